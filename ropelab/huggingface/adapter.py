"""A LoRA adapter in PEFT's form, added to the weights of a loaded model: only when it is asked for.

Nothing of PEFT is run: its configuration may name modules to import. W becomes W + s B A, with s = alpha/r, or
alpha/sqrt(r) where it is rank-stabilised (Hu et al. 2021, 2106.09685, section 4.1; Kalajdzievski 2023, 2312.03732).
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ropelab import files, runs
from ropelab.errors import DamagedFileError, RunError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor's name
# what may stand in the configuration beside r and alpha without changing what is computed
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "modules_to_save": (None, []),
    "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "lora_bias": (False, None), "use_qalora": (False, None),
    "target_parameters": (None, []), "trainable_token_indices": (None,), "layer_replication": (None,),
    "alora_invocation_tokens": (None,), "use_bdlora": (None,), "arrow_config": (None,),
}  # fmt: skip


class Adapter(NamedTuple):
    """What an adapter adds."""

    digest: str  # sha256 over both of its files
    scale: float  # s
    pairs: dict[str, tuple[Tensor, Tensor]]  # name of a module -> A (r, in), B (out, r)


def read(folder: Path) -> Adapter:
    """The adapter in a folder. `ValueError` for what is none, and for one that is more than plain LoRA."""
    for name in (CONFIG, WEIGHTS):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"--adapter {folder} has no {name}: it is no adapter that ropelab can read")
        if path.is_symlink() and folder.resolve().parent.name != "snapshots":
            raise ValueError(f"{path} is a link, which is not followed; put the file itself there")
    try:
        said = files.load_json(folder / CONFIG, follow=True)
    except (OSError, DamagedFileError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read: {error}") from None
    if not isinstance(said, dict):
        raise ValueError(f"{folder / CONFIG} is no JSON object")
    for key, plain in _PLAIN.items():
        if key in said and said[key] not in plain:
            raise ValueError(
                f"--adapter {folder}: {key}={str(said[key])[:40]} is more than plain LoRA; merge it into the model: "
                "model.merge_and_unload().save_pretrained(FOLDER)"
            )
    rank, alpha = said.get("r", 0), said.get("lora_alpha", 0)
    known = files.mistyped(said, {"r": (int,), "lora_alpha": (int, float)}) is None
    if not known or not 0 < rank < 2**20 or not abs(alpha) < 2**20:
        raise ValueError(f"{folder / CONFIG} lacks r and lora_alpha, the rank and the factor of an adapter")
    scale = float(alpha) / (math.sqrt(rank) if said.get("use_rslora") is True else rank)
    try:
        tensors = runs.load_tensors(folder / WEIGHTS)
    except (RunError, OSError, ValueError):
        raise ValueError(f"{folder / WEIGHTS} is damaged: fetch it again") from None
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name in tensors:
        module, part, _ = name.removeprefix(PREFIX).rpartition(".lora_A.weight")
        if part and (other := f"{name.removesuffix('.lora_A.weight')}.lora_B.weight") in tensors:
            pairs[module] = (tensors[name], tensors[other])
        elif not name.endswith(".lora_B.weight"):
            raise ValueError(f"--adapter {folder}: {name} is no part of a plain LoRA adapter")
    if 2 * len(pairs) != len(tensors) or not pairs:
        raise ValueError(f"--adapter {folder}: {WEIGHTS} does not hold pairs of lora_A and lora_B")
    for module, (down, up) in pairs.items():
        if down.dim() != 2 or up.dim() != 2 or len(down) != rank or up.shape[1] != rank:
            raise ValueError(f"--adapter {folder}: {module} has not the rank {rank} that {CONFIG} says")
    said_digest = "".join(f"{name} {files.sha256_of(folder / name)}\n" for name in (CONFIG, WEIGHTS))
    return Adapter(hashlib.sha256(said_digest.encode()).hexdigest(), scale, pairs)


@torch.no_grad()
def add(model: nn.Module, adapter: Adapter) -> None:
    """Add an adapter to the weights of a model. `ValueError` where it is for another one, and nothing is changed."""
    deltas: list[tuple[Tensor, Tensor]] = []
    modules = dict(model.named_modules())
    for name, (down, up) in adapter.pairs.items():
        weight = getattr(modules.get(name), "weight", None)
        # GPT-2's linears are transposed: (in, out)
        linear, shape = isinstance(modules.get(name), nn.Linear), (up.shape[0], down.shape[1])
        if weight is None or tuple(weight.shape) != (shape if linear else shape[::-1]):
            raise ValueError(f"the adapter is for another model: {type(model).__name__} has no {name} of {shape}")
        delta = adapter.scale * (up.float() @ down.float())  # (out, in)
        deltas.append((weight, delta if linear else delta.T))
    for weight, delta in deltas:
        weight.copy_(weight.float() + delta.to(weight.device))
