"""From the command line's `KEY=VALUE` to a validated `Config`: the only place that knows Hydra and OmegaConf.

Hydra composes the groups of `configs/`; every other override is read here by the type of the key it sets, so a path
may hold any character and a wrong type is an error that names the key. What comes out is plain dataclasses, and a
stored configuration is plain JSON that never passes through Hydra again.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ropelab import files
from ropelab.config.schema import (
    FIRST_ENDINGS,
    Config,
    DataConfig,
    EvalConfig,
    LocalLauncher,
    Method,
    ModelConfig,
    SlurmLauncher,
    TrackConfig,
    TrainConfig,
)

GROUPS = ("pos", "scaling", "positions", "model", "data")
OTHER_NAMES = {  # of the same things elsewhere
    **dict.fromkeys(("width", "dim", "hidden_size", "hidden_dim", "n_embd", "embed_dim"), "d_model"),
    **dict.fromkeys(("depth", "layers", "n_layers", "num_layers", "num_hidden_layers"), "n_layer"),
    **dict.fromkeys(("heads", "n_heads", "num_heads", "num_attention_heads"), "n_head"),
    **dict.fromkeys(("block_size", "context", "context_length", "seq_len", "sequence_length", "length"), "ctx"),
    **dict.fromkeys(("learning_rate", "max_lr"), "lr"), "batch": "batch_size", "max_steps": "steps",
}  # fmt: skip
OWN_SLURM = "ROPELAB_SLURM"  # names a file of the user's own settings of the launcher slurm
ENVIRONMENT = {"runs_dir": "ROPELAB_RUNS", "cache_dir": "ROPELAB_CACHE"}
LATER: dict[str, Any] = {"positions": {"name": "contiguous"}, "parent": None}  # keys newer than the first version
LATER_IN: dict[str, dict[str, Any]] = {
    "data": {
        "splits": {"train": None, "validation": None, "test": None},
        "test_path": None,
        "held_out": 0.05,
        "split_by": "document",
        "endings": list(FIRST_ENDINGS),
        "overlap": "refuse",
        "repeated_heads": "keep",
    },
    "eval": {"baseline": None, "bos": "false", "memory_gb": None},
    "train": {"activation_checkpointing": False, "deterministic": False, "parallel": "ddp"},
}
LAUNCHERS: dict[str, type[LocalLauncher] | type[SlurmLauncher]] = {"local": LocalLauncher, "slurm": SlurmLauncher}
METHODS = ("pos", "scaling", "positions")  # groups whose parameters are the method's own
SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "track": TrackConfig,
}


def config_dir() -> Path:
    """The folder of shipped YAML files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if (inside / "config.yaml").is_file() else package.parent / "configs"


@functools.cache
def choices(group: str) -> tuple[str, ...]:
    """The names that a group can take: its YAML files."""
    return tuple(sorted(path.stem for path in (config_dir() / group).glob("*.yaml")))


class About(NamedTuple):
    """What a reader is told of a method: the lines `# key: value` at the head of its YAML, which needs no torch."""

    label: str  # in tables and legends
    summary: str = ""
    paper: str = "-"
    applies_to: tuple[str, ...] | None = None  # of a scaling: names of encodings; None: any
    dynamic: bool = False  # of a scaling: its factor follows ctx, and `auto` is 1
    has_factor: bool = True


@functools.cache
def about(group: str, name: str) -> About:
    """The head of a method's YAML; of a name that has none the name itself."""
    if name not in choices(group):
        return About(name)
    text = (config_dir() / group / f"{name}.yaml").read_text(encoding="utf-8")
    head = dict(re.findall(r"^# (label|summary|paper|applies to|dynamic): (.*)$", text, re.M))
    to = head.get("applies to", "any")
    return About(
        head.get("label", name), head.get("summary", ""), head.get("paper", "-"),
        None if to == "any" else tuple(to.split(", ")), head.get("dynamic") == "yes",
        "factor" in _defaults(group, name),
    )  # fmt: skip


def nearest(name: str, valid: Iterable[str]) -> str:
    """'; did you mean X?' for the valid name closest to `name`, else the list of valid names."""
    options = sorted(valid)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; valid: {', '.join(options)}"


def _nearest_key(key: str, valid: Sequence[str]) -> str:
    """`nearest` for a dotted key: by its last name among the keys of its section, or of all where it names none.

    What other programs call a setting is known too. Far from all keys of a section, it is answered with their list.
    """
    head, dot, last = key.rpartition(".")
    last = OTHER_NAMES.get(last, last)
    inside = [known for known in valid if dot and known.startswith(f"{head}.")]
    close = difflib.get_close_matches(last, [known.removeprefix(f"{head}.") for known in inside], n=1, cutoff=0.6)
    if close:
        return f"; did you mean {head}.{close[0]}?"
    same = [known for known in valid if known.endswith(f".{last}")]
    if same:
        return f"; did you mean {' or '.join(same)}?"
    return f"; valid: {', '.join(sorted(inside))}" if inside else nearest(key, valid)


def keys() -> list[str]:
    """Every key that a run can be told by, dotted; of a method's parameters those of the default one."""
    return _all_keys(_compose({}))


def keys_called(name: str) -> list[str]:
    """The dotted keys whose last name is this one, or what other programs call so."""
    last = OTHER_NAMES.get(name, name)
    return [key for key in keys() if key.rpartition(".")[2] == last]


def load(overrides: Sequence[str] = (), *, parent: Mapping[str, Any] | None = None) -> Config:
    """Compose the shipped configuration with overrides such as `pos=alibi` and `train.lr=1e-3`.

    `parent` is the stored configuration of a run to go on from: what is not overridden is as there, but for
    evaluation, tracking, device and folders. `ValueError`, in one line with the fix, for every override that is not
    exactly one known key and one value.
    """
    pairs = _split(overrides)
    chosen = {key: value for key, value in pairs.items() if key in GROUPS}
    tree = _compose(chosen)
    for key, variable in ENVIRONMENT.items():
        tree[key] = os.environ.get(variable) or tree[key]
    if parent is not None:
        _inherit(tree, to_dict(from_dict(dict(parent))), chosen)
    factors = pairs.pop("scaling.factors", None) if tree["scaling"]["name"] == "longrope" else None
    for key, text in pairs.items():
        if key not in GROUPS:
            _assign(tree, key, text)
    if factors is not None:
        found = _factors_file(factors)
        for key, value in found.items():
            if f"scaling.{key}" in pairs and tree["scaling"][key] != value:
                raise ValueError(
                    f"scaling.{key}={pairs[f'scaling.{key}']} beside scaling.factors={factors}: the file says {key}; "
                    "leave one of them out"
                )
            tree["scaling"][key] = value
    return from_dict(tree)


def launcher(name: str, overrides: Sequence[str]) -> LocalLauncher | SlurmLauncher:
    """How a sweep runs: `configs/launcher/NAME.yaml`, `own_launcher`, and overrides such as `launcher.partition=gpu`.

    `ValueError` for what is unknown or of another type.
    """
    if name not in LAUNCHERS:
        raise ValueError(f"unknown launcher '{name}'{nearest(name, LAUNCHERS)}")
    import yaml

    tree = yaml.safe_load((config_dir() / "launcher" / f"{name}.yaml").read_text(encoding="utf-8"))
    tree |= own_launcher(name)
    hints = typing.get_type_hints(LAUNCHERS[name])
    for override in overrides:
        key, _, text = override.partition("=")
        field = key.removeprefix("launcher.")
        if field not in hints:
            known = [f"launcher.{known}" for known in hints]
            raise ValueError(f"launcher={name} has no setting '{key}'{nearest(key, known)}")
        tree[field] = _parse(key, text, hints[field])
    return typing.cast(LocalLauncher | SlurmLauncher, _section("launcher", LAUNCHERS[name], tree))


def own_launcher(name: str) -> dict[str, Any]:
    """The settings of a launcher in the file that the user's ROPELAB_SLURM names, with the keys of the shipped one.

    `ValueError` where it cannot be read or has other keys; {} without one, and for other launchers than slurm.
    """
    file = os.environ.get(OWN_SLURM) if name == "slurm" else None
    if not file:
        return {}
    try:
        found, _ = files.load_yaml(Path(file).expanduser())
    except (OSError, ValueError) as error:
        raise ValueError(f"{OWN_SLURM}={file} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{OWN_SLURM}={file} is no file of lines such as partition: gpu; correct it, or unset it")
    known = typing.get_type_hints(LAUNCHERS[name])
    odd = next((key for key in found if key not in known), None)
    if odd is not None:
        raise ValueError(f"{OWN_SLURM}={file} has no setting '{odd}'{nearest(str(odd), known)}")
    return found


def _inherit(tree: dict[str, Any], parent: dict[str, Any], chosen: Mapping[str, str]) -> None:
    """Take from a parent's configuration what is not chosen anew; its tokeniser in any case."""
    for key in (*GROUPS, "train", "seed"):
        if key not in chosen:
            tree[key] = parent[key]
    for key in ("tokenizer", "vocab_size", "tokenizer_path"):
        tree["data"][key] = parent["data"][key]


def _factors_file(name: str) -> dict[str, Any]:
    """The parameters of scaling=longrope that a factors file holds: what `ropelab search longrope` writes.

    `long_factors` is needed; `short_factors`, `start_tokens`, `attention_factor`, `factor` and `original_ctx` may be
    there.
    """
    path = Path(_unquoted(name)).expanduser()
    try:
        found = files.load_json(path, follow=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"scaling.factors={name} cannot be read ({reason}); give a FILE of `ropelab search`") from None
    if not isinstance(found, dict) or not isinstance(found.get("long_factors"), list):
        raise ValueError(f"scaling.factors={name} holds no list long_factors; give a FILE of `ropelab search longrope`")
    taken: dict[str, Any] = {}
    for key in ("long_factors", "short_factors", "start_tokens", "attention_factor", "factor", "original_ctx"):
        value = found.get(key)
        if value is None:
            continue
        numbers = value if isinstance(value, list) else [value]
        listed = key.endswith("_factors")
        if isinstance(value, list) != listed or not all(_is_number(item) for item in numbers):
            raise ValueError(f"scaling.factors={name}: {key} must be {'a list of numbers' if listed else 'a number'}")
        taken[key] = [float(item) for item in value] if isinstance(value, list) else value
    return taken


def _is_number(value: Any) -> bool:
    """Is it a finite number that fits into 64 bits?"""
    return isinstance(value, int | float) and not isinstance(value, bool) and -(2**63) < value < 2**63


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON data; `from_dict` is the inverse."""
    tree = dataclasses.asdict(config)
    for group in METHODS:
        tree[group] = {"name": tree[group]["name"], **tree[group]["parameters"]}
    tree["train"]["keep"] = list(tree["train"]["keep"])
    tree["eval"]["scalings"] = list(tree["eval"]["scalings"])
    if tree["data"]["endings"] is not None:
        tree["data"]["endings"] = list(tree["data"]["endings"])
    return tree


def from_dict(tree: dict[str, Any]) -> Config:
    """Dataclasses from plain data, with every type and range checked. `ValueError` with the dotted key."""
    tree = {**LATER, **tree}  # what the runs of the first versions do not say
    for section, later in LATER_IN.items():
        if isinstance(tree.get(section), dict):
            tree[section] = {**later, **tree[section]}
    fields: dict[str, Any] = {}
    hints = typing.get_type_hints(Config)
    _no_strangers(tree, hints, "")
    for key, kind in hints.items():
        if key not in tree:
            raise ValueError(f"{key} is missing from the configuration")
        if key in METHODS:
            fields[key] = _method(key, tree[key])
        elif key in SECTIONS:
            fields[key] = _section(key, SECTIONS[key], tree[key])
        else:
            fields[key] = _typed(key, tree[key], kind)
    for item in fields["eval"].scalings:
        parse_scaling(item)
    return Config(**fields)


def changed(group: str, method: Method) -> dict[str, Any]:
    """The parameters of a method that are not the defaults of its YAML; a scaling's factor is told apart from them."""
    if method.name not in choices(group):  # of a checkpoint a scaling may be kept that is none of ours
        return dict(method.parameters)
    defaults = _defaults(group, method.name)
    return {
        key: value for key, value in method.parameters.items() if key != "factor" and value != defaults.get(key, value)
    }


def parse_scaling(text: str) -> Method:
    """`yarn`, `yarn:8`, `yarn:auto`: an item of eval.scalings as a method with the defaults of its YAML."""
    name, colon, factor = text.partition(":")
    scaling = _method("scaling", {"name": name})
    if not colon:
        return scaling
    if "factor" not in scaling.parameters:
        raise ValueError(f"eval.scalings: {name} takes no factor, not '{text}'")
    return _method("scaling", {"name": name, **scaling.parameters, "factor": _read("scaling.factor", factor, "auto")})


# --- overrides ------------------------------------------------------------------------------------------------------

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")


def _split(overrides: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if key[:1] in ("+", "~") or "@" in key:
            raise ValueError(f"'{override}': +, ~ and @ are not supported; every key exists already, write KEY=VALUE")
        if not equals:
            raise ValueError(f"'{override}' is not KEY=VALUE, such as train.lr=1e-3")
        if key.startswith(("hydra.", "hydra/")) or key == "hydra":
            raise ValueError(f"'{override}': hydra settings belong to `ropelab sweep`")
        if not _KEY.fullmatch(key):
            raise ValueError(f"'{key}' is not a key; write KEY=VALUE such as train.lr=1e-3")
        if "${" in value:
            raise ValueError(f"'{override}': interpolations are not supported; write the value itself")
        if key in pairs:
            raise ValueError(f"{key} is given twice ({pairs[key]} and {value}); give it once")
        if key in GROUPS and value not in choices(key):
            if "," in value:
                raise ValueError(
                    f"{key} takes one value here, not '{value}'; several are a sweep: ropelab sweep {override}"
                )
            raise ValueError(f"unknown {key} '{value}'{nearest(value, choices(key))}")
        pairs[key] = value
    return pairs


def _compose(chosen: dict[str, str]) -> dict[str, Any]:
    return copy.deepcopy(_composed(tuple(sorted(chosen.items()))))


@functools.cache
def _composed(chosen: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(config_dir().resolve()), version_base="1.3", job_name="ropelab"):
        composed = compose("config", [f"{group}={name}" for group, name in chosen])
    return typing.cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))


def _assign(tree: dict[str, Any], key: str, text: str) -> None:
    """Set one dotted key of the composed tree to the value that `text` spells for its type."""
    head, _, rest = key.partition(".")
    if head not in tree:
        raise ValueError(f"unknown key '{key}'{_nearest_key(key, _all_keys(tree))}")
    if not isinstance(tree[head], dict):
        if rest:
            raise ValueError(f"unknown key '{key}'; {head} holds a value, write {head}=VALUE")
        tree[head] = _parse(key, text, typing.get_type_hints(Config)[head])
        return
    if not rest:
        inside = ", ".join(f"{head}.{name}" for name in tree[head])
        raise ValueError(f"{head} is a section, not a value; set one of its keys: {inside}")
    outer, _, inner = rest.partition(".")
    if head in SECTIONS and isinstance(tree[head].get(outer), dict):  # a section inside a section
        names = ", ".join(f"{head}.{outer}.{name}" for name in tree[head][outer])
        if inner not in tree[head][outer]:
            wrong = f"unknown key '{key}'" if inner else f"{key} is a section, not a value"
            raise ValueError(f"{wrong}; set one of its keys: {names}")
        rest = outer
    if rest == "name":
        raise ValueError(f"{key} is fixed by the group; choose with {head}={text}")
    if rest not in tree[head]:
        if head in METHODS:
            name = tree[head]["name"]
            if key == "scaling.factor":
                if name != "none":
                    raise ValueError(f"scaling={name} takes no factor; leave out --factor and scaling.factor={text}")
                methods = ", ".join(method for method in choices("scaling") if "factor" in _defaults("scaling", method))
                raise ValueError(f"scaling.factor={text} needs a scaling; add scaling=NAME, one of {methods}")
            known = [f"{head}.{parameter}" for parameter in tree[head] if parameter != "name"]
            takes = nearest(key, known) if known else "; it has none"
            raise ValueError(f"{head}={name} has no parameter '{rest}'{takes}")
        raise ValueError(f"unknown key '{key}'{_nearest_key(key, _all_keys(tree))}")
    if head in METHODS:
        tree[head][rest] = _read(key, text, tree[head][rest])
    elif inner:
        kind = typing.get_type_hints(SECTIONS[head])[rest]
        tree[head][rest][inner] = _parse(key, text, typing.get_type_hints(kind)[inner])
    else:
        tree[head][rest] = _parse(key, text, typing.get_type_hints(SECTIONS[head])[rest])


def _all_keys(tree: dict[str, Any]) -> list[str]:
    keys = list(tree)
    for head, inner in tree.items():
        if isinstance(inner, dict):
            for name, value in inner.items():
                if isinstance(value, dict):
                    keys += [f"{head}.{name}.{innermost}" for innermost in value]
                elif name != "name":
                    keys.append(f"{head}.{name}")
    return keys


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" else text


# an item in quotes up to the quote before a comma or the end, or all up to a comma
_ITEM = re.compile(
    r"""\s*('(?:(?!'\s*(?:,|$)).)*'(?=\s*(?:,|$))|"(?:(?!"\s*(?:,|$)).)*"(?=\s*(?:,|$))|[^,]*)""", re.DOTALL
)


def _items(key: str, text: str) -> list[str]:
    """What stands between the commas of a list, quotes included; an item in quotes may hold commas itself."""
    found, at = [], 0
    while at <= len(text):
        matched = _ITEM.match(text, at)
        assert matched is not None
        found.append(matched[1].strip())
        comma = text.find(",", matched.end())
        at = comma + 1 if comma >= 0 else len(text) + 1
    for item in found:
        if item[:1] not in ('"', "'"):
            torn = item.count('"') % 2 or (len(found) > 1 and item.count("'") % 2)
        else:
            torn = len(item) < 2 or item[-1] != item[0]
        if torn:
            raise ValueError(
                f"{key}: quotes around a comma are not those of an item ({_short(item)}); write the whole item in "
                f"quotes, such as {key}=['export A=1,2'], and the whole setting in those of the shell"
            )
    return [item for item in found if item]


def spelled_list(items: Iterable[str]) -> str:
    """A list of texts as `load` and `launcher` read it."""

    def spelled(item: str) -> str:
        if not re.search(r"""[,'"]|^\s|\s$""", item):
            return item
        return f"'{item}'" if not re.search(r"'\s*(,|$)", item) else f'"{item}"'

    return f"[{','.join(map(spelled, items))}]"


def _parse(key: str, text: str, kind: Any) -> Any:
    """The value that `text` spells for an annotation of the schema."""
    optional = isinstance(kind, types.UnionType)
    if optional:
        if text in ("null", "none", "None"):
            return None
        (kind,) = (inner for inner in typing.get_args(kind) if inner is not type(None))
    if typing.get_origin(kind) is tuple:
        if not (text.startswith("[") and text.endswith("]")):
            raise ValueError(f"{key} takes a list such as [a,b], not '{text}'")
        inner = typing.get_args(kind)[0]
        return [_parse(key, item, inner) for item in _items(key, text[1:-1])]
    if kind is str:
        if not _unquoted(text):
            raise ValueError(f"{key} is empty; give {key}=VALUE{' or null' if optional else ''}, or leave it out")
        return _unquoted(text)
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError(f"{key} takes true or false{' or null' if optional else ''}, not '{text}'")
    if "," in text:
        raise ValueError(f"{key} takes one value here, not '{text}'; several are a sweep: ropelab sweep {key}={text}")
    word = "a whole number" if kind is int else "a number"
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"{key} takes {word}{' or null' if optional else ''}, not '{_short(text)}'") from None
    if kind is int and not _is_number(value):
        raise ValueError(f"{key} takes a whole number below 2**63, not '{_short(text)}' of {len(text)} digits")
    return value


def _short(text: str) -> str:
    """The beginning of a text that is too long to be read."""
    return text if len(text) <= 80 else f"{text[:40]}..."


def _read(key: str, text: str, default: Any) -> Any:
    """The value of a method's parameter: of the type of its default in the YAML; `auto` also admits numbers."""
    if default is None:
        return (
            None if text in ("null", "none", "None") else _parse(key, text, float if re.search("[.eE]", text) else int)
        )
    if isinstance(default, list):
        return _parse(key, text, tuple[float, ...])
    if default in ("auto", "auto-row") or (isinstance(default, float) and key == "scaling.factor"):
        return text if text in ("auto", "auto-row") else _parse_factor(key, text)
    return _parse(key, text, type(default))


def _parse_factor(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{key} takes auto, auto-row or a number >= 1, not '{_short(text)}'") from None


# --- plain data to dataclasses --------------------------------------------------------------------------------------


def _no_strangers(tree: dict[str, Any], known: Iterable[str], prefix: str) -> None:
    for key in tree:
        if key not in set(known):
            raise ValueError(f"unknown key '{prefix}{key}'{nearest(key, known)}")


def _method(group: str, tree: Any) -> Method:
    if not isinstance(tree, dict) or tree.get("name") not in choices(group):
        name = tree.get("name") if isinstance(tree, dict) else tree
        raise ValueError(f"unknown {group} '{name}'{nearest(str(name), choices(group))}")
    defaults = {key: value for key, value in _defaults(group, tree["name"]).items() if key != "name"}
    given = {key: value for key, value in tree.items() if key != "name"}
    _no_strangers(given, defaults, f"{group}.")
    parameters = {**defaults, **given}  # a stored run may be older than a parameter
    if "factor" in parameters:
        parameters["factor"] = _factor(parameters["factor"])
    for key, value in given.items():
        _check_parameter(f"{group}.{key}", value, defaults[key])
    for key in ("original_ctx", "max_ctx"):
        length = parameters.get(key)
        if length is not None and not (isinstance(length, int) and length >= 1):
            raise ValueError(f"{group}.{key} must be a whole number >= 1, not {length}")
    return Method(tree["name"], parameters)


def _check_parameter(key: str, value: Any, default: Any) -> None:
    """`ValueError` where a parameter's value is not of the kind of its default in the YAML."""
    if key == "scaling.factor":
        return  # `_factor` knows more
    if isinstance(default, bool | str):
        if type(value) is not type(default):
            raise ValueError(
                f"{key} must be {'true or false' if isinstance(default, bool) else 'a word'}, not {value!r}"
            )
        return
    if default is None and value is None:
        return
    several = isinstance(default, list)
    if isinstance(value, list) != several or not all(_is_number(item) for item in (value if several else [value])):
        raise ValueError(f"{key} must be {'a list of finite numbers' if several else 'a finite number'}, not {value!r}")
    if isinstance(default, int) and not isinstance(value, int):
        raise ValueError(f"{key} must be a whole number, not {value!r}")


@functools.cache
def _defaults(group: str, name: str) -> dict[str, Any]:
    """The values of one method's YAML, which holds no interpolation: Hydra is not needed to read a stored run."""
    import yaml

    text = (config_dir() / group / f"{name}.yaml").read_text(encoding="utf-8")
    return typing.cast(dict[str, Any], yaml.safe_load(text))


def _factor(value: Any) -> Any:
    if value in ("auto", "auto-row"):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < float("inf"):
        raise ValueError(f"scaling.factor takes auto, auto-row or a number >= 1, not {value}")
    return float(value)


def _section(name: str, kind: type, tree: Any) -> Any:
    if not isinstance(tree, dict):
        raise ValueError(f"{name} is a section of keys, not {tree!r}")
    hints = typing.get_type_hints(kind)
    _no_strangers(tree, hints, f"{name}.")
    missing = [key for key in hints if key not in tree]
    if missing:
        raise ValueError(f"{name}.{missing[0]} is missing from the configuration")
    return kind(
        **{
            key: _section(f"{name}.{key}", hint, tree[key])
            if isinstance(hint, type) and dataclasses.is_dataclass(hint)
            else _typed(f"{name}.{key}", tree[key], hint)
            for key, hint in hints.items()
        }
    )


def _typed(key: str, value: Any, kind: Any) -> Any:
    """`value` if it is of the annotated type (an int where a float is due, a list where a tuple is), else an error."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        (kind,) = (inner for inner in typing.get_args(kind) if inner is not type(None))
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_typed(key, item, typing.get_args(kind)[0]) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if typing.get_origin(kind) is not None or type(value) is not kind:
        raise ValueError(f"{key} must be {getattr(kind, '__name__', kind)}, not {value!r}")
    return value
