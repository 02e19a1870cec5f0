"""Faults by real means: damaged files, full disks, read-only places, processes in each other's way, strangers' runs.

After each of them: no traceback, one line that names the file and the fix, the right exit status, nothing finished
lost, and never another number.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from ropelab import cli, files, report, runs, training
from ropelab.analysis import diagnose_run
from ropelab.errors import RunError
from ropelab.evaluation import evaluations
from ropelab.runs import RunDir
from ropelab.training import compile_blocks
from tests.lab import ASKED, BPE, ROOT, SIX, Lab, Process, Said, made_lab, one_line, ropelab
from tests.test_runs import content, lines_without_speed, steps_saved

SEARCH = ("search.population=4", "search.iterations=1", "search.mutations=1", "search.crossovers=1",
          "search.parents=2", "search.samples=2", "search.start_tokens=[0]")  # fmt: skip


class Whole(NamedTuple):
    """A lab with a run that was trained and evaluated, and what it says."""

    lab: Lab
    rows: list[dict[str, Any]]
    tensors: dict[str, bytes]
    metrics: list[dict[str, Any]]
    val_nll: float


@pytest.fixture(scope="session")
def whole(shared: Path) -> Whole:
    lab = made_lab(shared)
    rows = json.loads(lab.evaluate().out)["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok"]
    return Whole(lab, rows, content(lab.run), lines_without_speed(lab.run), lab.run.manifest()["val_nll"])


def assert_as_before(lab: Lab, whole: Whole) -> None:
    """The run and its evaluation are those that were there before the fault."""
    run = lab.run
    assert run.status() == "done"
    assert content(run) == whole.tensors
    assert run.manifest()["val_nll"] == whole.val_nll
    evaluated = lab.evaluate()
    assert evaluated.status == 0, evaluated.err
    assert json.loads(evaluated.out)["rows"] == whole.rows


# --- damaged files --------------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path) -> None:
    """One bit, inside a number of a JSON file; the time of the file stays, as when a disk rots."""
    data, state = bytearray(path.read_bytes()), path.stat()
    digits = [at for at, byte in enumerate(data) if chr(byte).isdigit()] if path.suffix == ".json" else []
    data[random.Random(7).choice(digits) if digits else len(data) * 2 // 3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def missing(path: Path) -> None:
    path.unlink()


DAMAGES = (truncated, flipped, missing)
OF_RUN = (
    "manifest.json", "metrics.jsonl", "tokenizer.json", "checkpoints/*/state.json", "checkpoints/*/model.safetensors",
    "checkpoints/*/optimizer.safetensors", "results/*.json", "results/*.safetensors",
)  # fmt: skip
OF_CACHE = (
    "tokens/*/index.json", "tokens/*/train.bin", "tokens/*/test.bin", "tokens/*/shingles.bin", "sources/*.json",
    "tokenizers/*/tokenizer.json",
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", OF_RUN)
def test_a_damaged_file_of_a_run_is_said_and_gives_no_other_number(
    whole: Whole, tmp_path: Path, pattern: str, damage: Callable[[Path], None]
) -> None:
    """Every command that reads it either refuses it in a line, or gives the number that is true; training mends it."""
    lab = whole.lab.copy(tmp_path / "lab")
    run = lab.run
    (path,) = run.path.glob(pattern)
    damage(path)
    gone = damage is missing and pattern == "manifest.json"  # then it is no run

    evaluated = lab.evaluate()
    if evaluated.status == 0:
        assert json.loads(evaluated.out)["rows"] == whole.rows
        if pattern.startswith("results"):
            repaired = damage is missing and pattern.endswith(".json")  # nobody knows that there was one
            assert repaired or path.name in evaluated.err
    else:
        assert evaluated.status == 2
        one_line(evaluated, "there is no run" if gone else path.parent.name if "checkpoints" in pattern else path.name)
    unread = ["metrics.jsonl", *(["checkpoints/*/optimizer.safetensors"] if damage is not missing else [])]
    assert (evaluated.status == 0) == (pattern in (*unread, "results/*.json", "results/*.safetensors"))

    damage(path) if pattern.startswith("results") and damage is not missing else None  # it was made again
    for said in (lab.report("rope"), ropelab("show", "rope", *lab.places(), "--json")):
        if said.status == 0:
            rows = json.loads((lab.root / "report" / "results.json").read_text())["evals"][0]["rows"]
            assert rows == whole.rows
        else:
            assert said.status == 2
            one_line(said, "there is no run" if gone else path.name)
    listed = json.loads(ropelab("runs", "--json", *lab.places()).out)
    assert [row["status"] for row in listed] == ([] if gone else ["damaged" if "manifest" in pattern else "done"])

    trained = lab.train("--json")
    assert trained.status == 0, trained.err
    if pattern == "results/*.json" and damage is not missing:
        path.unlink()  # as the line said
    assert_as_before(lab, whole)
    if pattern != "metrics.jsonl":
        assert lines_without_speed(run) == whole.metrics


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", OF_CACHE)
def test_a_damaged_file_of_the_cache_is_made_again(
    whole: Whole, tmp_path: Path, pattern: str, damage: Callable[[Path], None]
) -> None:
    lab = whole.lab.copy(tmp_path / "lab")
    (path,) = lab.cache.glob(pattern)
    before = {each.name: each.read_bytes() for each in path.parent.glob("*") if each.name != "index.json"}
    damage(path)
    shutil.rmtree(lab.run.results)
    assert_as_before(lab, whole)
    again = lab.train("--json")
    assert (again.status, json.loads(again.out)["skipped"]) == (0, True)
    assert {each.name: each.read_bytes() for each in path.parent.glob("*") if each.name != "index.json"} == before


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", ["manifest.json", "metrics.jsonl", "tokenizer.json"])
def test_an_unfinished_run_goes_on_in_spite_of_a_damaged_file(
    whole: Whole, tmp_path: Path, pattern: str, damage: Callable[[Path], None]
) -> None:
    """Its weights are not trained again; of metrics that are damaged no number is used, and it is said."""
    lab = Lab(tmp_path / "lab", whole.lab.text)
    stopped_at(lab, 5)
    run = lab.run
    assert steps_saved(run) == ["step-00000002", "step-00000004"]
    damage(run.path / pattern)
    done = lab.train("--json")
    assert done.status == 0, done.err
    assert content(run) == whole.tensors
    assert run.manifest()["val_nll"] == whole.val_nll
    if pattern == "metrics.jsonl" and damage is missing:
        assert "metrics.jsonl is truncated, altered or missing; its lines up to step 4 are lost" in done.err
        assert lines_without_speed(run) == whole.metrics[4:]
        return
    assert lines_without_speed(run) == whole.metrics
    if pattern == "metrics.jsonl":
        assert "goes on from step-00000002, up to which it is whole" in done.err
    else:
        assert ("manifest.json" in done.err) == (pattern == "manifest.json" and damage is not missing)


def stopped_at(lab: Lab, step: int) -> None:
    """Train to a step and then fail, as by a pulled cable: nothing is saved at that moment."""

    train = training.train

    def stopping(config: Any, *, progress: Any, **more: Any) -> Any:
        def telling(description: str, done: int, total: int, **facts: Any) -> None:
            if description == "train" and done == step:
                raise OSError(5, "a cable was pulled")

        return train(config, progress=telling, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", stopping)
        assert lab.train().status == 1


def test_a_run_goes_on_with_the_threads_that_it_began_with(tmp_path: Path, whole: Whole) -> None:
    """Sums over other numbers of threads are rounded otherwise."""
    lab = Lab(tmp_path / "lab", whole.lab.text)
    torch.set_num_threads(2)
    stopped_at(lab, 5)
    seen = []

    def counting(*_: Any, **__: Any) -> Iterator[Any]:
        seen.append(torch.get_num_threads())
        raise OSError(5, "a cable was pulled")

    for gone in (False, True):  # as the manifest says, and without one the checkpoint
        torch.set_num_threads(1)
        if gone:
            lab.run.manifest_path.unlink()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules["ropelab.training.trainer"], "steps", counting)
            assert lab.train().status == 1
    assert seen == [2, 2]
    assert lab.run.manifest()["environment"]["threads"] == 2


def test_scores_of_a_search_that_are_damaged_are_made_again(whole: Whole, tmp_path: Path) -> None:
    lab = whole.lab.copy(tmp_path / "lab")
    command = ("search", "longrope", "rope", "--ctx", "64", "--json", *SEARCH, *lab.places())
    first = json.loads(ropelab(*command).out)
    (path,) = lab.run.path.glob("searches/*/state.json")
    flipped(path)
    said = ropelab(*command)
    assert (said.status, str(path) in said.err) == (0, True)
    again = json.loads(said.out)
    assert again.pop("scored") == first.pop("scored") > 0
    assert again == first


# --- a disk that is full, and one that cannot be written ------------------------------------------------------------


@contextlib.contextmanager
def mounted(place: Path, *arguments: str) -> Iterator[None]:
    """A file system at a place; where none can be mounted, the test is skipped: file-size limits are tried anyway."""
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(place)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextlib.contextmanager
def free(place: Path, kilobytes: int) -> Iterator[None]:
    """Fill a disk but for so much."""
    filler = place / "filler"
    state = os.statvfs(place)
    filler.write_bytes(b"x" * max(0, state.f_bavail * state.f_frsize - 1024 * kilobytes))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def files_up_to(place: Path, kilobytes: int) -> Iterator[None]:
    """No file of this process may grow beyond so much."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


SIZES = {  # free kilobytes, from none to enough: with each of them another write is the first that does not fit
    "train": (0, 4, 12, 20, 48, 96, 140, 250, 2000),
    "eval": (0, 2, 4, 8, 12, 2000),
    "prepare": (0, 4, 12, 28, 44, 60, 4000),
    "search": (0, 4, 12, 24, 2000),
    "report": (0, 60, 1000, 16000),
}


@pytest.mark.parametrize("limit", [free, files_up_to])
@pytest.mark.parametrize("job", SIZES)
def test_a_full_disk_is_said_in_a_line_and_costs_nothing(
    whole: Whole, tmp_path: Path, job: str, limit: Callable[[Path, int], contextlib.AbstractContextManager[None]]
) -> None:
    """The same command again and again, each time with a little more room, until it fits: then all is as without."""
    disk = tmp_path / "disk"
    with mounted(disk, "-t", "tmpfs", "-o", "size=20m", "none") if limit is free else contextlib.nullcontext():
        disk.mkdir(exist_ok=True)
        if job in ("train", "prepare"):
            lab = Lab(disk / "lab", whole.lab.text)
            shutil.copytree(whole.lab.cache, lab.cache)
        else:
            lab = whole.lab.copy(disk / "lab")
        if job == "eval":
            shutil.rmtree(lab.run.results)
        if job == "prepare":
            shutil.rmtree(lab.cache / "tokens")
        commands: dict[str, Callable[[], Said]] = {
            "train": lambda: lab.train("--json"),
            "eval": lab.evaluate,
            "prepare": lambda: ropelab("data", "prepare", *BPE, f"data.path={lab.text}", *lab.places()),
            "search": lambda: ropelab("search", "longrope", "rope", "--ctx", "64", "--json", *SEARCH, *lab.places()),
            "report": lambda: lab.report("rope"),
        }
        failures = []
        for kilobytes in SIZES[job]:
            with limit(disk, kilobytes):
                said = commands[job]()
            if said.status == 0:
                break
            failures.append(said)
            assert said.status in (1, 2), said.err
            last = said.err.splitlines()[-1]
            assert last.startswith("ropelab: ")
            assert any(word in last for word in ("No space left", "File too large", "os error 28", "os error 27")), last
            assert str(disk) in last or lab.runs.joinpath("x").parent.name in last
            assert [path for path in lab.root.rglob(".*") if path.name != ".matplotlib"] == []
        assert said.status == 0, said.err
        assert len(failures) >= 2
        if job in ("train", "eval"):
            assert_as_before(lab, whole)
            assert lines_without_speed(lab.run) == whole.metrics
        if job == "search":
            again = whole.lab.copy(tmp_path / "again")
            plain = ropelab("search", "longrope", "rope", "--ctx", "64", "--json", *SEARCH, *again.places())
            one, other = json.loads(said.out), json.loads(plain.out)
            assert {**one, "path": None, "scored": None} == {**other, "path": None, "scored": None}
        if job == "report":
            assert json.loads((lab.root / "report" / "results.json").read_text())["evals"][0]["rows"] == whole.rows


def test_a_read_only_run_can_be_read_and_is_not_written(whole: Whole, tmp_path: Path) -> None:
    """By a mount, as root may write anywhere else: what is stored is read, and all else is refused in a line."""
    lab = whole.lab.copy(tmp_path / "lab")
    with mounted(lab.runs, "--bind", "-o", "ro", str(whole.lab.runs)):
        stored = lab.evaluate()
        assert (stored.status, json.loads(stored.out)["rows"]) == (0, whole.rows)
        assert lab.report("rope").status == 0
        for said in (
            lab.evaluate("eval.max_ctx=128"),
            ropelab("search", "longrope", "rope", "--ctx", "64", *SEARCH, *lab.places()),
            lab.train("seed=1"),
            ropelab("runs", "rm", "rope", "--yes", *lab.places()),
        ):
            assert said.status in (1, 2)
            one_line(said, "Read-only file system", str(lab.runs))
    assert_as_before(lab, whole)


@pytest.mark.parametrize("key", ["runs_dir", "cache_dir"])
def test_a_place_below_a_file_is_refused_in_a_line(whole: Whole, tmp_path: Path, key: str) -> None:
    (tmp_path / "file").write_text("")
    there = f"{key}={tmp_path / 'file' / 'below'}"
    other = f"cache_dir={tmp_path / 'cache'}" if key == "runs_dir" else f"runs_dir={tmp_path / 'runs'}"
    said = ropelab("train", "--pos", "rope", *SIX, f"data.path={whole.lab.text}", there, other)
    assert said.status == 2
    one_line(said, there, "another")
    assert not (tmp_path / "runs").exists() or list((tmp_path / "runs").iterdir()) == []


# --- kills, processes in each other's way, clocks -------------------------------------------------------------------


@pytest.mark.integration
def test_a_few_random_kills_change_nothing(tmp_path: Path) -> None:
    """The short form of scripts/soak.py, on what is not killed in other tests; training is, in tests/test_runs.py."""
    out = tmp_path / "soak.json"
    command = [sys.executable, "scripts/soak.py", "--kills", "4", "--jobs", "eval,tokenise", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert (found["kills"], found["kills_in_equal_trials"]) == (4, 4)


def test_a_few_random_faults_of_the_disk_lose_nothing(tmp_path: Path) -> None:
    """The short form of its `--faults`, on a job that only faults have."""
    out = tmp_path / "soak.json"
    command = [sys.executable, "scripts/soak.py", "--faults", "2", "--jobs", "report", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["faults"]
    assert (found["faults"], found["faults_without_a_loss"]) == (2, 2)


def test_two_processes_evaluate_one_run_at_once(whole: Whole, tmp_path: Path) -> None:
    lab = whole.lab.copy(tmp_path / "lab")
    shutil.rmtree(lab.run.results)
    pair = [Process(cli.main, "eval", "rope", *ASKED, *lab.places(), "device=cpu") for _ in range(2)]
    for process in pair:
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert json.loads(out)["rows"] == whole.rows
    assert len(list(lab.run.results.iterdir())) == 2
    assert_as_before(lab, whole)


def test_a_run_that_is_evaluated_is_neither_removed_nor_trained(whole: Whole, tmp_path: Path) -> None:
    lab = whole.lab.copy(tmp_path / "lab")
    run = lab.run
    truncated(run.path / "checkpoints" / "step-00000006" / "model.safetensors")  # so that training would begin again
    with run.in_use(), run.in_use():  # two may
        for said in (ropelab("runs", "rm", "rope", "--yes", *lab.places()), lab.train()):
            assert said.status == 2
            assert f"{run.name} is being written by another process" in said.err.splitlines()[-1]
    with run.locked():
        said = lab.evaluate("eval.max_ctx=128")
        assert (said.status, "another process" in said.err or "truncated" in said.err) == (2, True)
    assert ropelab("runs", "rm", "rope", "--yes", *lab.places()).status == 0
    assert list(lab.runs.iterdir()) == []


def test_a_run_removed_while_another_process_waits_for_it_is_not_written(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is one of a file that is gone: whoever gets it then has no run."""
    run = whole.lab.copy(tmp_path / "lab").run
    holder = RunDir(run.path).locked()
    holder.__enter__()

    def removed(seconds: float) -> None:
        if run.path.exists():
            files.remove(run.path, within=run.path.parent)
            holder.__exit__(None, None, None)

    monkeypatch.setattr(time, "sleep", removed)
    with pytest.raises(RunError, match="removed by another process"), run.locked():
        pytest.fail("a run that is gone was locked")


def test_a_clock_that_is_set_back_does_not_change_which_run_is_the_latest(whole: Whole, tmp_path: Path) -> None:
    lab = whole.lab.copy(tmp_path / "lab")
    tomorrow = time.time() + 86400
    os.utime(lab.run.manifest_path, (tomorrow, tomorrow))  # it was finished before the clock was set back
    done = lab.train("seed=1", "--json")
    assert done.status == 0
    assert runs.latest_finished(lab.runs).name == json.loads(done.out)["run"]


def test_a_temporary_file_is_left_alone_while_its_writer_lives(tmp_path: Path) -> None:
    """And removed by the next writer when it does not: a killed process holds no lock."""
    with files.new_folder(tmp_path / "final") as ours:
        abandoned = tmp_path / files._temporary_name()
        abandoned.mkdir()
        (abandoned / "half").write_text("")
        with files.new_folder(tmp_path / "final") as other:
            assert ours.is_dir()
            assert {path.name for path in tmp_path.iterdir()} == {ours.name, other.name}
    (tmp_path / files._temporary_name()).write_text("")
    files.write_json(tmp_path / "file.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


# --- other versions, and other shapes -------------------------------------------------------------------------------


def changed_manifest(of: RunDir, **changes: Any) -> None:
    """As another program would have written it: with a seal that fits."""
    files.write_sealed(of.manifest_path, {**of.manifest(), **changes})


def test_a_run_of_another_version_of_the_numerics_is_not_mixed_in(whole: Whole, tmp_path: Path) -> None:
    lab = whole.lab.copy(tmp_path / "lab")
    manifest = lab.run.manifest()
    environment = {**manifest["environment"], "ropelab": "9.9.9"}
    changed_manifest(lab.run, identity={**manifest["identity"], "numerics": 2}, environment=environment)
    for said in (lab.evaluate(), ropelab("show", "rope", *lab.places()), lab.report("rope")):
        assert said.status == 2
        one_line(said, "of ropelab 9.9.9: use that version", "train the run again")
    said = lab.report()
    assert said.status == 2
    assert "left out" in said.err


def test_a_configuration_of_another_version_is_said_with_its_file(whole: Whole, tmp_path: Path) -> None:
    lab = whole.lab.copy(tmp_path / "lab")
    config = lab.run.manifest()["config"]
    changed_manifest(lab.run, config={**config, "train": {**config["train"], "momentum": 0.9}})
    for said in (lab.evaluate(), ropelab("show", "rope", *lab.places()), lab.report("rope")):
        assert said.status == 2
        one_line(said, "manifest.json", "train.momentum", "use the code that made it")


def resaved(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights of a checkpoint, with checksums that fit."""
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors")
    state = files.load_json(checkpoint / "state.json")
    state["sha256"]["model.safetensors"] = files.sha256_of(checkpoint / "model.safetensors")
    files.write_sealed(checkpoint / "state.json", state)


@pytest.mark.parametrize("of", ["shape", "run"])
def test_a_checkpoint_that_is_not_this_runs_is_passed_over(whole: Whole, tmp_path: Path, of: str) -> None:
    lab = Lab(tmp_path / "lab", whole.lab.text)
    stopped_at(lab, 5)
    checkpoint = lab.run.path / "checkpoints" / "step-00000004"
    if of == "shape":
        resaved(checkpoint, lambda weights: weights.update({"tokens.weight": torch.zeros(3, 3)}))
    else:
        state = files.load_json(checkpoint / "state.json")
        files.write_sealed(checkpoint / "state.json", {**state, "digest": "0" * 64})
    done = lab.train("--json")
    assert done.status == 0
    assert "step-00000004 is truncated or altered; training goes on from step-00000002" in done.err
    assert_as_before(lab, whole)


def test_a_finished_run_with_weights_of_another_shape_is_refused(whole: Whole, tmp_path: Path) -> None:
    lab = whole.lab.copy(tmp_path / "lab")
    shutil.rmtree(lab.run.results)
    checkpoint = lab.run.path / "checkpoints" / "step-00000006"
    for name in ("blocks.0.norm_attention.weight", "tokens.weight"):
        resaved(checkpoint, lambda weights, name=name: weights.update({name: torch.zeros(3)}))  # type: ignore[misc]
        said = lab.evaluate()
        assert said.status == 2
        assert lab.run.name in said.err.splitlines()[-1]


# --- a stranger's run -----------------------------------------------------------------------------------------------


def garbage(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}" * 50)
    state = files.load_json(checkpoint / "state.json")
    state["sha256"]["model.safetensors"] = files.sha256_of(checkpoint / "model.safetensors")
    files.write_sealed(checkpoint / "state.json", state)


def elsewhere(checkpoint: Path) -> None:
    state = files.load_json(checkpoint / "state.json")
    outside = checkpoint.parent.parent.parent.parent / "outside"
    outside.write_text("secret")
    sums = {**state["sha256"], f"../../../../{outside.name}": files.sha256_of(outside)}
    files.write_sealed(checkpoint / "state.json", {**state, "sha256": sums})


def linked(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint.parent.parent / "moved")
    (checkpoint / "model.safetensors").symlink_to(checkpoint.parent.parent / "moved")


def piped(checkpoint: Path) -> None:
    (checkpoint / "state.json").unlink()
    os.mkfifo(checkpoint / "state.json")


def deep(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text("[" * 10**5)


def without_sums(checkpoint: Path) -> None:
    state = files.load_json(checkpoint / "state.json")
    files.write_sealed(checkpoint / "state.json", {**state, "sha256": {}})


@pytest.mark.parametrize("attack", [garbage, elsewhere, linked, piped, deep, without_sums])
def test_a_strangers_checkpoint_is_refused_in_a_line(
    whole: Whole, tmp_path: Path, attack: Callable[[Path], None]
) -> None:
    lab = whole.lab.copy(tmp_path / "lab")
    shutil.rmtree(lab.run.results)
    attack(lab.run.path / "checkpoints" / "step-00000006")
    said = lab.evaluate()
    assert said.status == 2
    one_line(said, "step-00000006")


@pytest.mark.parametrize(
    "changes",
    [
        {"config": []}, {"config": {}}, {"config": {"train": {"steps": "six"}}}, {"tokenizer": {}},
        {"original_ctx": 0}, {"train_ctx": True}, {"corpus": {"name": ["x"]}}, {"identity": {}}, {"error": {"a": 1}},
        {"config": {"train": {"steps": 6}, "pos": "${oc.env:HOME}"}}, {"run": 5}, {"status": ["done"]},
        {"tokenizer": {"name": "bpe", "digest": "x", "n_vocab": 10**15}}, {"environment": [1]},
    ],
)  # fmt: skip
def test_a_strangers_manifest_is_refused_in_a_line(whole: Whole, tmp_path: Path, changes: dict[str, Any]) -> None:
    lab = whole.lab.copy(tmp_path / "lab")
    changed_manifest(lab.run, **changes)
    for said in (
        lab.evaluate(),
        lab.report("rope"),
        ropelab("show", "rope", *lab.places()),
        ropelab("runs", *lab.places()),
        ropelab("train", "--from", "rope", "train.steps=7", *lab.places()),
        ropelab("search", "longrope", "rope", "--ctx", "64", *SEARCH, *lab.places()),
    ):
        assert said.status in (0, 2), said.err
        assert said.status == 0 or said.err.splitlines()[-1].startswith("ropelab: ")
        assert os.environ["HOME"] not in said.err + said.out or "oc.env" not in str(changes)


def test_a_bomb_of_depth_is_a_damaged_file(whole: Whole, tmp_path: Path) -> None:
    lab = whole.lab.copy(tmp_path / "lab")
    (result,) = lab.run.results.glob("*.json")
    result.write_text('{"a":' * 10**5)
    said = lab.report("rope")
    assert said.status == 2
    one_line(said, result.name, "nested too deeply")
    lab.run.manifest_path.write_text("[" * 10**5)
    said = lab.evaluate()
    assert said.status == 2
    one_line(said, "manifest.json", "nested too deeply")


def test_links_of_a_strangers_run_are_not_written_through(whole: Whole, tmp_path: Path) -> None:
    lab = Lab(tmp_path / "lab", whole.lab.text)
    stopped_at(lab, 5)
    victim = tmp_path / "victim"
    for name in ("metrics.jsonl", "tokenizer.json", "lock"):
        victim.write_text("precious")
        (lab.run.path / name).unlink()
        (lab.run.path / name).symlink_to(victim)
        said = lab.train()
        assert said.status != 0
        one_line(said, name)
        assert victim.read_text() == "precious"
        (lab.run.path / name).unlink()
    precious = tmp_path / "precious"
    shutil.copytree(lab.run.path, precious)
    (lab.runs / "alibi-link-s0-00000000").symlink_to(precious)
    before = content(RunDir(precious))
    said = ropelab("runs", "rm", "alibi-link-s0-00000000", "--yes", *lab.places())
    assert said.status == 2
    one_line(said, "alibi-link-s0-00000000 is a link")
    assert (lab.runs / "alibi-link-s0-00000000").is_symlink()
    assert content(RunDir(precious)) == before


class Scripts(HTMLParser):
    """Every element that begins in a page, with the names of its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


MARKUP = "\"'><script>alert(1)</script><img src=x onerror=alert(1)></style>{{x}}<!--"


def marked(value: Any, *, spared: tuple[str, ...]) -> Any:
    """The same JSON with markup at the end of every string but those of the named keys."""
    if isinstance(value, dict):
        return {key: each if key in spared else marked(each, spared=spared) for key, each in value.items()}
    if isinstance(value, list):
        return [marked(each, spared=spared) for each in value]
    return value + MARKUP if isinstance(value, str) else value


def test_markup_in_a_strangers_run_reaches_the_report_as_text(whole: Whole, tmp_path: Path) -> None:
    """In every string of results and manifest that the program does not look up in a table of its own."""
    lab = whole.lab.copy(tmp_path / "lab")
    assert lab.report("rope").status == 0
    plain = Scripts((lab.root / "report" / "report.html").read_text(encoding="utf-8"))
    run = lab.run
    (path,) = run.results.glob("*.json")
    item = files.load_json(path)
    protocol = marked(item["protocol"], spared=("name", "split"))
    rows = marked(item["rows"], spared=("status",))
    rows[1] |= {"status": "undefined", "reason": MARKUP, "ppl": None, "nll": None, "ci95": None}
    wrong = {
        **marked(item, spared=("pos", "scaling", "scaling_parameters", "weights")),
        "protocol": protocol,
        "rows": rows,
    }
    files.write_sealed(path, wrong)
    manifest = run.manifest()
    spared = ("config", "identity", "status", "digest", "numerics")
    files.write_sealed(run.manifest_path, marked(manifest, spared=spared))
    said = lab.report("rope")
    assert said.status == 0, said.err
    page = (lab.root / "report" / "report.html").read_text(encoding="utf-8")
    assert MARKUP not in page
    assert "alert(1)" in page
    attacked = Scripts(page)
    assert attacked.handlers == plain.handlers == []
    for tag in ("script", "img", "style", "link", "iframe"):
        assert attacked.tags.get(tag) == plain.tags.get(tag)


def test_any_change_of_a_stored_result_is_refused_or_harmless(whole: Whole, tmp_path: Path) -> None:
    """Every value of it in turn replaced by one of another kind, sealed anew: exit 0 or 2, and never a traceback."""
    lab = whole.lab.copy(tmp_path / "lab")
    (path,) = lab.run.results.glob("*.json")
    item = files.load_json(path)
    places = list(nodes(item))
    draw = random.Random(3)
    statuses = set()
    for place in draw.sample(places, min(len(places), 24)):
        files.write_sealed(path, replaced(item, place, draw.choice([None, [], {}, "x", -1, 1e300, True, 10**30])))
        try:
            evals = evaluations(lab.run)
        except RunError as error:
            said = str(error)
        else:
            said = ""
        statuses.add(2 if said else 0)
        if said:
            assert path.name in said
            continue
        report.write_report(
            tmp_path / "report", evals=evals, verdicts=[], title="t", notes=[], manifest={},
            diagnoses=[diagnose_run(lab.run.manifest(), evals)],
        )  # fmt: skip
    assert statuses == {0, 2}


def nodes(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a JSON tree; of a list those in its first entries."""
    if place:
        yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, each in inner:
        yield from nodes(each, (*place, key))


def replaced(value: Any, place: tuple[Any, ...], by: Any) -> Any:
    if not place:
        return by
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[place[0]] = replaced(copied[place[0]], place[1:], by)
    return copied


def test_a_name_cannot_steer_the_terminal(whole: Whole, tmp_path: Path) -> None:
    lab = whole.lab.copy(tmp_path / "lab")
    changed_manifest(lab.run, error="\x1b]0;owned\x07\x1b[2J", status="failed\x1b[31m")
    said = ropelab("runs", *lab.places())
    assert said.status == 0
    assert "\x1b" not in said.out + said.err
    said = lab.evaluate()
    assert said.status == 2
    assert "\x1b" not in said.err


BOMB = b"cos\nsystem\n(S'touch %s'\ntR."  # a pickle that makes a file when it is read


def test_no_pickle_is_read(whole: Whole, tmp_path: Path) -> None:
    """Pickles under every likely name, in a run, in the cache and in the corpus: no command reads one."""
    lab = whole.lab.copy(tmp_path / "lab")
    text = tmp_path / "text"
    shutil.copytree(whole.lab.text, text)
    lab = Lab(lab.root, text)
    struck = tmp_path / "struck"
    bomb = BOMB % str(struck).encode()
    folders = [text, *(path for path in lab.root.rglob("*") if path.is_dir() and path.name != "results")]
    shutil.rmtree(lab.run.results)
    for folder in folders:
        for name in ("model.pt", "model.pkl", "pytorch_model.bin", "optimizer.pt", "data.pickle", "train.npy", "x.npz"):
            (folder / name).write_bytes(bomb)
    for said in (
        lab.evaluate(), lab.report("rope"), ropelab("show", "rope", *lab.places()), lab.train("train.keep=[0.5]"),
        lab.train("seed=1"), ropelab("runs", *lab.places()),
    ):  # fmt: skip
        assert said.status == 0, said.err
    assert not struck.exists()
    os.system(f"{sys.executable} -c \"import pickle; pickle.load(open('{text / 'model.pt'}', 'rb'))\"")
    assert struck.exists()  # it would have


def test_no_module_can_read_a_pickle() -> None:
    """torch.load, np.load with pickles, and what else runs code that a file holds, occur nowhere."""
    words = ("torch.load(", "np.load(", "numpy.load(", "allow_pickle", "joblib", "shelve", "marshal", "dill", "cPickle",
             "weights_only", "yaml.load(", "yaml.unsafe_load", "hydra.utils", "instantiate(", "__import__")  # fmt: skip
    found = [
        f"{path.name}: {word}"
        for path in sorted((ROOT / "ropelab").rglob("*.py"))
        for word in words
        if word in path.read_text(encoding="utf-8")
    ]
    assert found == []


def test_compiled_kernels_are_kept_where_only_the_user_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reads pickles there: not in a run, and not in the cache, which may be shared."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    class Nothing:
        blocks = ()

    compile_blocks(Nothing())  # type: ignore[arg-type]
    place = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert place.parent == tmp_path
    assert place.stat().st_mode & 0o077 == 0
