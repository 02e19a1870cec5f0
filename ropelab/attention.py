"""Causal attention with positions: the one call that every layer makes, and the kernel that serves it.

Shapes: B sequences, H heads, T tokens, D head dimension. A position bias is a vector by distance, (H, T): no kernel
for long sequences builds (T, T) from it. Biases that depend on the query's index or on the text are computed for one
block of queries at a time.

Kernels
    materialised  scores in full, (B, H, T, T): the fastest training step on a CPU at short T
    sdpa          torch's fused causal attention: no bias, no window
    blocks        torch's fused attention, query blocks over their key range; the mask of a block is an overlapping
                  view of one vector by distance (on a CPU; elsewhere a copy of that one block), or a dense block where
                  distance does not say it all
    two_scores    query blocks with their scores in full: near keys by one pair of queries and keys, far keys by another
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

SHORT = 512  # longest T at which the materialised kernel wins on a CPU
BLOCK = 2048  # query rows of a block: large enough for the kernel, small enough that few masked keys are visited
DENSE = 2**25  # numbers in a dense block of scores or masks: 128 MB in fp32


class Bias(NamedTuple):
    """All that changes a score besides queries and keys: what the position record says, and the evaluation's window."""

    by_distance: Tensor | None = None  # (H, T) fp32: [h, i - j] is added
    by_query: Callable[[Tensor, Tensor], Tensor] | None = None  # (i (Q, 1), distance (Q, K)) -> (H, Q, K), added
    window: int | None = None  # keys with 0 <= i - j < window are seen
    block: int | None = None  # keys of the query's own block of so many tokens, and of the block before it, are seen
    far: int | None = None  # keys this many tokens back or more have scores of their own
    decays: bool = False  # each layer takes gain_i (total_i - total_j) of its own
    scale: Tensor | None = None  # (T,) fp32: factor on the scores of query i

    @property
    def pairwise(self) -> bool:
        """Does the mask of a block depend on more than the distance?"""
        return self.by_query is not None or self.block is not None or self.decays or self.far is not None

    @property
    def plain(self) -> bool:
        """Is there nothing to add to the scores?"""
        return self.by_distance is None and self.window is None and not self.pairwise


def choose_kernel(device: torch.device, length: int, *, training: bool, bias: Bias) -> str:
    """The kernel for sequences of `length` tokens: a fixed rule, never a timing."""
    if bias.far is not None:
        return "two_scores"
    if training and device.type == "cpu" and length <= SHORT:
        return "materialised"
    return "sdpa" if bias.plain else "blocks"


class Attend:
    """Causal attention over T tokens with the biases of one record, ready to be called by every layer."""

    def __init__(
        self, length: int, *, bias: Bias, device: torch.device, training: bool, kernel: str | None = None
    ) -> None:
        self.length = length
        # what no key of this length is far enough away for changes nothing
        self.bias = bias._replace(
            window=None if bias.window is None or bias.window >= length else bias.window,
            block=None if bias.block is None or 2 * bias.block >= length else bias.block,
            far=None if bias.far is None or bias.far >= length else bias.far,
        )
        self.kernel = kernel or choose_kernel(device, length, training=training, bias=self.bias)
        assert self.bias.plain or self.kernel != "sdpa"
        assert (self.bias.far is None) == (self.kernel != "two_scores")
        self.device = device
        # what is added to a score by distance, the window included: (H, T) or (1, T)
        vector = torch.zeros(1, length, device=device) if bias.by_distance is None else bias.by_distance
        if self.bias.window is not None:
            vector = vector.masked_fill(torch.arange(length, device=device) >= self.bias.window, -math.inf)
        self.by_distance = vector
        # (1, H or 1, T, T), once for all layers; what the text decides is added by each
        self.mask = self._mask(0, length, 0, None) if self.kernel == "materialised" else None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, far: tuple[Tensor, Tensor] | None = None, decay: Any = None
    ) -> Tensor:
        """q, k, v (B, H, T, D) -> (B, H, T, D).

        far: the queries and keys of the second score. decay: `total` (B, H, T) and `gain` (B, H, T) or None.
        """
        assert (decay is not None) == self.bias.decays
        if self.bias.scale is not None:
            scale = self.bias.scale[:, None]  # (T, 1)
            q = (q * scale).to(v.dtype)
            far = None if far is None else ((far[0] * scale).to(v.dtype), far[1])
        if self.kernel == "sdpa":
            return scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.kernel == "materialised":
            assert self.mask is not None
            if decay is None:
                # a learned bias in fp32, or its gradient would be summed in bf16
                return _materialised(q, k, v, self.mask if self.mask.requires_grad else self.mask.to(q.dtype))
            # in fp32: a total over the text outgrows what bf16 can tell apart
            return _materialised(q, k, v, self.mask - _decays(decay, slice(None), slice(None)))
        return self._blocks(q, k, v, far, decay)

    def weights(
        self, q: Tensor, k: Tensor, rows: range, *, far: tuple[Tensor, Tensor] | None = None, decay: Any = None
    ) -> Tensor:
        """The attention weights of a block of queries, (B, H, rows, rows.stop) fp32: q, k (B, H, T, D).

        They are those of the other calls, whatever the kernel, for who wants to look at them.
        """
        if self.bias.scale is not None:
            scale = self.bias.scale[:, None]  # (T, 1)
            q, far = q * scale, None if far is None else (far[0] * scale, far[1])
        return torch.softmax(self._scores(q, k, rows.start, rows.stop, 0, far, decay), dim=-1)

    def _scores(
        self, q: Tensor, k: Tensor, start: int, stop: int, first: int, far: tuple[Tensor, Tensor] | None, decay: Any
    ) -> Tensor:
        """Scores of queries start..stop-1 and keys first..stop-1 with all biases: (B, H, rows, keys) fp32."""
        scores = q[:, :, start:stop].float() @ k[:, :, first:stop].float().transpose(-2, -1)
        if far is not None and self.bias.far is not None:
            distance = self._distances(start, stop, first)  # (rows, keys)
            distant = far[0][:, :, start:stop].float() @ far[1][:, :, first:stop].float().transpose(-2, -1)
            scores = torch.where(distance < self.bias.far, scores, distant)
        biased: Tensor = scores * q.shape[-1] ** -0.5 + self._mask(start, stop, first, decay)
        return biased

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor, far: tuple[Tensor, Tensor] | None, decay: Any) -> Tensor:
        length = q.shape[2]
        out = torch.empty_like(q) if not torch.is_grad_enabled() else None
        parts: list[Tensor] = []
        start = 0
        while start < length:
            rows = BLOCK
            if self.bias.pairwise:  # the block is dense
                keys = min(start + BLOCK, length)
                rows = max(1, min(BLOCK, DENSE // (q.shape[0] * q.shape[1] * keys)))
            stop = min(start + rows, length)
            first = self._oldest(start)
            old_k, old_v = k[:, :, first:stop], v[:, :, first:stop]
            if self.bias.far is not None:
                weights = torch.softmax(self._scores(q, k, start, stop, first, far, decay), dim=-1)
                part = weights.to(v.dtype) @ old_v
            elif self.bias.pairwise:
                mask = self._mask(start, stop, first, decay)
                part = scaled_dot_product_attention(q[:, :, start:stop], old_k, old_v, attn_mask=mask)
            else:
                # rows run backwards, so that the mask's entry depends on row + column and is a view of one vector
                mask = self._backward_mask(start, stop, first)
                block = q[:, :, start:stop].flip(2)
                part = scaled_dot_product_attention(block, old_k, old_v, attn_mask=mask).flip(2)
            if out is None:
                parts.append(part)
            else:
                out[:, :, start:stop] = part
            start = stop
        return torch.cat(parts, dim=2) if out is None else out

    def _oldest(self, start: int) -> int:
        """The oldest key that any query from `start` on can see."""
        first = 0 if self.bias.window is None else max(0, start - self.bias.window + 1)
        return first if self.bias.block is None else max(first, (start // self.bias.block - 1) * self.bias.block)

    def _distances(self, start: int, stop: int, first: int) -> Tensor:
        """i - j of queries start..stop-1 and keys first..stop-1, (rows, keys) int64; negative in the future."""
        i = torch.arange(start, stop, device=self.device)
        return i[:, None] - torch.arange(first, stop, device=self.device)

    def _mask(self, start: int, stop: int, first: int, decay: Any) -> Tensor:
        """Biases of queries start..stop-1 and keys first..stop-1, (B or 1, H or 1, rows, keys) fp32; -inf: unseen."""
        mask = self._backward_mask(start, stop, first).flip(2)  # (1, H or 1, rows, keys)
        if self.bias.by_query is not None:
            distance = self._distances(start, stop, first)
            index = torch.arange(start, stop, device=self.device, dtype=torch.float32)[:, None]
            mask = mask + self.bias.by_query(index, distance.clamp(min=0).float())
        if decay is not None:
            mask = mask - _decays(decay, slice(start, stop), slice(first, stop))
        if self.bias.block is not None:
            i = torch.arange(start, stop, device=self.device) // self.bias.block  # (rows,)
            j = torch.arange(first, stop, device=self.device) // self.bias.block  # (keys,)
            mask = mask.masked_fill(i[:, None] - j > 1, -math.inf)
        return mask

    def _backward_mask(self, start: int, stop: int, first: int) -> Tensor:
        """(1, H or 1, rows, keys): what the distance says of rows stop-1 down to start and keys first..stop-1.

        Row r and column c stand at distance (stop - 1 - r) - (first + c), which r + c decides; -inf in the future.
        """
        rows, keys = stop - start, stop - first
        distance = stop - 1 - first - torch.arange(rows + keys - 1, device=self.device)
        vector = self.by_distance[:, distance.clamp(min=0)].masked_fill(distance < 0, -math.inf)  # (H, rows + keys - 1)
        view: Tensor = _Hankel.apply(vector, rows, keys)[None]  # type: ignore[no-untyped-call]
        return view if view.device.type == "cpu" else view.contiguous()


class _Hankel(torch.autograd.Function):
    """(H, rows + keys - 1) -> (H, rows, keys) with entry [h, r, c] = vector[h, r + c], an overlapping view.

    The gradient is the sum over each anti-diagonal, in a fixed order: autograd's own for a gather adds atomically, and
    a run could not be resumed bit by bit.
    """

    @staticmethod
    def forward(ctx: Any, vector: Tensor, rows: int, keys: int) -> Tensor:
        vector = vector.contiguous()
        return vector.as_strided((vector.shape[0], rows, keys), (vector.shape[1], 1, 1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        heads, rows, keys = gradient.shape
        wide = pad(gradient, (0, rows)).flatten(1)  # (H, rows x (keys + rows)): rows of zeros behind each row
        # cut to rows of one number less, entry [r, c] moves to column r + c
        skewed = wide[:, : rows * (rows + keys - 1)].view(heads, rows, rows + keys - 1)
        return skewed.sum(1), None, None


def _decays(decay: Any, rows: slice, keys: slice) -> Tensor:
    """gain_i (total_i - total_j), (B, H, rows, keys) fp32."""
    # from the block's first query on: the totals of a long text are large, those of near tokens hardly differ
    centre = decay.total[..., rows.start or 0, None]
    total = (decay.total - centre).float()
    fallen = total[..., rows, None] - total[..., None, keys]
    faded: Tensor = fallen if decay.gain is None else decay.gain.float()[..., rows, None] * fallen
    return faded


def _materialised(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v with the scores in full; q, k, v (B, H, T, D), mask (B or 1, H or 1, T, T)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, T, T)
    return torch.softmax(scores + mask, dim=-1).to(v.dtype) @ v
