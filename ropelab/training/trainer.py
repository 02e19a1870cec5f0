"""From a configuration to a trained run, and from several to several at once."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch

from ropelab.config import Config, TrainConfig
from ropelab.distributed import SIGNALS, SINGLE, Ranks
from ropelab.errors import Interrupted, NonFiniteLossError, RankLostError
from ropelab.model import GPT
from ropelab.progress import Progress, silent
from ropelab.training.batched import check_stackable, stacked_steps
from ropelab.training.compiling import compile_blocks
from ropelab.training.loop import Step, steps
from ropelab.training.plan import TrainPlan, plan_training
from ropelab.training.recorder import NullRecorder, RunRecorder, is_trained, train_result
from ropelab.training.resume import Stored, read_stored
from ropelab.training.state import TrainState, new_model, restore


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collect the signals that stop a training in a list instead of dying of them; a second Ctrl-C ends it at once.

    SIGINT, SIGTERM, and SIGUSR2, by which Slurm can say that a job's time is nearly over. It may send more than one.
    """
    caught: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        if caught and signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        caught.append(signum)

    before = {signum: signal.signal(signum, handle) for signum in SIGNALS}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def repeatable(config: TrainConfig) -> Iterator[None]:
    """With train.deterministic torch takes kernels that give the same bits each time, and refuses what has none."""
    if not config.deterministic:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@dataclasses.dataclass(frozen=True)
class RunTraining:
    """A run in training: its plan, its state and its record. All ranks call the methods, at the same steps."""

    plan: TrainPlan
    state: TrainState
    stored: Stored  # what the training resumed from
    recorder: RunRecorder | NullRecorder
    ranks: Ranks = SINGLE

    @classmethod
    def restored(
        cls, plan: TrainPlan, model: GPT, recorder: RunRecorder | NullRecorder, ranks: Ranks = SINGLE
    ) -> RunTraining:
        """From the last checkpoint that is intact and this run's, else from the start. The recorder has the lock."""
        stored = read_stored(plan.run, model, plan.digest, ranks)
        return cls(plan, restore(plan, model, stored, ranks), stored, recorder, ranks)

    def begin(self, *, stacked: int = 1) -> None:
        """Before the first step, `stacked` models of which are trained at once."""
        self.recorder.begin(self.state, self.stored, stacked=stacked)
        self.state.begin()

    def on_step(self, done: Step, progress: Progress, signals: Sequence[int]) -> bool:
        """Record a step: its metrics, and validation loss, kept weights and checkpoint where they are due.

        A signal makes a checkpoint due. Returns whether one was written.
        """
        plan, state, train = self.plan, self.state, self.plan.config.train
        step = state.step = done.step
        seen = (step - state.start) * train.batch_size * train.ctx
        speed = seen / (time.perf_counter() - state.began)
        line: dict[str, Any] = {
            "step": step, "loss": done.loss, "lr": done.lr, "grad_norm": done.grad_norm,
            "tokens_per_s": round(speed, 1),
        }  # fmt: skip
        if done.synced and (plan.is_last(step) or step % train.eval_every == 0):
            line["val_nll"] = state.validate(plan, self.ranks)
        self.recorder.log(line)
        progress("train", step, train.steps, loss=done.loss, tokens_per_s=speed, run=plan.run.name)
        if step in plan.keep:
            self.recorder.keep(step, state.weights())
        due = done.synced and (plan.is_last(step) or bool(signals) or step % train.checkpoint_every == 0)
        if due:
            self.save()
        return due

    def save(self) -> None:
        """A checkpoint of the current step."""
        self.recorder.save(self.state, self.state.weights(), self.state.moments())

    def on_nonfinite(self, error: NonFiniteLossError) -> None:
        """Keep the weights before the bad step; the run has failed."""
        if self.state.step > self.state.start:
            self.save()
        self.recorder.on_nonfinite(error)


def train(config: Config, *, progress: Progress = silent, ranks: Ranks = SINGLE) -> dict[str, Any]:
    """Train the run that `config` describes: from its last checkpoint, or not at all when it is finished.

    Returns the `train` object of the JSON contract. Raises `ValueError` for a configuration that cannot be trained
    (before anything is written), `NonFiniteLossError`, and `Interrupted` after saving.

    With `ranks` all of them call it with one configuration and train the run together.
    """
    progress = progress if ranks.is_first else silent
    plan = plan_training(config, progress, ranks)
    ranks.check_alike("run", plan.digest)
    ranks.connect(plan.device)
    if ranks.broadcast_object(lambda: is_trained(plan)):
        return ranks.broadcast_object(lambda: train_result(plan, skipped=True))
    recorder = RunRecorder(plan, ranks.world) if ranks.is_first else NullRecorder()
    with recorder.lock(), repeatable(config.train), interrupts() as caught:
        with ranks.barrier_after():
            run = RunTraining.restored(plan, new_model(plan), recorder, ranks)
            if plan.compiles:
                compile_blocks(run.state.model, parallel=run.state.parallel)
            run.begin()
        try:
            for done in steps(
                run.state.model, run.state.optimizer, plan.windows.batch_at, config.train, start=run.state.start,
                dtype=run.state.dtype, positions_at=plan.windows.positions_at, sync_at=plan.sync_at,
                loss=run.state.loss, ranks=ranks,
            ):  # fmt: skip
                # whichever rank a signal came to, all stop at one step: where they have waited for the device anyway
                signals = ranks.signals(caught) if done.synced else ()
                saved = run.on_step(done, progress, signals)
                if signals and saved and not plan.is_last(done.step):
                    raise Interrupted(signals[0], plan.run.name, done.step)
        except NonFiniteLossError as error:
            run.on_nonfinite(error)
            ranks.barrier()  # a launcher ends the others when one has ended: not before all is written
            raise
        except Interrupted:
            recorder.on_interrupt()
            ranks.barrier()
            raise
        except BaseException as error:
            cause = ranks.cause(error)
            if isinstance(cause, RankLostError):  # nothing is wrong with the run
                recorder.on_interrupt()
            else:
                recorder.on_crash(cause)
            raise cause from None if cause is not error else error.__cause__
        recorder.finish(run.state)
    return ranks.broadcast_object(lambda: train_result(plan, skipped=False))


def train_together(
    configs: Sequence[Config], *, progress: Progress = silent
) -> list[dict[str, Any] | NonFiniteLossError]:
    """`train` for runs of one shape and one recipe, their models stacked so that a step is made for all at once.

    Finished runs are left as they are, and runs that stand at different steps are trained apart. Returns the `train`
    object of each, or the error of a run that became non-finite, which does not touch the others. `ValueError`, before
    anything is written, for runs that cannot be stacked: see `batched.check_stackable`.
    """
    plans = [plan_training(config, progress) for config in configs]
    first = plans[0]
    for plan in plans:
        if plan.config.train != first.config.train or plan.device != first.device:
            raise ValueError("runs of different train.* or device cannot be trained in one stack")
    if len({plan.digest for plan in plans}) < len(plans):
        raise ValueError("the same run is there twice; a stack trains each once")
    results: dict[int, dict[str, Any] | NonFiniteLossError] = {}
    models = {index: new_model(plan) for index, plan in enumerate(plans) if not is_trained(plan)}
    if models:
        check_stackable(list(models.values()), first.config.train.ctx)
    with ExitStack() as stack:
        recorders = {index: RunRecorder(plans[index]) for index in models}
        for recorder in recorders.values():
            stack.enter_context(recorder.lock())
        stack.enter_context(repeatable(first.config.train))
        caught = stack.enter_context(interrupts())
        runs = {index: RunTraining.restored(plans[index], models[index], recorders[index]) for index in models}

        def stands(index: int) -> tuple[int, str]:
            return runs[index].state.start, str(runs[index].state.dtype)

        for _, group in itertools.groupby(sorted(runs, key=stands), key=stands):
            numbers = list(group)
            failed = _train_stack([runs[index] for index in numbers], caught, progress)
            results.update((numbers[place], error) for place, error in failed.items())
    return [
        results[index] if index in results else train_result(plan, skipped=index not in models)
        for index, plan in enumerate(plans)
    ]


def _train_stack(
    runs: Sequence[RunTraining], caught: Sequence[int], progress: Progress
) -> dict[int, NonFiniteLossError]:
    """Train runs that stand at one step to their end; those that became non-finite, by their place."""
    plan, start = runs[0].plan, runs[0].state.start
    for run in runs:
        run.begin(stacked=len(runs))
    positions = [run.plan.windows.positions_at for run in runs]
    failed: dict[int, NonFiniteLossError] = {}
    stepping = stacked_steps(
        [run.state.model for run in runs], [run.state.optimizer for run in runs],
        [run.plan.windows.batch_at for run in runs], plan.config.train, start=start, dtype=runs[0].state.dtype,
        positions_at=[at for at in positions if at is not None] or None, sync_at=plan.sync_at,
        compiled=plan.compiles,
    )  # fmt: skip
    try:
        for entries in stepping:
            saved = []
            for place, (run, entry) in enumerate(zip(runs, entries, strict=True)):
                if isinstance(entry, NonFiniteLossError):
                    if place not in failed:
                        failed[place] = entry
                        run.on_nonfinite(entry)
                else:
                    saved.append(run.on_step(entry, progress, caught) and not run.plan.is_last(entry.step))
            if caught and saved and all(saved):
                names = ", ".join(run.plan.run.name for run in runs)
                raise Interrupted(caught[0], names, max(run.state.step for run in runs))
    except BaseException as error:
        for place, run in enumerate(runs):
            if place not in failed and isinstance(error, Interrupted):
                run.recorder.on_interrupt()
            elif place not in failed:
                run.recorder.on_crash(error)
        raise
    for place, run in enumerate(runs):
        if place not in failed:
            run.recorder.finish(run.state)
    return failed
