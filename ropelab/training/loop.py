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

from ropelab.config import TrainConfig
from ropelab.distributed import SINGLE, Ranks, clip_gradients, sync_on_last
from ropelab.errors import NonFiniteLossError
from ropelab.model import GPT
from ropelab.training.optimizer import FUSED, lr_at

MAX_IN_FLIGHT = 16  # steps on a GPU between two readings of the losses: reading waits until the GPU has done them


@dataclass(frozen=True)
class Step:
    """One optimizer step, counted from 1: mean loss of its batch in nats per token, gradient norm before clipping."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    synced: bool = True  # is the model as this step left it? Not where later steps were taken before this was read


class Loss(nn.Module):
    """A model and its loss as one module: all that a step uses of the weights, so that DDP and FSDP can wrap it.

    dtype: the arithmetic of the training; bf16 is autocast. sharded: FSDP will wrap it.
    """

    def __init__(self, model: GPT, dtype: torch.dtype, *, sharded: bool = False) -> None:
        super().__init__()
        self.model, self.dtype, self.sharded = model, dtype, sharded

    def forward(self, windows: Tensor, positions: Tensor | None = None) -> Tensor:
        """windows (B, ctx + 1), positions of their inputs (B, ctx) or None -> loss of each target in nats, (B, ctx)."""
        narrow = self.dtype == torch.bfloat16
        # cast weights are not kept where the weights themselves are not
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=narrow, cache_enabled=not self.sharded):
            hidden = self.model(windows[:, :-1], positions=positions)  # (B, ctx, C)
            losses = self.model.nll(hidden, windows[:, 1:])
        return losses.clone() if self.sharded else losses  # FSDP2 wants no view


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
    sync_at: Callable[[int], bool] = lambda step: False,
    max_in_flight: int | None = None,
    loss: nn.Module | None = None,
    ranks: Ranks = SINGLE,
) -> Iterator[Step]:
    """Train from step `start` + 1 to config.steps, yielding every optimizer step.

    `batch_at(step)` returns the windows of a step, (batch_size, ctx + 1), and `positions_at(step)` the positions of
    their inputs, (batch_size, ctx); None: 0 .. ctx - 1. On a GPU up to `max_in_flight` steps are taken before their
    losses are read and yielded; only after the last of them is the model as its step left it (`synced`). The steps for
    which `sync_at` is true are such. `NonFiniteLossError` instead of a step whose loss or gradient is not finite: the
    weights stay those of the last good step.

    All `ranks` take the same steps, each on its share of the batch; `loss` is `Loss` of the model, wrapped by DDP or
    FSDP. What is yielded is of the whole batch and the same on all ranks.
    """
    device = model.tokens.weight.device
    separator = model.tokens.num_embeddings - 1
    fused = device.type in FUSED
    if max_in_flight is None:
        max_in_flight = MAX_IN_FLIGHT if device.type == "cuda" else 1
    assert max_in_flight == 1 or fused
    loss = Loss(model, dtype) if loss is None else loss
    share = ranks.shard(config.batch_size)
    parameters = list(model.parameters())
    model.activation_checkpointing = config.activation_checkpointing
    model.train()
    # 1 from the first step on whose loss or gradient is not finite: no update is made any more
    broken = torch.zeros((), device=device)
    pending: list[tuple[int, float, Tensor]] = []  # step, lr, (loss, norm of the gradient)
    for step in range(start + 1, config.steps + 1):
        model.set_training_fraction((step - 1) / config.steps)
        windows = to_device(batch_at(step), device)  # (batch_size, ctx + 1)
        positions = None if positions_at is None else to_device(positions_at(step), device)  # (batch_size, ctx)
        lr = lr_at(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # the mean is over the targets of the whole batch, whatever the micro-batch and the ranks
        scored = (windows[:, 1:] != separator).sum()
        total = torch.zeros((), device=device)
        for low in range(share.start, share.stop, config.micro):
            rows = slice(low, min(low + config.micro, share.stop))
            positions_of_rows = None if positions is None else positions[rows]  # (rows, ctx)
            with sync_on_last(loss, last=rows.stop == share.stop):
                part = loss(windows[rows], positions_of_rows).sum() / scored
                # the ranks' gradients become their mean, and are due as a sum
                (part * ranks.world if ranks.world > 1 else part).backward()
            total += part.detach()
        limit = config.grad_clip if config.grad_clip is not None else math.inf
        norm = clip_gradients(parameters, limit)
        pending.append((step, lr, torch.stack((ranks.all_reduce(total), norm))))
        if fused:  # decided on the device, without waiting for it
            broken = torch.maximum(broken, 1 - pending[-1][2].isfinite().all().float())
            optimizer.found_inf = broken  # type: ignore[attr-defined]
        else:
            list(_read(pending))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if len(pending) >= max_in_flight or step == config.steps or sync_at(step):
            yield from _read(pending)
            pending.clear()


def _read(pending: list[tuple[int, float, Tensor]]) -> Iterator[Step]:
    """The pending steps, their figures copied to the host at once. `NonFiniteLossError` at the first bad one."""
    figures = torch.stack([both for _, _, both in pending]).tolist()
    for (step, lr, _), (loss, norm) in zip(pending, figures, strict=True):
        if not math.isfinite(loss):
            raise NonFiniteLossError(step, "loss", loss)
        if not math.isfinite(norm):
            raise NonFiniteLossError(step, "norm of the gradient", norm)
        yield Step(step, loss, lr, norm, synced=step == pending[-1][0])


@torch.no_grad()
def validation_nll(
    model: GPT,
    windows: NDArray[np.int64],
    *,
    dtype: torch.dtype,
    batch: int,
    loss: nn.Module | None = None,
    ranks: Ranks = SINGLE,
) -> float:
    """Mean loss in nats per token over fixed windows (N, ctx + 1), in the arithmetic of the training.

    All `ranks` score a share of the windows each; `loss` as in `steps`.
    """
    device = model.tokens.weight.device
    separator = model.tokens.num_embeddings - 1
    loss = Loss(model, dtype) if loss is None else loss
    if missing := -len(windows) % ranks.world:
        # every rank makes as many passes; windows of separators score nothing
        windows = np.concatenate([windows, np.full((missing, windows.shape[1]), separator)])
    windows = windows[ranks.shard(len(windows))]
    total, count = 0.0, 0
    for low in range(0, len(windows), batch):
        part = to_device(windows[low : low + batch], device)
        total += float(loss(part).cpu().double().sum())  # MPS has no fp64
        count += int((part[:, 1:] != separator).sum())
    if ranks.world > 1:
        total, count = ranks.all_reduce(torch.tensor([total, count], dtype=torch.float64, device=device)).tolist()
    return total / count
