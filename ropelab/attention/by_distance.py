"""Biases that depend on the distance alone: (H, T) numbers, of which no kernel builds (H, T, T).

In a block of queries whose rows run backwards, query row r and key column c stand at a distance that r + c decides. The
mask of the block is therefore an overlapping view of one vector, a Hankel matrix (all its anti-diagonals are constant).
torch's fused attention on a CPU reads a mask by its strides, so the view costs nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

ROWS = 64  # query rows whose scores the backward pass holds: they stay in a CPU's cache
HELD = 2**21  # numbers of such a block of scores, over all sequences and heads: 8 MB in fp32


def mask(vector: Tensor, start: int, stop: int, first: int) -> Tensor:
    """(H, rows, keys): bias of queries stop-1 down to start and keys first..stop-1, -inf in the future.

    `vector` (H, T) is the bias by distance. Row r and column c stand at distance (stop - 1 - r) - (first + c). On a CPU
    a view, elsewhere a copy.
    """
    rows, keys = stop - start, stop - first
    distance = stop - 1 - first - torch.arange(rows + keys - 1, device=vector.device)
    by_sum = vector[:, distance.clamp(min=0)].masked_fill(distance < 0, -math.inf)  # (H, rows + keys - 1)
    view: Tensor = Hankel.apply(by_sum, rows, keys)  # type: ignore[no-untyped-call]
    return view if view.device.type == "cpu" else view.contiguous()


class Hankel(torch.autograd.Function):
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
        return anti_diagonals(gradient), None, None


def anti_diagonals(block: Tensor) -> Tensor:
    """Sums over r + c = n of block (H, rows, keys): (H, rows + keys - 1), in a fixed order."""
    heads, rows, keys = block.shape
    wide = pad(block, (0, rows)).flatten(1)  # (H, rows x (keys + rows)): rows of zeros behind each row
    # cut to rows of one number less, entry [r, c] moves to column r + c
    return wide[:, : rows * (rows + keys - 1)].view(heads, rows, rows + keys - 1).sum(1)


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """torch's attention with an added mask, which stays fp32 beside bf16 queries where the kernel takes it so."""
    # autocast would round the mask to bf16, and build it in full
    with torch.autocast(q.device.type, enabled=False):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask if q.device.type == "cpu" else mask.to(q.dtype))


def blocks(q: Tensor, k: Tensor, v: Tensor, vector: Tensor, *, window: int | None, rows: int) -> Tensor:
    """Causal attention with a bias by distance, `rows` queries at a time over the keys that they see.

    q, k, v (B, H, T, D); vector (H or 1, T) holds -inf from `window` on -> (B, H, T, D). Not for gradients: those of
    `recomputed` need less time and memory.
    """
    out = torch.empty_like(q)
    for start in range(0, q.shape[2], rows):
        stop = min(start + rows, q.shape[2])
        first = 0 if window is None else max(0, start - window + 1)
        added = mask(vector, start, stop, first)[None]
        part = fused(q[:, :, start:stop].flip(2), k[:, :, first:stop], v[:, :, first:stop], added)
        out[:, :, start:stop] = part.flip(2)
    return out


def recomputed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, window: int | None, rows: int) -> Tensor:
    """`blocks` with gradients of q, k, v and of the bias; the scores are computed again in the backward pass.

    `bias` is a vector by distance, (H or 1, T), or (H or 1, T, T) with -inf for all that is not seen: one that depends
    on more than the distance, made once for all layers.
    """
    out: Tensor = _Recomputed.apply(q, k, v, bias, window, rows)  # type: ignore[no-untyped-call]
    return out


class _Recomputed(torch.autograd.Function):
    """Keeps q, k, v and the output. The gradient of a bias is the sum of dS over all that it is added to, in order.

    Gradients of attention as in Dao et al. 2022 (2205.14135), appendix B: dS = P (dP - rowsum(dO O)).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: int | None, rows: int) -> Tensor:
        if bias.dim() == 2:
            out = blocks(q, k, v, bias, window=window, rows=rows)
        else:
            out = torch.empty_like(q)
            for start in range(0, q.shape[2], rows):
                stop = min(start + rows, q.shape[2])
                added = bias[None, :, start:stop, :stop]
                out[:, :, start:stop] = fused(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], added)
        ctx.save_for_backward(q, k, v, bias, out)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out = ctx.saved_tensors
        in_full = bias.dim() == 3
        needs_bias = ctx.needs_input_grad[3]
        batch, heads, length, d_head = q.shape
        rows = min(ROWS, length)
        # the widest range of keys that a block sees
        widest = length if ctx.window is None else min(length, ctx.window - 1 + rows)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))  # sums over many blocks
        dbias = torch.zeros_like(bias) if needs_bias and in_full else None
        # entry [h, r, c] collects dS of row r and of the key widest - 1 - c before the block's last query: in all
        # blocks alike this is the distance widest - 1 - (r + c)
        collected = None
        if needs_bias and not in_full:
            collected = q.new_zeros(bias.shape[0], rows, widest, dtype=torch.float32)
        together = max(1, HELD // (heads * rows * widest))  # sequences
        for low in range(0, batch, together):
            part = slice(low, low + together)
            for start in range(0, length, rows):
                stop = min(start + rows, length)
                first = 0 if ctx.window is None else max(0, start - ctx.window + 1)
                # (b, H, r, D), rows backwards where the mask is a view that wants them so
                query, due, given = (_turned(x[part, :, start:stop], in_full) for x in (q, gradient, out))
                added = bias[:, start:stop, first:stop] if in_full else mask(bias, start, stop, first)
                key, value = k[part, :, first:stop], v[part, :, first:stop]  # (b, H, c, D)
                query = query * d_head**-0.5
                scores = (query @ key.transpose(-2, -1)).float().add_(added)
                weights = torch.softmax(scores, dim=-1)  # (b, H, r, c) fp32
                dv[part, :, first:stop] += weights.to(due.dtype).transpose(-2, -1) @ due
                delta = (due.float() * given.float()).sum(-1, keepdim=True)  # (b, H, r, 1)
                ds = (due @ value.transpose(-2, -1)).float().sub_(delta).mul_(weights)  # (b, H, r, c)
                if needs_bias:
                    over = ds.sum(0) if bias.shape[0] == heads else ds.sum((0, 1))[None]  # (H or 1, r, c)
                    if dbias is not None:
                        dbias[:, start:stop, first:stop] += over
                    elif collected is not None:
                        collected[:, : stop - start, widest - (stop - first) :] += over
                ds = ds.to(q.dtype)
                dq[part, :, start:stop] = _turned(ds @ key, in_full) * d_head**-0.5
                dk[part, :, first:stop] += ds.transpose(-2, -1) @ query
        if collected is not None:
            by_sum = anti_diagonals(collected)[:, :widest]  # (H, widest); what stands at r + c >= widest is the future
            dbias = pad(by_sum.flip(1), (0, length - widest))  # (H, T)
        return dq, dk.to(k.dtype), dv.to(v.dtype), dbias, None, None


def _turned(x: Tensor, forwards: bool) -> Tensor:
    """x (b, H, r, D) with its rows backwards, or as they are."""
    return x if forwards else x.flip(2)
