"""From the command line to validated configurations: `load` one, `points` of a sweep. The only border to Hydra."""

from ropelab.config.load import (
    LAUNCHERS,
    METHODS,
    changed,
    choices,
    config_dir,
    from_dict,
    keys,
    keys_called,
    launcher,
    load,
    nearest,
    own_launcher,
    parse_scaling,
    spelled_list,
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
    "keys_called",
    "launcher",
    "load",
    "nearest",
    "own_launcher",
    "parse_scaling",
    "spelled_list",
    "summaries",
    "to_dict",
]
