"""The border between the command line and the configuration: what is accepted, and what every mistake is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ropelab import config
from ropelab.config import Method

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("ROPELAB_RUNS", "ROPELAB_CACHE"):
        monkeypatch.delenv(variable, raising=False)


def read_yaml(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    return tree


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def refusal(*overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        config.load(overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what the files say is what comes out -----------------------------------------------------------------------------


def test_defaults_are_those_of_the_files() -> None:
    """The composed configuration is config.yaml with the four group files laid over it, read here without Hydra."""
    expected = read_yaml("config.yaml")
    chosen = {group: name for entry in expected.pop("defaults") if entry != "_self_" for group, name in entry.items()}
    for group, name in chosen.items():
        expected[group] = {**expected.get(group, {}), **read_yaml(f"{group}/{name}.yaml")}
    assert config.to_dict(config.load()) == expected


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in ("pos", "scaling", "model") for name in names(group)]
)
def test_every_group_file_composes(group: str, name: str) -> None:
    tree = config.to_dict(config.load([f"{group}={name}"]))
    file = read_yaml(f"{group}/{name}.yaml")
    assert {key: tree[group][key] for key in file} == file
    if group != "model":
        assert set(tree[group]) == set(file)


@pytest.mark.parametrize("name", names("data"))
def test_every_corpus_composes(name: str) -> None:
    path = None if name == "stdlib" else "somewhere"
    resolved = config.load([f"data={name}", *([f"data.path={path}"] if path else [])])
    assert (resolved.data.name, resolved.data.path) == (name, path)


def test_every_method_file_has_a_summary_and_a_paper() -> None:
    for group in ("pos", "scaling"):
        for name in names(group):
            told = config.about(group, name)
            assert told.label
            assert told.summary
            assert told.paper


def test_a_configuration_survives_json() -> None:
    resolved = config.load(["scaling=yarn", "scaling.factor=4", "train.keep=[0.25,0.5]", "eval.scalings=[none,yarn:8]"])
    again = config.from_dict(json.loads(json.dumps(config.to_dict(resolved))))
    assert again == resolved
    assert again.train.keep == (0.25, 0.5)
    assert again.eval.scalings == ("none", "yarn:8")


def test_a_stored_configuration_is_not_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's run folder must not read our environment: `${oc.env:...}` stays the text that it is."""
    monkeypatch.setenv("SECRET", "tell-tale")
    tree = config.to_dict(config.load(["data=text", "data.path=x"]))
    tree["runs_dir"] = "${oc.env:SECRET}"
    tree["data"]["path"] = "${oc.env:SECRET}"
    resolved = config.from_dict(tree)
    assert (resolved.runs_dir, resolved.data.path) == ("${oc.env:SECRET}", "${oc.env:SECRET}")


def test_one_load_does_not_change_the_next() -> None:
    before = config.to_dict(config.load(["pos=rope"]))
    config.load(["pos=rope", "pos.base=500", "train.lr=0.5", "train.keep=[0.5]"])
    assert config.to_dict(config.load(["pos=rope"])) == before


def test_environment_gives_folders_and_overrides_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROPELAB_RUNS", "/runs of mine/ü=#")
    monkeypatch.setenv("ROPELAB_CACHE", "")
    resolved = config.load()
    assert resolved.runs_dir == "/runs of mine/ü=#"
    assert resolved.cache_dir == read_yaml("config.yaml")["cache_dir"]
    assert config.load(["runs_dir=elsewhere"]).runs_dir == "elsewhere"


def test_hydra_is_not_needed_to_read_a_stored_configuration() -> None:
    code = (
        "import json, sys; from ropelab import config; config.from_dict(json.load(sys.stdin)); "
        "print([m for m in ('hydra', 'omegaconf', 'torch') if m in sys.modules])"
    )
    tree = json.dumps(config.to_dict(config.load()))
    done = subprocess.run(
        [sys.executable, "-c", code], input=tree, capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert done.stdout.strip() == "[]"


# --- values ---------------------------------------------------------------------------------------------------------

ODD_PATHS = [
    "a b", "a=b", "it's", 'say "so"', "#1", "a@b", "a,b", "{x}", "[x]", "(x)", "~x", "x;y", "größe/日本", "a:b", "x!",
    "$HOME", "%s", "*", "a\\b", "-x", "null.txt", "1e3", "true", "&x", "x|y", " x", "?", "`x`",
]  # fmt: skip


@pytest.mark.parametrize("path", ODD_PATHS)
@pytest.mark.parametrize("key", ["data.path", "runs_dir", "cache_dir"])
def test_paths_hold_any_character(key: str, path: str) -> None:
    head, _, rest = key.partition(".")
    value = config.to_dict(config.load([*(["data=text"] if head == "data" else []), f"{key}={path}"]))[head]
    assert (value[rest] if rest else value) == path


NULLS = ("null", "none", "None")


@given(st.text(min_size=1).filter(lambda text: "${" not in text and text[0] not in "'\"" and text not in NULLS))
def test_any_text_is_a_path(text: str) -> None:
    """Whatever a path holds, quotes around the whole and the word for nothing apart, it arrives as it was typed."""
    assert config.load(["data=text", f"data.path={text}"]).data.path == text


def test_quotes_around_a_whole_value_are_the_shells() -> None:
    assert config.load(["data=text", "data.path='a b'"]).data.path == "a b"
    assert config.load(['runs_dir="a b"']).runs_dir == "a b"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.lr=1e-3", "train.lr", 1e-3),
        ("train.lr=1", "train.lr", 1.0),
        ("train.grad_clip=null", "train.grad_clip", None),
        ("train.warmup_steps=0", "train.warmup_steps", 0),
        ("train.compile=True", "train.compile", True),
        ("train.keep=[]", "train.keep", []),
        ("train.keep=[0.5, 0.75]", "train.keep", [0.5, 0.75]),
        ("eval.ctx=8192", "eval.ctx", "8192"),
        ("eval.ctx=512,8192", "eval.ctx", "512,8192"),
        ("eval.scalings=[none,yarn:8,ntk:auto,linear:auto-row]", "eval.scalings",
         ["none", "yarn:8", "ntk:auto", "linear:auto-row"]),
        ("model.qk_norm=true", "model.qk_norm", True),
        ("device=cuda:1", "device", "cuda:1"),
        ("seed=4294967295", "seed", 4294967295),
        ("pos.base=500000", "pos.base", 500000.0),
        ("pos.fraction=0.5", "pos.fraction", 0.5),
        ("pos.layout=interleaved", "pos.layout", "interleaved"),
        ("data.subset=null", "data.subset", None),
    ],
)  # fmt: skip
def test_values_take_the_type_of_their_key(override: str, key: str, value: object) -> None:
    found: Any = config.to_dict(config.load([override]))
    for part in key.split("."):
        found = found[part]
    assert found == value
    assert type(found) is type(value)


def test_parameters_of_a_scaling() -> None:
    scaling = config.load(
        ["scaling=yarn", "scaling.factor=8", "scaling.original_ctx=64", "scaling.beta_fast=16"]
    ).scaling
    kept = {"beta_slow": 1.0, "ramp": "index", "truncate": True, "attention_factor": None}
    assert scaling == Method("yarn", {"factor": 8.0, "original_ctx": 64, "beta_fast": 16.0, **kept})


def test_a_stored_run_may_be_older_than_a_parameter_and_a_key() -> None:
    """What it does not say has its default; what nobody knows is refused."""
    tree = config.to_dict(config.load(["scaling=yarn"]))
    old = {**tree, "scaling": {"name": "yarn", "factor": 8.0}, "eval": dict(tree["eval"])}
    del old["positions"], old["parent"], old["eval"]["baseline"]
    read = config.from_dict(old)
    assert read.scaling.parameters == {**config.load(["scaling=yarn"]).scaling.parameters, "factor": 8.0}
    assert (read.positions.name, read.parent, read.eval.baseline) == ("contiguous", None, None)
    with pytest.raises(ValueError, match=r"unknown key 'scaling\.beta'"):
        config.from_dict({**tree, "scaling": {"name": "yarn", "beta": 8.0}})


@pytest.mark.parametrize(
    ("text", "name", "factor"),
    [
        ("yarn", "yarn", "auto"),
        ("yarn:8", "yarn", 8.0),
        ("ntk:auto", "ntk", "auto"),
        ("ntk:auto-row", "ntk", "auto-row"),
    ],
)
def test_parse_scaling(text: str, name: str, factor: object) -> None:
    method = config.parse_scaling(text)
    assert (method.name, method.parameters["factor"]) == (name, factor)


def test_parse_scaling_none() -> None:
    assert config.parse_scaling("none") == Method("none", {})


# --- mistakes -------------------------------------------------------------------------------------------------------

# every key of config.yaml and of the default groups: values that it cannot have, and what the message must say of them
BAD_VALUES: dict[str, list[tuple[str, str]]] = {
    "pos.base": [("abc", "a number"), ("nan", "finite"), ("inf", "finite"), ("", "a number")],
    "pos.layout": [("", "empty")],
    "pos.fraction": [("half", "a number"), ("nan", "finite")],
    "parent": [("", "empty")],
    "model.n_layer": [("0", ">= 1"), ("-1", ">= 1"), ("two", "a whole number"), ("1.5", "a whole number")],
    "model.d_model": [("0", ">= 1"), ("127", "divisible by model.n_head"), ("null", "a whole number")],
    "model.n_head": [("0", ">= 1"), ("3", "try model.n_head=4")],
    "model.qk_norm": [("yes", "true or false"), ("1", "true or false")],
    "data.path": [("", "empty"), ("''", "empty")],
    "data.subset": [("", "empty")],
    "data.tokenizer": [("words", "bytes, bpe, gpt2")],
    "data.vocab_size": [("abc", "a whole number"), ("4e3", "a whole number")],
    "data.tokenizer_path": [("", "empty")],
    "data.text_field": [("", "empty")],
    "data.splits": [("train", "data.splits.train, data.splits.validation, data.splits.test")],
    "data.test_path": [("", "empty")],
    "data.held_out": [("0", "above 0"), ("0.5", "at most 0.4"), ("nan", "at most 0.4"), ("x", "a number")],
    "data.split_by": [("author", "document, file"), ("", "empty")],
    "data.endings": [(".txt", "a list such as"), ("[txt]", "such as .txt, not 'txt'"), ("[]", "reads no file"),
                     ("[.md]", "add data=text")],
    "data.overlap": [("ignore", "refuse, warn, drop"), ("", "empty")],
    "data.repeated_heads": [("cut", "keep, drop"), ("", "empty")],
    "train.ctx": [("1", ">= 2"), ("0", ">= 2"), ("1e3", "a whole number"), ("abc", "a whole number"),
                  ("64,128", "ropelab sweep train.ctx=64,128"), ("", "a whole number")],
    "train.batch_size": [("0", ">= 1"), ("-4", ">= 1"), ("big", "a whole number")],
    "train.micro_batch_size": [("5", "divide train.batch_size=16"), ("0", "divide"), ("x", "a whole number or null")],
    "train.steps": [("0", ">= 1"), ("1.5", "a whole number"), ("null", "a whole number")],
    "train.lr": [("0", "> 0"), ("-1", "> 0"), ("nan", "> 0"), ("inf", "> 0"), ("1e999", "> 0"), ("fast", "a number"),
                 ("1e-3,2e-3", "ropelab sweep train.lr=1e-3,2e-3")],
    "train.final_lr": [("1.1", "[0, 1]"), ("-0.1", "[0, 1]"), ("nan", "[0, 1]"), ("x", "a number")],
    "train.warmup_steps": [("-1", "train.steps=1000"), ("1001", "train.steps=1000"), ("x", "a whole number or null")],
    "train.weight_decay": [("-0.1", ">= 0"), ("nan", ">= 0"), ("inf", ">= 0"), ("x", "a number")],
    "train.grad_clip": [("0", "> 0"), ("-1", "> 0"), ("nan", "> 0"), ("inf", "> 0"), ("x", "a number or null")],
    "train.dtype": [("fp16", "auto, fp32, bf16"), ("", "empty")],
    "train.compile": [("1", "true or false or null"), ("", "true or false or null")],
    "train.activation_checkpointing": [("1", "true or false"), ("null", "true or false")],
    "train.deterministic": [("maybe", "true or false"), ("", "true or false")],
    "train.parallel": [("both", "auto, ddp, fsdp"), ("", "empty")],
    "train.eval_every": [("0", ">= 1"), ("x", "a whole number")],
    "train.checkpoint_every": [("0", ">= 1"), ("x", "a whole number")],
    "train.keep": [("0.5", "a list such as"), ("[0.5", "a list"), ("[a]", "a number"), ("[0]", "between 0 and 1"),
                   ("[1]", "between 0 and 1"), ("[nan]", "between 0 and 1")],
    "eval.ctx": [("", "empty")],
    "eval.protocol": [("lst", "last, nonoverlapping, prefix, sliding")],
    "eval.stride": [("0", ">= 1"), ("x", "a whole number")],
    "eval.last": [("0", ">= 1"), ("-1", ">= 1")],
    "eval.tokens": [("0", ">= 1"), ("1e5", "a whole number")],
    "eval.max_ctx": [("0", ">= 1"), ("x", "a whole number or null")],
    "eval.baseline": [("bigram", "must be one of unigram")],
    "eval.bos": [("yes", "must be one of false, true, auto"), ("", "empty")],
    "eval.window": [("0", ">= 1"), ("-5", ">= 1"), ("x", "a whole number or null")],
    "eval.scalings": [("yarn", "a list such as"), ("[yrn]", "did you mean yarn?"), ("[yarn:x]", "auto-row or a number"),
                      ("[yarn:0.5]", ">= 1"), ("[yarn:inf]", ">= 1"), ("[yarn:nan]", ">= 1"), ("[yarn:]", ">= 1"),
                      ("[none:2]", "none takes no factor")],
    "eval.dtype": [("fp64", "auto, fp32, bf16")],
    "eval.memory_gb": [("0", "> 0"), ("-1", "> 0"), ("much", "a number or null")],
    "eval.split": [("train", "test, validation")],
    "track.wandb": [("on", "disabled, offline, online")],
    "track.project": [("", "empty")],
    "seed": [("-1", "[0, 2**32)"), ("4294967296", "[0, 2**32)"), ("1.5", "a whole number"), ("0x10", "a whole number"),
             ("null", "a whole number"), ("0,1", "ropelab sweep seed=0,1")],
    "device": [("tpu", "auto, cpu, cuda, mps"), ("", "empty"), ("CPU", "auto, cpu, cuda, mps")],
    "runs_dir": [("", "empty"), ("''", "empty")],
    "cache_dir": [("", "empty"), ('""', "empty")],
}  # fmt: skip


def test_the_table_of_bad_values_holds_every_key() -> None:
    keys = set()
    for head, value in config.to_dict(config.load()).items():
        keys |= {f"{head}.{name}" for name in value if name != "name"} if isinstance(value, dict) else {head}
    assert keys == set(BAD_VALUES)


@pytest.mark.parametrize(
    ("key", "value", "says"), [(key, value, says) for key, rows in BAD_VALUES.items() for value, says in rows]
)
def test_bad_values_name_the_key_and_the_fix(key: str, value: str, says: str) -> None:
    message = refusal(f"{key}={value}")
    named = "scaling" if key == "eval.scalings" else "model.d_model" if key == "model.n_head" and value == "3" else key
    assert named in message
    assert says in message


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["+x=1"], "write KEY=VALUE"),
        (["++train.lr=1"], "write KEY=VALUE"),
        (["~train.lr"], "write KEY=VALUE"),
        (["pos@foo=rope"], "write KEY=VALUE"),
        (["pos@_global_=rope"], "write KEY=VALUE"),
        (["train=5"], "set one of its keys: train.ctx"),
        (["eval="], "set one of its keys: eval.ctx"),
        (["track=x"], "set one of its keys: track.wandb"),
        (["seed=${train.steps}"], "write the value itself"),
        (["runs_dir=${oc.env:HOME}"], "write the value itself"),
        (["pos=../data/text"], "valid: alibi, cable, drope, fire"),
        (["pos=/etc/passwd"], "valid: alibi"),
        (["pos="], "valid: alibi"),
        (["pos=null"], "valid: alibi"),
        (["pos=rope.yaml"], "did you mean rope?"),
        (["pos=ropee"], "unknown pos 'ropee'; did you mean rope?"),
        (["scaling=yran"], "did you mean yarn?"),
        (["model=tny"], "did you mean tiny?"),
        (["data=bok"], "did you mean books?"),
        (["pos=rope,alibi"], "ropelab sweep pos=rope,alibi"),
        (["pos.name=alibi"], "choose with pos=alibi"),
        (["scaling.name=yarn"], "choose with scaling=yarn"),
        (["model.name=small"], "choose with model=small"),
        (["data.name=books"], "choose with data=books"),
        (["hydra.verbose=true"], "ropelab sweep"),
        (["hydra/launcher=submitit_slurm"], "ropelab sweep"),
        (["hydra=x"], "ropelab sweep"),
        (["seed=1", "seed=1"], "give it once"),
        (["train.lr=1e-3", "pos=rope", "train.lr=2e-3"], "train.lr is given twice (1e-3 and 2e-3)"),
        (["trian.lr=1"], "did you mean train.lr?"),
        (["train.lrr=1"], "did you mean train.lr?"),
        (["lr=1"], "train.lr"),
        (["train.lr.x=1"], "did you mean train.lr?"),
        (["seed.x=1"], "write seed=VALUE"),
        (["xyzzy=1"], "unknown key 'xyzzy'; valid: cache_dir"),
        (["pos.bse=1"], "pos=rope has no parameter 'bse'; did you mean pos.base?"),
        (["pos=alibi", "pos.base=1"], "pos=alibi has no parameter 'base'; it has none"),
        (["scaling.factor=4"], "add scaling=NAME, one of dynamic_linear, dynamic_ntk, dynamic_yarn, "),
        (["scaling=rerope", "scaling.factor=4"], "scaling=rerope takes no factor; leave out --factor"),
        (["positions=pose", "positions.max_ctx=0"], "positions.max_ctx must be a whole number >= 1"),
        (["positions=pose", "positions.max_ctx=1.5"], "positions.max_ctx must be a whole number >= 1"),
        (["positions=skips"], "valid: contiguous, pose, randomized"),
        (["scaling=longrope", "scaling.factors=missing.json"], "cannot be read"),
        (["scaling=linear", "scaling.beta_fast=4"], "scaling=linear has no parameter 'beta_fast'"),
        (["scaling=linear", "scaling.factor=0.5"], "a number >= 1, not 0.5"),
        (["scaling=linear", "scaling.factor=nan"], "a number >= 1, not nan"),
        (["scaling=linear", "scaling.factor=inf"], "a number >= 1, not inf"),
        (["scaling=linear", "scaling.factor=-2"], "a number >= 1, not -2"),
        (["scaling=linear", "scaling.factor=abc"], "auto, auto-row or a number"),
        (["scaling=linear", "scaling.factor="], "auto, auto-row or a number"),
        (["scaling=linear", "scaling.factor=true"], "auto, auto-row or a number"),
        (["scaling=linear", "scaling.original_ctx=0"], ">= 1"),
        (["scaling=linear", "scaling.original_ctx=x"], "a whole number"),
        (["data.tokenizer=bpe", "data.vocab_size=257"], "between 258 and 65536"),
        (["data.tokenizer=bpe", "data.vocab_size=65537"], "between 258 and 65536"),
        (["data=text"], "needs data.path"),
        (["data=hf", "data.path=null"], "needs data.path"),
        (["rope"], "not KEY=VALUE"),
        (["=5"], "write KEY=VALUE"),
        (["train.=5"], "write KEY=VALUE"),
        (["train..lr=5"], "write KEY=VALUE"),
        (["train.lr =5"], "write KEY=VALUE"),
        ([" train.lr=5"], "write KEY=VALUE"),
        (["train.__class__=5"], "unknown key"),
        (["train/lr=5"], "write KEY=VALUE"),
        (["größe=5"], "write KEY=VALUE"),
    ],
)  # fmt: skip
def test_odd_overrides_are_refused(overrides: list[str], says: str) -> None:
    assert says in refusal(*overrides)


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "/dev/zero", "/dev/stdin", "a terabyte"])
def test_a_factors_file_without_an_end_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    file = Path(kind) if kind.startswith("/dev") else tmp_path / "factors.json"
    if kind == "a terabyte":
        with file.open("wb") as opened:
            opened.truncate(2**40)
    elif not kind.startswith("/dev"):
        os.mkfifo(tmp_path / "pipe" if kind.startswith("link") else file)
        if kind.startswith("link"):
            file.symlink_to(tmp_path / "pipe")
    command = [sys.executable, "-m", "ropelab", "show", "--scaling", "longrope", f"scaling.factors={file}"]
    told = subprocess.run(command, stdin=subprocess.PIPE, capture_output=True, text=True, timeout=300, check=False)
    assert told.returncode == 2
    assert told.stderr.startswith(f"ropelab: scaling.factors={file} cannot be read (it ")
    assert told.stderr.endswith("give a FILE of `ropelab search`\n")
    assert told.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("train", "lr"), "0.1", "train.lr"),
        (("train", "steps"), True, "train.steps"),
        (("train", "steps"), 1.0, "train.steps"),
        (("train", "keep"), 0.5, "train.keep"),
        (("train", "extra"), 1, "train.extra"),
        (("train",), 5, "train"),
        (("pos", "name"), "../evil", "unknown pos '../evil'"),
        (("pos",), "rope", "unknown pos"),
        (("scaling",), None, "unknown scaling"),
        (("seed",), None, "seed"),
        (("plugin",), "x.py", "unknown key 'plugin'"),
    ],
)  # fmt: skip
def test_a_stored_configuration_is_checked(path: tuple[str, ...], value: object, says: str) -> None:
    tree: Any = config.to_dict(config.load())
    inside = tree
    for part in path[:-1]:
        inside = inside[part]
    inside[path[-1]] = value
    with pytest.raises(ValueError) as caught:
        config.from_dict(tree)
    assert says in str(caught.value)


@pytest.mark.parametrize("key", ["pos", "train", "seed"])
def test_a_stored_configuration_is_whole(key: str) -> None:
    tree = config.to_dict(config.load())
    del tree[key]
    with pytest.raises(ValueError, match=f"{key} is missing"):
        config.from_dict(tree)
    tree = config.to_dict(config.load())
    del tree["train"]["lr"]
    with pytest.raises(ValueError, match=r"train\.lr is missing"):
        config.from_dict(tree)
