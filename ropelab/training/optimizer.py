"""AdamW: which parameters decay, the learning rate of a step, and the moments as named tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ropelab.config import TrainConfig
from ropelab.distributed import is_sharded, shard_like
from ropelab.model import GPT

BETAS = (0.9, 0.95)
FUSED = ("cpu", "cuda")  # devices whose fused AdamW skips a step where `found_inf` is 1


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of step 1..steps: linear over the warm-up, then a cosine to final_lr x lr at the last step."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def build_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW in two groups: weight decay for matrices and the token table; none for positions, norms and scalars."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        positional = name.startswith("encoding.")
        (plain if positional or parameter.dim() < 2 else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    # of a model whose ranks hold parts of it: one fused call takes tensors of one kind
    if kept := [parameter for parameter in plain if is_sharded(decayed[0]) and not is_sharded(parameter)]:
        groups[1]["params"] = [parameter for parameter in plain if is_sharded(parameter)]
        groups.append({"params": kept, "weight_decay": 0.0})
    fused = model.tokens.weight.device.type in FUSED
    return torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, fused=fused)


def optimizer_tensors(model: GPT, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, `<parameter>/<exp_avg|exp_avg_sq|step>`."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(model: GPT, optimizer: torch.optim.AdamW, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; the step counters stay where the optimizer wants them."""
    for name, parameter in model.named_parameters():
        state = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors[f"{name}/{key}"]
            if key != "step":
                value = shard_like(value, parameter)
            state[key] = value.to(parameter.device) if parameter.is_cuda else value
        optimizer.state[parameter] = state
