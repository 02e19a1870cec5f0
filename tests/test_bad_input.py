"""Generated command lines: whatever is typed, a line and exit status 2, or 0; never a traceback, never half a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ropelab import config as configs
from ropelab import data
from tests.lab import SIX, Lab, made_lab, ropelab

EXAMPLES = {"train": 90, "show": 40, "method": 30, "eval": 30, "runs": 15, "search": 15, "verify": 10}
assert sum(EXAMPLES.values()) >= 200

GROUPS = {
    "pos": ["rope", "alibi", "learned", "sinusoidal", "p_rope", "t5"],
    "scaling": ["none", "linear", "yarn", "longrope", "ntk", "dynamic_ntk"],
    "positions": ["contiguous", "pose"],
    "model": ["tiny"],
    "data": ["stdlib", "text"],
}
# what a value may be by mistake; nothing that would be big and possible
NUMBERS = st.sampled_from(
    ["0", "-1", "1", "2", "3", "7", "64", "1e-3", "0.5", "1e400", "-1e400", "nan", "inf", "1_0", "0x10", "1e3", "10**9",
     "999999999999999999", "-0", "٣", "1,2", "1.5.2", " 8", "8 "]
)  # fmt: skip
WORDS = st.sampled_from(
    ["", "none", "null", "true", "False", "auto", "auto-row", "[]", "[0.5]", "[0.5", "[a,b]", "[1,[2]]",
     "[none,yarn:8]",
     "yarn:", ":8", "last", "cuda", "cuda:99", "cpu:1", "../x", "~", "/dev/null", "/nowhere/at/all", "a'b", '"a"', "'",
     "{a:1}",
     "${oc.env:HOME}", "$HOME", "a=b", "é", "\U0001f600", "a b", "\n", "\t", "a#b", "@", "x" * 300,
     "\udce4", "\x00", "%s", "~nobody/x"]
)  # fmt: skip
FREE = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8)
VALUES = st.one_of(NUMBERS, WORDS, FREE)


def keys() -> list[str]:
    """Every key that there is, those of the methods' parameters included."""
    tree = configs.to_dict(configs.load())
    found = [key for key, value in tree.items() if not isinstance(value, dict)]
    found += [f"{head}.{key}" for head, inner in tree.items() if isinstance(inner, dict) for key in inner]
    for group in ("pos", "scaling", "positions"):
        for name in GROUPS[group]:
            found += [f"{group}.{key}" for key in getattr(configs.load([f"{group}={name}"]), group).parameters]
    return sorted(set(found) - {"runs_dir", "cache_dir"})


KEYS = keys()
WRONG_KEYS = st.sampled_from(
    ["", "x", "train", "train.", ".train", "train.lrr", "pos.name", "+train.lr", "~train.lr", "train.lr@x",
     "hydra.run.dir",
     "hydra/launcher", "a.b.c.d", "train..lr", "é", "pos@x", "++x", "eval", "defaults", "_target_", "train.__class__"]
)  # fmt: skip
GROUP = st.one_of(
    [st.builds("{}={}".format, st.just(group), st.sampled_from([*names, "rop", "", "../x", names[0].upper()]))
     for group, names in GROUPS.items()]
)  # fmt: skip
OVERRIDE = st.one_of(
    st.builds("{}={}".format, st.sampled_from(KEYS), VALUES),
    st.builds("{}={}".format, st.sampled_from(KEYS), VALUES),
    GROUP,
    st.builds("{}={}".format, WRONG_KEYS, VALUES),
)
OVERRIDES = st.lists(OVERRIDE, min_size=1, max_size=4)
QUICK = settings(derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def lab(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A finished run, and from then on no text that could be read: what is right ends there, in a line."""
    folder = tmp_path_factory.mktemp("bad")
    lab = made_lab(shared).copy(folder / "lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "prepare", unread)
        patch.chdir(folder)
        yield lab


def unread(*_: Any, **__: Any) -> Any:
    raise ValueError("this test reads no text")


def state(lab: Lab) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in lab.root.rglob("*")}


def check(lab: Lab, *arguments: str) -> None:
    """The command line ends with 0, or with 2 and a line; and writes nothing below the runs and the cache."""
    before, here = state(lab), sorted(Path.cwd().iterdir())
    said = ropelab(*arguments)
    assert said.status in (0, 2), (arguments, said)
    if said.status == 2:
        assert said.err.count("\n") == 1, (arguments, said.err)
        assert said.err.startswith("ropelab: "), (arguments, said.err)
        assert len(said.err) > len("ropelab: ") + 5
    changed = {path for path, when in state(lab).items() if before.get(path) != when}
    assert changed <= {str(lab.runs), str(lab.runs / lab.run.name)}, (arguments, changed)  # a file was tried there
    assert sorted(Path.cwd().iterdir()) == here


@given(OVERRIDES)
@settings(QUICK, max_examples=EXAMPLES["train"])
def test_train(lab: Lab, overrides: list[str]) -> None:
    check(lab, "train", *lab.places(), "device=cpu" if not any("device" in item for item in overrides) else "seed=1",
          *overrides)  # fmt: skip


@given(OVERRIDES)
@settings(QUICK, max_examples=EXAMPLES["show"])
def test_show_of_settings(lab: Lab, overrides: list[str]) -> None:
    check(lab, "show", *overrides)


@given(
    st.sampled_from([*GROUPS["pos"], "rop", ""]), st.sampled_from([*GROUPS["scaling"], "yarm", ""]), VALUES,
    st.sampled_from(["64", "0", "-3", "x", "64,128", "64,", "1e3", "", "999999999999999999999"]),
    st.lists(OVERRIDE, max_size=1),
)  # fmt: skip
@settings(QUICK, max_examples=EXAMPLES["method"])
def test_show_of_a_method(lab: Lab, pos: str, scaling: str, factor: str, ctx: str, overrides: list[str]) -> None:
    check(lab, "show", "--pos", pos, "--scaling", scaling, "--factor", factor, "--ctx", ctx, *overrides)


ASKED = [key for key in KEYS if key.startswith(("eval", "scaling", "data"))]
EVALUATION = st.lists(
    st.one_of(
        st.builds("{}={}".format, st.sampled_from(ASKED), VALUES),
        st.builds("{}={}".format, st.just("scaling"), st.sampled_from([*GROUPS["scaling"], "x"])),
        OVERRIDE,
    ),
    max_size=3,
)  # fmt: skip


@given(
    EVALUATION, st.sampled_from(["64", "32,64", "64,32", "16,", "0", "-1", "a", ",", "32,32", "99999999999999999999"]),
    st.sampled_from([[], ["--scaling", "yarn"], ["--scaling", "x"], ["--factor", "0"], ["--protocol", "lst"],
                     ["--scaling", "linear", "--factor", "nan"], ["--ctx", "32"], ["-o", "/dev/null/x.png"]]),
)  # fmt: skip
@settings(QUICK, max_examples=EXAMPLES["eval"])
def test_eval(lab: Lab, overrides: list[str], ctx: str, options: list[str]) -> None:
    check(lab, "eval", "rope", "--ctx", ctx, *options, *lab.places(), *overrides)


NAMES = st.one_of(
    st.sampled_from(["rope", "", ".", "..", "../..", "/", "/etc/passwd", "rope-", "x" * 300, "a/b" * 100, "\x00",
                     "~nobody/x",
                     "-", "rm", "list", "*", "\udce4"]),
    FREE,
)  # fmt: skip


@given(
    st.sampled_from(["list", "rm", "remove", ""]),
    st.lists(NAMES.filter(lambda name: not name.startswith("-")), max_size=2),
)
@settings(QUICK, max_examples=EXAMPLES["runs"])
def test_runs(lab: Lab, action: str, names: list[str]) -> None:
    named = [name for name in names if name != "rope"]  # that one would be removed
    check(lab, "runs", action, *lab.places(), "--", *named)
    check(lab, "show", *lab.places(), "--", *named[:1])


@given(
    st.sampled_from(["longrope", "longrop"]),
    st.lists(st.builds("{}={}".format, st.sampled_from(
        ["search.population", "search.iterations", "search.step", "search.start_tokens", "search.bound",
         "search.parents",
         "search.targets", "search.samples", "search.x", "eval.tokens", "pos", "seed", "device"]), VALUES), max_size=2),
    st.sampled_from([["--ctx", "64"], ["--ctx", "32"], ["--ctx", "x"], [], ["--ctx", "64", "--factor", "1"],
                     ["--ctx", "64", "--factor", "nan"], ["--ctx", "64", "--ctx", "128"]]),
)  # fmt: skip
@settings(QUICK, max_examples=EXAMPLES["search"])
def test_search(lab: Lab, method: str, overrides: list[str], options: list[str]) -> None:
    check(lab, "search", method, "rope", *options, *lab.places(), *overrides)


@given(
    st.lists(OVERRIDE, max_size=2),
    st.sampled_from([["--steps", "1"], ["--steps", "-3"], ["--at", "0"], ["--at", "99"], ["--steps", "x"],
                     ["--at", "20"]]),
)  # fmt: skip
@settings(QUICK, max_examples=EXAMPLES["verify"])
def test_verify_resume(lab: Lab, overrides: list[str], options: list[str]) -> None:
    check(lab, "verify-resume", *options, *SIX[3:6], *overrides)
