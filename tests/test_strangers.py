"""Run and sweep folders made to harm: every command ends with a line or does its work, and touches nothing else.

`HOSTILE` is the generator: each entry turns a good folder into one that a stranger might send.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ropelab import data, files
from ropelab.data import fast
from ropelab.errors import DamagedFileError
from tests.lab import TINY, Said, changed, forked_workers, once, one_line, ropelab, write_corpus
from tests.test_faults import nodes, replaced

pytestmark = pytest.mark.usefixtures("forked_workers")
SECRET = "what only the user may read"


class Made(NamedTuple):
    """A sweep of two runs that was trained and evaluated, and a folder of the user's that lies beside it."""

    root: Path

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def sweep(self) -> Path:
        (found,) = (self.runs / "sweeps").iterdir()
        return found

    @property
    def run(self) -> Path:
        return next(path for path in sorted(self.runs.iterdir()) if path.name.startswith("rope"))

    @property
    def mine(self) -> Path:
        return self.root / "mine"

    def say(self, *arguments: str) -> Said:
        return ropelab(*arguments, f"runs_dir={self.runs}")


def sweep_of_two(root: Path) -> Made:
    """A good folder, and beside it the text and the cache."""
    write_corpus(root / "text")
    made = Made(root / "good")
    settings = changed(
        TINY, "train.steps=4", "eval.ctx=64", "eval.last=8", "eval.protocol=last", "eval.tokens=500",
        f"data.path={root / 'text'}", f"runs_dir={made.runs}", f"cache_dir={root / 'cache'}",
    )  # fmt: skip
    with forked_workers():
        said = ropelab("sweep", "pos=rope,alibi", *settings)
    assert said.status == 0, said.err
    made.mine.mkdir()
    for name in ("thesis.txt", "step-00000009", "metrics.jsonl", "0000.json"):
        (made.mine / name).write_text(SECRET, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def good(shared: Path) -> Made:
    return Made(once(shared / "strangers", sweep_of_two) / "good")


@pytest.fixture
def made(good: Made, tmp_path: Path) -> Made:
    shutil.copytree(good.root, tmp_path / "copy", symlinks=True)
    return Made(tmp_path / "copy")


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    value = change(files.load_json(path))
    path.write_text(json.dumps(files.sealed(value) if isinstance(value, dict) else value), encoding="utf-8")


def in_manifest(place: tuple[Any, ...], value: Any, *, of: str) -> Callable[[Made], None]:
    def attack(made: Made) -> None:
        rewrite(getattr(made, of) / "manifest.json", lambda tree: replaced(tree, place, value))

    return attack


def without(place: tuple[Any, ...], key: str, *, of: str) -> Callable[[Made], None]:
    def attack(made: Made) -> None:
        path = getattr(made, of) / "manifest.json"
        tree = files.load_json(path)
        inner = tree
        for part in place:
            inner = inner[part]
        del inner[key]
        path.write_text(json.dumps(tree), encoding="utf-8")

    return attack


def written(name: str, text: str, *, of: str) -> Callable[[Made], None]:
    return lambda made: (getattr(made, of) / name).write_text(text, encoding="utf-8") and None


def sparse(name: str, *, of: str) -> Callable[[Made], None]:
    def attack(made: Made) -> None:
        with (getattr(made, of) / name).open("wb") as file:
            file.truncate(2**40)

    return attack


def link(name: str, to: str, *, of: str) -> Callable[[Made], None]:
    """A file or folder of a run or sweep replaced by a link to one of the user's."""

    def attack(made: Made) -> None:
        place = getattr(made, of) / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
        place.symlink_to(made.mine / to)

    return attack


def pipe(name: str, *, of: str) -> Callable[[Made], None]:
    def attack(made: Made) -> None:
        (getattr(made, of) / name).unlink(missing_ok=True)
        os.mkfifo(getattr(made, of) / name)

    return attack


MANY = 10**400
RUN, SWEEP = "run", "sweep"
HOSTILE: dict[str, Callable[[Made], None]] = {
    # sweeps of other shapes
    "no config": without(("tasks", 0), "config", of=SWEEP),
    "no evaluations": without(("tasks", 0), "evaluations", of=SWEEP),
    "no steps": without(("tasks", 0, "config", "train"), "steps", of=SWEEP),
    "tasks are words": in_manifest(("tasks",), ["x"], of=SWEEP),
    "a run that leads up": in_manifest(("tasks", 0, "run"), "..", of=SWEEP),
    "a run that leads away": in_manifest(("tasks", 0, "run"), "../mine", of=SWEEP),
    "a run with a line break": in_manifest(("tasks", 0, "run"), "rope\n\x1b[2J", of=SWEEP),
    "a step of 400 digits": in_manifest(("tasks", 0, "config", "train", "steps"), MANY, of=SWEEP),
    "a sweep of a terabyte": sparse("manifest.json", of=SWEEP),
    "an answer that is a list": written("answers/0000.json", "[1]", of=SWEEP),
    "an answer of other shape": written("answers/0000.json", '{"train": {}, "evaluations": [{}]}', of=SWEEP),
    "an answer of words": written("answers/0000.json", '{"train": 1, "evaluations": "x"}', of=SWEEP),
    "an answer that steers": written("answers/0000.json", '{"error": "\\u001b[2J\\nDONE"}', of=SWEEP),
    "an answer of depth": written("answers/0000.json", "[" * 10**5, of=SWEEP),
    "an answer of a terabyte": sparse("answers/0000.json", of=SWEEP),
    "jobs that are no numbers": written("jobs", "", of=SWEEP),
    "a pipe for an answer": pipe("answers/0000.json", of=SWEEP),
    # runs of other shapes
    "an infinite step": written("metrics.jsonl", '{"step": Infinity}\n{"step": 1e999}\n[]\n', of=RUN),
    "metrics of a terabyte": sparse("metrics.jsonl", of=RUN),
    "a fraction that is a word": in_manifest(("config", "pos", "fraction"), "x", of=RUN),
    "a base of 400 digits": in_manifest(("config", "pos", "base"), MANY, of=RUN),
    "a width of 30 digits": in_manifest(("config", "model", "d_model"), 10**30, of=RUN),
    "layers without an end": in_manifest(("config", "model", "n_layer"), 10**9, of=RUN),
    "a width without an end": in_manifest(("config", "model", "d_model"), 2**40, of=RUN),
    "a context without an end": in_manifest(("train_ctx",), 2**39, of=RUN),
    "a run of a terabyte": sparse("manifest.json", of=RUN),
    "weights of a terabyte": sparse("checkpoints/step-00000004/model.safetensors", of=RUN),
    "a pipe for a manifest": pipe("manifest.json", of=RUN),
    "a pipe for a lock": pipe("lock", of=RUN),
    "a pipe for metrics": pipe("metrics.jsonl", of=RUN),
    "a manifest of depth": written("manifest.json", '{"a":' * 10**5, of=RUN),
    # what leads elsewhere
    "linked results": link("results", "", of=RUN),
    "linked checkpoints": link("checkpoints", "", of=RUN),
    "linked metrics": link("metrics.jsonl", "metrics.jsonl", of=RUN),
    "a linked lock of a run": link("lock", "thesis.txt", of=RUN),
    "a linked manifest": link("manifest.json", "thesis.txt", of=RUN),
    "a linked tokenizer": link("tokenizer.json", "thesis.txt", of=RUN),
    "linked answers": link("answers", "", of=SWEEP),
    "a linked answer": link("answers/0000.json", "0000.json", of=SWEEP),
    "linked jobs": link("jobs", "", of=SWEEP),
    "a linked lock of a sweep": link("lock", "thesis.txt", of=SWEEP),
    "a linked manifest of a sweep": link("manifest.json", "thesis.txt", of=SWEEP),
}


STRANGE: tuple[Any, ...] = (None, [], {}, "x", "..", "/", "../mine", "\x1b[2J\n", "=1+1", -1, 0, 1e300, True, 10**30,
                            MANY, [[]], {"name": {}}, [1, "x"], "x" * 10**5)  # fmt: skip


def mutated(made: Made, draw: random.Random) -> str:
    """Change some files of the run and the sweep at random, as a stranger could; what was done."""
    done = []
    for _ in range(draw.randint(1, 3)):
        if draw.random() < 0.2:
            name = draw.choice(list(HOSTILE))
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # changed too much already
                HOSTILE[name](made)
                done.append(name)
            continue
        found = [path for of in (made.run, made.sweep) for path in sorted(of.rglob("*")) if path.is_file()]
        path = draw.choice([path for path in found if not path.is_symlink()])
        place = path.relative_to(made.root).as_posix()
        data = bytearray(path.read_bytes() if path.stat().st_size < 2**24 else b"")
        how = draw.random()
        if path.suffix == ".json" and how < 0.7:
            with contextlib.suppress(DamagedFileError, ValueError, LookupError):
                tree = files.load_json(path)
                at = draw.choice(list(nodes(tree)))
                by = draw.choice(STRANGE)
                path.write_text(json.dumps(files.sealed(replaced(tree, at, by))), encoding="utf-8")
                done.append(f"{place}: {at} = {str(by)[:30]!r}")
        elif how < 0.8 and data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            path.write_bytes(data)
            done.append(f"{place}: a bit")
        elif how < 0.9:
            path.write_bytes(data[: draw.randint(0, len(data))])
            done.append(f"{place}: cut short")
        else:
            path.unlink()
            kind = draw.choice(("gone", "a link", "a folder", "a pipe"))
            if kind == "a link":
                path.symlink_to(made.mine / "thesis.txt")
            elif kind == "a folder":
                path.mkdir()
            elif kind == "a pipe":
                os.mkfifo(path)
            done.append(f"{place}: {kind}")
    return "; ".join(done)


@contextlib.contextmanager
def within_seconds(seconds: int) -> Iterator[None]:
    """`AssertionError` where something waits for ever."""

    def late(signum: int, frame: object) -> None:
        raise AssertionError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tried(good: Made, at: Path, draw: random.Random) -> tuple[str, str]:
    """A copy of a good folder, changed at random and put through some commands: what was done, and what went wrong."""
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(good.root, at, symlinks=True)
    made = Made(at)
    run, sweep, page, before = made.run.name, made.sweep.name, str(at / "page"), untouched(made)
    what = mutated(made, draw)
    cache = f"cache_dir={good.root.parent / 'cache'}"
    asked: tuple[str, ...] = ()
    try:
        for asked in draw.sample([
            ("status", sweep), ("status", "--json"), ("runs", "list", "--json"), ("runs", "pos=rope"),
            ("collect", sweep), ("cancel", sweep), ("report", run, "-o", page), ("report", sweep, "-o", page),
            ("show", run), ("eval", run, "--ctx", "32,", "eval.tokens=200", cache), ("retry", sweep, cache),
            ("runs", "rm", run, "--yes"),
        ], 4):  # fmt: skip
            with within_seconds(120):
                ended_well(made.say(*asked))
            assert untouched(made) == before
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return what, f"{' '.join(asked)}: {''.join(traceback.format_exception(error))}"
    return what, ""


def untouched(made: Made) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(made.mine.iterdir())}


def ended_well(said: Said) -> None:
    assert said.status in (0, 1, 2), said.err
    assert "\x1b" not in said.out + said.err
    assert SECRET not in said.out + said.err
    if said.status:
        assert said.err.splitlines()[-1].startswith("ropelab: ")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_refused_or_harmless(good: Made, made: Made, tmp_path: Path, name: str) -> None:
    HOSTILE[name](made)
    before = untouched(made)
    sweep, run = made.sweep.name, made.run.name
    others = [path.name for path in made.runs.iterdir() if path.name.startswith("alibi")]
    listed = made.say("runs", "list", "--json")
    assert {row["run"] for row in json.loads(listed.out)} >= {*others}  # one bad folder hides no other
    for arguments in (
        ("status", sweep), ("status", "--json"), ("collect", sweep), ("cancel", sweep),
        ("report", run, "-o", str(tmp_path / "page")), ("report", sweep, "-o", str(tmp_path / "page")),
        ("show", run), ("runs", "pos=rope"),
    ):  # fmt: skip
        ended_well(made.say(*arguments))
        assert untouched(made) == before, arguments
    ended_well(made.say("eval", run, "--ctx", "32,", "eval.tokens=200", f"cache_dir={good.root.parent / 'cache'}"))
    assert untouched(made) == before


def fast_one(change: dict[str, Any]) -> str:
    """The run's bytes as a tokeniser of the `tokenizers` library, with steps of a stranger's."""
    return json.dumps({"name": "fast", "rows": 256, "source": {**data.to_json(data.Bytes()), **change}})


LETTERS = list(data.to_json(data.Bytes())["model"]["vocab"])
DOUBLED = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
WORD = {"id": 0, "content": "a!", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True,
        "special": False}  # fmt: skip
TOKENISERS: dict[str, str] = {
    "too large": " " * (2**28 + 1),
    "of depth": "[" * 10**5,
    "of depth within": fast_one({"normalizer": 0}).replace('"normalizer": 0', '"normalizer": ' + "[" * 900 + "]" * 900),
    "endless on a text": fast_one({"normalizer": {"type": "Sequence", "normalizers": [DOUBLED] * 40}}),
    "endless as it is loaded": fast_one(
        {"normalizer": {"type": "Sequence", "normalizers": [DOUBLED] * 40}, "added_tokens": [WORD]}
    ),
    "a pattern without an end": fast_one({"pre_tokenizer": {
        "type": "Split", "pattern": {"Regex": r"([a-j ]+)+\d\d\d"}, "behavior": "Isolated", "invert": False,
    }}),
    "a merge of nothing": json.dumps({"name": "bpe", "vocabulary": LETTERS, "merges": ["a bc"]}),
    "a token twice": json.dumps({"name": "bpe", "vocabulary": [*LETTERS[:-1], "a"], "merges": []}),
    "of another name": json.dumps({"name": "x", "vocabulary": LETTERS, "merges": []}),
    "with more tokens": json.dumps({"name": "bpe", "vocabulary": [*LETTERS, "ab", "abc"], "merges": ["a b", "ab c"]}),
    "of others": json.dumps({"name": "gpt2", "vocabulary": LETTERS, "merges": []}),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENISERS)
def test_a_hostile_tokeniser_in_a_run_is_refused(
    good: Made, made: Made, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(fast, "TRIAL_SECONDS", 1)
    text = TOKENISERS[kind]
    (made.run / "tokenizer.json").write_text(text, encoding="utf-8")
    with contextlib.suppress(DamagedFileError):
        if kind != "of others":  # else the manifest says that it is the run's
            in_manifest(("tokenizer", "digest"), files.digest_of(defined(text)), of=RUN)(made)
    run, cache, before = made.run.name, f"cache_dir={good.root.parent / 'cache'}", untouched(made)
    for arguments in (
        ("eval", run, "--ctx", "32,", "eval.tokens=200"), ("export", run, "-o", str(made.root / "exported")),
        ("train", "--from", run, "train.steps=6"), ("show", run, "--attention"),
        ("search", "longrope", run, "--ctx", "128"),
    ):  # fmt: skip
        there = sorted(made.runs.iterdir())
        with within_seconds(240):
            said = made.say(*arguments, cache)
        ended_well(said)
        assert said.status == 2, (arguments, said.out)
        one_line(said, "tokenizer.json")
        assert sorted(made.runs.iterdir()) == there
        assert not (made.root / "exported").exists()
    ended_well(made.say("show", run))
    assert untouched(made) == before


def defined(text: str) -> Any:
    """What the digest of a tokeniser is of."""
    value = files.parse_json(text)
    if value["name"] == "fast":
        value["source"] |= {"padding": None, "truncation": None}
    return value


@pytest.mark.parametrize("number", range(6))
def test_a_folder_changed_at_random_is_refused_or_harmless(good: Made, tmp_path: Path, number: int) -> None:
    """The short form of `scripts/soak.py --hostile N`."""
    what, wrong = tried(good, tmp_path / "copy", random.Random(f"0 {number}"))
    assert not wrong, f"{what}: {wrong}"


@pytest.mark.parametrize(
    "name",
    ["linked results", "linked checkpoints", "linked metrics", "a linked lock of a run", "linked answers",
     "linked jobs", "a linked lock of a sweep", "a run that leads up"],
)  # fmt: skip
def test_a_hostile_sweep_that_is_tried_again_touches_nothing_else(good: Made, made: Made, name: str) -> None:
    """`retry` trains and evaluates what is missing: in the folder of runs, or not at all."""
    for path in made.runs.glob("rope*/checkpoints/step-*"):  # there is something to do
        shutil.rmtree(path)
    HOSTILE[name](made)
    before = untouched(made)
    ended_well(made.say("retry", made.sweep.name, f"cache_dir={good.root.parent / 'cache'}"))
    assert untouched(made) == before


@pytest.mark.parametrize("of", [RUN, SWEEP])
def test_any_change_of_a_manifest_is_refused_or_harmless(made: Made, of: str) -> None:
    """Values of it in turn replaced by ones of another kind, sealed anew."""
    path = getattr(made, of) / "manifest.json"
    tree = files.load_json(path)
    draw = random.Random(7)
    run, sweep = made.run.name, made.sweep.name
    commands = itertools.cycle(
        [("status", sweep), ("runs", "pos=rope"), ("collect", sweep), ("report", run, "-o", "x")]
    )
    places = [place for place in nodes(tree) if place != ("environment",)]
    for place in draw.sample(places, 40):
        by = draw.choice([None, [], {}, "x", -1, 1e300, True, 10**30, "..", [[]], {"name": {}}])
        path.write_text(json.dumps(files.sealed(replaced(tree, place, by))), encoding="utf-8")
        arguments = next(commands)
        out = [str(made.root / "page") if item == "x" else item for item in arguments]
        ended_well(made.say(*out))


def test_results_of_other_weights_are_not_told(made: Made, good: Made) -> None:
    """The weights are replaced, their record too: the stored numbers are of others, and no command prints them."""
    (at,) = (made.run / "checkpoints").iterdir()
    (other,) = (next(p for p in made.runs.iterdir() if p.name.startswith("alibi")) / "checkpoints").iterdir()
    (stored,) = (made.run / "results").glob("*.json")
    asked = ("--ctx", "64", "--protocol", "last", "eval.last=8", "eval.tokens=500", "--json")
    cache = f"cache_dir={good.root.parent / 'cache'}"
    first = json.loads(made.say("eval", made.run.name, *asked, cache).out)
    assert first["weights"] == files.sha256_of(at / "model.safetensors") == files.load_json(stored)["weights"]
    weights = (other / "model.safetensors").read_bytes()
    (at / "model.safetensors").write_bytes(weights)
    state = files.load_json(at / "state.json")
    state["sha256"]["model.safetensors"] = files.sha256_of(at / "model.safetensors")
    files.write_sealed(at / "state.json", state)
    said = made.say("report", made.run.name, "-o", str(made.root / "page"))
    assert said.status == 2
    one_line(said, stored.name, "other weights")
    assert "LOST" in made.say("status", made.sweep.name).out
    again = made.say("eval", made.run.name, *asked, cache)
    assert again.status == 0, again.err
    assert "other weights" in again.err
    assert json.loads(again.out)["rows"] != first["rows"]
    assert json.loads(again.out)["weights"] == files.sha256_of(at / "model.safetensors")


def test_a_result_of_an_earlier_version_is_bound_after_one_look_at_the_weights(
    made: Made, good: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stored,) = (made.run / "results").glob("*.json")
    item = files.load_json(stored)
    weights = item.pop("weights")
    files.write_sealed(stored, item)
    hashed: list[str] = []
    sha256_of = files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path))
    for arguments in (("runs",), ("status", made.sweep.name), ("collect", made.sweep.name)):
        assert made.say(*arguments).status == 0
    assert not hashed
    for _ in range(2):
        assert made.say("report", made.run.name, "-o", str(made.root / "page")).status == 0
        bound = files.load_json(stored)
        assert (bound["weights"], bound["weights_bound"]) == (weights, "later")
    assert hashed.count("model.safetensors") == 1
    files.write_sealed(stored, item)  # and where the weights are not those of the record, it is refused
    (at,) = (made.run / "checkpoints").iterdir()
    with (at / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    said = made.say("report", made.run.name, "-o", str(made.root / "page"))
    assert said.status == 2
    one_line(said, made.run.name, "weights")


def test_a_sweep_trains_where_it_lies_with_the_users_cache_and_no_tracking(made: Made) -> None:
    """The folders in a stored configuration are those of another time, or of a stranger; so is where it reports to."""
    tree = files.load_json(made.sweep / "manifest.json")
    for place, value in (("runs_dir", made.mine), ("cache_dir", made.mine / "cache")):
        tree = replaced(tree, ("tasks", 0, "config", place), str(value))
    tree = replaced(tree, ("tasks", 0, "config", "track"), {"wandb": "offline", "project": "x\x1b[2J"})
    (made.sweep / "manifest.json").write_text(json.dumps(tree), encoding="utf-8")
    before = untouched(made)
    index = next(number for number, task in enumerate(tree["tasks"]) if task["run"] == made.run.name)
    assert index == 0
    for path in made.runs.glob("rope*/checkpoints/step-*"):
        shutil.rmtree(path)
    (made.sweep / "answers" / "0000.json").unlink()
    said = made.say("retry", made.sweep.name, f"cache_dir={made.root / 'cache'}")
    assert said.status == 0, said.err
    assert f"not {made.mine / 'cache'} as before" in said.err
    assert "track.wandb=disabled, not offline as before" in said.err
    assert "\x1b" not in said.err
    assert untouched(made) == before
    assert list((made.run / "checkpoints").iterdir())
    assert not (made.run / "wandb").exists()
    again = files.load_json(made.sweep / "manifest.json")["tasks"][0]["config"]
    assert (again["cache_dir"], again["track"]["wandb"]) == (str(made.root / "cache"), "disabled")
