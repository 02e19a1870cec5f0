"""The training loop: plain, visible, a generator of what happened at each step.

AdamW (0.9, 0.95), linear warm-up and cosine, clipping, gradient accumulation, bf16 by autocast. Batches are addressed
by (seed, step), so nothing but the step has to be remembered to go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ropelab.model import GPT
from ropelab.schema import TrainConfig

BETAS = (0.9, 0.95)


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient became NaN or infinite; `step` is the step whose batch did it."""

    def __init__(self, step: int, what: str, value: float) -> None:
        super().__init__(f"the {what} became {value} at step {step}; lower train.lr or use train.dtype=fp32")
        self.step = step


@dataclass(frozen=True)
class Step:
    """One optimizer step, counted from 1: mean loss of its batch in nats per token, gradient norm before clipping."""

    step: int
    loss: float
    lr: float
    grad_norm: float


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of step 1..steps: linear over the warm-up, then a cosine to final_lr x lr at the last step."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` by what the device can do, never by a timing: bf16 where it multiplies bf16 natively, else fp32.

    CUDA from compute capability 8.0; a CPU with AVX512-BF16 or AMX; MPS stays fp32.
    """
    if dtype != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def build_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW in two groups: weight decay for matrices and the token table; none for positions, norms and scalars."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        positional = name.startswith("encoding.")
        (plain if positional or parameter.dim() < 2 else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    fused = model.tokens.weight.device.type in ("cpu", "cuda")
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
            state[key] = value.to(parameter.device) if value.dim() or parameter.is_cuda else value
        optimizer.state[parameter] = state


def to_device(batch: NDArray[np.int64], device: torch.device) -> Tensor:
    """One host-to-device copy, asynchronous from pinned memory on CUDA."""
    tensor = torch.from_numpy(batch)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def steps(
    model: GPT,
    optimizer: torch.optim.AdamW,
    batch_at: Callable[[int], NDArray[np.int64]],
    config: TrainConfig,
    *,
    start: int,
    dtype: torch.dtype,
    positions_at: Callable[[int], NDArray[np.int64]] | None = None,
) -> Iterator[Step]:
    """Train from step `start` + 1 to config.steps, yielding after each optimizer step.

    `batch_at(step)` returns the windows of a step, (batch_size, ctx + 1), and `positions_at(step)` the positions of
    their inputs, (batch_size, ctx); None: 0 .. ctx - 1. `NonFiniteLossError` before the update that a non-finite loss
    would make, so the weights stay those of the last good step.
    """
    device = model.tokens.weight.device
    separator = model.tokens.num_embeddings - 1
    model.train()
    for step in range(start + 1, config.steps + 1):
        model.progress((step - 1) / config.steps)
        windows = to_device(batch_at(step), device)  # (batch_size, ctx + 1)
        places = None if positions_at is None else to_device(positions_at(step), device)  # (batch_size, ctx)
        lr = lr_at(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # the mean is over the targets of the whole batch, so that it does not depend on the micro-batch
        scored = (windows[:, 1:] != separator).sum()
        total = torch.zeros((), device=device)
        for low in range(0, len(windows), config.micro):
            micro = windows[low : low + config.micro]  # (micro, ctx + 1)
            places_of_micro = None if places is None else places[low : low + config.micro]
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                hidden = model(micro[:, :-1], positions=places_of_micro)  # (micro, ctx, C)
                loss = model.nll(hidden, micro[:, 1:]).sum() / scored
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        value = float(total)
        if not math.isfinite(value):
            raise NonFiniteLossError(step, "loss", value)
        limit = config.grad_clip if config.grad_clip is not None else math.inf
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), limit))
        if not math.isfinite(norm):
            raise NonFiniteLossError(step, "norm of the gradient", norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield Step(step, value, lr, norm)


@torch.no_grad()
def validation_nll(model: GPT, windows: NDArray[np.int64], *, dtype: torch.dtype, batch: int) -> float:
    """Mean loss in nats per token over fixed windows (N, ctx + 1), in the arithmetic of the training."""
    device = model.tokens.weight.device
    separator = model.tokens.num_embeddings - 1
    total, count = 0.0, 0
    for low in range(0, len(windows), batch):
        part = to_device(windows[low : low + batch], device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses = model.nll(model(part[:, :-1]), part[:, 1:])
        total += float(losses.cpu().double().sum())  # MPS has no fp64
        count += int((part[:, 1:] != separator).sum())
    return total / count
