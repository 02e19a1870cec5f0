"""Scores and masks of a block of queries, with all that is added to them: the part that several kernels share.

Shapes: B sequences, H heads, T tokens, D head dimension. A bias by distance is a vector, (H, T): no kernel for long
sequences builds (T, T) from it. Biases that depend on the query's index or on the text are computed for one block of
queries at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ropelab.attention import by_distance
from ropelab.attention.bias import Bias

BLOCK = 1024  # query rows of a block: large enough for the kernel, small enough that few masked keys are visited
# Numbers in a dense block of scores or masks: on a CPU 16 MB in fp32, which the heap hands out again without new pages,
# elsewhere 128 MB.
DENSE, DENSE_ELSEWHERE = 2**22, 2**25


class Request(NamedTuple):
    """One causal attention: over `length` tokens, with products in `dtype`."""

    length: int
    bias: Bias  # without what no key is far enough away for: `Bias.within`
    device: torch.device
    training: bool
    dtype: torch.dtype


class Scores:
    """The scores of one request, a block of queries at a time."""

    def __init__(self, request: Request) -> None:
        self.length, self.bias, self.device = request.length, request.bias, request.device
        # what is added to a score by distance, the window included: (H, T) or (1, T)
        vector = self.bias.by_distance
        vector = torch.zeros(1, self.length, device=self.device) if vector is None else vector
        if self.bias.window is not None:
            vector = vector.masked_fill(torch.arange(self.length, device=self.device) >= self.bias.window, -math.inf)
        self.by_distance = vector

    def mask(self, start: int, stop: int, first: int, decay: Any) -> Tensor:
        """Biases of queries start..stop-1 and keys first..stop-1, (B or 1, H or 1, rows, keys) fp32; -inf: unseen."""
        by_query = None
        if self.bias.by_query is not None:
            index = torch.arange(start, stop, device=self.device, dtype=torch.float32)[:, None]  # (rows, 1)
            distance = index - torch.arange(first, stop, device=self.device, dtype=torch.float32)  # (rows, keys)
            by_query = self.bias.by_query(index, distance.clamp_(min=0))[None]  # (1, H, rows, keys)
        if by_query is not None and self.bias.by_distance is None and self.bias.window is None:
            # a bias by query alone: of its block the future is left, the triangle of the newest keys
            future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=self.device).triu_(1)
            newest = by_query[..., start - first :]
            if by_query.requires_grad:
                mask = torch.cat((by_query[..., : start - first], newest.masked_fill(future, -math.inf)), dim=-1)
            else:
                newest.masked_fill_(future, -math.inf)
                mask = by_query
        else:
            mask = by_distance.mask(self.by_distance, start, stop, first).flip(1)[None]  # (1, H or 1, rows, keys)
            mask = mask if by_query is None else mask + by_query
        if decay is not None:
            mask = mask + decay_bias(decay.cumsum, decay.gate, start, stop, first)
        if self.bias.block is not None:
            i = torch.arange(start, stop, device=self.device) // self.bias.block  # (rows,)
            j = torch.arange(first, stop, device=self.device) // self.bias.block  # (keys,)
            mask = mask.masked_fill(i[:, None] - j > 1, -math.inf)
        return mask

    def scores(
        self, q: Tensor, k: Tensor, start: int, stop: int, first: int, far: tuple[Tensor, Tensor] | None, decay: Any
    ) -> Tensor:
        """Scores of queries start..stop-1 and keys first..stop-1 with all biases: (B, H, rows, keys) fp32."""

        def product(q: Tensor, k: Tensor, low: int, high: int) -> Tensor:
            """Of the queries and keys low..high-1: (B, H, rows, high - low)."""
            return q[:, :, start:stop].float() @ k[:, :, low:high].float().transpose(-2, -1)

        if far is None or self.bias.far is None:
            scores = product(q, k, first, stop)
        else:
            # keys before `mixed` are far from all of these queries, keys from `near` on are so from none
            mixed = min(max(first, start - self.bias.far + 1), stop)
            near = min(max(mixed, stop - self.bias.far), stop)
            distant, close = product(*far, first, near), product(q, k, mixed, stop)
            i = torch.arange(start, stop, device=self.device)
            distance = i[:, None] - torch.arange(mixed, near, device=self.device)  # (rows, near - mixed)
            between = torch.where(
                distance < self.bias.far, close[..., : near - mixed], distant[..., mixed - first :]
            )  # fmt: skip
            scores = torch.cat((distant[..., : mixed - first], between, close[..., near - mixed :]), dim=-1)
        scores = scores * q.shape[-1] ** -0.5
        if self.bias.cap is not None:
            scores = self.bias.cap * torch.tanh(scores / self.bias.cap)
        biased: Tensor = scores + self.mask(start, stop, first, decay)
        return biased

    def by_blocks(self, q: Tensor, v: Tensor, attended: Callable[[int, int, int], Tensor]) -> Tensor:
        """attended(start, stop, oldest key) (B, H, rows, E) of all queries, computed again in the backward pass."""

        def block(start: int, stop: int) -> Tensor:
            return attended(start, stop, self.oldest(start))

        out = v.new_empty(*q.shape[:3], v.shape[-1]) if not torch.is_grad_enabled() else None
        parts: list[Tensor] = []
        start = 0
        while start < self.length:
            stop = min(start + self.rows(q, min(start + BLOCK, self.length)), self.length)
            if out is None:
                # kept for the backward pass, the blocks would be (B, H, T, T)
                parts.append(checkpoint(block, start, stop, use_reentrant=False, preserve_rng_state=False))
            else:
                out[:, :, start:stop] = block(start, stop)
            start = stop
        return torch.cat(parts, dim=2) if out is None else out

    def rows(self, q: Tensor, keys: int) -> int:
        """Queries of a dense block over so many keys."""
        dense = DENSE if self.device.type == "cpu" else DENSE_ELSEWHERE
        return max(1, min(BLOCK, dense // (q.shape[0] * q.shape[1] * keys)))

    def oldest(self, start: int) -> int:
        """The oldest key that any query from `start` on can see."""
        first = 0 if self.bias.window is None else max(0, start - self.bias.window + 1)
        return first if self.bias.block is None else max(first, (start // self.bias.block - 1) * self.bias.block)


def decay_bias(cumsum: Tensor, gate: Tensor | None, start: int, stop: int, first: int) -> Tensor:
    """-gate_i (cumsum_i - cumsum_j) of queries start..stop-1 and keys first..stop-1: (B, H, rows, keys) fp32."""
    query, key = centred(cumsum, start, stop, first)
    added = key[..., None, :] - query[..., None]
    return added if gate is None else added.mul_(gate[..., start:stop, None].float())


def centred(cumsum: Tensor, start: int, stop: int, first: int) -> tuple[Tensor, Tensor]:
    """Sums of queries and of keys less the first query's, (B, H, rows) and (B, H, keys) fp32.

    The sums over a long text are large, those of near tokens hardly differ.
    """
    centre = cumsum[..., start, None]
    return (cumsum[..., start:stop] - centre).float(), (cumsum[..., first:stop] - centre).float()
