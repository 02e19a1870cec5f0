"""Several small models in one step: seeds, or methods that differ in position only, trained side by side.

A model of a few million parameters does not fill a GPU at the batch that an experiment fixes. M models of one shape do
better together: their weights are stacked along a first dimension, so that M linear layers become one batched product
and M optimizer steps one. Nothing is mixed: model i has its own batches, loss, clipping and moments, as if it were
alone in `training.steps`.

Letters: M models, B sequences, T tokens, C width, H heads, D head dimension, V entries of the vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ropelab.attention import Attend
from ropelab.model import GPT, NORM_EPS, Prepared, bias_of, logits_held, rotate
from ropelab.positions import Positions, QueryBias, Rotation
from ropelab.schema import TrainConfig
from ropelab.training import FUSED, UNREAD, NonFiniteLossError, Step, lr_at, to_device

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
        if model.encoding.reads_content:
            raise ValueError(f"{type(model.encoding).__name__} reads the text in every layer: it cannot be stacked")
    with torch.no_grad():
        _join([model.prepare(ctx).record for model in models], first, ctx, torch.float32)


def stacked_steps(
    models: Sequence[GPT],
    optimizers: Sequence[torch.optim.AdamW],
    batches_at: Sequence[At],
    config: TrainConfig,
    *,
    start: int,
    dtype: torch.dtype,
    positions_at: Sequence[At] | None = None,
    settle_at: Callable[[int], bool] = lambda step: False,
    unread: int | None = None,
    compiled: bool = False,
) -> Iterator[list[Step | NonFiniteLossError]]:
    """`training.steps` for M models at once: train from step `start` + 1 to config.steps, yielding every step.

    Models, their optimizers (`build_optimizer` of each with this config, fresh or as loaded), batches and positions
    stand in one order, and so do the entries of what is yielded. A model whose loss or gradient is not finite leaves
    with the weights and moments of its last good step; its entry is the error from then on. The others go on, and when
    none is left the iterator ends. `settle_at` and `unread` are those of `training.steps`. `compiled`: torch.compile of
    the block of the stack, since the models' own are not called.

    After a settled step weights of the models and states of their optimizers are views of the stack: they can be
    evaluated and saved as ever, but not trained or moved to another device. Once the iterator has ended or is closed
    they are tensors of their own.

    `ValueError`, before anything is changed, for models that `check_stackable` refuses and for optimizers at different
    steps.
    """
    check_stackable(models, config.ctx)
    _check_optimizers(models, optimizers)
    if unread is None:
        unread = UNREAD if models[0].tokens.weight.device.type == "cuda" else 1
    return _steps(models, optimizers, batches_at, config, start, dtype, positions_at, settle_at, unread, compiled)


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
    start: int, dtype: torch.dtype, positions_at: Sequence[At] | None, settle_at: Callable[[int], bool], unread: int,
    compiled: bool,
) -> Iterator[list[Step | NonFiniteLossError]]:  # fmt: skip
    stack = _Stack(models, optimizers, dtype)
    device, fused = stack.device, stack.device.type in FUSED
    assert unread == 1 or fused
    block: Block = torch.compile(_block, dynamic=False) if compiled else _block
    if config.activation_checkpointing:
        block = functools.partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
    failed: dict[int, NonFiniteLossError] = {}
    waiting: list[tuple[int, float, Tensor]] = []  # step, lr, (losses, norms of the gradients) (2, M)
    # 1 from the first step on that comes to something not finite in a model that is present: no update is made any more
    broken = torch.zeros((), device=device)
    step = start
    try:
        while step < config.steps:
            step += 1
            for index in stack.present:
                models[index].progress((step - 1) / config.steps)
            windows = to_device(np.stack([at(step) for at in batches_at]), device)  # (M, batch_size, ctx + 1)
            places = None  # (M, batch_size, ctx)
            if positions_at is not None:
                places = to_device(np.stack([at(step) for at in positions_at]), device)
            # each model's mean is over the targets of its whole batch, as in `training.steps`
            scored = (windows[..., 1:] != stack.separator).sum((1, 2))  # (M,)
            total = torch.zeros(len(models), device=device)
            for low in range(0, windows.shape[1], config.micro):
                micro = windows[:, low : low + config.micro]  # (M, micro, ctx + 1)
                places_of_micro = None if places is None else places[:, low : low + config.micro]
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                    hidden = stack.forward(micro[..., :-1], places_of_micro, block)  # (M, micro, ctx, C)
                    losses = stack.nll(hidden, micro[..., 1:]).sum((1, 2)) / scored  # (M,)
                # no loss depends on another model's weights, so the gradient of the sum is that of each
                losses.sum().backward()  # type: ignore[no-untyped-call]
                total += losses.detach()
            figures = torch.stack((total, stack.clip(config.grad_clip)))  # (2, M)
            lr = lr_at(step, config)
            waiting.append((step, lr, figures))
            good = figures.isfinite().all(0) | ~stack.is_present  # (M,)
            broken = torch.maximum(broken, 1 - good.all().float())
            stack.step(lr, broken)
            if len(waiting) < unread and step < config.steps and not settle_at(step):
                continue
            read: list[tuple[list[float], list[float]]] = torch.stack([both for _, _, both in waiting]).tolist()
            bad = [_not_finite(*figures_of_step, stack.present) for figures_of_step in read]
            made = next((n for n, some in enumerate(bad) if some), len(bad))  # updates
            for n, ((taken, lr, _), (losses_of, norms_of)) in enumerate(zip(waiting[:made], read, strict=False)):
                yield [
                    failed.get(index) or Step(taken, loss, lr, norm, settled=n == made - 1)
                    for index, (loss, norm) in enumerate(zip(losses_of, norms_of, strict=True))
                ]
            if made < len(waiting):
                step = waiting[made][0]
                for index, (what, value) in bad[made].items():
                    failed[index] = NonFiniteLossError(step, what, value)
                    stack.leave(index)
                if not stack.present:
                    yield [failed[index] for index in range(len(models))]
                    return
                step -= 1  # the others take it again
                broken = torch.zeros_like(broken)
            waiting.clear()
    finally:
        for index in stack.present.copy():
            stack.leave(index)


def _not_finite(losses: list[float], norms: list[float], present: Sequence[int]) -> dict[int, tuple[str, float]]:
    """What is not finite in a step, model by model: what it is, and its value."""
    found = {index: ("norm of the gradient", norms[index]) for index in present if not math.isfinite(norms[index])}
    return found | {index: ("loss", losses[index]) for index in present if not math.isfinite(losses[index])}


# --- positions ------------------------------------------------------------------------------------------------------


class _Joined(NamedTuple):
    """What M encodings say about one forward pass; what only some of them use changes nothing for the others."""

    embedding: Tensor | None  # (M, B or 1, T, C) fp32
    qk_embedding: Tensor | None  # (M, B or 1, T, C) fp32
    rotation: Rotation | None  # every tensor (M, B or 1, 1, T, R/2) fp32
    scale: Tensor | None  # (M, 1, 1, T, 1) fp32, of the scores of each query
    attend: Attend
    by_heads: bool  # are there biases? Then the models stand beside each other as heads, else as sequences


def _join(records: Sequence[Positions], model: GPT, length: int, dtype: torch.dtype) -> _Joined:
    """What M models of the shape of `model` say about `length` tokens. `ValueError` where it cannot be said at once."""
    if any(record.far is not None for record in records):
        raise ValueError("models with other scores for distant keys cannot be stacked")
    blocks = {record.block for record in records}
    if len(blocks) > 1:
        raise ValueError("models that see blocks of different lengths cannot be stacked")
    n_head, table = model.config.n_head, (length, model.config.d_model)
    bias = _stacked([record.bias for record in records], (length,), 0.0)  # (M, H, T)
    slopes = None  # a kernel computes them all, or none
    if all(record.bias is None or record.slopes is not None for record in records):
        slopes = _stacked([record.slopes for record in records], (n_head,), 0.0)  # (M, 1, H)
    # the biases of M models are those of M x H heads
    of_heads = Positions(
        bias=None if bias is None else bias.flatten(0, 1),  # (M, H, T) -> (M x H, T)
        slopes=None if slopes is None else slopes.flatten(),  # (M, 1, H) -> (M x H,)
        query_bias=_stacked_by_query([record.query_bias for record in records], n_head),
        block=blocks.pop(),
    )
    attend = Attend(
        length, bias=bias_of(of_heads, decays=False), device=model.tokens.weight.device, training=True, dtype=dtype
    )
    return _Joined(
        embedding=_stacked([record.embedding for record in records], table, 0.0),
        qk_embedding=_stacked([record.qk_embedding for record in records], table, 0.0),
        rotation=_stacked_rotations([record.rotation for record in records], length),
        scale=_stacked([record.logit_scale for record in records], (1, length, 1), 1.0),
        attend=attend,
        by_heads=of_heads.bias is not None or of_heads.query_bias is not None,
    )


def _stacked(parts: Sequence[Tensor | None], shape: tuple[int, ...], filler: float) -> Tensor | None:
    """(M, N, *shape): N is 1 for what is the same in all sequences, B for what is not, H for biases.

    A part that is missing becomes `filler`; None where all are missing.
    """
    given = [None if part is None else part.reshape(-1, *shape) for part in parts]
    missing = next((torch.full_like(part, filler) for part in given if part is not None), None)
    return None if missing is None else torch.stack([missing if part is None else part for part in given])


def _stacked_rotations(parts: Sequence[Rotation | None], length: int) -> Rotation | None:
    """The rotations of M models, their tables (M, B or 1, 1, T, R/2); a model that has none is turned by angle 0."""
    given = [part for part in parts if part is not None]
    layouts = {(part.cos_q.shape[-1], part.interleaved) for part in given}
    if len(layouts) > 1:
        raise ValueError("models that pair the dimensions of a head differently cannot be stacked")
    if not given:
        return None
    ((half, interleaved),) = layouts
    one, zero = torch.ones_like(given[0].cos_q), torch.zeros_like(given[0].sin_q)
    tables = [(one, zero, one, zero) if part is None else part[:4] for part in parts]
    cos_q, sin_q, cos_k, sin_k = (
        torch.stack([x.reshape(-1, 1, length, half) for x in same]) for same in zip(*tables, strict=True)
    )
    return Rotation(cos_q, sin_q, cos_k, sin_k, interleaved)


def _stacked_by_query(parts: Sequence[QueryBias | None], heads: int) -> QueryBias | None:
    """The biases of M models as those of M x H heads; zeros for a model that has none; None where none has."""
    if all(part is None for part in parts):
        return None

    def bias(query: Tensor, distance: Tensor) -> Tensor:
        zeros = distance.new_zeros(heads, *distance.shape)  # (H, Q, K)
        return torch.cat([zeros if part is None else part(query, distance) for part in parts])

    return bias


# --- the model ------------------------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, ..., I), weight (M, O, I) -> (M, ..., O)."""
    # (M, ..., I) -> (M, N, I), and back
    return torch.bmm(x.flatten(1, -2), weight.mT).view(*x.shape[:-1], -1)


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    """Layer norm of x (M, ..., C) with gains (M, C), in fp32."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS)
    return normed * gain.view(gain.shape[0], *[1] * (x.dim() - 2), gain.shape[1])  # (M, 1, ..., 1, C)


def _attended(q: Tensor, k: Tensor, v: Tensor, said: _Joined) -> Tensor:
    """q, k, v (M, B, H, T, D) -> (M, B, H, T, D), all models in one call of the kernel."""
    models, batch, *rest = q.shape
    if said.by_heads:  # (M, B, H, T, D) -> (B, M x H, T, D), and back
        out = said.attend(*(x.transpose(0, 1).flatten(1, 2) for x in (q, k, v)))
        return out.view(batch, models, *rest).transpose(0, 1)
    # (M, B, H, T, D) -> (M x B, H, T, D), and back
    return said.attend(*(x.flatten(0, 1) for x in (q, k, v))).view(q.shape)


def _block(x: Tensor, weights: Mapping[str, Tensor], said: _Joined, n_head: int) -> Tensor:
    """One layer of all models, x (M, B, T, C) -> (M, B, T, C): what `model.Block` computes for one."""
    width = x.shape[-1]
    normed = _norm(x, weights["norm_attention.weight"])
    qkv = weights["qkv.weight"]  # (M, 3C, C)
    if said.qk_embedding is None:
        packed = _linear(normed, qkv)  # (M, B, T, 3C)
    else:  # queries and keys see the position, values do not
        with_position = _linear(normed + said.qk_embedding, qkv[:, : 2 * width])
        packed = torch.cat((with_position, _linear(normed, qkv[:, 2 * width :])), dim=-1)
    # (M, B, T, 3C) -> (M, B, T, 3, H, D) -> three of (M, B, H, T, D)
    q, k, v = packed.view(*x.shape[:3], 3, n_head, width // n_head).permute(3, 0, 1, 4, 2, 5).unbind(0)
    if "norm_q.weight" in weights:
        q, k = _norm(q, weights["norm_q.weight"]).to(v.dtype), _norm(k, weights["norm_k.weight"]).to(v.dtype)
    if said.rotation is not None:
        cos_q, sin_q, cos_k, sin_k, interleaved = said.rotation
        q, k = rotate(q, cos_q, sin_q, interleaved=interleaved), rotate(k, cos_k, sin_k, interleaved=interleaved)
    if said.scale is not None:
        q = (q * said.scale).to(v.dtype)
    attended = _attended(q, k, v, said)
    # (M, B, H, T, D) -> (M, B, T, C)
    x = x + _linear(attended.transpose(2, 3).flatten(3), weights["attention_out.weight"])
    inner = F.gelu(_linear(_norm(x, weights["norm_mlp.weight"]), weights["mlp_in.weight"]))  # (M, B, T, 4C)
    return x + _linear(inner, weights["mlp_out.weight"])


Block = Callable[[Tensor, Mapping[str, Tensor], _Joined, int], Tensor]


class _Stack:
    """The weights of M models as leaves (M, ...), under the names that they have in one model, and AdamW over them.

    The models' own weights and their optimizers' states become views of them. Encodings stay the models' own modules,
    called one by one: they are small, and may differ in structure. So their parameters are not stacked; AdamW has those
    of all models.
    """

    def __init__(self, models: Sequence[GPT], optimizers: Sequence[torch.optim.AdamW], dtype: torch.dtype) -> None:
        self.models = models
        self.optimizers = optimizers
        self.dtype = dtype
        first = models[0]
        self.device = first.tokens.weight.device
        self.n_head = first.config.n_head
        self.n_vocab = first.tokens.num_embeddings
        self.separator = self.n_vocab - 1
        self.present = list(range(len(models)))  # the models that are trained
        self.is_present = torch.ones(len(models), dtype=torch.bool, device=self.device)
        self.named = [dict(model.named_parameters()) for model in models]
        self.weights: dict[str, nn.Parameter] = {}
        for name in self.named[0]:
            if not name.startswith("encoding."):
                stacked = torch.stack([named[name].detach() for named in self.named])
                self.weights[name] = nn.Parameter(stacked)
                for named, weight in zip(self.named, stacked, strict=True):
                    named[name].data = weight
        self.layers = [
            {name.removeprefix(prefix): weight for name, weight in self.weights.items() if name.startswith(prefix)}
            for prefix in (f"blocks.{layer}." for layer in range(first.config.n_layer))
        ]
        self.optimizer = self._build_optimizer()
        self._shared = False  # are the optimizers' states views already? From the first step on
        scales = [model.encoding.token_scale() for model in models]
        self.token_scale = None if set(scales) == {1.0} else torch.tensor(scales, device=self.device).view(-1, 1, 1, 1)
        # where each model's token table begins in the table of all, (M, 1, 1)
        self.first_row = self.n_vocab * torch.arange(len(models), device=self.device).view(-1, 1, 1)
        self._last: tuple[list[Prepared], _Joined] | None = None
        for model in models:
            model.train()

    def _build_optimizer(self) -> torch.optim.AdamW:
        """AdamW as `training.build_optimizer` has it: its constants, what decays, and the states so far."""
        groups = [{**group, "params": []} for group in self.optimizers[0].param_groups]
        states: dict[Tensor, dict[str, Tensor]] = {}
        for index, (optimizer, named) in enumerate(zip(self.optimizers, self.named, strict=True)):
            names = {parameter: name for name, parameter in named.items()}
            for group, theirs in zip(groups, optimizer.param_groups, strict=True):
                for parameter in theirs["params"]:
                    stacked = self.weights.get(names[parameter])
                    if stacked is None:
                        group["params"].append(parameter)
                        states[parameter] = optimizer.state[parameter]  # one dictionary, of both
                    elif index == 0:
                        group["params"].append(stacked)
        for name, stacked in self.weights.items():
            parts = [o.state[named[name]] for o, named in zip(self.optimizers, self.named, strict=True)]
            states[stacked] = {
                key: value.clone() if key == "step" else torch.stack([part[key] for part in parts])
                for key, value in parts[0].items()
            }
        together = torch.optim.AdamW(groups)
        together.state.update(states)
        return together

    def leave(self, index: int) -> None:
        """Give a model and its optimizer tensors of their own. Its share of the stack goes on, but no one reads it."""
        self.present.remove(index)
        self.is_present[index] = False
        state = self.optimizers[index].state
        for name, parameter in self.named[index].items():
            if name in self.weights:
                parameter.data = parameter.data.clone()
            state[parameter] = {key: value.clone() for key, value in state[parameter].items()}

    def joined(self, length: int, positions: Tensor | None) -> _Joined:
        """What the encodings say; that of the last call where no model has anything new to say."""
        prepared = [
            model.prepare(length, positions=None if positions is None else positions[index])
            for index, model in enumerate(self.models)
        ]
        if self._last is None or any(new is not old for new, old in zip(prepared, self._last[0], strict=True)):
            with torch.autocast(self.device.type, enabled=False):  # positions are never computed below fp32
                said = _join([of_one.record for of_one in prepared], self.models[0], length, self.dtype)
            self._last = prepared, said
        return self._last[1]

    def forward(self, tokens: Tensor, positions: Tensor | None, block: Block) -> Tensor:
        """tokens, positions (M, B, T) int64 (None: 0 .. T - 1) -> hidden states after the last norm, (M, B, T, C)."""
        said = self.joined(tokens.shape[-1], positions)
        # (M, V, C) -> (M x V, C)
        x = F.embedding(tokens + self.first_row, self.weights["tokens.weight"].flatten(0, 1))
        if self.token_scale is not None:
            x = x * self.token_scale
        if said.embedding is not None:
            x = x + said.embedding
        for weights in self.layers:
            x = block(x, weights, said, self.n_head)
        return _norm(x, self.weights["norm_out.weight"])

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Loss of every target in nats, fp32: hidden (M, B, T, C), targets (M, B, T) -> (M, B, T); 0 at separators.

        At most `logits_held` scores of all models together exist at a time, as in `GPT.nll`.
        """
        rows = max(1, logits_held(self.device, training=True) // (self.n_vocab * len(self.models)))
        flat, wanted = hidden.flatten(1, 2), targets.flatten(1)  # (M, N, C), (M, N)
        if wanted.shape[1] <= rows:
            return self._nll(flat, wanted).view(targets.shape)
        parts = [
            checkpoint(self._nll, *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(torch.split(flat, rows, dim=1), torch.split(wanted, rows, dim=1), strict=True)
        ]
        return torch.cat(parts, dim=1).view(targets.shape)

    def _nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden (M, N, C), targets (M, N) -> (M, N)."""
        scores = _linear(hidden, self.weights["tokens.weight"][:, :-1]).float()  # (M, N, V - 1)
        losses = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=self.separator, reduction="none")
        return losses.view(targets.shape)

    def clip(self, limit: float | None) -> Tensor:
        """Scale each model's gradients to the global norm `limit`; the norms before that, (M,)."""
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]  # (M, ...) each
        of_encodings = [
            [parameter.grad for parameter in model.encoding.parameters() if parameter.grad is not None]
            for model in self.models
        ]
        parts = [torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients]  # (M,) each
        if any(of_encodings):
            parts.append(torch.stack([nn.utils.get_total_norm(some).to(self.device) for some in of_encodings]))
        norms: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
        if limit is not None:
            # the formula of torch.nn.utils.clip_grad_norm_
            factors = (limit / (norms + 1e-6)).clamp(max=1.0)  # (M,)
            for gradient in gradients:
                gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))
            for some, factor in zip(of_encodings, factors, strict=True):
                for gradient in some:
                    gradient.mul_(factor)
        return norms

    def step(self, lr: float, broken: Tensor) -> None:
        """One step of AdamW for the models that are present, unless `broken` is 1; gradients are gone after it."""
        for index in set(range(len(self.models))).difference(self.present):
            for parameter in self.models[index].encoding.parameters():
                parameter.grad = None  # AdamW leaves it alone
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.device.type in FUSED:  # decided on the device, without waiting for it
            self.optimizer.found_inf = broken  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bool(broken):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not self._shared:
            self._share_states()

    def _share_states(self) -> None:
        for index, (optimizer, named) in enumerate(zip(self.optimizers, self.named, strict=True)):
            for name, stacked in self.weights.items():
                optimizer.state[named[name]] = {
                    key: value if key == "step" else value[index]
                    for key, value in self.optimizer.state[stacked].items()
                }
        self._shared = True
