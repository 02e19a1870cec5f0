"""Files of ours are whole or not there; what is not ours is left alone, and nothing leads out of a folder."""

from __future__ import annotations

import ast
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ropelab
from ropelab import files
from ropelab.errors import DamagedFileError, OutsideError

PACKAGE = Path(ropelab.__file__).parent


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is not ours stays


def test_neighbours_that_begin_as_the_name_does_stay(tmp_path: Path) -> None:
    (tmp_path / ".rope.png.swp").write_text("an editor's", encoding="utf-8")
    (tmp_path / ".model-backup").mkdir()
    (tmp_path / ".model-backup" / "thesis.txt").write_text("years", encoding="utf-8")
    files.write(tmp_path / "rope.png", b"new")
    with files.new_folder(tmp_path / "model") as temporary:
        (temporary / "config.json").write_text("{}", encoding="utf-8")
        files.publish(temporary, tmp_path / "model")
    assert listing(tmp_path) == [".model-backup", ".rope.png.swp", "model", "rope.png"]
    assert (tmp_path / ".model-backup" / "thesis.txt").read_text(encoding="utf-8") == "years"


def test_what_only_looks_like_ours_stays(tmp_path: Path) -> None:
    ours = files._temporary_name()
    forged = f".ropelab-tmp-{files._machine()}-{'0' * 16}-{'0' * 8}"
    names = [ours[:-1], f"{ours}x", ours.replace(ours[-1], "g"), forged]
    for name in names:
        (tmp_path / name).write_text("not ours", encoding="utf-8")
    (tmp_path / "target").write_text("x", encoding="utf-8")
    (tmp_path / files._temporary_name()).symlink_to(tmp_path / "target")
    files.clear_abandoned(tmp_path, any_machine=True)
    assert {*names, "target"} < {*listing(tmp_path)}


def test_what_a_killed_process_left_goes_and_what_a_living_one_fills_stays(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom ropelab import files\n"
        "with files.new_folder(Path(sys.argv[1]) / 'x') as folder:\n"
        "    (folder / 'half').write_text('half')\n    print('there', flush=True)\n    sys.stdin.read()\n"
    )
    filling = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert filling.stdout is not None
    assert filling.stdout.readline() == "there\n"
    files.write(tmp_path / "y", b"1")
    assert len(listing(tmp_path)) == 2  # its folder is held
    filling.kill()
    filling.communicate()
    files.write(tmp_path / "y", b"2")
    assert listing(tmp_path) == ["y"]


def test_what_another_machine_left_goes_only_where_nobody_else_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as there:
        there.setattr(files, "_machine", lambda: "0123abcd")
        (tmp_path / files._temporary_name()).write_text("half", encoding="utf-8")
    files.write(tmp_path / "y", b"1")
    assert len(listing(tmp_path)) == 2
    files.clear_abandoned(tmp_path, any_machine=True)
    assert listing(tmp_path) == ["y"]


def test_a_written_file_has_the_mode_of_an_ordinary_one(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write(tmp_path / "x", b"1")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("pipe", "null"):
        with pytest.raises(OutsideError, match="give the name of a file"):
            files.write(tmp_path / name, b"1")
    assert listing(tmp_path) == ["null", "pipe"]
    (tmp_path / "real").write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files.write(tmp_path / "link", b"new")
    assert (tmp_path / "real").read_text(encoding="utf-8") == "mine"


# --- one door for what is removed or cut short


def test_nothing_is_removed_or_cut_outside_the_folder_or_through_a_link(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "results").mkdir(parents=True)
    (mine / "results" / "a.json").write_text("mine", encoding="utf-8")
    run = tmp_path / "run"
    run.mkdir()
    (run / "results").symlink_to(mine / "results")
    (run / "metrics.jsonl").symlink_to(mine / "results" / "a.json")
    for path in (run / "results", run / "results" / "a.json", run / "metrics.jsonl", run / ".." / "mine", mine, run):
        with pytest.raises(OutsideError, match=r"does not lie in|is a link, and none is followed"):
            files.remove(path, within=run)
        with pytest.raises(OutsideError):
            files.truncate(path, 0, within=run)
        with pytest.raises(OutsideError):
            files.append(path, "x", within=run)
    assert (mine / "results" / "a.json").read_text(encoding="utf-8") == "mine"
    linked = tmp_path / "linked"  # what the user names may be a link
    linked.symlink_to(mine)
    files.truncate(linked / "results" / "a.json", 1, within=linked)
    assert (mine / "results" / "a.json").read_text(encoding="utf-8") == "m"
    files.remove(linked / "results", within=linked)
    assert listing(mine) == []
    files.remove(linked / "results", within=linked)  # what is not there need not be removed


# function that removes or cuts, or adds to a file in place -> who calls it
CALLERS = {
    "remove": {
        ("cli.runs", "_remove"), ("data.tokens", "load_or_build"), ("runs.folder", "_save"),
        ("runs.folder", "begun"), ("runs.folder", "drop_earlier"), ("runs.folder", "rewind"),
        ("sweeps.folder", "begun"), ("sweeps.folder", "forget"),
    },
    "truncate": {("runs.folder", "rewind"), ("sweeps.folder", "locked")},
    "append": {("runs.folder", "append_metrics")},
    "clear_abandoned": {("runs.folder", "rewind")},
}  # fmt: skip
# what removes, cuts or moves by itself -> where that may stand, beside files.py
RAW = {
    "unlink": set[str](), "rmtree": set[str](), "truncate": set[str](), "ftruncate": set[str](),
    "rmdir": {"huggingface.export"},  # an empty folder that -o names
    "removedirs": set[str](), "rename": set[str](), "renames": set[str](), "move": set[str](),
    "symlink_to": {"huggingface.checkpoint"},  # in a temporary folder of its own
    "copytree": set[str](), "copyfile": set[str](),
}  # fmt: skip


def calls() -> list[tuple[str, str, str, str]]:
    """(module, function around it, name before the dot, method) of every call of a method in the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    base = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                    found.append((module, function.name, base, node.func.attr))
    return found


def test_whoever_removes_or_cuts_does_it_through_the_one_door() -> None:
    mine = [call for call in calls() if call[0] != "files"]
    for method, callers in CALLERS.items():
        assert {(module, function) for module, function, base, name in mine if (base, name) == ("files", method)} == (
            callers
        )
    wrong = [call for call in mine if call[3] in RAW and call[2] != "files" and call[0] not in RAW[call[3]]]
    assert not wrong


# --- reading


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"step": Infinity}', "not finite"), ('{"step": NaN}', "not finite"), ('{"step": 1e999}', "not finite"),
        ('{"n": ' + "1" * 400 + "}", "400 digits"), ("[" * 100_000, "nested too deeply"), ("{", "truncated"),
        ("\x00", "truncated"),
    ],
)  # fmt: skip
def test_a_json_text_that_is_no_value_of_ours(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(DamagedFileError, match=why):
        files.parse_json(text)
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(DamagedFileError, match=why):
        files.load_json(tmp_path / "x.json")


BOMB = "a: &a [x, x]\n" + "".join(
    f"a{i}: &{'a' * (i + 2)} [{', '.join(['*' + 'a' * (i + 1)] * 10)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (BOMB, "aliases"),
        ("a: &a [*a]", "aliases"), ("[" * 5000, "deeply"), ("tau: " + "1" * 5000, "no valid YAML"),
        ("a: [", "no valid YAML"),
        ("!!python/object/apply:os.system [x]", "no valid YAML"),
    ],
)  # fmt: skip
def test_a_yaml_text_that_is_none_of_ours(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(DamagedFileError, match=why):
        files.load_yaml(tmp_path / "x.yaml")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DamagedFileError, match="no file"):
        files.load_yaml(tmp_path / "pipe")
    (tmp_path / "x.yaml").write_text("a: &a [1, 2]\nb: *a\n", encoding="utf-8")
    assert files.load_yaml(tmp_path / "x.yaml")[0] == {"a": [1, 2], "b": [1, 2]}


def test_only_a_file_of_bounded_size_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "real").write_text("1", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)
    for name, why in (
        ("pipe", "no file"),
        ("folder", "no file"),
        ("zero", "a link"),
        ("link", "a link"),
        ("huge", "bytes"),
    ):
        with pytest.raises(DamagedFileError, match=why):
            files.load_json(tmp_path / name)
    with pytest.raises(DamagedFileError, match="no file"):
        files.load_json(tmp_path / "zero", follow=True)
    assert files.load_json(tmp_path / "link", follow=True) == 1
    with pytest.raises(FileNotFoundError):
        files.load_json(tmp_path / "none")
    assert files.read_json(tmp_path / "none") is None


def test_a_lock_is_seen_while_a_process_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not files.is_locked(path)
    assert not path.exists()
    held = files.open_lock(tmp_path)
    assert not files.is_locked(path)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert files.is_locked(path)
    (tmp_path / "link").symlink_to(path)
    assert not files.is_locked(tmp_path / "link")
    fcntl.flock(held, fcntl.LOCK_SH)  # of a reader
    assert not files.is_locked(path)
    os.close(held)
    os.mkfifo(tmp_path / "pipe")
    assert not files.is_locked(tmp_path / "pipe")
