"""What an exported folder says of the run that it was: its own subfolder, which transformers does not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ropelab import config as configs
from ropelab import files, runs
from ropelab.config import Config, Method
from ropelab.positions import Geometry, Rope
from ropelab.scalings import build

FOLDER = "ropelab"
RUN = f"{FOLDER}/run.json"
REST = f"{FOLDER}/rest.safetensors"  # weights that transformers' model has no place for


class Recorded(NamedTuple):
    """The run that an export was."""

    manifest: dict[str, Any]
    trained: Config
    scaling: Method  # of the export, its factor a number
    train_ctx: int
    original_ctx: int
    rest: dict[str, Tensor]


def read(folder: Path) -> Recorded | None:
    """The record in a folder; None where there is none, or it is damaged."""
    found = files.read_json(folder / RUN, follow=True)
    try:
        stated = dict(found["scaling"])
        return Recorded(
            found["run"], configs.from_dict(found["run"]["config"]), Method(stated.pop("name"), stated),
            int(found["train_ctx"]), int(found["original_ctx"]), runs.load_tensors(folder / REST),
        )  # fmt: skip
    except (TypeError, KeyError, ValueError, OSError):
        return None


def still_turns(record: Recorded, pos: Method, scaling: Method, geometry: Geometry) -> bool:
    """Does a rotary configuration, read as `pos` and `scaling`, say what the record says? It may have been changed."""
    was = build(record.trained.pos, record.scaling, Geometry.of(record.trained.model, record.original_ctx))
    now = build(pos, scaling, geometry)
    if not isinstance(was, Rope) or not isinstance(now, Rope):
        return False
    for ctx in (1, 4096, 2**17):
        one, other = was.spectrum(ctx), now.spectrum(ctx)
        if one.inv_freq.shape != other.inv_freq.shape:
            return False
        if not torch.allclose(one.inv_freq, other.inv_freq, rtol=1e-6, atol=0):
            return False
        if abs(one.attention_factor - other.attention_factor) > 1e-6:
            return False
    return True
