"""M models as one: their weights, their forward pass and their optimizer; letters as the package explains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ropelab.model import GPT, NORM_EPS, Prepared, logits_held, rotate
from ropelab.training.batched.modules import Joined, join
from ropelab.training.optimizer import FUSED


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, ..., I), weight (M, O, I) -> (M, ..., O)."""
    # (M, ..., I) -> (M, N, I), and back
    return torch.bmm(x.flatten(1, -2), weight.mT).view(*x.shape[:-1], -1)


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    """Layer norm of x (M, ..., C) with gains (M, C), in fp32."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS)
    return normed * gain.view(gain.shape[0], *[1] * (x.dim() - 2), gain.shape[1])  # (M, 1, ..., 1, C)


def _attention(q: Tensor, k: Tensor, v: Tensor, record: Joined) -> Tensor:
    """q, k, v (M, B, H, T, D) -> (M, B, H, T, D), all models in one call of the kernel."""
    models, batch, *rest = q.shape
    if record.by_heads:  # (M, B, H, T, D) -> (B, M x H, T, D), and back
        out = record.attend(*(x.transpose(0, 1).flatten(1, 2) for x in (q, k, v)))
        return out.view(batch, models, *rest).transpose(0, 1)
    # (M, B, H, T, D) -> (M x B, H, T, D), and back
    return record.attend(*(x.flatten(0, 1) for x in (q, k, v))).view(q.shape)


def block_of_all(x: Tensor, weights: Mapping[str, Tensor], record: Joined, n_head: int) -> Tensor:
    """One layer of all models, x (M, B, T, C) -> (M, B, T, C): what `model.Block` computes for one."""
    width = x.shape[-1]
    normed = _norm(x, weights["norm_attention.weight"])
    qkv = weights["qkv.weight"]  # (M, 3C, C)
    if record.qk_embedding is None:
        packed = _linear(normed, qkv)  # (M, B, T, 3C)
    else:  # queries and keys see the position, values do not
        with_position = _linear(normed + record.qk_embedding, qkv[:, : 2 * width])
        packed = torch.cat((with_position, _linear(normed, qkv[:, 2 * width :])), dim=-1)
    # (M, B, T, 3C) -> (M, B, T, 3, H, D) -> three of (M, B, H, T, D)
    q, k, v = packed.view(*x.shape[:3], 3, n_head, width // n_head).permute(3, 0, 1, 4, 2, 5).unbind(0)
    if "norm_q.weight" in weights:
        q, k = _norm(q, weights["norm_q.weight"]).to(v.dtype), _norm(k, weights["norm_k.weight"]).to(v.dtype)
    if record.rotation is not None:
        cos_q, sin_q, cos_k, sin_k, interleaved = record.rotation
        q, k = rotate(q, cos_q, sin_q, interleaved=interleaved), rotate(k, cos_k, sin_k, interleaved=interleaved)
    if record.scale is not None:
        q = (q * record.scale).to(v.dtype)
    attended = _attention(q, k, v, record)
    # (M, B, H, T, D) -> (M, B, T, C)
    x = x + _linear(attended.transpose(2, 3).flatten(3), weights["attention_out.weight"])
    inner = F.gelu(_linear(_norm(x, weights["norm_mlp.weight"]), weights["mlp_in.weight"]))  # (M, B, T, 4C)
    return x + _linear(inner, weights["mlp_out.weight"])


Block = Callable[[Tensor, Mapping[str, Tensor], Joined, int], Tensor]


class Stack:
    """The weights of M models as leaves (M, ...), under the names that they have in one model, and its forward pass.

    The models' own weights become views of them. Encodings stay the models' own modules, called one by one: they are
    small, and may differ in structure. So their parameters are not stacked.
    """

    def __init__(self, models: Sequence[GPT], dtype: torch.dtype) -> None:
        self.models, self.dtype = models, dtype
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
            for prefix in (f"blocks.{layer}." for layer in range(models[0].config.n_layer))
        ]
        scales = [model.encoding.token_scale() for model in models]
        self.token_scale = None if set(scales) == {1.0} else torch.tensor(scales, device=self.device).view(-1, 1, 1, 1)
        # where each model's token table begins in the table of all, (M, 1, 1)
        self.first_row = self.n_vocab * torch.arange(len(models), device=self.device).view(-1, 1, 1)
        self._last: tuple[list[Prepared], Joined] | None = None
        for model in models:
            model.train()

    @property
    def device(self) -> torch.device:
        return self.weights["tokens.weight"].device

    @property
    def n_vocab(self) -> int:
        """Entries of one model's token table; the separator is the last."""
        return self.weights["tokens.weight"].shape[1]

    def prepare(self, length: int, positions: Tensor | None) -> Joined:
        """The records of all encodings as one; that of the last call where none of them has changed."""
        prepared = [
            model.prepare(length, positions=None if positions is None else positions[index])
            for index, model in enumerate(self.models)
        ]
        if self._last is None or any(new is not old for new, old in zip(prepared, self._last[0], strict=True)):
            with torch.autocast(self.device.type, enabled=False):  # positions are never computed below fp32
                record = join([one.record for one in prepared], self.models[0], length, self.dtype)
            self._last = prepared, record
        return self._last[1]

    def forward(self, tokens: Tensor, positions: Tensor | None, block: Block) -> Tensor:
        """tokens, positions (M, B, T) int64 (None: 0 .. T - 1) -> hidden states after the last norm, (M, B, T, C)."""
        record = self.prepare(tokens.shape[-1], positions)
        # (M, V, C) -> (M x V, C)
        x = F.embedding(tokens + self.first_row, self.weights["tokens.weight"].flatten(0, 1))
        if self.token_scale is not None:
            x = x * self.token_scale
        if record.embedding is not None:
            x = x + record.embedding
        for weights in self.layers:
            x = block(x, weights, record, self.models[0].config.n_head)
        return _norm(x, self.weights["norm_out.weight"])

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Loss of every target in nats, fp32: hidden (M, B, T, C), targets (M, B, T) -> (M, B, T); 0 at separators.

        At most `logits_held` scores of all models together exist at a time, as in `GPT.nll`.
        """
        rows = max(1, logits_held(self.device, training=True) // (self.n_vocab * len(self.models)))
        flat, flat_targets = hidden.flatten(1, 2), targets.flatten(1)  # (M, N, C), (M, N)
        if flat_targets.shape[1] <= rows:
            return self._nll(flat, flat_targets).view(targets.shape)
        parts = [
            checkpoint(self._nll, *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(torch.split(flat, rows, dim=1), torch.split(flat_targets, rows, dim=1), strict=True)
        ]
        return torch.cat(parts, dim=1).view(targets.shape)

    def _nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden (M, N, C), targets (M, N) -> (M, N)."""
        scores = _linear(hidden, self.weights["tokens.weight"][:, :-1]).float()  # (M, N, V - 1)
        losses = F.cross_entropy(
            scores.flatten(0, 1), targets.flatten(), ignore_index=self.n_vocab - 1, reduction="none"
        )
        return losses.view(targets.shape)


class StackOptimizer:
    """AdamW over a stack and the encodings of its models. The models' own optimizers' states become views of it."""

    def __init__(self, stack: Stack, optimizers: Sequence[torch.optim.AdamW]) -> None:
        self.stack, self.optimizers = stack, optimizers
        self.present = list(range(len(optimizers)))  # the models that are trained
        self.is_present = torch.ones(len(optimizers), dtype=torch.bool, device=stack.device)
        self.optimizer = self._build()
        self._shared = False  # are the optimizers' states views already? From the first step on

    def _build(self) -> torch.optim.AdamW:
        """AdamW as `training.build_optimizer` has it: its constants, what decays, and the states so far."""
        groups = [{**group, "params": []} for group in self.optimizers[0].param_groups]
        states: dict[Tensor, dict[str, Tensor]] = {}
        for index, (optimizer, named) in enumerate(zip(self.optimizers, self.stack.named, strict=True)):
            names = {parameter: name for name, parameter in named.items()}
            for group, theirs in zip(groups, optimizer.param_groups, strict=True):
                for parameter in theirs["params"]:
                    stacked = self.stack.weights.get(names[parameter])
                    if stacked is None:
                        group["params"].append(parameter)
                        states[parameter] = optimizer.state[parameter]  # one dictionary, of both
                    elif index == 0:
                        group["params"].append(stacked)
        for name, stacked in self.stack.weights.items():
            parts = [o.state[named[name]] for o, named in zip(self.optimizers, self.stack.named, strict=True)]
            states[stacked] = {
                key: value.clone() if key == "step" else torch.stack([part[key] for part in parts])
                for key, value in parts[0].items()
            }
        together = torch.optim.AdamW(groups)
        together.state.update(states)
        return together

    def detach(self, index: int) -> None:
        """Give a model and its optimizer tensors of their own; its share of the stack is not used any more."""
        self.present.remove(index)
        self.is_present[index] = False
        state = self.optimizers[index].state
        for name, parameter in self.stack.named[index].items():
            if name in self.stack.weights:
                parameter.data = parameter.data.clone()
            state[parameter] = {key: value.clone() for key, value in state[parameter].items()}

    def clip(self, limit: float | None) -> Tensor:
        """Scale each model's gradients to the global norm `limit`; the norms before that, (M,)."""
        gradients = [weight.grad for weight in self.stack.weights.values() if weight.grad is not None]  # (M, ...) each
        of_encodings = [
            [parameter.grad for parameter in model.encoding.parameters() if parameter.grad is not None]
            for model in self.stack.models
        ]
        parts = [torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients]  # (M,) each
        if any(of_encodings):
            parts.append(torch.stack([nn.utils.get_total_norm(some).to(self.stack.device) for some in of_encodings]))
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
        for index in set(range(len(self.stack.models))).difference(self.present):
            for parameter in self.stack.models[index].encoding.parameters():
                parameter.grad = None  # AdamW leaves it alone
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.stack.device.type in FUSED:  # decided on the device, without waiting for it
            self.optimizer.found_inf = broken  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bool(broken):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not self._shared:
            self._share_states()

    def _share_states(self) -> None:
        for index, (optimizer, named) in enumerate(zip(self.optimizers, self.stack.named, strict=True)):
            for name, stacked in self.stack.weights.items():
                optimizer.state[named[name]] = {
                    key: value if key == "step" else value[index]
                    for key, value in self.optimizer.state[stacked].items()
                }
        self._shared = True
