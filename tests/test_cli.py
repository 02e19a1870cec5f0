"""The command line from outside: what it prints, how it ends, and what every mistake is told.

A mistake ends with exit 2 and one line on stderr, `ropelab: what is wrong and the fix`, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ropelab import cli, files, training
from ropelab.positions import ENCODINGS
from tests.lab import TINY, as_json, changed, good, invoke, listing, once, words, write_corpus
from tests.lab import refused as mistake

SHAPE = changed(TINY, "train.steps=3")
NUMBER = (int, float)


@dataclass(frozen=True)
class Lab:
    """A corpus and three finished runs; `tiny` are the settings of one more."""

    root: Path
    corpus: Path
    rope: str
    alibi: str
    learned: str

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def tiny(self, *changes: str) -> list[str]:
        return tiny(self.corpus, *changes)


def tiny(corpus: Path, *changes: str) -> list[str]:
    """The settings of a tiny run on a corpus, changed."""
    return list(changed((*SHAPE, f"data.path={corpus}"), *changes))


@pytest.fixture(scope="module")
def trained(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Copies of three runs that are trained once: these tests evaluate them, and touch their files."""

    def make(folder: Path) -> None:
        corpus = write_corpus(folder / "corpus")
        where = [f"runs_dir={folder / 'runs'}", f"cache_dir={folder / 'cache'}"]
        for pos in ("alibi", "learned", "rope"):
            good("train", *tiny(corpus, f"pos={pos}"), *where)

    made = once(shared / "cli", make)
    root = tmp_path_factory.mktemp("lab")
    for name in ("runs", "cache"):
        shutil.copytree(made / name, root / name)
    names = {path.name.partition("-")[0]: path.name for path in (root / "runs").iterdir() if path.is_dir()}
    return Lab(root, made / "corpus", rope=names["rope"], alibi=names["alibi"], learned=names["learned"])


@pytest.fixture
def lab(trained: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Lab:
    """The trained runs as a user has them: folders from the environment, an empty working folder."""
    monkeypatch.setenv("ROPELAB_RUNS", str(trained.runs))
    monkeypatch.setenv("ROPELAB_CACHE", str(trained.root / "cache"))
    monkeypatch.delenv("ROPELAB_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return trained


@dataclass(frozen=True)
class Refusals:
    """Checks mistakes against the rule above."""

    lab: Lab

    def __call__(self, *arguments: object, says: str | Sequence[str]) -> str:
        before = listing(self.lab.runs, Path.cwd())
        line = mistake(*arguments)
        for part in [says] if isinstance(says, str) else says:
            assert part in line
        assert listing(self.lab.runs, Path.cwd()) == before, "something was written"
        return line


@pytest.fixture
def refused(lab: Lab) -> Refusals:
    return Refusals(lab)


# --- train ----------------------------------------------------------------------------------------------------------

TRAIN_FIELDS: dict[str, type | tuple[type, ...]] = {
    "run": str, "run_dir": str, "status": str, "skipped": bool, "step": int, "train_loss": float, "val_nll": float,
    "params": int, "tokens_per_s": NUMBER, "device": str, "dtype": str,
}  # fmt: skip


def test_train_json(lab: Lab, tmp_path: Path) -> None:
    """A new run, then the same command again: skipped, with the same numbers, and nothing is written."""
    where = f"runs_dir={tmp_path / 'runs'}"
    first = as_json("train", "--pos", "rope", *lab.tiny(where))
    for field, kind in TRAIN_FIELDS.items():
        assert isinstance(first[field], kind), field
    assert (first["status"], first["skipped"], first["step"], first["dtype"]) == ("done", False, 3, "fp32")
    assert Path(first["run_dir"]) == tmp_path / "runs" / first["run"]
    # 257 x 16 tokens, 4 x 16^2 attention, 8 x 16^2 MLP, three norms of 16: the table is tied to the head
    assert first["params"] == 257 * 16 + 12 * 16 * 16 + 3 * 16
    assert abs(first["train_loss"] - math.log(257)) < 0.3  # three steps after a start at the uniform distribution
    before = listing(tmp_path / "runs")
    again = as_json("train", "--pos", "rope", *lab.tiny(where))
    assert again == {**first, "skipped": True}
    assert listing(tmp_path / "runs") == before


def test_train_in_words(lab: Lab) -> None:
    done = good("train", *lab.tiny("pos=rope"))
    assert f"{lab.rope} is finished already" in done.stderr
    assert done.stdout.splitlines()[-1] == str(lab.runs / lab.rope)


def test_train_is_repeatable(lab: Lab, tmp_path: Path) -> None:
    mine = as_json("show", lab.rope)["run"]
    other = as_json("train", "--pos", "rope", *lab.tiny(f"runs_dir={tmp_path / 'again'}"))
    assert other["run"] == mine
    manifest = json.loads((lab.runs / mine / "manifest.json").read_text())
    assert (other["train_loss"], other["val_nll"]) == (manifest["train_loss"], manifest["val_nll"])


def test_train_with_a_scaling_keeps_it(lab: Lab, tmp_path: Path) -> None:
    where = f"runs_dir={tmp_path / 'runs'}"
    run = as_json("train", "--pos", "rope", "--scaling", "linear", "--factor", "4", *lab.tiny(where))["run"]
    assert run.startswith("rope-linear-text-s0-")
    kept = as_json("eval", run, where, "--ctx", "32")
    assert (kept["scaling"], kept["factor"]) == ("linear", 4.0)
    removed = as_json("eval", run, where, "--ctx", "32", "--scaling", "none")
    assert (removed["scaling"], removed["factor"]) == ("none", None)
    replaced = as_json("eval", run, where, "--ctx", "64", "--scaling", "ntk")
    assert (replaced["scaling"], replaced["factor"]) == ("ntk", 2.0)  # of 32, not of 4 x 32: scalings never compound
    changed = as_json("eval", run, where, "--ctx", "32", "--factor", "8")
    assert (changed["scaling"], changed["factor"]) == ("linear", 8.0)


def test_a_loss_that_is_no_number_fails_the_run(lab: Lab, tmp_path: Path) -> None:
    """Exit 1 with the step in message and manifest; the last good weights stay; a second call is not skipped."""
    where = f"runs_dir={tmp_path / 'runs'}"
    settings = lab.tiny(where, "train.lr=1e6", "train.grad_clip=null", "train.warmup_steps=0", "train.steps=50")
    for _ in range(2):
        done = invoke("train", *settings, "--json")
        assert done.exit_code == 1
        assert done.stdout == ""
        assert "finished" not in done.stderr
        lines = done.stderr.splitlines()
        (folder,) = (tmp_path / "runs").iterdir()
        manifest = json.loads((folder / "manifest.json").read_text())
        step = manifest["failed_step"]
        assert manifest["status"] == "failed"
        assert 2 <= step <= 50
        assert f"at step {step}" in lines[-1]
        assert f"at step {step}" in manifest["error"]
        assert "lower train.lr" in lines[-1]
        (checkpoint,) = (folder / "checkpoints").iterdir()
        assert json.loads((checkpoint / "state.json").read_text())["step"] == step - 1
        from safetensors.torch import load_file

        weights = load_file(checkpoint / "model.safetensors")
        assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    (row,) = as_json("runs", where)
    assert (row["status"], row["run"]) == ("failed", folder.name)
    assert invoke("eval", where).exit_code == 2
    assert "is failed" in invoke("eval", where, folder.name).stderr


BAD_TRAIN: list[tuple[list[str], Sequence[str]]] = [
    (["pos=ropee"], ["unknown pos 'ropee'", "did you mean rope?"]),
    (["--pos", "ropee"], ["unknown pos 'ropee'", "did you mean rope?"]),
    (["--scaling", "yrn"], ["unknown scaling 'yrn'", "did you mean yarn?"]),
    (["trian.lr=1"], ["unknown key 'trian.lr'", "did you mean train.lr?"]),
    (["+x=1"], ["'+x=1'", "KEY=VALUE"]),
    (["++x=1"], ["'++x=1'", "KEY=VALUE"]),
    (["~train.lr"], ["'~train.lr'", "KEY=VALUE"]),
    (["train=5"], ["train is a section", "train.ctx"]),
    (["seed=${train.steps}"], ["interpolations", "write the value itself"]),
    (["pos=../data/text"], ["unknown pos '../data/text'", "rope"]),
    (["pos.name=alibi"], ["pos.name", "pos=alibi"]),
    (["hydra.verbose=true"], ["hydra", "ropelab sweep"]),
    (["pos@foo=rope"], ["'pos@foo=rope'", "KEY=VALUE"]),
    (["seed=1", "seed=2"], ["seed is given twice", "once"]),
    (["--pos", "rope", "pos=alibi"], ["--pos rope and pos=alibi", "give pos once"]),
    (["--pos", "rope", "--pos", "alibi"], ["--pos alibi", "give pos once"]),
    (["--scaling", "yarn", "scaling=ntk"], ["give scaling once"]),
    (["--scaling", "yarn", "--factor", "2", "scaling.factor=4"], ["give scaling.factor once"]),
    (["--ctx", "256"], ["use train.ctx=256"]),
    (["pos=rope,alibi"], ["pos takes one value", "ropelab sweep pos=rope,alibi"]),
    (["train.lr=1e-3,2e-3"], ["train.lr takes one value", "ropelab sweep"]),
    (["--scaling", "linear"], ["factor 1 changes nothing", "give scaling.factor"]),
    (["--scaling", "linear", "--factor", "1"], ["factor 1 changes nothing", "give scaling.factor"]),
    (["--scaling", "yarn", "--factor", "auto-row"], ["auto-row belongs to evaluation", "give scaling.factor"]),
    (["--factor", "4"], ["scaling.factor=4 needs a scaling", "linear"]),
    (["--scaling", "linear", "--factor", "0.5"], ["scaling.factor", ">= 1, not 0.5"]),
    (["--scaling", "linear", "--factor", "nan"], ["scaling.factor", ">= 1, not nan"]),
    (["--scaling", "linear", "--factor", "inf"], ["scaling.factor", ">= 1, not inf"]),
    (["--scaling", "linear", "--factor", "much"], ["scaling.factor", "'much'"]),
    (["--scaling", "linear", "--pos", "alibi"], ["scaling=linear", "pos=rope", "pos=alibi"]),
    (["--scaling", "yarn", "--factor", "4", "--pos", "learned"], ["scaling=yarn", "pos=rope", "pos=learned"]),
    (["--scaling", "yarn", "--factor", "4", "scaling.beta_fast=0.5"], ["scaling.beta_fast", "beta_slow"]),
    (["--scaling", "yarn", "--factor", "4", "scaling.ramp=x"], ["scaling.ramp must be index or rotations"]),
    (["--scaling", "ntk", "--factor", "4", "model.n_head=8"], ["two rotary pairs"]),
    (["model.d_model=18"], ["even head dimension, not 9", "model.n_head=2"]),
    (["pos.fraction=0.1"], ["pos.fraction=0.1"]),
    (["pos.fraction=0"], ["pos.fraction must be in (0, 1]"]),
    (["pos.base=1"], ["pos.base must be > 1"]),
    (["pos.base=inf"], ["pos.base", "finite"]),
    (["pos.layout=both"], ["half or interleaved"]),
    (["pos=sinusoidal", "model.d_model=15", "model.n_head=3"], ["even model.d_model"]),
    (["train.keep=[0.01]"], ["train.keep=0.01", "train.steps=3"]),
    (["device=tpu"], ["device must be one of auto, cpu, cuda, mps"]),
    (["device=cpu:3"], ["device=cpu:3", "use device=cpu"]),
    (["train.ctx=100000"], ["too few for one window of 100000", "use train.ctx="]),
    (["data=books", "data.path=null"], ["data.path or ROPELAB_DATA"]),
    (["data=nonfiction"], ["nonfiction only evaluates", "train on books"]),
    (["data=wikitext"], ["wikitext only evaluates", "train on books"]),
    (["data.path=null"], ["needs data.path"]),
    (["data.path=nowhere"], ["data.path=nowhere does not exist", "a folder"]),
    (["data.tokenizer=gpt2", "data.tokenizer_path=nowhere"], ["nowhere", "vocab.bpe"]),
    (["runs_dir="], ["runs_dir is empty"]),
    (["cache_dir="], ["cache_dir is empty"]),
    (["rope"], ["'rope' is not KEY=VALUE"]),
]  # fmt: skip


DIGITS = "1" * 400
LONG: list[tuple[list[str], Sequence[str]]] = [
    (["train", f"model.n_layer={DIGITS}"], ["model.n_layer", "below 2**63", "400 digits"]),
    (["train", f"seed={DIGITS}"], ["seed", "400 digits"]),
    (["train", f"train.lr={DIGITS}"], ["train.lr", "> 0, not inf"]),
    (["train", f"train.keep=[{DIGITS}]"], ["train.keep"]),
    (["train", "positions=randomized", f"positions.max_ctx={DIGITS}"], ["positions.max_ctx", "400 digits"]),
    (["train", f"train.steps={DIGITS * 20}"], ["train.steps", "a whole number"]),
    (["train", "--scaling", "linear", "--factor", DIGITS], ["scaling.factor"]),
    (["show", "--pos", "fire", f"pos.width={DIGITS}"], ["pos.width", "400 digits"]),
    (["show", "--pos", "rope", "--ctx", DIGITS], ["--ctx takes one length"]),
    (["eval", "ROPE", "--ctx", DIGITS], ["--ctx takes lengths up to", "400 digits"]),
    (["eval", "ROPE", "--ctx", f"32,{DIGITS}"], ["--ctx takes lengths up to"]),
    (["eval", "ROPE", f"eval.tokens={DIGITS}"], ["eval.tokens", "400 digits"]),
    (["search", "longrope", "--ctx", DIGITS], ["--ctx takes one number"]),
    (["search", "longrope", "ROPE", "--ctx", "64", f"search.population={DIGITS}"], ["search.population", "to 1000000"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), LONG, ids=[" ".join(row[0])[:40] for row in LONG])
def test_a_number_of_400_digits_is_a_mistake(refused: Refusals, arguments: list[str], says: Sequence[str]) -> None:
    line = refused(*(refused.lab.rope if item == "ROPE" else item for item in arguments), says=says)
    assert len(line) < 600


LARGE: list[tuple[list[str], Sequence[str]]] = [
    (["train", "train.ctx=100000000"], ["training takes at least", "GB are free", "use train.ctx="]),
    (["train", "train.ctx=999999999999"], ["training takes at least", "use train.ctx="]),
    (["train", "model.n_layer=1000000000"], ["use model.n_layer="]),
    (["train", "model.d_model=100000000"], ["use model.d_model="]),
    (["train", "train.batch_size=1000000000000"], ["use train.batch_size="]),
    (["train", "train.batch_size=65536", "train.ctx=1024"], ["use train.micro_batch_size="]),
    (["train", "pos=fire", "pos.width=1000000000000"], ["pos.width="]),
    (["train", "pos=t5", "pos.buckets=1000000000000000000", "pos.max_distance=1000000000000000000"], ["pos.buckets="]),
    (["train", "pos=sandwich", "pos.d=1000000000000"], ["pos.d must be even and from 2 to 65536"]),
    (["train", "positions=randomized", "positions.max_ctx=100000000000000"], ["positions.max_ctx="]),
    (["train", "pos=learned", "train.ctx=10000000000"], ["use train.ctx="]),
    (["train", "pos=cable", "model.n_layer=1000000000000"], ["use model.n_layer="]),
    (["sweep", "pos=rope,alibi", "train.ctx=999999999999999", "--dry-run"], ["more than any machine has"]),
    (["verify-resume", "train.ctx=999999999999"], ["use train.ctx="]),
    (["show", "--pos", "rope", "model.d_model=1000000000", "model.n_head=1"], ["alone takes", "model.d_model"]),
    (["show", "--pos", "sinusoidal", "model.d_model=10000000", "--ctx", "1048576"], ["use --ctx", "model.d_model"]),
    (["show", "--attention", "model.d_model=1000000000"], ["takes", "model.d_model"]),
    (["bench", "train", "train.ctx=100000000"], ["use train.ctx="]),
    (["bench", "eval", "--ctx", "999999999999,"], ["use --ctx"]),
    (["bench", "attention", "--ctx", "999999999999,"], ["use --ctx"]),
    (["bench", "many", "--models", "10000000"], ["fewer of them at once"]),
    (["bench", "start", "--vocab", "1000000000000"], ["training takes at least"]),
    (["eval", "ROPE", "--ctx", "999999999999"], ["no test document is long enough", "use --ctx"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), LARGE, ids=[" ".join(row[0]) for row in LARGE])
def test_what_no_memory_holds_is_refused_before_it_is_made(
    refused: Refusals, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: Sequence[str]
) -> None:
    """In a line with what would fit; neither a model nor a record of positions of that size is tried: that would end
    with no memory, or never."""
    if arguments[0] == "sweep":
        done = invoke(*arguments)
        assert done.exit_code == 2
        assert all(word in done.stderr for word in says), done.stderr
    else:
        refused(*(refused.lab.rope if item == "ROPE" else item for item in arguments), says=says)


def test_memory_that_ends_during_the_work_is_a_line(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:

    for error in (
        MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nIf reserved ..."),
    ):  # fmt: skip

        def full(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(training, "train", full)
        done = invoke("train")
        assert done.exit_code == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("ropelab: out of memory (")
        assert "smaller" in line
    monkeypatch.setattr(training, "train", lambda *_, **__: [][1])
    assert isinstance(invoke("train").exception, IndexError)  # our own faults keep their traceback


@pytest.mark.parametrize(("arguments", "says"), BAD_TRAIN, ids=[" ".join(row[0]) for row in BAD_TRAIN])
def test_train_refuses(refused: Refusals, arguments: list[str], says: Sequence[str]) -> None:
    refused("train", *refused.lab.tiny(*(item for item in arguments if "=" in item)), *(
        item for item in arguments if "=" not in item
    ), says=says)  # fmt: skip


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_train_refuses_a_device_that_is_not_there(refused: Refusals, device: str) -> None:
    there = torch.cuda.device_count() > int(device[5:] or 0) if "cuda" in device else torch.backends.mps.is_available()
    if there:
        pytest.skip(f"this machine has {device}")
    refused("train", *refused.lab.tiny(f"device={device}"), says=[f"device={device}", "use "])
    refused("eval", refused.lab.rope, f"device={device}", says=[f"device={device}", "use "])
    refused("reproduce", "c-order", f"device={device}", says=[f"device={device}", "use "])
    refused("bench", "train", f"device={device}", says=[f"device={device}", "use "])


BAD_FILES: dict[str, tuple[bytes, Sequence[str]]] = {
    "empty.txt": (b"", ["is empty", "remove it"]),
    "bom.txt": (b"\xef\xbb\xbf", ["is empty"]),
    "binary.txt": (b"text\0text", ["is binary", "offset 4"]),
    "latin1.txt": ("caf\xe9".encode("latin1"), ["is not UTF-8", "0xe9 at offset 3", "iconv"]),
    "short.txt": (b"hello", ["too short", "more text"]),
    "blank.txt": (b" \n\n", ["too short", "more text"]),
    "one line.txt": (words(7, 1).encode(), ["too few for one window of 32 + 1"]),
    "picture.png": (b"\x89PNG", ["or .parquet file", "data.endings=[.png]"]),
    "cut.jsonl": (b'{"text": "a', ["line 1", "is not JSON"]),
    "field.jsonl": (b'{"body": "a"}\n', ["line 1", "data.text_field", "body"]),
    "list.jsonl": (b"[1]\n", ["line 1", "no JSON object"]),
    "not.txt.gz": (b"text", ["damaged or no .gz file"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_train_refuses_text_that_is_none(refused: Refusals, tmp_path: Path, name: str) -> None:
    content, says = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    named = [] if name == "one line.txt" else [str(path)]
    refused("train", *refused.lab.tiny(f"data.path={path}"), says=[*says, *named])


def test_one_bad_file_of_many_is_named(refused: Refusals, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "many")
    (folder / "7.txt").write_bytes(b"\xff\xff")
    refused("train", *refused.lab.tiny(f"data.path={folder}"), says=[str(folder / "7.txt"), "UTF-8"])
    (tmp_path / "none").mkdir()
    refused(
        "train", *refused.lab.tiny(f"data.path={tmp_path / 'none'}"), says=[str(tmp_path / "none"), "holds no .txt"]
    )


def test_train_refuses_test_text_in_the_training_text(refused: Refusals, tmp_path: Path) -> None:
    folder = tmp_path / "overlap"
    folder.mkdir()
    text = words(3, 200)
    (folder / "train.txt").write_text(text)
    (folder / "test.txt").write_text(text[5000:9000])
    refused("train", *refused.lab.tiny(f"data.path={folder}"), says=["test.txt", "occurs in the training text"])


# --- folders that cannot be written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_folders_that_are_files(refused: Refusals, tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    for key in ("runs_dir", "cache_dir"):
        refused("train", *refused.lab.tiny(f"{key}={file / below}"), says=[f"{key}=", "cannot be written"])
    refused("reproduce", "c-order", f"runs_dir={file / below}", says=["runs_dir=", "cannot be written"])
    assert file.read_text() == "not a folder"


@pytest.fixture
def read_only(lab: Lab, tmp_path: Path) -> Iterator[Path]:
    """A folder of runs on a file system that is mounted read-only: permissions do not stop root."""
    folder = tmp_path / "read-only"
    good("eval", lab.rope, "--ctx", "64")
    shutil.copytree(lab.runs / lab.rope, folder / lab.rope)
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode
    ):
        pytest.skip("mount --bind is not allowed here")
    try:
        if subprocess.run(["mount", "-o", "remount,ro,bind", folder], capture_output=True).returncode:
            pytest.skip("a read-only bind mount is not allowed here")
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_read_only_folders(refused: Refusals, read_only: Path) -> None:
    lab = refused.lab
    for folder in (read_only, read_only / "deeper"):
        refused("train", *lab.tiny(f"runs_dir={folder}"), says=["runs_dir=", "Read-only", "choose another"])
        refused("reproduce", "c-order", f"runs_dir={folder}", says=["runs_dir=", "Read-only"])
        refused("report", lab.rope, "-o", folder, says=["-o", "Read-only", "choose another"])
        refused("reproduce", "c-order", "-o", folder, says=["-o", "Read-only", "choose another"])
        refused("demo", "-o", folder, says=["-o", "Read-only", "choose another"])
        refused("eval", lab.rope, "-o", folder / "x.png", says=["-o", "Read-only", "choose another"])
        refused("show", "--pos", "rope", "-o", folder / "x.png", says=["-o", "Read-only", "choose another"])


def test_a_read_only_run_is_evaluated_only_if_it_was_before(refused: Refusals, read_only: Path) -> None:
    run = read_only / refused.lab.rope
    assert as_json("eval", run, "--ctx", "64") == as_json("eval", refused.lab.rope, "--ctx", "64")
    refused("eval", run, "--ctx", "40,", says=[str(run / "results"), "Read-only", "copy"])


# --- options as such ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "--pso", "rope"], "--pos"),
        (["train", "--pos"], "--pos"),
        (["reproduce", "c-order", "--seeds", "many"], "--seeds"),
        (["bench"], "train|eval|attention"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_usage_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["ropelab", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("ropelab: ")
    assert says in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [([], "reproduce"), (["--version"], "ropelab 0."), (["runs", "--help"], "rm"), (["-h"], "--version"),
     (["--help"], "-h, --help"), (["runs", "-h"], "rm")],
)  # fmt: skip
def test_help_and_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["ropelab", *arguments])
    with contextlib.suppress(SystemExit):
        cli.main()
    printed = capsys.readouterr()
    assert says in printed.out
    assert printed.err == ""


def test_help_offers_only_what_a_command_takes() -> None:
    """`train` takes its length as train.ctx=N, and says so to whoever types --ctx."""
    offered = good("train", "--help").stdout
    assert "--ctx" not in offered
    assert "--pos" in offered
    for name in ("-h", "--help"):
        for command in ("train", "eval", "sweep", "search", "bench", "export", "import", "verify-resume"):
            assert good(command, name).stdout.startswith("Usage: "), command


HEAVY = ("torch", "hydra", "omegaconf", "wandb", "datasets", "tokenizers", "matplotlib", "plotly", "scipy", "numpy")


def test_light_commands_import_nothing_heavy(lab: Lab) -> None:
    """--help of every command needs none of the libraries; `show` without arguments and `runs` need no torch."""
    commands = [
        command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback
    ]
    assert {"train", "eval", "show", "runs", "data", "reproduce", "demo", "report", "bench"} <= set(commands)
    code = f"""
import sys
from typer.testing import CliRunner
from ropelab.cli import app
def loaded(names): return [name for name in names if name in sys.modules]
for command in {commands!r}:
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0 and "Usage" in done.stdout, command
    assert not loaded({HEAVY!r}), (command, loaded({HEAVY!r}))
for arguments in (["show"], ["show", "--json"], ["runs"], ["runs", "--json"], ["reproduce", "--list"]):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and done.stdout, (arguments, done.stderr)
    heavy = ("torch", "wandb", "datasets", "tokenizers", "matplotlib", "plotly")
    assert not loaded(heavy), (arguments, loaded(heavy))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- eval -----------------------------------------------------------------------------------------------------------

EVAL_FIELDS: dict[str, type | tuple[type, ...]] = {
    "run": str, "pos": str, "scaling": str, "factor": (float, type(None)), "train_ctx": int, "protocol": dict,
    "window": (int, type(None)), "rows": list,
}  # fmt: skip
ROW_FIELDS: dict[str, type | tuple[type, ...]] = {
    "ctx": int, "factor": (float, type(None)), "ppl": (float, type(None)), "nll": (float, type(None)),
    "bits_per_byte": (float, type(None)), "tokens": int, "documents": int, "ci95": (list, type(None)), "status": str,
}  # fmt: skip


def check_contract(result: dict[str, Any]) -> None:
    for field, kind in EVAL_FIELDS.items():
        assert isinstance(result[field], kind), field
    assert isinstance(result["protocol"]["name"], str)
    for row in result["rows"]:
        for field, kind in ROW_FIELDS.items():
            assert isinstance(row[field], kind), field
            assert not isinstance(row[field], bool), field
        if row["status"] == "ok":
            assert row["ppl"] == pytest.approx(math.exp(row["nll"]))
            # a token is a byte here
            assert row["bits_per_byte"] == pytest.approx(row["nll"] / math.log(2))
        if row["ci95"] is not None:
            low, high = row["ci95"]
            assert low <= row["ppl"] <= high


def contexts(result: dict[str, Any]) -> list[int]:
    return [row["ctx"] for row in result["rows"]]


def test_eval_json(lab: Lab) -> None:
    result = as_json("eval", lab.rope, "--ctx", "128")
    check_contract(result)
    assert (result["run"], result["pos"], result["scaling"]) == (lab.rope, "rope", "none")
    assert (result["factor"], result["train_ctx"], result["window"]) == (None, 32, None)
    assert result["protocol"]["name"] == "nonoverlapping"
    assert contexts(result) == [32, 64, 128]
    assert len({row["tokens"] for row in result["rows"]}) == 1  # the same targets at every ctx
    # three steps from a start near the uniform distribution
    assert all(abs(row["nll"] - math.log(256)) < 0.3 for row in result["rows"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("128", [32, 64, 128]),
        ("96", [32, 64, 96]),
        ("32", [32]),
        ("16", [16]),
        ("64,", [64]),
        ("64,256", [64, 256]),
        ("16,32,64", [16, 32, 64]),
        (None, [32, 64, 128, 256]),
    ],
)
def test_ctx_forms(lab: Lab, given: str | None, expected: list[int]) -> None:
    assert contexts(as_json("eval", lab.rope, *(() if given is None else ("--ctx", given)))) == expected


def test_factors(lab: Lab) -> None:
    """auto: one power of two for the ladder; auto-row: one for each row, 1 inside; dynamic: 1, s follows ctx."""
    auto = as_json("eval", lab.rope, "--ctx", "96", "--scaling", "linear")
    assert (auto["factor"], [row["factor"] for row in auto["rows"]]) == (4.0, [4.0, 4.0, 4.0])
    by_row = as_json("eval", lab.rope, "--ctx", "96", "--scaling", "linear", "--factor", "auto-row")
    assert (by_row["factor"], [row["factor"] for row in by_row["rows"]]) == (None, [1.0, 2.0, 4.0])
    given = as_json("eval", lab.rope, "--ctx", "64", "--scaling", "yarn", "--factor", "8")
    assert (given["factor"], [row["factor"] for row in given["rows"]]) == (8.0, [8.0, 8.0])
    dynamic = as_json("eval", lab.rope, "--ctx", "96", "--scaling", "dynamic_ntk")
    assert (dynamic["factor"], [row["factor"] for row in dynamic["rows"]]) == (1.0, [1.0, 1.0, 1.0])
    # up to L auto-row and the dynamic method scale nothing, and one factor for all does
    plain = as_json("eval", lab.rope, "--ctx", "96")
    assert by_row["rows"][0]["nll"] == plain["rows"][0]["nll"] == dynamic["rows"][0]["nll"]
    assert auto["rows"][0]["nll"] != plain["rows"][0]["nll"]
    assert by_row["rows"][2]["nll"] == auto["rows"][2]["nll"]
    for result in (auto, by_row, given, dynamic):
        check_contract(result)


def test_a_length_at_which_an_encoding_is_undefined_is_a_row(lab: Lab) -> None:
    result = as_json("eval", lab.learned, "--ctx", "64")
    check_contract(result)
    inside, outside = result["rows"]
    assert inside["status"] == "ok"
    assert (outside["ctx"], outside["status"], outside["ppl"], outside["nll"]) == (64, "undefined", None, None)
    assert (outside["ci95"], outside["tokens"]) == (None, 0)
    table = good("eval", lab.learned, "--ctx", "64").stdout
    assert "64" in table


def test_numbers_that_are_not_finite_are_null(lab: Lab, broken: Path, tmp_path: Path) -> None:
    """Weights far too large give a perplexity that no float holds; weights that are no numbers give none at all."""
    from safetensors.torch import load_file, save_file

    checkpoint = broken / "checkpoints" / "step-00000003"
    weights = load_file(checkpoint / "model.safetensors")
    state = files.unsealed(json.loads((checkpoint / "state.json").read_text()))
    for scale, status in ((1e3, "ok"), (math.nan, "non-finite")):
        save_file({name: tensor * scale for name, tensor in weights.items()}, checkpoint / "model.safetensors")
        state["sha256"]["model.safetensors"] = hashlib.sha256(
            (checkpoint / "model.safetensors").read_bytes()
        ).hexdigest()  # fmt: skip
        files.write_sealed(checkpoint / "state.json", state)
        shutil.rmtree(broken / "results", ignore_errors=True)
        rows = as_json("eval", broken, "--ctx", "64")["rows"]
        assert [(row["ctx"], row["status"], row["ppl"]) for row in rows] == [(32, status, None), (64, status, None)]
        assert all((row["nll"] is None) == (status != "ok") for row in rows)
        assert all((row["nll"] or 1e9) > 700 for row in rows)
        good("eval", broken, "--ctx", "64")
        good("report", broken, "-o", tmp_path / "report")
        results = (tmp_path / "report" / "results.json").read_text()
        json.loads(results, parse_constant=lambda name: pytest.fail(f"JSON has no {name}"))


def test_several_runs_and_scalings(lab: Lab) -> None:
    two = as_json("eval", lab.alibi, lab.rope, "--ctx", "64")
    assert set(two) == {"results"}
    assert [item["run"] for item in two["results"]] == [lab.alibi, lab.rope]
    for item in two["results"]:
        check_contract(item)
    # only runs of the same targets are comparable, and these are
    assert len({item["protocol"]["targets_digest"] for item in two["results"]}) == 1
    three = as_json("eval", lab.rope, "eval.scalings=[none,yarn:4,linear]", "--ctx", "64")
    assert [(item["scaling"], item["factor"]) for item in three["results"]] == [
        ("none", None), ("yarn", 4.0), ("linear", 2.0),
    ]  # fmt: skip
    assert as_json("eval", lab.rope, "eval.scalings=[yarn:4]", "--ctx", "64") == three["results"][1]


def test_eval_takes_the_latest_finished_run(lab: Lab) -> None:
    (lab.runs / lab.alibi / "manifest.json").touch()
    done = good("eval", "--ctx", "32", "--json")
    assert json.loads(done.stdout)["run"] == lab.alibi
    assert lab.alibi in done.stderr
    (lab.runs / lab.rope / "manifest.json").touch()
    assert json.loads(good("eval", "--ctx", "32", "--json").stdout)["run"] == lab.rope


def test_runs_by_path_and_by_the_beginning_of_their_name(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    names = (lab.runs / lab.rope, f"{lab.runs / lab.rope}/", lab.rope[:4], lab.rope.rpartition("-")[2])
    for name in names:
        assert as_json("eval", name, "--ctx", "32")["run"] == lab.rope
    monkeypatch.chdir(lab.runs)
    monkeypatch.delenv("ROPELAB_RUNS")
    assert as_json("eval", lab.rope, "--ctx", "32")["run"] == lab.rope


def test_a_stored_evaluation_is_read(lab: Lab) -> None:
    """The second time nothing is computed: what was stored is what is printed, here with a mark in it."""
    arguments = ("eval", lab.rope, "--ctx", "48,", "--protocol", "last", "eval.last=8")
    folder = lab.runs / lab.rope / "results"
    before = set(folder.glob("*.json"))
    first = as_json(*arguments)
    (stored,) = set(folder.glob("*.json")) - before
    again = listing(folder)
    assert as_json(*arguments) == first
    assert listing(folder) == again
    files.write_sealed(stored, {**files.unsealed(json.loads(stored.read_text())), "mark": 1})
    assert as_json(*arguments) == {**first, "mark": 1}
    stored.write_text('{"cut')  # a damaged one is computed again
    assert as_json(*arguments) == first
    assert json.loads(stored.read_text()).items() >= first.items()


def test_eval_in_words(lab: Lab, tmp_path: Path) -> None:
    picture = tmp_path / "new folder" / "x.png"
    done = good("eval", lab.rope, "--ctx", "64", "-o", picture)
    assert "RoPE" in done.stdout
    assert "nonoverlapping" in " ".join(done.stdout.split())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in done.stderr
    picture.unlink()
    assert json.loads(good("eval", lab.rope, "--ctx", "64", "--json", "-o", picture).stdout)["run"] == lab.rope
    assert picture.exists()


def test_other_text(lab: Lab, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", seed=5, files=3)
    result = as_json("eval", lab.rope, "data=text", f"data.path={other}", "--ctx", "64")
    check_contract(result)
    assert result["rows"][0]["documents"] == 3  # all of it is test text
    own = as_json("eval", lab.rope, "--ctx", "64")
    assert result["protocol"]["targets_digest"] != own["protocol"]["targets_digest"]
    one = as_json("eval", lab.rope, f"data.path={other / '1.txt'}", "--ctx", "64")
    assert one["rows"][0]["documents"] == 1


def test_eval_refuses_text_of_the_training(refused: Refusals, tmp_path: Path) -> None:
    """A copy of the training text is other text to be scored in full; the run's own place would be its test split."""
    lab = refused.lab
    copy = shutil.copytree(lab.corpus, tmp_path / "copy")
    refused("eval", lab.rope, "data=text", f"data.path={copy}", "--ctx", "64", says="occur in the training text")


def test_eval_refuses_text_that_is_too_short(refused: Refusals, tmp_path: Path) -> None:
    text = words(511, 2)
    (tmp_path / "a.txt").write_text(text)
    refused(
        "eval", refused.lab.rope, "data=text", f"data.path={tmp_path / 'a.txt'}", "--ctx", "1024",
        says=[f"the longest has {len(text)}", f"use --ctx {len(text) - 1} or less"],
    )  # fmt: skip


BAD_EVAL: list[tuple[list[str], Sequence[str]]] = [
    (["ROPE", "--ctx", "0"], ["--ctx", "at least 2"]),
    (["ROPE", "--ctx", "-1"], ["--ctx", "at least 2"]),
    (["ROPE", "--ctx", "abc"], ["--ctx", "such as 8192", "'abc'"]),
    (["ROPE", "--ctx", "1.5"], ["--ctx", "such as 8192"]),
    (["ROPE", "--ctx", "512,256"], ["--ctx", "growing"]),
    (["ROPE", "--ctx", "512,512"], ["--ctx", "growing"]),
    (["ROPE", "--ctx", ""], ["eval.ctx is empty"]),
    (["ROPE", "--ctx", ","], ["--ctx", "such as 8192"]),
    (["ROPE", "--ctx", "64,,"], ["--ctx", "such as 8192"]),
    (["ROPE", "--ctx", str(2**40)], ["ctx", "use "]),
    (["ROPE", "--ctx", "4096,"], ["no test document is long enough for ctx 4096", "use --ctx"]),
    (["ROPE", "--ctx", "64", "--ctx", "128"], ["give eval.ctx once"]),
    (["ROPE", "--ctx", "64", "eval.ctx=128"], ["give eval.ctx once"]),
    (["ROPE", "--ctx", "31,500"], ["31 does not divide 500", "use "]),
    (["ROPE", "--ctx", "64", "eval.max_ctx=32"], ["eval.max_ctx=32", "64"]),
    (["ROPE", "--ctx", "64", "--protocol", "last"], ["eval.last=64", "16 or less"]),
    (["ROPE", "--ctx", "64", "--protocol", "last", "eval.last=17"], ["eval.last=17", "16 or less"]),
    (["ROPE", "--ctx", "64", "--protocol", "sliding"], ["eval.stride=64", "32 or less"]),
    (["ROPE", "--protocol", "lst"], ["eval.protocol", "last"]),
    (["ROPE", "--scaling", "yrn"], ["did you mean yarn?"]),
    (["ROPE", "--factor", "4"], ["scaling.factor=4 needs a scaling", "linear"]),
    (["ALIBI", "--factor", "4"], ["scaling.factor=4 needs a scaling"]),
    (["ROPE", "--scaling", "yarn", "--factor", "0.5"], [">= 1, not 0.5"]),
    (["ROPE", "--scaling", "yarn", "--factor", "nan"], [">= 1, not nan"]),
    (["ROPE", "--scaling", "yarn", "--factor", "inf"], [">= 1, not inf"]),
    (["ROPE", "--scaling", "yarn", "--factor", "x"], ["'x'"]),
    (["ALIBI", "--scaling", "yarn", "--ctx", "64"], ["scaling=yarn", "pos=rope", "pos=alibi"]),
    (["ALIBI", "eval.scalings=[none,yarn:4]", "--ctx", "80,"], ["scaling=yarn", "pos=alibi"]),
    (["ROPE", "ALIBI", "--scaling", "yarn", "--ctx", "80,"], ["scaling=yarn", "pos=alibi"]),
    (["ROPE", "eval.scalings=[none]", "--scaling", "yarn"], ["either --scaling or eval.scalings"]),
    (["ROPE", "eval.scalings=[yrn]"], ["did you mean yarn?"]),
    (["ROPE", "pos=alibi"], ["pos=alibi is fixed by the run", "eval takes"]),
    (["ROPE", "model.n_layer=2"], ["model.n_layer=2 is fixed by the run"]),
    (["ROPE", "train.ctx=64"], ["train.ctx=64 is fixed by the run"]),
    (["ROPE", "seed=1"], ["seed=1 is fixed by the run"]),
    (["ROPE", "data.tokenizer=bpe"], ["the run's own tokeniser"]),
    (["ROPE", "data=text"], ["needs data.path"]),
    (["ROPE", "data=text", "data.path=nowhere"], ["data.path=nowhere does not exist"]),
    (["ROPE", "eval.split=validation", "data=text", "data.path=nowhere"], ["eval.split=validation"]),
    (["nope"], ["there is no run 'nope'"]),
    (["ROPE", "nope"], ["there is no run 'nope'"]),
    (["rope-txt-s0"], ["there is no run", "did you mean rope-text-s0-"]),
    (["ROPE", "+eval.last=3"], ["'+eval.last=3'"]),
    (["ROPE", "-o", "x.pdf"], ["-o x.pdf", "ends in .png"]),
    (["ROPE", "-o", "."], ["-o .", "ends in .png"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), BAD_EVAL, ids=[" ".join(row[0]) for row in BAD_EVAL])
def test_eval_refuses(refused: Refusals, arguments: list[str], says: Sequence[str]) -> None:
    runs = {"ROPE": refused.lab.rope, "ALIBI": refused.lab.alibi}
    refused("eval", *(runs.get(item, item) for item in arguments), says=says)


def test_output_in_a_place_that_is_none(refused: Refusals, tmp_path: Path) -> None:
    lab = refused.lab
    file = tmp_path / "file"
    file.write_text("not a folder")
    (tmp_path / "folder.png").mkdir()
    refused("eval", lab.rope, "-o", file / "x.png", says=["-o", "cannot be written"])
    refused("eval", lab.rope, "-o", tmp_path / "folder.png", says=["is a folder"])
    refused("show", "--pos", "rope", "-o", file / "x.png", says=["-o", "cannot be written"])
    refused("show", "--pos", "rope", "-o", "x.svg", says=["ends in .png"])
    refused("report", lab.rope, "-o", file, says=["-o", "cannot be written"])
    refused("reproduce", "c-order", "-o", file / "x", says=["-o", "cannot be written"])
    refused("demo", "-o", file, says=["-o", "cannot be written"])
    assert file.read_text() == "not a folder"


# --- runs that cannot be used ---------------------------------------------------------------------------------------


@pytest.fixture
def broken(lab: Lab, tmp_path: Path) -> Path:
    """A copy of a run to be damaged, alone in a folder of runs."""
    return Path(shutil.copytree(lab.runs / lab.rope, tmp_path / "runs" / lab.rope))


def damage_manifest(run: Path, **changes: object) -> None:
    files.write_sealed(run / "manifest.json", {**files.load_json(run / "manifest.json"), **changes})


@pytest.mark.parametrize("damage", ["truncated", "one bit", "weights gone", "checkpoint gone", "state cut"])
def test_eval_refuses_a_damaged_checkpoint(refused: Refusals, broken: Path, damage: str) -> None:
    checkpoint = broken / "checkpoints" / "step-00000003"
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "truncated":
        weights.write_bytes(content[:-1])
    elif damage == "one bit":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "weights gone":
        weights.unlink()
    elif damage == "checkpoint gone":
        shutil.rmtree(checkpoint)
    else:
        (checkpoint / "state.json").write_text("{")
    before = listing(broken)
    refused(
        "eval", broken, "--ctx", "32", says=[str(checkpoint), "truncated, altered or missing", "train the run again"]
    )
    assert listing(broken) == before


@pytest.mark.parametrize(("status", "shown"), [("running", "interrupted"), ("failed", "failed")])
def test_eval_refuses_a_run_that_is_not_finished(refused: Refusals, broken: Path, status: str, shown: str) -> None:
    damage_manifest(broken, status=status)
    where = f"runs_dir={broken.parent}"
    refused("eval", broken, says=[broken.name, f"is {shown}", "ropelab train"])
    refused("eval", where, says=["no finished run", "ropelab train"])
    (row,) = as_json("runs", where)
    assert row["status"] == shown


@pytest.mark.parametrize("content", ["{", "[]", "{}", ""])
def test_a_broken_manifest_hides_no_other_run(refused: Refusals, broken: Path, content: str) -> None:
    other = Path(shutil.copytree(broken, broken.parent / "other"))
    (broken / "manifest.json").write_text(content)
    where = f"runs_dir={broken.parent}"
    refused("eval", broken, says=broken.name)
    refused("show", broken, says="")
    rows = {row["run"]: row["status"] for row in as_json("runs", where)}
    assert rows.pop(broken.name) in ("damaged", "unknown")
    assert rows == {other.name: "done"}
    assert other.name in good("runs", where).stdout
    assert as_json("eval", where, "--ctx", "32")["run"] == refused.lab.rope


def test_a_broken_tokeniser_is_named(refused: Refusals, broken: Path) -> None:
    (broken / "tokenizer.json").write_text("{")
    refused("eval", broken, "--ctx", "32", says=[str(broken / "tokenizer.json"), "damaged"])


def test_eval_refuses_text_that_was_changed(refused: Refusals, tmp_path: Path) -> None:
    """The text of a run is its identity: changed or moved text is said, not silently scored."""
    lab = refused.lab
    corpus = Path(shutil.copytree(lab.corpus, tmp_path / "corpus"))
    where = f"runs_dir={tmp_path / 'runs'}"
    run = as_json("train", *lab.tiny(where, f"data.path={corpus}", "pos=rope"))["run"]
    assert run == lab.rope  # the same text in another place is the same run
    (corpus / "0.txt").write_text(words(99))
    refused("eval", where, run, "--ctx", "32", says=[run, "restore it"])
    shutil.rmtree(corpus)
    refused("eval", where, run, "--ctx", "32", says=[str(corpus), "does not exist"])


# --- show -----------------------------------------------------------------------------------------------------------


def test_show_json(lab: Lab) -> None:
    shown = as_json("show", "--pos", "rope", "--scaling", "linear", "--factor", "8", "--ctx", "256")
    assert (shown["pos"], shown["scaling"], shown["factor"]) == ("rope", "linear", 8.0)
    assert (shown["ctx"], shown["train_ctx"], shown["d_head"], shown["n_head"]) == (256, 128, 32, 4)
    inv_freq = shown["rotation"]["inv_freq"]
    # Su et al. 2021: theta_i = 10000^(-2i/d); Chen et al. 2023: divided by the factor
    assert inv_freq == pytest.approx([10000 ** (-2 * i / 32) / 8 for i in range(16)], rel=1e-12)
    assert shown["rotation"]["attention_factor"] == 1.0
    assert (shown["bias"], shown["embedding"]) == (None, None)
    for pair, row in enumerate(shown["coverage"]):
        theta = 10000 ** (-2 * pair / 32)
        assert row["pair"] == pair
        assert row["wavelength"] == pytest.approx(2 * math.pi * 8 / theta)
        assert row["turns_train"] == pytest.approx(128 * theta / (2 * math.pi))
        assert row["turns_ctx"] == pytest.approx(256 * theta / 8 / (2 * math.pi))


def test_show_json_of_the_other_kinds(lab: Lab) -> None:
    alibi = as_json("show", "--pos", "alibi", "--ctx", "8")
    assert (alibi["rotation"], alibi["embedding"], alibi["coverage"], alibi["factor"]) == (None, None, None, None)
    # Press et al. 2022: slopes 2^(-8h/H)
    assert alibi["bias"]["by_distance"] == [[-(2.0 ** (-2 * h)) * d for d in range(8)] for h in range(1, 5)]
    sinusoidal = as_json("show", "--pos", "sinusoidal", "--ctx", "8", "model.d_model=16", "model.n_head=2")
    table = sinusoidal["embedding"]
    assert (len(table), len(table[0])) == (8, 16)
    # Vaswani et al. 2017, section 3.5: sin and cos of p / 10000^(2i/d) in turn
    expected = [
        [(math.sin if c % 2 == 0 else math.cos)(p / 10000 ** ((c - c % 2) / 16)) for c in range(16)] for p in range(8)
    ]
    assert [value for row in table for value in row] == pytest.approx([v for row in expected for v in row], abs=1e-6)
    none = as_json("show", "pos=none")
    assert (none["scaling"], none["rotation"], none["bias"], none["embedding"]) == ("none", None, None, None)


def test_show_in_its_other_forms(lab: Lab, tmp_path: Path) -> None:
    methods = as_json("show")
    assert "rope" in methods["pos"]
    assert "2309.00071" in methods["scaling"]["yarn"]["paper"]
    text = good("show").stdout
    assert all(name in text for name in (*methods["pos"], *methods["scaling"]))
    assert as_json("show", "train.lr=0.5")["train"]["lr"] == 0.5
    run = as_json("show", lab.rope)
    assert (run["run"], run["pos"], run["train_ctx"], run["d_head"]) == (lab.rope, "rope", 32, 8)
    assert "status: done" in good("show", lab.rope).stdout
    picture = tmp_path / "x.png"
    good("show", "--pos", "rope", "-o", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    for settings in (["--pos", "p_rope"], ["--scaling", "proportional", "--factor", "2"]):  # pairs that do not turn
        assert "does not turn" in good("show", *settings).stdout
    assert "scaling rerope: " in good("show", "--pos", "rope", "--scaling", "rerope", "--ctx", "256").stdout
    assert methods["scaling"]["clamp"]["applies_to"] == ["learned"]


def test_show_explains_the_curve_of_a_run(lab: Lab, tmp_path: Path) -> None:
    run = shutil.copytree(lab.runs / lab.rope, tmp_path / "runs" / lab.rope, ignore=shutil.ignore_patterns("results"))
    text = good("show", run).stdout
    assert f"not evaluated: run `ropelab eval {lab.rope}" in text
    good("eval", run, "--ctx", "128", "--protocol", "last", "eval.last=8", "eval.scalings=[none,linear:4]", "--json")
    good("eval", run, "--ctx", "128", "--protocol", "nonoverlapping", "--json")
    shown = as_json("show", run)
    assert shown["ctx"] == 128  # the longest that was evaluated
    plain, linear = shown["diagnosis"]["evaluated"]
    assert (plain["scaling"], plain["predicted"]["breaks_from"]) == ("none", 33)
    assert (linear["scaling"], linear["factor"], linear["predicted"]["breaks_from"]) == ("linear", 4.0, 129)
    assert plain["by_position"]["ctx"] == 128
    assert linear["by_position"] is None
    # theta_3 = 10000^(-6/8): 32 tokens are 0.032 radians of it
    assert shown["coverage"][3]["trained_to"] == pytest.approx(0.032)
    assert sum(row["new"] for row in shown["coverage"]) == plain["new_pairs"] == 3
    text = good("show", run).stdout
    for word in ("Predicted and observed breakdown", "PI ×4", "129", "loss by position, none, at 128 tokens"):
        assert word in text
    good("report", run, "-o", tmp_path / "report")
    assert "Why the curves bend" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_show_of_a_run_takes_a_scaling_and_measures_attention(lab: Lab, tmp_path: Path) -> None:
    shown = as_json("show", lab.rope, "--scaling", "yarn", "--factor", "4", "--ctx", "100", "--attention")
    assert (shown["scaling"], shown["factor"], shown["ctx"]) == ("yarn", 4.0, 100)
    assert not any(row["new"] for row in shown["coverage"])
    found = shown["attention"]
    assert (found["text"], found["ctx"], found["edges"]) == ("text", 100, [0, 1, 2, 4, 8, 16, 32, 64, 100])
    assert found["queries"] == 64 * found["documents"]
    (heads,) = found["mass"]
    for head, row in enumerate(heads):
        assert sum(row) == pytest.approx(1, abs=1e-6)
        assert found["beyond"][0][head] == pytest.approx(sum(row[6:]), abs=1e-6)  # 32 tokens back and more
    picture = tmp_path / "x.png"
    text = good("show", lab.rope, "--attention", "--ctx", "64", "-o", picture).stdout
    assert "attention by distance at 64 tokens" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_show_of_a_run_has_its_trained_tensors(lab: Lab) -> None:
    from ropelab.runs import RunDir

    table = RunDir(lab.runs / lab.learned).load_weights()["encoding.table"]
    assert as_json("show", lab.learned)["embedding"] == table.tolist()
    stretched = as_json("show", lab.learned, "--scaling", "interpolate", "--factor", "2", "--ctx", "64")["embedding"]
    assert stretched[:4:2] == table[:2].tolist()


def test_show_prints_which_kernel_serves_an_encoding() -> None:
    """Every encoding has a row; one encoding has its own lengths and dtype."""
    rows = as_json("show", "--attention", "device=cpu", "train.dtype=fp32")["attention"]
    assert {row["pos"] for row in rows} == set(ENCODINGS)
    kernels = {(row["pos"], row["use"]): row["kernel"] for row in rows}
    assert kernels["rope", "evaluation"] == "sdpa"
    assert kernels["t5", "evaluation"] == "blocks"
    assert kernels["learned", "evaluation"] is None  # past its table
    settings = ("--pos", "t5", "train.ctx=1024", "train.dtype=bf16", "eval.window=100", "device=cpu")
    one, other = as_json("show", "--attention", *settings, "--ctx", "2048")["attention"]
    assert {key: one[key] for key in ("use", "ctx", "device", "dtype", "kernel")} == {
        "use": "training", "ctx": 1024, "device": "cpu", "dtype": "bf16", "kernel": "recomputed",
    }  # fmt: skip
    assert (other["ctx"], other["dtype"], other["kernel"]) == (2048, "fp32", "blocks")
    assert "t5                   recomputed" in good("show", "--attention", *settings).stdout


BAD_SHOW: list[tuple[list[str], Sequence[str]]] = [
    (["ROPE", "ALIBI"], ["show takes one RUN"]),
    (["ROPE", "--pos", "rope"], ["show takes one RUN"]),
    (["ROPE", "train.lr=1"], ["has its own configuration"]),
    (["qqqq"], ["there is no run 'qqqq'", "`ropelab runs` lists those"]),
    (["roep"], ["there is no run 'roep'", "did you mean the method rope (`ropelab show --pos rope`)?"]),
    (["yarn"], ["there is no run 'yarn'", "did you mean the method yarn (`ropelab show --scaling yarn`)?"]),
    (["c-yarn-8"], ["there is no run", "did you mean the claim c-yarn-8x (`ropelab reproduce c-yarn-8x`)?"]),
    (["rope-txt-s0"], ["there is no run", "did you mean rope-text-s0-"]),
    (["--pos", "ropee"], ["did you mean rope?"]),
    (["--pos", "alibi", "--scaling", "yarn"], ["scaling=yarn", "pos=rope"]),
    (["--pos", "rope", "--factor", "4"], ["needs a scaling"]),
    (["--pos", "rope", "--ctx", "0"], ["--ctx takes one length from 1"]),
    (["--pos", "rope", "--ctx", "64,128"], ["--ctx takes one length"]),
    (["--pos", "rope", "--ctx", ""], ["--ctx takes one length"]),
    (["--pos", "rope", "--ctx", str(10**9)], ["--ctx takes one length"]),
    (["--pos", "rope", "--ctx", "4", "--ctx", "8"], ["--ctx takes one length"]),
    (["--pos", "learned", "--ctx", "1000"], ["end at 128"]),
    (["--ctx", "64"], ["add --pos NAME"]),
    (["--pos", "rope", "--attention", "-o", "x.png"], ["-o draws no table of kernels"]),
    (["--attention", "--pos", "alibi", "--scaling", "yarn"], ["scaling=yarn applies to pos=rope"]),
    (["--attention", "--ctx", "0"], ["--ctx takes one length from 1"]),
    (["ROPE", "--scaling", "clamp"], ["scaling=clamp", "pos=learned"]),
    (["ROPE", "--attention", "--ctx", "100000"], ["no test document holds 100000 tokens"]),
    (["-o", "x.png"], ["add --pos NAME"]),
    (["--pos", "rope", "model.d_model=18", "model.n_head=2"], ["even head dimension"]),
]


@pytest.mark.parametrize(("arguments", "says"), BAD_SHOW, ids=[" ".join(row[0]) for row in BAD_SHOW])
def test_show_refuses(refused: Refusals, arguments: list[str], says: Sequence[str]) -> None:
    runs = {"ROPE": refused.lab.rope, "ALIBI": refused.lab.alibi}
    refused("show", *(runs.get(item, item) for item in arguments), says=says)


# --- runs, data, report, reproduce, bench ---------------------------------------------------------------------------


def test_runs(lab: Lab) -> None:
    rows = {row["run"]: row for row in as_json("runs")}
    assert set(rows) == {lab.rope, lab.alibi, lab.learned}
    assert all((row["status"], row["step"], row["train_ctx"]) == ("done", 3, 32) for row in rows.values())
    assert all(run in good("runs").stdout for run in rows)
    assert as_json("runs", f"runs_dir={lab.root / 'no such folder'}") == []


def test_runs_rm(lab: Lab, broken: Path) -> None:
    where = f"runs_dir={broken.parent}"
    kept = invoke("runs", "rm", broken.name, where, input="n\n")
    assert broken.exists()
    assert str(broken) in kept.stderr
    assert good("runs", "rm", "--yes", broken.name, where).exit_code == 0
    assert not broken.exists()
    assert (lab.runs / lab.rope).exists()


OTHERS: list[tuple[list[str], Sequence[str]]] = [
    (["runs", "rm"], ["needs the runs to remove"]),
    (["runs", "rm", "nope", "--yes"], ["there is no run 'nope'"]),
    (["runs", "delete"], ["list or rm, not 'delete'"]),
    (["runs", "+x=1"], ["'+x=1'"]),
    (["data", "fetch"], ["list or prepare, not 'fetch'"]),
    (["data", "prepare", "data=text", "data.path=nowhere"], ["nowhere does not exist"]),
    (["report", "nope"], ["there is no run 'nope'"]),
    (["reproduce"], ["--list"]),
    (["reproduce", "c-odrer"], ["c-order"]),
    (["reproduce", "nowhere.yaml"], ["nowhere.yaml"]),
    (["reproduce", "c-order", "--seeds", "0"], ["--seeds must be at least 1"]),
    (["reproduce", "c-order", "--seeds", "-1"], ["--seeds must be at least 1"]),
    (["reproduce", "demo", "c-order"], ["demo is a set"]),
    (["reproduce", "c-order", "train.lr=1"], ["train.lr=1 is fixed by the claim's file"]),
    (["reproduce", "c-order", "runs_dir="], ["runs_dir is empty"]),
    (["demo", "--seeds", "0"], ["--seeds must be at least 1"]),
    (["demo", "pos=rope"], ["pos=rope is fixed"]),
    (["bench", "speed"], ["train, eval, attention, many or start, not 'speed'"]),
    (["bench", "train", "--rounds", "0"], ["--rounds must be at least 1"]),
    (["bench", "train", "--ctx", "64"], ["use train.ctx=64"]),
    (["bench", "train", "--pos", "ropee"], ["did you mean rope?"]),
    (["bench", "attention", "--ctx", "abc"], ["--ctx", "'abc'"]),
]


@pytest.mark.parametrize(("arguments", "says"), OTHERS, ids=[" ".join(row[0]) for row in OTHERS])
def test_other_commands_refuse(refused: Refusals, arguments: list[str], says: Sequence[str]) -> None:
    refused(*arguments, says=says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("statement: x\ncolour: red\n", ["colour", "statement"]),
        ("a: [\n", ["no valid YAML"]),
        ("", ["must be a mapping"]),
        ("- 1\n", ["must be a mapping"]),
    ],
)
def test_reproduce_refuses_a_file_with_errors(refused: Refusals, tmp_path: Path, content: str, says: list[str]) -> None:
    file = tmp_path / "my claim.yaml"
    file.write_text(content)
    refused("reproduce", file, says=["my claim.yaml", *says])


def test_reproduce_lists_claims(lab: Lab) -> None:
    found = as_json("reproduce", "--list")
    assert "c-order" in [row["claim"] for row in found]
    assert all(row["statement"] and row["source"] for row in found)
    assert "demo" in good("reproduce", "--list").stdout


CLAIM = """
statement: A learned table ends at the training length
source: Press et al. 2022, footnote 4
tier: cpu
cell: cell.yaml
protocol: nonoverlapping
runs:
  learned: [pos=learned]
checks:
  - statement: It has a perplexity where it should
    exact: {kind}
    terms: [learned@L]
"""


def test_reproduce_from_nothing_to_a_verdict(lab: Lab, forked_workers: None, tmp_path: Path) -> None:
    """Trains what is missing, once; exit 0 for PASS and 1 for FAIL, with the JSON of both."""
    folder = tmp_path / "my claims"
    folder.mkdir()
    settings = [item for item in lab.tiny() if not item.startswith("device")]
    cell = {"train": settings, "eval": {"ctx": ["L", "2L"], "tokens": 256, "last": 8, "stride": 8}}
    (folder / "cell.yaml").write_text(json.dumps(cell))  # JSON is YAML
    (folder / "true.yaml").write_text(CLAIM.format(kind="defined"))
    (folder / "false.yaml").write_text(CLAIM.format(kind="undefined"))
    where = [f"runs_dir={tmp_path / 'runs'}", "device=cpu"]
    done = invoke("reproduce", folder / "true.yaml", *where, "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    (found,) = result["verdicts"]
    assert (found["claim"], found["verdict"]) == ("true", "PASS")
    assert isinstance(found["reason"], str)
    (check,) = found["checks"]
    assert {"statement", "theta", "tau", "interval", "verdict"} <= set(check)
    assert check["verdict"] == "PASS"
    for item in result["evals"]:
        check_contract(item)
        assert [row["status"] for row in item["rows"]] == ["ok", "undefined"]
    assert [(row["run"], row["status"]) for row in as_json("runs", where[0])] == [(lab.learned, "done")]

    both = [folder / "true.yaml", folder / "false.yaml"]
    done = invoke("reproduce", *both, *where, "-o", tmp_path / "report")
    assert done.exit_code == 1
    assert "0 of 1 runs trained" in done.stderr
    stored = json.loads((tmp_path / "report" / "results.json").read_text())
    assert [(item["claim"], item["verdict"]) for item in stored["verdicts"]] == [("true", "PASS"), ("false", "FAIL")]
    assert "PASS" in done.stdout
    assert "FAIL" in done.stdout
    assert done.stdout.splitlines()[-1] == str(tmp_path / "report" / "report.html")


def test_reproduce_says_which_run_failed(lab: Lab, forked_workers: None, tmp_path: Path) -> None:
    settings = [item for item in lab.tiny("data.path=nowhere") if not item.startswith("device")]
    (tmp_path / "cell.yaml").write_text(json.dumps({"train": settings, "eval": {"ctx": ["L", "2L"], "tokens": 256}}))
    (tmp_path / "mine.yaml").write_text(CLAIM.format(kind="defined"))
    done = invoke("reproduce", tmp_path / "mine.yaml", f"runs_dir={tmp_path / 'runs'}", "device=cpu", "--json")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "pos=learned" in done.stderr
    assert "nowhere does not exist" in done.stderr


def test_report(lab: Lab, refused: Refusals, tmp_path: Path) -> None:
    good("eval", lab.rope, "--ctx", "64")
    page = tmp_path / "a report" / "report.html"
    assert good("report", lab.rope, "-o", page.parent).stdout.strip() == str(page)
    assert lab.rope in page.read_text(encoding="utf-8")
    fresh = Path(shutil.copytree(lab.runs / lab.rope, tmp_path / "runs" / lab.rope))
    shutil.rmtree(fresh / "results")
    refused("report", fresh, says=["no evaluation", "ropelab eval"])
    refused("report", f"runs_dir={tmp_path / 'nothing'}", says=["no evaluation", "ropelab eval"])
    (fresh / "results").mkdir()
    (fresh / "results" / "cut.json").write_text("{")
    refused("report", fresh, says=[str(fresh / "results" / "cut.json"), "evaluate again"])
    assert not Path("report").exists()


def test_data(lab: Lab) -> None:
    found = {row["name"]: row["present"] for row in as_json("data")}
    assert found["stdlib"] is True
    assert found["text"] is None
    facts = as_json("data", "prepare", "data=text", f"data.path={lab.corpus}")
    sizes = [len(file.read_bytes()) for file in lab.corpus.iterdir()]
    assert sum(facts["tokens"].values()) == sum(sizes)  # a byte is a token
    assert facts["n_vocab"] == 257
    assert facts["longest_test_document"] in sizes


# --- names that are hard to spell -----------------------------------------------------------------------------------

ODD = 'it\'s a=b, "x" #1 @home {y} größe 日本'


def test_folders_with_odd_names(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """data.path, runs_dir, cache_dir, ROPELAB_RUNS, ROPELAB_CACHE, -o and a run's own path hold any character."""
    odd = tmp_path / ODD
    corpus = Path(shutil.copytree(lab.corpus, odd / "text"))
    where = [f"runs_dir={odd / 'runs'}", f"cache_dir={odd / 'cache'}"]
    run = as_json("train", *lab.tiny(f"data.path={corpus}", "pos=rope"), *where)["run"]
    assert run == lab.rope
    assert (odd / "runs" / run / "manifest.json").exists()
    assert (odd / "cache").is_dir()
    expected = as_json("eval", lab.rope, "--ctx", "64")
    monkeypatch.setenv("ROPELAB_RUNS", str(odd / "runs"))
    monkeypatch.setenv("ROPELAB_CACHE", str(odd / "cache"))
    assert as_json("eval", "--ctx", "64") == expected
    assert as_json("eval", run, "--ctx", "64", *where) == expected
    monkeypatch.delenv("ROPELAB_RUNS")
    assert as_json("eval", odd / "runs" / run, "--ctx", "64") == expected
    assert as_json("show", odd / "runs" / run)["run"] == run
    good("eval", odd / "runs" / run, "--ctx", "64", "-o", odd / "new" / f"{ODD}.png")
    assert (odd / "new" / f"{ODD}.png").exists()
    good("report", odd / "runs" / run, "-o", odd / "report")
    assert (odd / "report" / "report.html").exists()
    renamed = (odd / "runs" / run).rename(odd / "runs" / ODD)
    assert as_json("eval", renamed, "--ctx", "64", "--protocol", "prefix")["rows"][0]["status"] == "ok"
    assert [row["run"] for row in as_json("runs", f"runs_dir={odd / 'runs'}")] == [ODD]
    other = write_corpus(odd / "other", seed=8, files=2)
    assert as_json("eval", renamed, f"data.path={other}", "--ctx", "64")["rows"][0]["documents"] == 2


@pytest.mark.parametrize("name", [ODD, "a b", "a=b", "'q'", '"q"', "#", "@", "a,b", "{a}", "ä"])
def test_odd_names_that_do_not_exist_are_named(refused: Refusals, tmp_path: Path, name: str) -> None:
    path = tmp_path / "none" / name
    said = " ".join(str(path).split())
    refused("train", *refused.lab.tiny(f"data.path={path}"), says=[said, "does not exist"])
    refused("eval", refused.lab.rope, f"data.path={path}", says=[said, "does not exist"])
    if "=" not in name:
        refused("eval", path, says=[f"there is no run '{said}'"])
    file = tmp_path / name
    file.write_text("")
    refused("train", *refused.lab.tiny(f"runs_dir={file}"), says=["runs_dir=", name, "cannot be written"])
    refused("train", *refused.lab.tiny(f"cache_dir={file}"), says=["cache_dir=", name, "cannot be written"])
    refused("reproduce", "c-order", "-o", file, says=["-o ", name, "cannot be written"])


IMPOSSIBLE: list[tuple[list[str], str]] = [
    (["report", "--pdf"], "No such option: --pdf; `ropelab report -o FOLDER` writes a page, which a browser prints"),
    (["eval", "--csv", "x.csv"], "No such option: --csv; `ropelab report -o FOLDER`"),
    (["train", "--gpu", "0"], "No such option: --gpu; write device=cuda or device=cpu"),
    (["train", "--lr", "1"], "No such option: --lr; settings have no dashes: write train.lr=VALUE"),
    (["sweep", "--hidden-size", "8"], "--hidden-size; settings have no dashes: write model.d_model=VALUE"),
    (["train", "--form", "x"], "No such option: --form; did you mean --from?"),
    (["report", "--verbose"], "No such option: --verbose; `report` takes -o, --output, --help"),
    (["diagnose", "x"], "No such command 'diagnose'; `ropelab show RUN`"),
    (["compare", "a", "b"], "No such command 'compare'; `ropelab report"),
    (["pdf"], "No such command 'pdf'; `ropelab --help` lists them"),
    (["evaluate"], "No such command 'evaluate'. Did you mean 'eval'?"),
    (["report", "-o", "x.pdf"], "-o x.pdf is the name of a file, and a report is a folder with report.html"),
    (["reproduce", "c-order", "-o", "page.html"], "give -o page (a browser prints the page as PDF)"),
]


@pytest.mark.parametrize(("arguments", "says"), IMPOSSIBLE, ids=[" ".join(row[0]) for row in IMPOSSIBLE])
def test_what_cannot_be_done_names_what_can(
    lab: Lab, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ropelab", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    told = capsys.readouterr()
    assert (stopped.value.code, told.out) == (2, "")
    assert told.err.count("\n") == 1
    assert says in told.err


# --- the process itself ---------------------------------------------------------------------------------------------


def test_as_a_process(lab: Lab) -> None:
    """`python -m ropelab` keeps stdout to the result, stderr to the rest, and its exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ropelab"]
    done = subprocess.run([*command, "eval", "--ctx", "32", "--json"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    check_contract(json.loads(done.stdout))
    done = subprocess.run([*command, "train", "pos=ropee"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ropelab: unknown pos 'ropee'; did you mean rope?\n"


def test_a_reader_that_has_seen_enough(lab: Lab) -> None:
    """`ropelab show | head -1` is no error of anyone: nothing on stderr."""
    done = subprocess.run(
        ["bash", "-c", f"'{sys.executable}' -m ropelab show --json | true"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
