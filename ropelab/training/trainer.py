"""From a configuration to a trained run, and from several to several at once."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch

from ropelab.config import Config, TrainConfig
from ropelab.distributed import SIGNALS, SINGLE, Ranks
from ropelab.errors import Interrupted, NonFiniteLossError, RankLostError
from ropelab.progress import Progress, silent
from ropelab.training.batched import check_stackable, stacked_steps
from ropelab.training.compiling import compile_blocks, compiles
from ropelab.training.loop import steps
from ropelab.training.session import Session


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collect the signals that stop a training in a list instead of dying of them; a second Ctrl-C is obeyed at once.

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


def train(config: Config, *, progress: Progress = silent, ranks: Ranks = SINGLE) -> dict[str, Any]:
    """Train the run that `config` describes: from its last checkpoint, or not at all when it is finished.

    Returns the `train` object of the JSON contract. Raises `ValueError` for a configuration that cannot be trained
    (before anything is written), `NonFiniteLossError`, and `Interrupted` after saving.

    With `ranks` all of them call it with one configuration and train the run together.
    """
    progress = progress if ranks.is_first else silent
    session = Session(config, progress, ranks)
    ranks.check_alike("run", session.digest)
    ranks.connect(session.device)
    if ranks.broadcast_object(session.is_done):
        return ranks.broadcast_object(lambda: session.result(skipped=True))
    with session.held(), repeatable(config.train), interrupts() as caught:
        with ranks.barrier_after():
            session.restore()
            if compiles(config.train, session.device):
                compile_blocks(session.model, parallel=session.parallel)
            session.begin()
        try:
            for done in steps(
                session.model, session.optimizer, session.batch_at, config.train, start=session.start,
                dtype=session.dtype, positions_at=session.positions_at, settle_at=session.settles,
                loss=session.loss, ranks=ranks,
            ):  # fmt: skip
                # whichever rank a signal came to, all stop at one step: where they have waited for the device anyway
                signals = ranks.signals(caught) if done.settled else ()
                saved = session.take(done, progress, signals)
                if signals and saved and not session.is_last(done.step):
                    raise Interrupted(signals[0], session.run.name, done.step)
        except NonFiniteLossError as error:
            session.broke(error)
            ranks.barrier()  # a launcher ends the others when one has ended: not before all is written
            raise
        except Interrupted:
            session.stopped()
            ranks.barrier()
            raise
        except BaseException as error:
            cause = ranks.cause(error)
            if isinstance(cause, RankLostError):  # nothing is wrong with the run
                session.stopped()
            else:
                session.crashed(cause)
            raise cause from None if cause is not error else error.__cause__
        session.finish()
    return ranks.broadcast_object(lambda: session.result(skipped=False))


def train_together(
    configs: Sequence[Config], *, progress: Progress = silent
) -> list[dict[str, Any] | NonFiniteLossError]:
    """`train` for runs of one shape and one recipe, their models stacked so that a step is made for all at once.

    Finished runs are left as they are, and runs that stand at different steps are trained apart. Returns the `train`
    object of each, or the error of a run that became non-finite, which does not touch the others. `ValueError`, before
    anything is written, for runs that cannot be stacked: `stacking.check_stackable` says what can.
    """
    sessions = [Session(config, progress) for config in configs]
    first = sessions[0]
    for session in sessions:
        if session.config.train != first.config.train or session.device != first.device:
            raise ValueError("runs of different train.* or device cannot be trained in one stack")
    if len({session.digest for session in sessions}) < len(sessions):
        raise ValueError("the same run is there twice; a stack trains each once")
    results: dict[int, dict[str, Any] | NonFiniteLossError] = {}
    skipped = {index for index, session in enumerate(sessions) if session.is_done()}
    rest = [index for index in range(len(sessions)) if index not in skipped]
    if rest:
        check_stackable([sessions[index].fresh_model() for index in rest], first.config.train.ctx)
    with ExitStack() as stack:
        for index in rest:
            sessions[index].run.make()
            stack.enter_context(sessions[index].run.locked())
        stack.enter_context(repeatable(first.config.train))
        caught = stack.enter_context(interrupts())
        for index in rest:
            sessions[index].restore()
        alike = sorted(rest, key=lambda index: (sessions[index].start, str(sessions[index].dtype)))
        for _, group in itertools.groupby(alike, key=lambda index: (sessions[index].start, sessions[index].dtype)):
            numbers = list(group)
            failed = _train_stack([sessions[index] for index in numbers], caught, progress)
            results.update((numbers[place], error) for place, error in failed.items())
    for index, session in enumerate(sessions):
        if index not in results:
            results[index] = session.result(skipped=index in skipped)
    return [results[index] for index in range(len(sessions))]


def _train_stack(
    sessions: Sequence[Session], caught: Sequence[int], progress: Progress
) -> dict[int, NonFiniteLossError]:
    """Train runs that stand at one step to their end; those that became non-finite, by their place."""
    first = sessions[0]
    for session in sessions:
        session.begin(stacked=len(sessions))
    places = [session.positions_at for session in sessions if session.positions_at is not None]
    failed: dict[int, NonFiniteLossError] = {}
    going = stacked_steps(
        [session.model for session in sessions], [session.optimizer for session in sessions],
        [session.batch_at for session in sessions], first.config.train, start=first.start, dtype=first.dtype,
        positions_at=places or None, settle_at=first.settles, compiled=compiles(first.config.train, first.device),
    )  # fmt: skip
    try:
        for entries in going:
            saved = []
            for place, (session, entry) in enumerate(zip(sessions, entries, strict=True)):
                if isinstance(entry, NonFiniteLossError):
                    if place not in failed:
                        failed[place] = entry
                        session.broke(entry)
                else:
                    saved.append(session.take(entry, progress, caught) and not session.is_last(entry.step))
            if caught and saved and all(saved):
                raise Interrupted(
                    caught[0],
                    ", ".join(session.run.name for session in sessions),
                    max(session.step for session in sessions),
                )
    except Interrupted:
        for place, session in enumerate(sessions):
            if place not in failed:
                session.stopped()
        raise
    except BaseException as error:
        for place, session in enumerate(sessions):
            if place not in failed:
                session.crashed(error)
        raise
    for place, session in enumerate(sessions):
        if place not in failed:
            session.finish()
    return failed
