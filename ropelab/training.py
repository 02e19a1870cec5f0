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
WIDE = 192  # width from which oneDNN's fp32 products are the faster ones on a CPU with AVX-512
UNREAD = 16  # steps on a GPU between two readings of the losses: reading waits for all that was asked of the GPU
FUSED = ("cpu", "cuda")  # devices whose fused AdamW leaves a step out when it is told to


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
    settled: bool = True  # is the model as this step left it? Not where later steps were taken before this was read


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


def matmul_precision(device: torch.device, width: int) -> str:
    """What torch.set_float32_matmul_precision gets for fp32 products of a model `width` wide: a fixed rule.

    `medium` lets a CPU multiply by oneDNN instead of MKL, which is still fp32 where the CPU has no AMX (with AMX it
    would be bf16), faster with AVX-512 and slower on narrow models. Everywhere else `highest`.
    """
    if device.type != "cpu" or torch.cpu._is_amx_tile_supported():
        return "highest"
    return "medium" if torch.backends.cpu.get_cpu_capability() == "AVX512" and width >= WIDE else "highest"


def build_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW in two groups: weight decay for matrices and the token table; none for positions, norms and scalars."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        positional = name.startswith("encoding.")
        (plain if positional or parameter.dim() < 2 else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
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
    settle_at: Callable[[int], bool] = lambda step: False,
    unread: int | None = None,
) -> Iterator[Step]:
    """Train from step `start` + 1 to config.steps, yielding every optimizer step.

    `batch_at(step)` returns the windows of a step, (batch_size, ctx + 1), and `positions_at(step)` the positions of
    their inputs, (batch_size, ctx); None: 0 .. ctx - 1. On a GPU up to `unread` steps are taken before their losses are
    read and yielded; only after the last of them is the model as its step left it (`settled`). The steps of `settle_at`
    are such. `NonFiniteLossError` instead of a step whose loss or gradient is not finite: the weights stay those of the
    last good step.
    """
    device = model.tokens.weight.device
    separator = model.tokens.num_embeddings - 1
    fused = device.type in FUSED
    if unread is None:
        unread = UNREAD if device.type == "cuda" else 1
    assert unread == 1 or fused
    model.activation_checkpointing = config.activation_checkpointing
    model.train()
    # 1 from the first step on whose loss or gradient is not finite: no update is made any more
    broken = torch.zeros((), device=device)
    waiting: list[tuple[int, float, Tensor]] = []  # step, lr, (loss, norm of the gradient)
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
        limit = config.grad_clip if config.grad_clip is not None else math.inf
        norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        waiting.append((step, lr, torch.stack((total, norm))))
        if fused:  # decided on the device, without waiting for it
            broken = torch.maximum(broken, 1 - waiting[-1][2].isfinite().all().float())
            optimizer.found_inf = broken  # type: ignore[attr-defined]
        else:
            list(_read(waiting))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if len(waiting) >= unread or step == config.steps or settle_at(step):
            yield from _read(waiting)
            waiting.clear()


def _read(waiting: list[tuple[int, float, Tensor]]) -> Iterator[Step]:
    """The steps that wait, their figures copied to the host at once. `NonFiniteLossError` at the first that is bad."""
    figures = torch.stack([both for _, _, both in waiting]).tolist()
    for (step, lr, _), (loss, norm) in zip(waiting, figures, strict=True):
        if not math.isfinite(loss):
            raise NonFiniteLossError(step, "loss", loss)
        if not math.isfinite(norm):
            raise NonFiniteLossError(step, "norm of the gradient", norm)
        yield Step(step, loss, lr, norm, settled=step == waiting[-1][0])


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
