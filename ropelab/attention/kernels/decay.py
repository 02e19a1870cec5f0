"""Biases that the text decides: gate_i (cumsum_i - cumsum_j) is taken from the score of query i and key j.

`cumsum` (B, H, T) is a running sum over the text, in fp64, since scores see differences of it; `gate` (B, H, T) fp32 or
None for 1. Each layer has its own, so that nothing is shared and all is computed a block of queries at a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ropelab.attention import by_distance
from ropelab.attention.kernels.base import Kernel
from ropelab.attention.kernels.chunked_recompute import HELD, ROWS, ChunkedRecompute, score_gradients
from ropelab.attention.scores import Request, centred, decay_bias


class DecayRecompute(Kernel):
    """A bias computed from the text, alone but for a window."""

    name = ChunkedRecompute.name
    summary = ChunkedRecompute.summary
    priority = 40

    @classmethod
    def supports(cls, request: Request) -> bool:
        return request.bias.only("decays")

    @classmethod
    def suits(cls, request: Request) -> bool:
        return request.training

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, far: tuple[Tensor, Tensor] | None, decay: Any) -> Tensor:
        rows = self.scores.rows(q, self.request.length)
        return decay_recompute(q, k, v, decay.cumsum, decay.gate, window=self.request.bias.window, rows=rows)


def decay_recompute(
    q: Tensor, k: Tensor, v: Tensor, cumsum: Tensor, gate: Tensor | None, *, window: int | None, rows: int
) -> Tensor:
    """Causal attention with decays that keeps no scores, and gradients of all its tensors; `rows` queries at a time.

    q, k, v (B, H, T, D) -> (B, H, T, D). Keys with 0 <= i - j < window are seen.
    """
    out: Tensor = _Recomputed.apply(q, k, v, cumsum, gate, window, rows)  # type: ignore[no-untyped-call]
    return out


class _Recomputed(torch.autograd.Function):
    """Keeps q, k, v and the decays; dS as in `chunked_recompute`.

    From dS: gate_i dS_ij is what the gradient of cumsum_j gains and that of cumsum_i loses, and the gradient of gate_i
    gains -(cumsum_i - cumsum_j) dS_ij. Rows of dS add up to 0 but for rounding, whose running sum over the text would
    be large: it is kept small, and what cumsum_i loses is counted.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cumsum: Tensor, gate: Tensor | None, window: int | None, rows: int
    ) -> Tensor:
        out = torch.empty_like(q)
        for start in range(0, q.shape[2], rows):
            stop = min(start + rows, q.shape[2])
            first = _oldest(start, window)
            added = _mask(cumsum, gate, start, stop, first, window)
            out[:, :, start:stop] = by_distance.fused(
                q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], added
            )
        ctx.save_for_backward(q, k, v, cumsum, gate)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cumsum, gate = ctx.saved_tensors
        batch, heads, length, d_head = q.shape
        rows = min(ROWS, length)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))  # sums over many blocks
        dcumsum = torch.zeros_like(cumsum)
        dgate = None if gate is None else torch.empty_like(gate)
        together = max(1, HELD // (heads * rows * length))  # sequences
        for low in range(0, batch, together):
            part = slice(low, low + together)
            sums, gates = cumsum[part], None if gate is None else gate[part]
            for start in range(0, length, rows):
                stop = min(start + rows, length)
                first = _oldest(start, ctx.window)
                query, due = q[part, :, start:stop], gradient[part, :, start:stop]  # (b, H, r, D)
                key, value = k[part, :, first:stop], v[part, :, first:stop]  # (b, H, c, D)
                query = query * d_head**-0.5
                added = _mask(sums, gates, start, stop, first, ctx.window)
                ds = score_gradients(query, key, value, due, None, added, dv[part, :, first:stop])
                over = ds.sum(-1)  # (b, H, r)
                of_query, of_key = centred(sums, start, stop, first)
                weight = torch.ones_like(of_query) if gates is None else gates[..., start:stop].float()
                dcumsum[part, :, first:stop] += (weight[..., None, :] @ ds).squeeze(-2)
                dcumsum[part, :, start:stop] -= weight * over
                if dgate is not None:
                    dgate[part, :, start:stop] = (ds @ of_key[..., None]).squeeze(-1) - of_query * over
                ds = ds.to(q.dtype)
                dq[part, :, start:stop] = (ds @ key) * d_head**-0.5
                dk[part, :, first:stop] += ds.transpose(-2, -1) @ query
        return dq, dk.to(k.dtype), dv.to(v.dtype), dcumsum, dgate, None, None


def _mask(cumsum: Tensor, gate: Tensor | None, start: int, stop: int, first: int, window: int | None) -> Tensor:
    """`decay_bias`, and -inf for what is not seen."""
    added = decay_bias(cumsum, gate, start, stop, first)
    i = torch.arange(start, stop, device=cumsum.device)
    distance = i[:, None] - torch.arange(first, stop, device=cumsum.device)
    # of a block the future is left, the triangle of the newest keys
    added[..., start - first :].masked_fill_(distance[:, start - first :] < 0, -math.inf)
    return added if window is None else added.masked_fill_(distance >= window, -math.inf)


def _oldest(start: int, window: int | None) -> int:
    """The oldest key that any query from `start` on can see."""
    return 0 if window is None else max(0, start - window + 1)
