"""What a command leaves behind: nothing when it refuses, only the last checkpoint when it ends, files all can read."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest

import ropelab as package
from ropelab import files
from ropelab.runs import RunDir
from tests.lab import Lab, made_lab, one_line, ropelab
from tests.test_faults import changed_manifest, stopped_at
from tests.test_runs import content


@pytest.fixture(scope="module")
def lab(shared: Path) -> Lab:
    return made_lab(shared)


REFUSED = {
    "train": ("train", "data=text", "data.path=nowhere"),
    "train, too short": ("train", "data=text", "data.path=TEXT", "train.ctx=1000000", "model.d_model=8"),
    "train, a method": ("train", "pos=rope", "model.d_model=18", "model.n_head=2"),
    "train, a parent": ("train", "--from", "nobody"),
    "verify-resume": ("verify-resume", "data=text", "data.path=nowhere"),
    "sweep": ("sweep", "pos=rope,alibi", "data=text", "data.path=nowhere"),
    "eval": ("eval", "nobody"),
    "report": ("report", "-o", "new/report"),
    "search": ("search", "longrope", "nobody", "--ctx", "64", "-o", "new/a.json"),
    "export": ("export", "nobody", "-o", "new/export"),
    "import": ("import", "nowhere"),
    "runs": ("runs", "nobody"),
    "data": ("data", "prepare", "data=text", "data.path=nowhere"),
    "reproduce": ("reproduce", "c-order", "data=text", "data.path=nowhere", "-o", "new/report"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_command_leaves_no_folder(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [item.replace("TEXT", str(lab.text)) for item in REFUSED[name]]
    places = ["runs_dir=new/runs", *([] if name in ("report", "runs") else ["cache_dir=new/cache"])]
    said = ropelab(*command, *places, *([] if command[0] != "train" else ["device=cpu"]))
    assert said.status == 2, said
    assert not (tmp_path / "new" / "runs").exists()
    left = {path.name for path in tmp_path.rglob("*")}
    assert not left or (name == "train, too short" and not any("tmp" in item for item in left)), left


# --- checkpoints ----------------------------------------------------------------------------------------------------


def steps(run: RunDir) -> list[str]:
    return sorted(path.name for path in (run.path / "checkpoints").iterdir())


@pytest.mark.parametrize("killed", ["before earlier ones were removed", "before the run was done", "long ago"])
def test_a_finished_run_holds_only_its_last_checkpoint(lab: Lab, tmp_path: Path, killed: str) -> None:
    """A kill between the last checkpoint and the end: the next `train` finishes, and clears what is earlier away."""
    mine = Lab(tmp_path / "lab", lab.text)
    stopped_at(mine, 5)  # the checkpoint of step 4 is there
    earlier = [shutil.copytree(path, tmp_path / path.name) for path in (mine.run.path / "checkpoints").glob("step-*")]
    assert earlier
    assert mine.train().status == 0
    whole = content(mine.run)
    assert steps(mine.run) == ["step-00000006"]
    if killed != "before the run was done":
        for path in earlier:
            shutil.copytree(path, mine.run.path / "checkpoints" / path.name)
    if killed != "long ago":
        changed_manifest(mine.run, status="running")
    said = mine.train()
    assert said.status == 0, said.err
    assert steps(mine.run) == ["step-00000006"]
    assert content(mine.run) == whole
    assert mine.run.status() == "done"


def test_a_finished_run_that_is_in_use_or_read_only_is_left_as_it_is(lab: Lab, tmp_path: Path) -> None:
    mine = lab.copy(tmp_path / "lab")
    last = mine.run.path / "checkpoints" / "step-00000006"
    shutil.copytree(last, last.with_name("step-00000004"))
    with mine.run.in_use():
        said = mine.train()
    assert said.status == 0, said.err
    assert steps(mine.run) == ["step-00000004", "step-00000006"]


# --- rights ---------------------------------------------------------------------------------------------------------


def test_what_is_published_can_be_read_as_other_files_of_the_user(lab: Lab, tmp_path: Path) -> None:
    """Of runs and of caches; an export is published by the same function."""
    usual = tmp_path / "usual"
    usual.write_bytes(b"")
    (tmp_path / "folder").mkdir()
    rights = {False: usual.stat().st_mode, True: (tmp_path / "folder").stat().st_mode}
    checked = list(lab.root.rglob("*"))
    assert {"model.safetensors", "optimizer.safetensors", "manifest.json"} <= {path.name for path in checked}
    for path in checked:
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(rights[path.is_dir()]), path
    with files.new_folder(tmp_path / "made") as temporary:
        (temporary / "inner").mkdir(mode=0o700)
        for name in ("a", "inner/b"):
            (temporary / name).write_bytes(b"")
            (temporary / name).chmod(0o600)
        files.publish(temporary, tmp_path / "made")
    for path in (tmp_path / "made").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(rights[path.is_dir()]), path


# --- versions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ("0.0.9", "ropelab 0.0.9: use that version"),
        (package.__version__, f"another ropelab {package.__version__} than this one, or altered: use the code"),
        (None, "unknown version of ropelab"),
    ],
)
def test_a_run_that_is_not_understood_names_a_version_that_helps(
    lab: Lab, tmp_path: Path, made: str | None, says: str
) -> None:
    """`use that version` of this very version would be no help."""
    mine = lab.copy(tmp_path / "lab")
    manifest = mine.run.manifest()
    environment = {**manifest["environment"], "ropelab": made} if made else {}
    config = {**manifest["config"], "pos": {"name": "mine"}}
    changed_manifest(mine.run, config=config, environment=environment)
    for said in (mine.evaluate(), ropelab("show", "rope", *mine.places())):
        assert said.status == 2
        one_line(said, "unknown pos 'mine'", says)
    changed_manifest(mine.run, config=manifest["config"], identity={**manifest["identity"], "numerics": 99})
    said = mine.evaluate()
    assert said.status == 2
    one_line(said, "numerics 99", says)
