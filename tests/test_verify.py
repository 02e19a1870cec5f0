"""`ropelab verify-resume`: that it proves what it says, and that it can tell what it was made to tell."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ropelab import config as configs
from ropelab import training
from ropelab.model import GPT
from ropelab.training import recorder, state, verify
from tests import lab
from tests.lab import changed, forked, one_line, ropelab

# what --steps says belongs to the command
TINY = tuple(item for item in lab.TINY if not item.startswith(("train.steps", "train.eval_every")))


@pytest.fixture(scope="module")
def places(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("verify")
    return f"data.path={home / 'corpus'}", f"cache_dir={home / 'cache'}", f"runs_dir={folder / 'runs'}"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A place for temporary folders that must be empty afterwards."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("ropelab-verify")] == []


class Killed(BaseException):
    """In this process a kill is an exception that nobody catches."""


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainings in this process instead of processes of their own: without four seconds of imports each."""

    def in_this_process(task: dict[str, Any], *_: Any) -> dict[str, Any]:
        told: dict[str, Any] = {}

        def kill(pid: int, signum: int) -> None:
            raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verify, "_emit", told.update)
            patch.setattr(verify.os, "kill", kill)
            patch.setattr(recorder.RunRecorder, "on_crash", lambda self, error: None)  # a dead process writes nothing
            try:
                verify._work(task)
                assert task["kill_at"] is None
            except Killed:
                assert told["done"] == task["kill_at"]
            finally:
                torch.use_deterministic_algorithms(False)
        return told

    monkeypatch.setattr(verify, "_in_a_process", in_this_process)


def verified(places: tuple[str, ...], *overrides: str, steps: int = 6, at: int | None = None) -> dict[str, Any]:
    resolved = configs.load(changed(TINY, *overrides, *places))
    return verify.verify_resume(resolved, steps=steps, at=at)


@pytest.mark.parametrize(("ranks", "dtype"), [(1, "bf16"), pytest.param(2, "fp32", marks=pytest.mark.slow)])
def test_the_command_with_real_processes_and_a_real_kill(places: tuple[str, ...], ranks: int, dtype: str) -> None:
    """One process, forked; and two ranks that torchrun starts, which are killed with it."""
    with forked(verify, verify.main) if ranks == 1 else contextlib.nullcontext():
        done = ropelab("verify-resume", "--steps", "4", "--at", "2", "--json", f"--ranks={ranks}",
                       *changed(TINY, *places, f"train.dtype={dtype}"))  # fmt: skip
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert (found["equal"], found["cause"], found["differences"]) == (True, None, [])
    assert (found["at"], found["killed_at"], found["steps_lost"]) == (2, 4, 2)
    assert (found["dtype"], found["world_size"]) == (dtype, ranks)
    assert found["parallel"] == (None if ranks == 1 else "ddp")
    assert all(part["equal"] for part in found["compared"].values())
    assert found["compared"]["optimizer"]["tensors"] == 3 * found["compared"]["weights"]["tensors"]
    assert found["compared"]["metrics"]["lines"] == 4
    assert not (Path(places[2].partition("=")[2])).exists()


@pytest.mark.usefixtures("here")
@pytest.mark.skipif(not os.environ.get("ROPELAB_COMPILE_TESTS"), reason="45 s of compiling: ROPELAB_COMPILE_TESTS=1")
def test_compiled_blocks_resume_exactly(places: tuple[str, ...]) -> None:
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("there is no C compiler")
    try:
        found = verified(places, "train.compile=true", steps=4)
    finally:
        torch._dynamo.reset()
    assert found["equal"]
    assert found["compiled"]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("steps", "at", "killed_at"), [(2, 1, 2), (6, None, 5), (6, 5, 6)])
def test_every_step_can_be_resumed(places: tuple[str, ...], steps: int, at: int | None, killed_at: int) -> None:
    found = verified(places, "pos=learned", steps=steps, at=at)
    assert found["equal"]
    assert (found["at"], found["killed_at"]) == (at or steps // 2, killed_at)
    assert found["steps_lost"] == killed_at - found["at"]


@pytest.mark.usefixtures("here")
def test_the_settings_of_the_user_are_those_that_are_verified(places: tuple[str, ...]) -> None:
    """A warm-up, validation and kept weights that fit a long training only."""
    found = verified(places, "train.steps=5000", "train.warmup_steps=900", "train.keep=[0.001,0.5]", "pos=alibi",
                     "track.wandb=online", "train.eval_every=1000")  # fmt: skip
    assert found["equal"]
    assert found["compared"]["best"]["best_val_nll"] > 0


@pytest.mark.usefixtures("here")
def test_a_fault_of_resuming_is_told_from_the_kernels(places: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Second moments that are lost: the straight training is the same each time."""
    load = training.load_optimizer_tensors

    def forgetful(model: GPT, optimizer: Any, tensors: dict[str, torch.Tensor]) -> None:
        load(model, optimizer, {name: t * 0 if name.endswith("exp_avg_sq") else t for name, t in tensors.items()})

    monkeypatch.setattr(state, "load_optimizer_tensors", forgetful)
    found = verified(places)
    assert (found["equal"], found["cause"], found["operations"]) == (False, "resuming", [])
    first = found["differences"][0]
    assert (first["what"], first["line"]) == ("metrics", 4)
    assert first["straight"]["loss"] == first["resumed"]["loss"]  # the weights are still those of step 3
    assert first["straight"]["val_nll"] != first["resumed"]["val_nll"]
    parts = {difference["what"] for difference in found["differences"]}
    assert {"model", "optimizer"} <= parts
    assert not found["compared"]["weights"]["equal"]


@pytest.mark.usefixtures("here")
def test_a_kernel_that_is_not_deterministic_is_named(
    places: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An operation that torch says has no deterministic kernel, and a sum that is another one each time."""
    nll = GPT.nll
    noise = torch.Generator()
    noise.seed()

    def noisy(self: GPT, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
        return nll(self, hidden, targets) * (1 + 1e-4 * float(torch.rand((), generator=noise)))

    monkeypatch.setattr(GPT, "nll", noisy)
    said = ropelab("verify-resume", "--steps", "4", *TINY, *places)
    assert said.status == 1
    one_line(said, "not by resuming", "put_", "also with torch's deterministic kernels")
    assert "metrics: first at line 1: loss" in said.out
    assert "weights" in said.out


@pytest.mark.usefixtures("here")
def test_a_training_that_begins_again_instead_of_going_on_is_no_proof(
    places: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would end in equal numbers, too."""
    monkeypatch.setattr("ropelab.training.resume.latest_checkpoint", lambda *_: None)
    with pytest.raises(RuntimeError, match="went on at step 1, not at step 4"):
        verified(places)


def test_mistakes_are_said_before_anything_is_trained(places: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_in_a_process", lambda *_: pytest.fail("something was trained"))
    for options, words in (
        (("--steps", "1"), "--steps must be at least 2"),
        (("--steps", "4", "--at", "4"), "--at must be a step before the last, 1 to 3"),
        (("--at", "0"), "1 to 19"),
        (("--ranks", "3"), "cannot be shared by 3 ranks"),
        (("--ranks", "0"), "--ranks must be at least 1"),
        (("pos=rope", "scaling=linear"), "changes nothing"),
        (("parent=nothing",), "there is no run 'nothing'"),
    ):
        said = ropelab("verify-resume", *options, *TINY, *places)
        assert said.status == 2
        one_line(said, words)
    monkeypatch.setenv("CXX", "no-such-compiler")
    said = ropelab("verify-resume", *TINY, *places, "train.compile=true")
    assert said.status == 2
    one_line(said, "needs a C compiler", "no-such-compiler", "train.compile=false")


def test_a_training_that_dies_is_said_with_its_words(places: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.sys, "executable", shutil.which("false"))
    said = ropelab("verify-resume", "--steps", "2", *TINY, *places)
    assert said.status == 1
    one_line(said, "the straight training ended with status 1, not 0")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_proof_leaves_nothing_behind(
    places: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, signum: int
) -> None:
    """The folder is looked for after the test."""

    def interrupting(task: dict[str, Any], path: Path, *_: Any) -> dict[str, Any]:
        assert path.parent.is_dir()
        os.kill(os.getpid(), signum)
        time.sleep(5)
        raise AssertionError("the signal did not come")

    monkeypatch.setattr(verify, "_in_a_process", interrupting)
    said = ropelab("verify-resume", "--steps", "2", *TINY, *places)
    assert said.status == 130
    one_line(said, "interrupted")
