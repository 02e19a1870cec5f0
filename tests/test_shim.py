"""The places where the program writes, syncs, renames or creates, each refused once by a disk that fails.

After it: a line that names the file, no traceback, no temporary file, nothing finished lost; and the same command then
leaves what an undisturbed one leaves. Some places here; `scripts/soak.py --faults N` has every operation of every
command, and disks on which all that follows fails too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ropelab import files, runs
from ropelab.search import scores
from scripts.soak import complaints, differences, digests
from tests.lab import BPE, SIX, Lab, Said, ropelab
from tests.shim import Shim, failing
from tests.test_faults import SEARCH, Whole, whole  # noqa: F401 (fixture)

COMMANDS: dict[str, Callable[[Lab], Said]] = {
    "train": lambda lab: lab.train("train.keep=[0.5]"),
    "eval": lambda lab: lab.evaluate(),
    "prepare": lambda lab: ropelab("data", "prepare", *BPE, f"data.path={lab.text}", *lab.places()),
    "search": lambda lab: ropelab("search", "longrope", "rope", "--ctx", "64", "--json", *SEARCH, *lab.places()),
    "report": lambda lab: lab.report("rope"),
}
EVERY = {"train": 4, "eval": 1, "prepare": 3, "search": 4, "report": 3}  # of the places of a command, one in so many


def begin(job: str, lab: Lab, whole: Whole) -> None:  # noqa: F811
    """The folder as it is before the command, always at one path: some names are digests of it."""
    shutil.rmtree(lab.root, ignore_errors=True)
    shutil.copytree(whole.lab.root, lab.root, symlinks=True)
    if job in ("train", "prepare"):
        shutil.rmtree(lab.runs)
    if job == "eval":
        shutil.rmtree(lab.run.results)
    if job == "prepare":
        shutil.rmtree(lab.cache)


@pytest.mark.parametrize("job", COMMANDS)
def test_a_disk_that_fails_once_is_said_and_costs_nothing(
    whole: Whole, tmp_path: Path, job: str, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr(scores, "SAVE_EVERY", -1.0)  # after each of them, however long they take
    lab = Lab(tmp_path / "lab", whole.lab.text)
    begin(job, lab, whole)
    with failing(lab.root) as counted:
        said = COMMANDS[job](lab)
    assert said.status == 0, said.err
    undisturbed = digests(lab.root)
    places: dict[str, int] = {}
    for number, operation in enumerate(counted.seen, 1):
        places.setdefault(operation.place, number)
    assert {operation.kind for operation in counted.seen} == {"create", "write", "fsync", "rename"}
    for place, number in list(places.items())[:: EVERY[job]]:
        begin(job, lab, whole)
        before = digests(lab.root)
        with failing(lab.root, number) as shim:
            said = COMMANDS[job](lab)
        assert [operation.place for operation in shim.refused] == [place]
        assert complaints(said.status, said.err, lab.root, before, shim.done) == [], place
        again = COMMANDS[job](lab)
        assert again.status == 0, (place, again.err)
        assert differences(undisturbed, digests(lab.root)) == [], place


def test_a_point_of_a_sweep_is_not_left_out_for_a_full_disk(whole: Whole, tmp_path: Path) -> None:  # noqa: F811
    """`--skip-invalid` is for settings that cannot be."""
    places = (f"data.path={whole.lab.text}", f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}")
    with failing(tmp_path / "cache", 4):
        said = ropelab("sweep", "pos=rope,alibi", "--skip-invalid", "--dry-run", *SIX, *places)
    assert (said.status, said.out) == (2, "")
    assert said.err.splitlines()[-1].startswith(f"ropelab: cache_dir={tmp_path / 'cache'} cannot be written")


def test_tensors_are_on_the_disk_or_the_file_is_named(tmp_path: Path) -> None:
    """Of checkpoints and exports alike: safetensors has an error of its own, and leaves the syncing to others."""
    path = tmp_path / "model.safetensors"
    with failing(tmp_path) as shim:
        runs.save_tensors({"a": torch.ones(4, 6).T}, path)
    assert [operation.kind for operation in shim.seen] == ["write", "fsync"]
    for number in (1, 2):
        with failing(tmp_path, number), pytest.raises(OSError, match=r"model\.safetensors") as caught:
            runs.save_tensors({"a": torch.ones(4)}, path)
        assert caught.value.filename == str(path)


def write_folder(final: Path) -> None:
    with files.new_folder(final) as temporary:
        files.write(temporary / "config.json", b"{}")
        files.publish(temporary, final)


def test_an_error_in_a_new_folder_names_the_file_as_it_would_be_called(tmp_path: Path) -> None:
    final = tmp_path / "model"
    kinds = []
    for number in range(1, 9):
        with failing(tmp_path, number) as shim, pytest.raises(OSError, match=r"model") as caught:
            write_folder(final)
        kinds.append(shim.refused[0].kind)
        named = Path(caught.value.filename)
        assert named in (final, final / "config.json", tmp_path)
        if named != tmp_path:  # that was the sync after it was published
            assert list(tmp_path.iterdir()) == []
    assert set(kinds) == {"create", "write", "fsync", "rename"}


def test_the_shim_refuses_what_it_says(tmp_path: Path) -> None:
    """Every way to write is counted, elsewhere none; half of what was refused is there; afterwards nothing fails."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()

    def act(folder: Path, shim: Shim) -> None:
        (folder / "text").write_text("words")
        handle = os.open(folder / "raw", os.O_WRONLY | os.O_CREAT)
        os.write(handle, b"bytes")
        os.fsync(handle)
        with os.fdopen(handle, "ab") as file:
            file.write(b"more")
        (folder / "raw").replace(folder / "renamed")
        (folder / "made").mkdir()
        save_file({"a": torch.ones(2)}, folder / "made" / "x.safetensors")

    expected = ["create text", "write text", "create raw", "write raw", "fsync raw", "write raw", "rename renamed",
                "create made", "write made/x.safetensors"]  # fmt: skip
    with failing(inside) as shim:
        act(inside, shim)
        act(outside, shim)
    assert [" ".join(operation) for operation in shim.seen] == expected
    for number in range(1, len(expected) + 1):
        shutil.rmtree(inside)
        inside.mkdir()
        with failing(inside, number, lasting=True) as shim, pytest.raises((OSError, SafetensorError)):
            act(inside, shim)
        assert " ".join(shim.refused[0]) == expected[number - 1]
        if number == 2:
            assert (inside / "text").read_text() == "wo"
    shutil.rmtree(inside)
    inside.mkdir()
    act(inside, shim)
