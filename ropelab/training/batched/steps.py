"""The steps of a stack: each model's own batches, losses and failures."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ropelab.config import TrainConfig
from ropelab.errors import NonFiniteLossError
from ropelab.model import GPT
from ropelab.training.batched.modules import join
from ropelab.training.batched.stack import Block, Stack, StackOptimizer, block_of_all
from ropelab.training.loop import MAX_IN_FLIGHT, Step, to_device
from ropelab.training.optimizer import FUSED, lr_at

SHAPE = ("n_layer", "d_model", "n_head", "qk_norm")  # of a model's configuration: one in a stack

At = Callable[[int], NDArray[np.int64]]
"""step -> the windows of its batch, (batch_size, ctx + 1), or the positions of their inputs, (batch_size, ctx)."""


def check_stackable(models: Sequence[GPT], ctx: int) -> None:
    """`ValueError`, which names the reason, where models cannot be trained in one stack at `ctx` tokens."""
    first = models[0]
    for model in models:
        facts = [(f"model.{key}", getattr(first.config, key), getattr(model.config, key)) for key in SHAPE]
        facts.append(("vocabulary", first.tokens.num_embeddings, model.tokens.num_embeddings))
        facts.append(("device", first.tokens.weight.device, model.tokens.weight.device))
        for what, one, other in facts:
            if one != other:
                raise ValueError(f"models of different {what} ({one}, {other}) cannot be stacked")
        if model.encoding.content_dependent:
            raise ValueError(f"{type(model.encoding).__name__} reads the text in every layer: it cannot be stacked")
    with torch.no_grad():
        join([model.prepare(ctx).record for model in models], first, ctx, torch.float32)


def stacked_steps(
    models: Sequence[GPT],
    optimizers: Sequence[torch.optim.AdamW],
    batches_at: Sequence[At],
    config: TrainConfig,
    *,
    start: int,
    dtype: torch.dtype,
    positions_at: Sequence[At] | None = None,
    sync_at: Callable[[int], bool] = lambda step: False,
    max_in_flight: int | None = None,
    compiled: bool = False,
) -> Iterator[list[Step | NonFiniteLossError]]:
    """`training.steps` for M models at once: train from step `start` + 1 to config.steps, yielding every step.

    Models, their optimizers (`build_optimizer` of each with this config, fresh or as loaded), batches and positions
    are in one order, and so are the entries of what is yielded. A model whose loss or gradient is not finite leaves
    with the weights and moments of its last good step; its entry is the error from then on. The others go on, and when
    none is left the iterator ends. `sync_at` and `max_in_flight` are those of `training.steps`. `compiled`:
    torch.compile of the block of the stack, since the models' own are not called.

    After a synced step weights of the models and states of their optimizers are views of the stack: they can be
    evaluated and saved as ever, but not trained or moved to another device. Once the iterator has ended or is closed
    they are tensors of their own.

    `ValueError`, before anything is changed, for models that `check_stackable` refuses and for optimizers at different
    steps.
    """
    check_stackable(models, config.ctx)
    _check_optimizers(models, optimizers)
    if max_in_flight is None:
        max_in_flight = MAX_IN_FLIGHT if models[0].tokens.weight.device.type == "cuda" else 1
    return _steps(models, optimizers, batches_at, config, start, dtype, positions_at, sync_at, max_in_flight, compiled)


def _check_optimizers(models: Sequence[GPT], optimizers: Sequence[torch.optim.AdamW]) -> None:
    counts = {
        int(optimizer.state[parameter]["step"]) if optimizer.state.get(parameter) else 0
        for model, optimizer in zip(models, optimizers, strict=True)
        for parameter in model.parameters()
    }
    if len(counts) > 1:
        raise ValueError(f"optimizers after {sorted(counts)} steps cannot be stacked: they must have made the same")


def _steps(
    models: Sequence[GPT], optimizers: Sequence[torch.optim.AdamW], batches_at: Sequence[At], config: TrainConfig,
    start: int, dtype: torch.dtype, positions_at: Sequence[At] | None, sync_at: Callable[[int], bool],
    max_in_flight: int, compiled: bool,
) -> Iterator[list[Step | NonFiniteLossError]]:  # fmt: skip
    stack = Stack(models, dtype)
    optimizer = StackOptimizer(stack, optimizers)
    device, separator, fused = stack.device, stack.n_vocab - 1, stack.device.type in FUSED
    assert max_in_flight == 1 or fused
    block: Block = torch.compile(block_of_all, dynamic=False) if compiled else block_of_all
    if config.activation_checkpointing:
        block = functools.partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
    failed: dict[int, NonFiniteLossError] = {}
    pending: list[tuple[int, float, Tensor]] = []  # step, lr, (losses, norms of the gradients) (2, M)
    # 1 from the first step on that comes to something not finite in a model that is present: no update is made any more
    broken = torch.zeros((), device=device)
    step = start
    try:
        while step < config.steps:
            step += 1
            for index in optimizer.present:
                models[index].set_training_fraction((step - 1) / config.steps)
            windows = to_device(np.stack([at(step) for at in batches_at]), device)  # (M, batch_size, ctx + 1)
            positions = None  # (M, batch_size, ctx)
            if positions_at is not None:
                positions = to_device(np.stack([at(step) for at in positions_at]), device)
            # each model's mean is over the targets of its whole batch, as in `training.steps`
            scored = (windows[..., 1:] != separator).sum((1, 2))  # (M,)
            total = torch.zeros(len(models), device=device)
            for low in range(0, windows.shape[1], config.micro):
                micro = windows[:, low : low + config.micro]  # (M, micro, ctx + 1)
                positions_of_micro = None if positions is None else positions[:, low : low + config.micro]
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                    hidden = stack.forward(micro[..., :-1], positions_of_micro, block)  # (M, micro, ctx, C)
                    losses = stack.nll(hidden, micro[..., 1:]).sum((1, 2)) / scored  # (M,)
                # no loss depends on another model's weights, so the gradient of the sum is that of each
                losses.sum().backward()  # type: ignore[no-untyped-call]
                total += losses.detach()
            figures = torch.stack((total, optimizer.clip(config.grad_clip)))  # (2, M)
            lr = lr_at(step, config)
            pending.append((step, lr, figures))
            good = figures.isfinite().all(0) | ~optimizer.is_present  # (M,)
            broken = torch.maximum(broken, 1 - good.all().float())
            optimizer.step(lr, broken)
            if len(pending) < max_in_flight and step < config.steps and not sync_at(step):
                continue
            read: list[tuple[list[float], list[float]]] = torch.stack([both for _, _, both in pending]).tolist()
            bad = [_not_finite(*figures_of_step, optimizer.present) for figures_of_step in read]
            made = next((n for n, some in enumerate(bad) if some), len(bad))  # updates
            for n, ((taken, lr, _), (losses_of, norms_of)) in enumerate(zip(pending[:made], read, strict=False)):
                yield [
                    failed.get(index) or Step(taken, loss, lr, norm, synced=n == made - 1)
                    for index, (loss, norm) in enumerate(zip(losses_of, norms_of, strict=True))
                ]
            if made < len(pending):
                step = pending[made][0]
                for index, (what, value) in bad[made].items():
                    failed[index] = NonFiniteLossError(step, what, value)
                    optimizer.detach(index)
                if not optimizer.present:
                    yield [failed[index] for index in range(len(models))]
                    return
                step -= 1  # the others take it again
                broken = torch.zeros_like(broken)
            pending.clear()
    finally:
        for index in optimizer.present.copy():
            optimizer.detach(index)


def _not_finite(losses: list[float], norms: list[float], present: Sequence[int]) -> dict[int, tuple[str, float]]:
    """The figures of a step that are not finite, by model: (what, value)."""
    found = {index: ("norm of the gradient", norms[index]) for index in present if not math.isfinite(norms[index])}
    return found | {index: ("loss", losses[index]) for index in present if not math.isfinite(losses[index])}
