"""A plan decides before anything is built; the recorder of the other ranks takes the calls of the first one's."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ropelab import training
from ropelab.errors import Interrupted, NonFiniteLossError, RunError
from ropelab.model import GPT
from ropelab.runs import models
from ropelab.training import plan, plan_training, trainer
from ropelab.training.recorder import NullRecorder, RunRecorder
from ropelab.training.state import TrainState
from tests.lab import tiny


def log(patch: pytest.MonkeyPatch, owner: Any, name: str, calls: list[str]) -> list[str]:
    """Add a name to `calls` at every call of the function that has it."""
    original = getattr(owner, name)

    def logging(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        return original(*arguments, **named)

    patch.setattr(owner, name, logging)
    return calls


def test_planning_builds_no_model_and_writes_no_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Twice the same plan, without a model, a random number for one, or a folder."""
    monkeypatch.setattr(GPT, "__init__", lambda *_, **__: pytest.fail("a model was built"))
    config = tiny(home, tmp_path / "runs", "pos=rope", "scaling=linear", "scaling.factor=4")
    before = torch.get_rng_state()
    first, second = plan_training(config), plan_training(config)
    assert torch.equal(before, torch.get_rng_state())
    assert (first.digest, first.identity, first.run.path) == (second.digest, second.identity, second.run.path)
    assert first.encoding is not second.encoding
    assert not (tmp_path / "runs").exists()
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.micro = 7  # type: ignore[misc]


@pytest.mark.parametrize("together", [False, True])
def test_what_is_trained_is_built_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:  # fmt: skip
    """One encoding, which the model takes, and one model for a run; none to be looked at and thrown away."""
    calls = [log(monkeypatch, owner, name, [])
             for owner, name in ((GPT, "init_weights"), (plan, "build"), (models, "build"))]  # fmt: skip
    configs = [tiny(home, tmp_path, f"seed={seed}", "pos=learned", "train.steps=2") for seed in range(2)]
    if together:
        training.train_together(configs)
    else:
        training.train(configs[0])
    assert [len(some) for some in calls] == ([2, 2, 0] if together else [1, 1, 0])


def methods(of: type) -> dict[str, inspect.Signature]:
    return {name: inspect.signature(f) for name, f in inspect.getmembers(of, inspect.isfunction) if name[0] != "_"}


def test_the_recorder_of_other_ranks_has_the_same_methods() -> None:
    assert methods(RunRecorder) == methods(NullRecorder)
    assert len(methods(RunRecorder)) > 5


def end_by(how: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """What happens after step 4 of a training, or in its fifth."""
    reached = [0]
    if how == "on_nonfinite":
        nll = GPT.nll
        monkeypatch.setattr(
            GPT, "nll", lambda self, *x: nll(self, *x) * (float("inf") if self.training and reached[-1] == 4 else 1)
        )

    def after(step: int) -> None:
        reached.append(step)
        if step == 4 and how == "on_interrupt":
            os.kill(os.getpid(), signal.SIGTERM)
        if step == 4 and how == "on_crash":
            raise LookupError("a cable was pulled")

    return after


SETTINGS = ("pos=t5", "train.steps=6", "train.eval_every=2", "train.checkpoint_every=3", "train.keep=[0.5]")
ERRORS = {"on_interrupt": Interrupted, "on_crash": LookupError, "on_nonfinite": NonFiniteLossError}


@pytest.mark.parametrize("how", ["finish", *ERRORS])
def test_ranks_take_the_same_part_in_a_training(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:  # fmt: skip
    """A rank that does not write makes the same calls, gathers the same tensors, and leaves nothing on the disk.

    What ranks do together must not depend on who writes: a rank that gathered what others do not would wait forever.
    """

    def parts(recorder: type[RunRecorder | NullRecorder], runs_dir: Path, error: type[BaseException] | None) -> Any:
        """What a rank does, in its order."""
        done: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            if recorder is NullRecorder:
                patch.setattr(trainer, "RunRecorder", lambda plan, world: NullRecorder())
            for owner, names in ((recorder, methods(recorder)), (TrainState, ("weights", "moments", "validate"))):
                for name in names:
                    log(patch, owner, name, done)
            after = end_by(how, patch)

            def progress(description: str, step: int, total: int, **_: Any) -> None:
                if description == "train":
                    after(step)

            with contextlib.nullcontext() if error is None else pytest.raises(error):
                training.train(tiny(home, runs_dir, *SETTINGS), progress=progress)
        return done

    error = ERRORS.get(how)
    wrote = parts(RunRecorder, tmp_path / "first", error)
    silent = parts(NullRecorder, tmp_path / "other", error or RunError)  # there is no manifest to return
    assert wrote == silent
    assert (wrote[:2], wrote[-1]) == (["lock", "begin"], how)
    assert {"log", "keep", "save", "weights", "moments", "validate"} <= set(wrote)
    assert (tmp_path / "first").exists()
    assert not (tmp_path / "other").exists()
