"""Several runs in one batched step: the runs that each alone would be, whatever becomes of the others."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ropelab import errors, training
from ropelab.config import Config
from ropelab.errors import NonFiniteLossError
from ropelab.model import GPT
from ropelab.runs import RunDir, all_runs
from tests.test_experiment import settings


def several(folder: Path, *more: str, methods: tuple[str, ...] = ("rope", "alibi", "learned")) -> list[Config]:
    return [
        settings(folder, f"pos={pos}", "train.dtype=fp32", "train.steps=6", f"seed={seed}", *more)
        for seed, pos in enumerate(methods)
    ]


def test_runs_trained_together_are_those_trained_alone(folder: Path) -> None:
    """Other methods, seeds and batches in one step: the same runs by name, with the same losses; none is made twice."""
    together = training.train_together(several(folder, f"runs_dir={folder / 'together'}"))
    for config_, one in zip(several(folder, f"runs_dir={folder / 'alone'}"), together, strict=True):
        assert isinstance(one, dict)
        alone = training.train(config_)
        assert one["run"] == alone["run"]
        mine, its = RunDir(Path(one["run_dir"])), RunDir(Path(alone["run_dir"]))
        losses = [line["loss"] for line in its.metrics()]
        assert [line["loss"] for line in mine.metrics()] == pytest.approx(losses, rel=1e-5)
        assert one["val_nll"] == pytest.approx(alone["val_nll"], rel=1e-5)
        assert (mine.manifest()["stacked"], its.manifest()["stacked"]) == (3, 1)
        assert mine.manifest()["digest"] == its.manifest()["digest"]
    again = training.train_together(several(folder, f"runs_dir={folder / 'together'}"))
    assert [one["skipped"] for one in again if isinstance(one, dict)] == [True] * 3


def test_a_stack_is_stopped_and_each_run_goes_on_alone(folder: Path) -> None:
    shape = (f"runs_dir={folder / 'stopped'}", "train.checkpoint_every=2")

    def stop(description: str, done: int, total: int, **facts: Any) -> None:
        if description == "train" and done == 3 and "rope" in facts["run"]:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(errors.Interrupted, match="saved at step 3"):
        training.train_together(several(folder, *shape), progress=stop)
    whole = training.train_together(several(folder, f"runs_dir={folder / 'whole'}"))
    for config_, one in zip(several(folder, *shape), whole, strict=True):
        assert isinstance(one, dict)
        done = training.train(config_)
        assert done["val_nll"] == pytest.approx(one["val_nll"], rel=1e-5)
        lines = RunDir(Path(done["run_dir"])).metrics()
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_runs_at_different_steps_go_on_in_stacks_of_their_own(folder: Path) -> None:
    shape = (f"runs_dir={folder / 'uneven'}", "train.checkpoint_every=2")

    def stop(description: str, done: int, total: int, **facts: Any) -> None:
        if description == "train" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(several(folder, *shape)[0], progress=stop)
    stacked = []
    for one in training.train_together(several(folder, *shape)):
        assert isinstance(one, dict)
        run = RunDir(Path(one["run_dir"]))
        assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4, 5, 6]
        stacked.append(run.manifest()["stacked"])
    assert stacked == [1, 2, 2]


def test_a_run_that_breaks_leaves_its_stack(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are inf from the start; the others are as without it."""
    healthy = training.train_together(several(folder, f"runs_dir={folder / 'healthy'}"))
    init = GPT.init_weights

    def poisoned(self: GPT, seed: int) -> None:
        init(self, seed)
        if seed == 1:
            with torch.no_grad():
                self.norm_out.weight[0] = math.inf

    monkeypatch.setattr(GPT, "init_weights", poisoned)
    first, broken, third = training.train_together(several(folder, f"runs_dir={folder / 'broken'}"))
    assert isinstance(broken, NonFiniteLossError)
    assert broken.step == 1
    for one, other in zip((first, third), (healthy[0], healthy[2]), strict=True):
        assert isinstance(one, dict)
        assert isinstance(other, dict)
        assert one["val_nll"] == other["val_nll"]
    states = {m["config"]["seed"]: m["status"] for m in (r.manifest() for r in all_runs(folder / "broken"))}
    assert states == {0: "done", 1: "failed", 2: "done"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("train.lr=1e-3",), "different train"),
        (("model.d_model=64",), r"different model\.d_model"),
        (("pos=cable",), "reads the text"),
        (("pos=rope", "seed=0"), "the same run is there twice"),
    ],
)
def test_what_cannot_be_stacked_is_refused_before_anything_is_written(
    folder: Path, changes: tuple[str, ...], says: str
) -> None:
    where = f"runs_dir={folder / 'refused'}"
    odd = settings(folder, "train.dtype=fp32", "train.steps=6", where, *changes)
    with pytest.raises(ValueError, match=says):
        training.train_together([*several(folder, where, methods=("rope",)), odd])
    assert not (folder / "refused").exists()
