"""Biases that the text decides: gain_i (total_i - total_j) is taken from the score of query i and key j.

`total` (B, H, T) is a running sum over the text, in fp64, since scores see differences of it; `gain` (B, H, T) fp32 or
None for 1. Each layer has its own, so that nothing is shared and all is computed a block of queries at a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ropelab.attention import by_distance
from ropelab.attention.recomputed import HELD, ROWS, score_gradients


def faded(total: Tensor, gain: Tensor | None, start: int, stop: int, first: int) -> Tensor:
    """-gain_i (total_i - total_j) of queries start..stop-1 and keys first..stop-1: (B, H, rows, keys) fp32."""
    query, key = _of_block(total, start, stop, first)
    added = key[..., None, :] - query[..., None]
    return added if gain is None else added.mul_(gain[..., start:stop, None].float())


def recomputed(
    q: Tensor, k: Tensor, v: Tensor, total: Tensor, gain: Tensor | None, *, window: int | None, rows: int
) -> Tensor:
    """Causal attention with decays that keeps no scores, and gradients of all its tensors; `rows` queries at a time.

    q, k, v (B, H, T, D) -> (B, H, T, D). Keys with 0 <= i - j < window are seen.
    """
    out: Tensor = _Recomputed.apply(q, k, v, total, gain, window, rows)  # type: ignore[no-untyped-call]
    return out


class _Recomputed(torch.autograd.Function):
    """Keeps q, k, v and the decays; dS as in `recomputed`.

    From dS: gain_i dS_ij is what total_j gains and total_i loses, -(total_i - total_j) dS_ij what gain_i gains. Rows of
    dS add up to 0 but for rounding, whose running sum over the text would be large: it is kept small, and what total_i
    loses is counted.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, total: Tensor, gain: Tensor | None, window: int | None, rows: int
    ) -> Tensor:
        out = torch.empty_like(q)
        for start in range(0, q.shape[2], rows):
            stop = min(start + rows, q.shape[2])
            first = _oldest(start, window)
            added = _mask(total, gain, start, stop, first, window)
            out[:, :, start:stop] = by_distance.fused(
                q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], added
            )
        ctx.save_for_backward(q, k, v, total, gain)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, total, gain = ctx.saved_tensors
        batch, heads, length, d_head = q.shape
        rows = min(ROWS, length)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))  # sums over many blocks
        dtotal = torch.zeros_like(total)
        dgain = None if gain is None else torch.empty_like(gain)
        together = max(1, HELD // (heads * rows * length))  # sequences
        for low in range(0, batch, together):
            part = slice(low, low + together)
            totals, gains = total[part], None if gain is None else gain[part]
            for start in range(0, length, rows):
                stop = min(start + rows, length)
                first = _oldest(start, ctx.window)
                query, due = q[part, :, start:stop], gradient[part, :, start:stop]  # (b, H, r, D)
                key, value = k[part, :, first:stop], v[part, :, first:stop]  # (b, H, c, D)
                query = query * d_head**-0.5
                added = _mask(totals, gains, start, stop, first, ctx.window)
                ds = score_gradients(query, key, value, due, None, added, dv[part, :, first:stop])
                over = ds.sum(-1)  # (b, H, r)
                of_query, of_key = _of_block(totals, start, stop, first)
                weight = torch.ones_like(of_query) if gains is None else gains[..., start:stop].float()
                dtotal[part, :, first:stop] += (weight[..., None, :] @ ds).squeeze(-2)
                dtotal[part, :, start:stop] -= weight * over
                if dgain is not None:
                    dgain[part, :, start:stop] = (ds @ of_key[..., None]).squeeze(-1) - of_query * over
                ds = ds.to(q.dtype)
                dq[part, :, start:stop] = (ds @ key) * d_head**-0.5
                dk[part, :, first:stop] += ds.transpose(-2, -1) @ query
        return dq, dk.to(k.dtype), dv.to(v.dtype), dtotal, dgain, None, None


def _of_block(total: Tensor, start: int, stop: int, first: int) -> tuple[Tensor, Tensor]:
    """Totals of queries and of keys as they differ from the first query's, (B, H, rows) and (B, H, keys) fp32.

    The totals of a long text are large, those of near tokens hardly differ.
    """
    centre = total[..., start, None]
    return (total[..., start:stop] - centre).float(), (total[..., first:stop] - centre).float()


def _mask(total: Tensor, gain: Tensor | None, start: int, stop: int, first: int, window: int | None) -> Tensor:
    """`faded`, and -inf for what is not seen."""
    added = faded(total, gain, start, stop, first)
    distance = torch.arange(start, stop, device=total.device)[:, None] - torch.arange(first, stop, device=total.device)
    # of a block the future is left, the triangle of the newest keys
    added[..., start - first :].masked_fill_(distance[:, start - first :] < 0, -math.inf)
    return added if window is None else added.masked_fill_(distance >= window, -math.inf)


def _oldest(start: int, window: int | None) -> int:
    """The oldest key that any query from `start` on can see."""
    return 0 if window is None else max(0, start - window + 1)
