"""What changes the numbers of a run, and the name that comes from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ropelab import files
from ropelab.config import Config

NUMERICS_VERSION = 1  # raised when a change of the code changes the numbers of an unchanged configuration


def identity_of(
    config: Config, *, corpus_digest: str, tokenizer_digest: str, parent_digest: str | None = None
) -> dict[str, Any]:
    """What changes the numbers of a run, and nothing else: no paths, device, micro-batch, evaluation or tracking."""
    model, train = config.model, config.train
    known = {
        "numerics": NUMERICS_VERSION,
        "pos": {"name": config.pos.name, **config.pos.parameters},
        "scaling": {"name": config.scaling.name, **config.scaling.parameters},
        "model": {"n_layer": model.n_layer, "d_model": model.d_model, "n_head": model.n_head, "qk_norm": model.qk_norm},
        "corpus": corpus_digest,
        "tokenizer": tokenizer_digest,
        "train": {
            "ctx": train.ctx,
            "batch_size": train.batch_size,
            "steps": train.steps,
            "lr": train.lr,
            "final_lr": train.final_lr,
            "warmup_steps": train.warmup,
            "weight_decay": train.weight_decay,
            "grad_clip": train.grad_clip,
            "dtype": train.dtype,
        },
        "seed": config.seed,
    }
    # said only where it differs from what the first versions knew, so that their runs are found again
    if config.positions.name != "contiguous":
        known["positions"] = {"name": config.positions.name, **config.positions.parameters}
    if parent_digest is not None:
        known["parent"] = parent_digest
    return known


def recipe(manifest: Mapping[str, Any]) -> str:
    """A digest of all that changes a run's numbers but its seed; of a parent its recipe, not its own seed."""
    known = {key: value for key, value in manifest["identity"].items() if key != "seed"}
    parent = manifest.get("parent")
    if parent is not None:
        known["parent"] = parent.get("recipe", parent["digest"])
    return files.digest_of(known)[:16]


def run_name(config: Config, digest: str) -> str:
    """`rope-books-s0-1a2b3c4d`, `rope-yarn-pose-books-s0-1a2b3c4d`."""
    words = [config.pos.name]
    words += [config.scaling.name] if config.scaling.name != "none" else []
    words += [config.positions.name] if config.positions.name != "contiguous" else []
    return "-".join([*words, config.data.name, f"s{config.seed}", digest[:8]])
