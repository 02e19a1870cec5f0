"""The one attention call of every layer, and the choice of the kernel behind it.

Shapes: B sequences, H heads, T tokens, D head dimension. A position bias is a vector by distance, (H, T): no kernel
for long sequences builds (T, T) from it. Biases that depend on the query's index or on the text are computed for one
block of queries at a time.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from ropelab.attention import bands, by_distance, decays
from ropelab.attention.bias import Bias, ByQuery
from ropelab.attention.recomputed import recomputed

KERNELS = {
    "materialised": "scores in full: the fastest training step on a CPU at a short ctx",
    "sdpa": "torch's fused causal attention: nothing is added to the scores",
    "blocks": "torch's fused attention by blocks of queries, the bias of a block made when it is needed",
    "recomputed": "blocks, and in the backward pass their scores again: a bias in training, learned or fixed",
    "triton": "own fused kernels, forward and backward: a bias by distance, by query or read off the text",
    "digits": "torch's fused causal attention, ALiBi's bias as eight more dimensions of queries and keys",
    "scores": "blocks of queries with their scores in full: far keys by a second pair of queries and keys, or a cap",
}

# Longest T at which scores in full make the fastest training step on a CPU: in bf16, and in fp32. Where the text
# decides the bias, the second holds for both; where it is left to dense blocks, which are slower, the first.
SHORT, SHORT_FP32 = 512, 128
SHORT_BY_QUERY = 1024  # longest T at which a bias by query is made in full, once for all layers, and not in each
# The same with the Triton kernel: at 8192 tokens 1.7 GB with 12 heads, beside twice as much while the gradients of two
# layers are added.
SHORT_BY_QUERY_TRITON = 8192
BLOCK = 1024  # query rows of a block: large enough for the kernel, small enough that few masked keys are visited
# Numbers in a dense block of scores or masks: on a CPU 16 MB in fp32, which the heap hands out again without new pages,
# elsewhere 128 MB.
DENSE, DENSE_ELSEWHERE = 2**22, 2**25
DENSE_BANDS = 2**27  # numbers of a bias by query that are made at a time where each layer makes its own: 512 MB


def choose_kernel(device: torch.device, length: int, *, training: bool, bias: Bias, dtype: torch.dtype) -> str:
    """The kernel for sequences of `length` tokens whose products are in `dtype`: a fixed rule, never a timing."""
    if bias.scored:
        return "scores"
    shared = bias.by_query is not None and not bias.decays  # one mask for all sequences and layers
    read = _alone(bias, "decays")
    short = SHORT if not read and (dtype == torch.bfloat16 or (bias.pairwise and not shared)) else SHORT_FP32
    if training and device.type == "cpu" and length <= short:
        return "materialised"
    if bias.plain:
        return "sdpa"
    if bias.pairwise:
        if device.type == "cuda" and has_triton() and (read or (training and _alone(bias, "by_query"))):
            return "triton"
        in_full = shared and training and device.type == "cpu" and length <= SHORT_BY_QUERY
        return "recomputed" if in_full or (read and training) else "blocks"
    if device.type == "cuda" and training and dtype == torch.bfloat16 and bias.slopes is not None and not bias.window:
        return "digits"
    if device.type == "cuda" and has_triton():
        return "triton"
    return "recomputed" if training else "blocks"


def _alone(bias: Bias, field: str) -> bool:
    """Is this field of a bias all that it adds to a score, but for a window?"""
    return bool(getattr(bias, field)) and bias._replace(**{field: Bias._field_defaults[field]}, window=None).plain


def has_triton() -> bool:
    """Is Triton installed, as it is with torch's CUDA builds?"""
    return importlib.util.find_spec("triton") is not None


class Attend:
    """Causal attention over T tokens with the biases of one record, ready to be called by every layer.

    `dtype` is that of the products: bf16 under autocast, fp32 without.
    """

    def __init__(
        self,
        length: int,
        *,
        bias: Bias,
        device: torch.device,
        training: bool,
        dtype: torch.dtype = torch.float32,
        kernel: str | None = None,
    ) -> None:
        self.length = length
        self.bias = bias.within(length)
        self.kernel = kernel or choose_kernel(device, length, training=training, bias=self.bias, dtype=dtype)
        assert self.bias.plain or self.kernel != "sdpa"
        assert self.bias.scored == (self.kernel == "scores")
        assert not self.bias.pairwise or self.kernel in ("materialised", "recomputed", "triton", "blocks", "scores")
        assert not self.bias.decays or self.kernel not in ("recomputed", "triton") or _alone(self.bias, "decays")
        assert not self.bias.pairwise or self.kernel != "triton" or self.bias.decays or _alone(self.bias, "by_query")
        self.device = device
        # what is added to a score by distance, the window included: (H, T) or (1, T)
        vector = torch.zeros(1, length, device=device) if bias.by_distance is None else bias.by_distance
        if self.bias.window is not None:
            vector = vector.masked_fill(torch.arange(length, device=device) >= self.bias.window, -math.inf)
        self.by_distance = vector
        # (1, H or 1, T, T), once for all layers; what the text decides is added by each
        in_full = self.kernel == "materialised" or (self.kernel == "recomputed" and self.bias.by_query is not None)
        self.mask = self._mask(0, length, 0, None) if in_full else None
        if self.kernel == "materialised" and self.mask is not None and not (self.mask.requires_grad or bias.decays):
            self.mask = self.mask.to(dtype)  # a learned bias stays fp32, or its gradient would be summed in bf16

        # (H, N), the same
        self.bands = None
        if self.kernel == "triton" and self.bias.by_query is not None and length <= SHORT_BY_QUERY_TRITON:
            self.bands = bands.make(self.bias.by_query, 0, length, device=device, again=True)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, far: tuple[Tensor, Tensor] | None = None, decay: Any = None
    ) -> Tensor:
        """q, k (B, H, T, D), v (B, H, T, E), in most kernels E = D -> (B, H, T, E).

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
            # a total over the text outgrows what bf16 can tell apart
            mask = self.mask if decay is None else self.mask + decays.faded(decay.cumsum, decay.gate, 0, self.length, 0)
            return _materialised(q, k, v, mask)
        if self.kernel == "digits":
            from ropelab.attention.digits import attend_with_slopes

            assert self.bias.slopes is not None
            return attend_with_slopes(q, k, v, self.bias.slopes)
        if self.kernel == "triton" and decay is not None:
            from ropelab.attention.triton_kernels import attend_with_decays

            return attend_with_decays(q, k, v, decay.cumsum, decay.gate, window=self.bias.window)
        if self.kernel == "triton" and self.bias.by_query is not None:
            return self._in_bands(q, k, v, self.bias.by_query)
        if self.kernel == "triton":
            from ropelab.attention.triton_kernels import attend_by_distance

            vector = self.by_distance.expand(q.shape[1], -1)  # (H, T)
            return attend_by_distance(q, k, v, vector, window=self.bias.window)
        if self.mask is not None:
            return recomputed(q, k, v, self.mask[0], window=None, rows=BLOCK)
        if self.kernel == "recomputed" and decay is not None:
            rows = self._rows(q, self.length)
            return decays.recomputed(q, k, v, decay.cumsum, decay.gate, window=self.bias.window, rows=rows)
        if not self.bias.pairwise:
            kernel = recomputed if torch.is_grad_enabled() else by_distance.blocks
            return kernel(q, k, v, self.by_distance, window=self.bias.window, rows=BLOCK)
        return self._dense_blocks(q, k, v, far, decay)

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
            between = torch.where(
                self._distances(start, stop, mixed)[:, : near - mixed] < self.bias.far,
                close[..., : near - mixed],
                distant[..., mixed - first :],
            )
            scores = torch.cat((distant[..., : mixed - first], between, close[..., near - mixed :]), dim=-1)
        scores = scores * q.shape[-1] ** -0.5
        if self.bias.cap is not None:
            scores = self.bias.cap * torch.tanh(scores / self.bias.cap)
        biased: Tensor = scores + self._mask(start, stop, first, decay)
        return biased

    def _in_bands(self, q: Tensor, k: Tensor, v: Tensor, by_query: ByQuery) -> Tensor:
        """Attention with a bias by query in bands: with those of all layers, or with its own for some queries."""
        from ropelab.attention.triton_kernels import attend_by_query

        if self.bands is not None:
            return attend_by_query(q, k, v, self.bands, window=self.bias.window)

        def attended(start: int, stop: int) -> Tensor:
            made = bands.make(by_query, start, stop, device=self.device, again=False)
            part = q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]
            return attend_by_query(*part, made, window=self.bias.window)

        rows = max(bands.BAND, DENSE_BANDS // (q.shape[1] * self.length) // bands.BAND * bands.BAND)
        parts = [
            checkpoint(attended, start, min(start + rows, self.length), use_reentrant=False, preserve_rng_state=False)
            for start in range(0, self.length, rows)
        ]
        return torch.cat(parts, dim=2)

    def _dense_blocks(self, q: Tensor, k: Tensor, v: Tensor, far: tuple[Tensor, Tensor] | None, decay: Any) -> Tensor:
        def attended(start: int, stop: int) -> Tensor:
            first = self._oldest(start)
            if self.bias.scored:
                weights = torch.softmax(self._scores(q, k, start, stop, first, far, decay), dim=-1)
                return weights.to(v.dtype) @ v[:, :, first:stop]
            mask = self._mask(start, stop, first, decay)
            return by_distance.fused(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], mask)

        out = v.new_empty(*q.shape[:3], v.shape[-1]) if not torch.is_grad_enabled() else None
        parts: list[Tensor] = []
        start = 0
        while start < self.length:
            stop = min(start + self._rows(q, min(start + BLOCK, self.length)), self.length)
            if out is None:
                # kept for the backward pass, the blocks would be (B, H, T, T)
                parts.append(checkpoint(attended, start, stop, use_reentrant=False, preserve_rng_state=False))
            else:
                out[:, :, start:stop] = attended(start, stop)
            start = stop
        return torch.cat(parts, dim=2) if out is None else out

    def _rows(self, q: Tensor, keys: int) -> int:
        """Queries of a dense block over so many keys."""
        dense = DENSE if self.device.type == "cpu" else DENSE_ELSEWHERE
        return max(1, min(BLOCK, dense // (q.shape[0] * q.shape[1] * keys)))

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
            mask = mask + decays.faded(decay.cumsum, decay.gate, start, stop, first)
        if self.bias.block is not None:
            i = torch.arange(start, stop, device=self.device) // self.bias.block  # (rows,)
            j = torch.arange(first, stop, device=self.device) // self.bias.block  # (keys,)
            mask = mask.masked_fill(i[:, None] - j > 1, -math.inf)
        return mask


def _materialised(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v with the scores in full; q, k, v (B, H, T, D), mask (B or 1, H or 1, T, T)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, T, T)
    return torch.softmax(scores + mask, dim=-1).to(v.dtype) @ v
