"""What a training resumes from: the newest checkpoint that is intact, this run's, and of this model's shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ropelab import runs
from ropelab.distributed import SINGLE, Ranks
from ropelab.errors import RunError
from ropelab.model import GPT
from ropelab.runs import RunDir


class Checkpoint(NamedTuple):
    """What a step checkpoint holds."""

    state: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


class Stored(NamedTuple):
    """What a run's folder holds of the training so far. Tensors only on the first rank, which reads them."""

    manifest: dict[str, Any]  # {}: there is none
    state: dict[str, Any]  # of the checkpoint to resume from; {}: there is none
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def read_stored(run: RunDir, model: GPT, digest: str, ranks: Ranks = SINGLE) -> Stored:
    """On all ranks, of a run that is locked. A manifest or a checkpoint that is damaged is named on stderr."""
    checkpoint: Checkpoint | None = None  # on the first rank

    def read() -> list[dict[str, Any]]:
        nonlocal checkpoint
        manifest = run.begun()
        checkpoint = latest_checkpoint(run, model, digest)
        return [manifest, {} if checkpoint is None else checkpoint.state]

    manifest, state = ranks.broadcast_object(read)
    if checkpoint is None:
        return Stored(manifest, state, {}, {})
    return Stored(manifest, state, checkpoint.model, checkpoint.optimizer)


def latest_checkpoint(run: RunDir, model: GPT, digest: str) -> Checkpoint | None:
    """The newest checkpoint of a run that can be resumed from; others are named on stderr. None: there is none."""
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
