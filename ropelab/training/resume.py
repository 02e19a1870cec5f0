"""The checkpoint that a training goes on from: the newest that is intact, this run's, and of this model's shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ropelab import runs
from ropelab.errors import RunError
from ropelab.model import GPT
from ropelab.runs import RunDir


class Checkpoint(NamedTuple):
    """What a step checkpoint holds."""

    state: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def latest_checkpoint(run: RunDir, model: GPT, digest: str) -> Checkpoint | None:
    """The newest checkpoint of a run that can be gone on from; others are named on stderr. None: there is none."""
    read: dict[Path, Checkpoint] = {}

    def fits(path: Path) -> bool:
        found = _read(path, model, digest)
        if found is not None:
            read[path] = found
        return found is not None

    path = run.latest_checkpoint(fits)
    return None if path is None else read[path]


def _read(path: Path, model: GPT, digest: str) -> Checkpoint | None:
    """An intact checkpoint; None where it is another run's, or its tensors are not those of this model."""
    state = runs.checkpoint_state(path)
    if state.get("digest", digest) != digest or "best_val_nll" not in state:  # early versions say no digest
        return None
    try:
        weights, moments = (runs.load_tensors(path / f"{part}.safetensors") for part in ("model", "optimizer"))
    except RunError:
        return None
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    of_optimizer = {
        f"{name}/{key}": torch.Size() if key == "step" else parameter.shape
        for name, parameter in model.named_parameters()
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    if _shapes(weights) != shapes or _shapes(moments) != of_optimizer:
        return None
    return Checkpoint(state, weights, moments)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
