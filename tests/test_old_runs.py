"""A folder of runs that the first version wrote (commit 3babe5b) is found, read, evaluated and gone on from.

`fixtures/runs-0.1.0.tar.xz`: two runs, one extended by a factor, a sweep of four runs, their evaluations under four
protocols and three scalings, and the texts they are of. Paths and the machine's name were replaced and sealed again.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ropelab import files, runs, sweeps
from ropelab.evaluation import evaluations
from ropelab.runs import RunDir
from tests.lab import as_json, good, invoke

PACKED = Path(__file__).parent / "fixtures" / "runs-0.1.0.tar.xz"
ROPE, ALIBI, CHILD = "rope-text-s0-71be6b64", "alibi-text-s0-2c6cc0bd", "rope-yarn-text-s0-ee58df09"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(PACKED) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def old(unpacked: Path, tmp_path: Path) -> Path:
    """A copy of its own, whose runs find their text."""
    shutil.copytree(unpacked, tmp_path / "old")
    for path in (tmp_path / "old" / "runs").glob("*/manifest.json"):
        manifest = files.load_json(path)
        manifest["config"]["data"]["path"] = str(tmp_path / "old" / "text")
        files.write_sealed(path, manifest)
    return tmp_path / "old"


def content(runs_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(runs_dir)): path.read_bytes() for path in runs_dir.rglob("results/*")}


def test_they_are_listed_and_shown(old: Path) -> None:
    listed = as_json("runs", f"runs_dir={old / 'runs'}")
    assert {ROPE, ALIBI, CHILD} <= {run["run"] for run in listed}
    shown = as_json("show", ROPE, f"runs_dir={old / 'runs'}")
    scalings = [one["scaling"] for one in shown["diagnosis"]["evaluated"]]
    assert scalings == ["none", "linear", "yarn"]


def test_stored_evaluations_are_read_and_not_made_again(old: Path) -> None:
    """The same question has the same name, so that nothing is scored; numbers are those that were written."""
    runs_dir, cache = f"runs_dir={old / 'runs'}", f"cache_dir={old / 'cache'}"
    stored: dict[str, Any] = {
        path.name: files.load_json(path) for path in (old / "runs" / ROPE / "results").glob("*.json")
    }
    before = set(content(old / "runs"))
    asked = [ROPE, "--ctx", "64", "eval.scalings=[none,linear:4,yarn:4]", runs_dir, cache]
    found = as_json("eval", *asked)["results"]
    again = as_json("eval", ALIBI, "--ctx", "64", "--protocol", "last", "eval.last=8", runs_dir, cache)
    assert set(content(old / "runs")) == before
    for result in found:
        (same,) = [
            item
            for item in stored.values()
            if (item["scaling"], item["protocol"]["name"], len(item["rows"]))
            == (result["scaling"], "nonoverlapping", 3)
        ]
        assert [row["nll"] for row in result["rows"]] == [row["nll"] for row in same["rows"]]
        assert result["weights_bound"] == "later"  # it did not say of which weights it was
    assert again["protocol"]["last"] == 8
    assert len(evaluations(RunDir(old / "runs" / ROPE))) == 5  # three scalings, the sliding one, the sweep's


def test_an_evaluation_made_again_has_the_same_losses(old: Path) -> None:
    results = old / "runs" / ROPE / "results"
    before = {path.name: runs.load_tensors(path) for path in results.glob("*.safetensors")}
    shutil.rmtree(results)
    good(
        "eval", ROPE, "--ctx", "64", "eval.scalings=[none,linear:4,yarn:4]", f"runs_dir={old / 'runs'}",
        f"cache_dir={old / 'cache'}", "--json",
    )  # fmt: skip
    made = {path.name: runs.load_tensors(path) for path in results.glob("*.safetensors")}
    assert len(made) == 3
    for name, tensors in made.items():
        for key, tensor in tensors.items():
            assert tensor.allclose(before[name][key], rtol=1e-6, atol=1e-6), (name, key)


def test_a_finished_run_is_not_trained_again_and_a_child_is_found(old: Path) -> None:
    shape = (
        "data=text", f"data.path={old / 'text'}", "model.n_layer=2", "model.d_model=16", "model.n_head=2",
        "train.ctx=16", "train.batch_size=4", "train.steps=20", "train.eval_every=10", "train.checkpoint_every=10",
        f"runs_dir={old / 'runs'}", f"cache_dir={old / 'cache'}", "device=cpu", "train.dtype=fp32",
    )  # fmt: skip
    said = as_json("train", "--pos", "rope", *shape)
    assert (said["run"], said["skipped"]) == (ROPE, True)
    more = ("train.ctx=32", "train.steps=5", "--scaling", "yarn", "--factor", "2", "train.dtype=fp32", *shape[-4:-1])
    child = as_json("train", "--from", ROPE, *more)
    assert (child["run"], child["skipped"]) == (CHILD, True)


def test_their_sweep_stands_as_it_stood(old: Path) -> None:
    (path,) = sweeps.all_sweeps(old / "runs")
    sweep = sweeps.Sweep(path)
    assert [one.state for one in sweep.standings()] == ["DONE"] * 4
    done = invoke("report", path.name, "-o", str(old / "report"), f"runs_dir={old / 'runs'}")
    assert done.exit_code == 0, done.output
    assert len(json.loads((old / "report" / "results.json").read_text())["evals"]) == 4
