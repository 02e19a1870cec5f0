"""Hydra's override grammar for sweeps: `pos=rope,alibi seed=range(0,3)` to the points of their product.

Here is also the way through to Hydra's own launchers, for those who prefer them.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ropelab import files
from ropelab.config.load import choices, config_dir, load, nearest

MOST = 10_000  # points of a sweep
LITERAL = ("eval.ctx",)  # keys whose commas are their own: a ladder of lengths is one value


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The points of a sweep, each a list of `KEY=VALUE`; the last override turns fastest.

    Values may be `a,b`, `choice(a,b)`, `range(0,3)`, `glob(r*)`, `sort(...)`, `shuffle(...)`. What is no value of that
    grammar is taken as it stands, so that a path may hold any character. `ValueError` for what cannot be a sweep.
    """
    keys = [override.partition("=")[0] for override in overrides]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is given twice; give it once, with all its values: {twice}=A,B")
    with _Grammar() as grammar:
        choices = [
            [f"{key}={value}" if "=" in override else override for value in grammar.values(override)]
            for key, override in zip(keys, overrides, strict=True)
        ]
    number = math.prod(len(values) for values in choices)
    if number > MOST:
        raise ValueError(f"these settings come to {number} points; a sweep has at most {MOST}")
    return [list(point) for point in itertools.product(*choices)]


def named_sweep(name: str) -> list[str]:
    """The overrides of `configs/sweep/NAME.yaml`, or of a FILE.yaml: one `KEY: VALUES` a line, as on the command line.

    `ValueError` for an unknown name or a file of another shape.
    """
    import yaml

    path = Path(name).expanduser()
    if not path.is_file():
        if name not in choices("sweep"):
            raise ValueError(
                f"unknown sweep '{name}'{nearest(name, choices('sweep'))}; or give a FILE.yaml, or "
                "settings such as pos=rope,alibi"
            )
        path = config_dir() / "sweep" / f"{name}.yaml"
    try:
        found, node = files.load_yaml(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); write lines such as pos: rope,alibi") from None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} holds no settings; write lines such as pos: rope,alibi")
    assert isinstance(node, yaml.MappingNode)
    keys = [str(key.value) for key, _ in node.value]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: {twice} is there twice; give it once, with all its values: {twice}: A,B")
    overrides = []
    for key, value in found.items():
        if isinstance(value, list | dict):
            raise ValueError(f"{path}: {key} takes its values as on the command line, such as {key}: rope,alibi")
        overrides.append(f"{key}={_spelled(value)}")
    return overrides


class _Grammar:
    """Hydra's parser of overrides, with our groups for `glob`."""

    def __enter__(self) -> _Grammar:
        from hydra import initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra
        from hydra.core.override_parser.overrides_parser import OverridesParser

        self._initialized = initialize_config_dir(str(config_dir().resolve()), version_base="1.3")
        self._initialized.__enter__()
        loader = GlobalHydra.instance().config_loader()
        self._parser = OverridesParser.create(config_loader=loader)
        return self

    def __exit__(self, *error: Any) -> None:
        self._initialized.__exit__(*error)

    def values(self, override: str) -> list[str]:
        """The texts that one override's value stands for."""
        from hydra.core.override_parser.types import Transformer
        from hydra.errors import HydraException, OverrideParseException

        key, equals, text = override.partition("=")
        if not equals or key in LITERAL or key[:1] in ("+", "~") or "@" in key:
            return [text]  # `config.load` says what is wrong with it
        try:
            (parsed,) = self._parser.parse_overrides([override])
        except OverrideParseException as error:
            if re.match(r"(choice|range|glob|interval|sort|shuffle)\(", text):
                reason = str(error).splitlines()[0]
                raise ValueError(f"{override} is not understood ({reason}); write range(0,3) or choice(a,b)") from None
            return [text]
        if not parsed.is_sweep_override():
            return [text]
        try:
            several = parsed.sweep_iterator(transformer=Transformer.identity)
            values = list(itertools.islice(several, MOST + 1))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{override}: {reason}; use a,b or range(0,3) or glob(r*) for a group") from None
        if len(values) > MOST:
            raise ValueError(f"{override} stands for more than {MOST} values; a sweep has at most {MOST} points")
        if not values:
            raise ValueError(f"{override} stands for no value")
        return [_spelled(value) for value in values]


def _spelled(value: Any) -> str:
    """A parsed value as `config.load` reads it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(_spelled(item) for item in value)}]"
    if isinstance(value, str | int | float):
        return str(value)
    if hasattr(value, "quote"):  # Hydra's QuotedString
        return str(value.text)
    raise ValueError(f"{value} cannot be one of several values; use a,b or one range, choice or glob")


def check_for_hydra(overrides: Sequence[str]) -> None:
    """`ValueError`, in one line, for settings that Hydra's multirun would refuse with a trace of its own.

    Our own keys are checked point by point, unless another sweeper than Hydra's own makes the points.
    """
    if any(item.startswith("-") for item in overrides):  # Hydra's own options: what they print is asked for
        return
    hydras = [item for item in overrides if item.startswith(("hydra/", "hydra."))]
    mine = [item for item in overrides if item not in hydras]
    if reason := _refused_by_hydra(hydras):
        raise ValueError(f"Hydra takes no {' '.join(hydras)}: {reason}")
    if not any(item.startswith(("hydra/sweeper", "hydra.sweeper")) for item in hydras):
        for point in expand(mine):
            load(point)  # what we say of a key is plainer than what Hydra says
    if reason := _refused_by_hydra([*hydras, *mine]):
        raise ValueError(f"Hydra, which makes the points with {hydras[0]}, takes no {' '.join(mine)}: {reason}")


def _refused_by_hydra(overrides: Sequence[str]) -> str:
    """Why Hydra does not begin a multirun with these; empty where it does."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    with _Grammar():
        try:
            GlobalHydra.instance().config_loader().load_configuration("config", list(overrides), RunMode.MULTIRUN)
        except (HydraException, OmegaConfBaseException) as error:
            return " ".join(str(error).partition("Config search path")[0].partition("See https")[0].split())
    return ""


def run_with_hydra(overrides: Sequence[str], work: Callable[[list[str]], Any]) -> None:
    """Hydra's own multirun over our configuration: its sweepers and launchers, its folders, its messages, its exit.

    `work` gets the overrides of each point and must be importable by name in the process that runs it.
    """
    import hydra
    from omegaconf import DictConfig

    def job(composed: DictConfig) -> Any:
        from hydra.core.global_hydra import GlobalHydra
        from hydra.core.hydra_config import HydraConfig

        # read as everywhere else, by our own types; in a process that is Hydra's already
        point = [item.replace("\\:", ":") for item in HydraConfig.get().overrides.task]
        outer = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            return work(point)
        finally:
            GlobalHydra.instance().hydra = outer

    asks = {"--cfg", "-c", "--info", "-i", "--hydra-help", "--package", "-p", "--resolve"}
    told = [override for override in overrides if override not in ("-m", "--multirun")]
    multirun = [] if asks & {item.partition("=")[0] for item in told} else ["--multirun"]
    sys.argv = ["ropelab sweep", *multirun, "hydra.job.name=ropelab", *told]
    hydra.main(version_base="1.3", config_path=str(config_dir().resolve()), config_name="config")(job)()
