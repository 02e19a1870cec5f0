"""From the command line to validated configurations: `load` one, `points` of a sweep. The only border to Hydra."""

from ropelab.config.load import (
    LAUNCHERS,
    METHODS,
    changed,
    choices,
    config_dir,
    from_dict,
    keys,
    launcher,
    load,
    nearest,
    own_launcher,
    parse_scaling,
    summaries,
    to_dict,
)

__all__ = [
    "LAUNCHERS",
    "METHODS",
    "changed",
    "choices",
    "config_dir",
    "from_dict",
    "keys",
    "launcher",
    "load",
    "nearest",
    "own_launcher",
    "parse_scaling",
    "summaries",
    "to_dict",
]
