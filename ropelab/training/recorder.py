"""What a training writes: manifest, metrics, checkpoints and wandb; on ranks other than the first, nothing."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ropelab import config as configs
from ropelab import data, runs
from ropelab.devices import DTYPE_NAMES, device_name, environment
from ropelab.errors import NonFiniteLossError, RunError
from ropelab.evaluation import lacking_for
from ropelab.progress import tell
from ropelab.runs import run_tokenizer
from ropelab.training.plan import TrainPlan
from ropelab.training.resume import Stored
from ropelab.training.state import TrainState
from ropelab.training.tracking import Tracker

_log = logging.getLogger(__name__)


class RunRecorder:
    """The folder of a run while it is trained, on the first rank. It waits for no other rank: see `NullRecorder`."""

    def __init__(self, plan: TrainPlan, world: int = 1) -> None:
        self.plan, self.world = plan, world
        self._summary: dict[str, Any] | None = None
        self._tracker: Tracker

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Make the folder and hold it for this training alone. `RunError` where another process trains the run."""
        self.plan.run.make()
        with self.plan.run.locked():
            yield

    def begin(self, state: TrainState, stored: Stored, *, stacked: int = 1) -> None:
        """Mark the run as running, `stacked` models a step, and drop what it holds of later steps."""
        plan, run, corpus = self.plan, self.plan.run, self.plan.corpus
        config, parent = configs.to_dict(plan.config), _parent_entry(plan)
        if (lacks := lacking_for(plan.config, corpus.test)) is not None:
            _warn_once(lacks)
        self._summary = stored.state.get("summary")
        corpus.tokenizer.save(run.tokenizer_path)
        run.update_manifest(
            run=run.name, digest=plan.digest, identity=plan.identity, config=config,
            status="running", error=None, failed_step=None, train_ctx=plan.config.train.ctx,
            original_ctx=plan.original_ctx, first_step=plan.windows.first_step, parent=parent,
            corpus={
                "name": corpus.name, "digest": corpus.digest, "joined_share": plan.windows.batches.joined_share,
                **corpus.details,
            },
            tokenizer={
                "name": corpus.tokenizer.name, "digest": corpus.tokenizer.digest, "n_vocab": corpus.tokenizer.n_vocab,
            },
            params=state.model.n_parameters(), dtype=DTYPE_NAMES[state.dtype], device=device_name(plan.device),
            device_type=plan.device.type, matmul_precision=state.precision, stacked=stacked,
            attention_backend=state.attention_kernel(plan), compiled=plan.compiles, environment=environment(),
            world_size=self.world, parallel=state.parallel,
            spread=_world_history(stored.manifest, state.start, self.world, state.parallel),
            started=stored.manifest.get("started", time.time()),
        )  # fmt: skip
        run.rewind(state.start)
        self._tracker = Tracker(
            plan.config.track, name=run.name, run_id=plan.digest[:16], folder=run.path, facts=config
        )  # fmt: skip

    def log(self, line: Mapping[str, Any]) -> None:
        """Add the metrics of a step."""
        self.plan.run.append_metrics(line)
        self._tracker.log(line)

    def keep(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Write the weights at one of the plan's steps to keep."""
        self.plan.run.save_kept(self.plan.keep[step], step, weights)

    def save(self, state: TrainState, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Write the checkpoint of the state's step, from which training can resume."""
        last = self.plan.is_last(state.step)
        facts: dict[str, Any] = {
            "best_val_nll": state.best if math.isfinite(state.best) else None, "digest": self.plan.digest,
            "dtype": DTYPE_NAMES[state.dtype], "matmul_precision": state.precision, "threads": torch.get_num_threads(),
        }  # fmt: skip
        if last:  # a manifest that is lost after this can be made again
            self._summary = facts["summary"] = _summary(self.plan, state.best)
        self.plan.run.save_step(state.step, {"model": weights, "optimizer": moments}, facts, last=last)

    def finish(self, state: TrainState) -> None:
        """The last step was taken and saved."""
        self.plan.run.drop_earlier(self.plan.config.train.steps)
        summary = self._summary or _summary(self.plan, state.best)
        self.plan.run.update_manifest(status="done", finished=time.time(), **summary)
        self._tracker.finish()

    def on_nonfinite(self, error: NonFiniteLossError) -> None:
        """The run has failed; the weights before the bad step were saved."""
        self.plan.run.update_manifest(status="failed", error=str(error), failed_step=error.step)
        self._tracker.finish(failed=True)

    def on_interrupt(self) -> None:
        """Nothing is wrong with the run: the same command resumes it."""
        self._tracker.finish(failed=True)

    def on_crash(self, error: BaseException) -> None:
        """The run has failed by something other than its numbers."""
        with contextlib.suppress(OSError):  # of a full disk: then the run shows as interrupted
            self.plan.run.update_manifest(status="failed", error=f"{type(error).__name__}: {error}")
        self._tracker.finish(failed=True)


class NullRecorder:
    """The recorder of ranks other than the first: takes the calls of `RunRecorder` and writes nothing.

    What ranks do together, such as gathering a sharded tensor, is done by the caller on all of them.
    """

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        yield

    def begin(self, state: TrainState, stored: Stored, *, stacked: int = 1) -> None:
        pass

    def log(self, line: Mapping[str, Any]) -> None:
        pass

    def keep(self, step: int, weights: Mapping[str, Tensor]) -> None:
        pass

    def save(self, state: TrainState, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        pass

    def finish(self, state: TrainState) -> None:
        pass

    def on_nonfinite(self, error: NonFiniteLossError) -> None:
        pass

    def on_interrupt(self) -> None:
        pass

    def on_crash(self, error: BaseException) -> None:
        pass


def is_trained(plan: TrainPlan) -> bool:
    """Is the run finished? Its tokeniser's file, should that be damaged, is written again.

    Checkpoints before its last, which a kill may have left, are removed where they can be.
    """
    run = plan.run
    if not run.is_done():
        return False
    run.tidy()
    try:
        run_tokenizer(run)
    except RunError as error:
        tell(f"{str(error).partition('; ')[0]}; it is written again")
        with run.locked():
            plan.corpus.tokenizer.save(run.tokenizer_path)
    return True


def train_result(plan: TrainPlan, *, skipped: bool) -> dict[str, Any]:
    """The `train` object of the JSON contract, of a finished run."""
    manifest = plan.run.manifest()
    fields = ("status", "step", "train_loss", "val_nll", "params", "tokens_per_s", "device", "dtype")
    return {
        "run": plan.run.name, "run_dir": str(plan.run.path), "skipped": skipped,
        **{key: manifest[key] for key in fields},
    }  # fmt: skip


@functools.cache
def _warn_once(message: str) -> None:
    """A line on stderr, once a process: the points of a sweep mostly have one text."""
    _log.warning("%s", message)


def _parent_entry(plan: TrainPlan) -> dict[str, Any] | None:
    """The parent as a manifest has it."""
    if plan.parent is None:
        return None
    manifest = plan.parent.manifest
    return {"run": plan.parent.name, "digest": manifest["digest"], "recipe": runs.recipe(manifest)}


def _world_history(manifest: Mapping[str, Any], start: int, world: int, parallel: str | None) -> list[dict[str, Any]]:
    """The ranks that trained the run, and from which step on; with more than one entry resuming was not bit-exact.

    [{"step", "world_size", "parallel"}]: in one process (1, null), which is also what older runs had.
    """
    plain = {"step": 0, "world_size": 1, "parallel": None}
    before = manifest.get("spread", [plain] if manifest else [])
    earlier = [entry for entry in before if entry["step"] < start]
    now = {"step": start, "world_size": world, "parallel": parallel}
    same = earlier and {**earlier[-1], "step": start} == now
    return earlier if same else [*earlier, now]


def _summary(plan: TrainPlan, best: float) -> dict[str, Any]:
    """What a manifest holds of a finished training; train_loss is the mean over the last 5% of the steps."""
    lines, steps = plan.run.metrics(), plan.config.train.steps
    val_nll = next(line["val_nll"] for line in reversed(lines) if "val_nll" in line)
    return {
        "step": steps,
        "train_loss": float(np.mean([line["loss"] for line in lines[-max(1, steps // 20) :]])),
        "val_nll": val_nll,
        "val_bits_per_byte": val_nll / math.log(2) / _bytes_per_target(plan.windows.validation, plan.corpus.tokenizer),
        "best_val_nll": best,
        "tokens_per_s": lines[-1]["tokens_per_s"],
    }


def _bytes_per_target(windows: NDArray[np.int64], tokenizer: data.Tokenizer) -> float:
    """Mean UTF-8 bytes of the scored targets of windows (N, ctx + 1)."""
    targets = windows[:, 1:].reshape(-1)  # (N x ctx,)
    return float(tokenizer.byte_lengths[targets[targets != tokenizer.separator]].mean())
