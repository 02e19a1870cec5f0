"""Attention for training that keeps no scores: they are computed again in the backward pass, some rows at a time.

For biases by distance, and for a bias in full that all layers share: its (H, T, T) exist once, not once a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ropelab.attention import by_distance, scores
from ropelab.attention.kernels.base import Kernel
from ropelab.attention.scores import Request, Scores

ROWS = 64  # query rows whose scores the backward pass holds: they stay in a CPU's cache
HELD = 2**21  # numbers of such a block of scores, over all sequences and heads: 8 MB in fp32


SHORT_BY_QUERY = 1024  # longest T at which a bias by query is made in full, once for all layers, and not in each


class ChunkedRecompute(Kernel):
    """A bias by distance, or one by query that is made in full for all layers."""

    name = "recomputed"
    summary = "blocks, and in the backward pass their scores again: a bias in training, learned or fixed"
    priority = 30

    @classmethod
    def supports(cls, request: Request) -> bool:
        bias = request.bias
        return not (bias.decays or bias.scored) and (not bias.pairwise or bias.by_query is not None)

    @classmethod
    def suits(cls, request: Request) -> bool:
        in_full = request.device.type == "cpu" and request.length <= SHORT_BY_QUERY
        return request.training and (in_full or not request.bias.pairwise)

    def __init__(self, request: Request, scores: Scores) -> None:
        super().__init__(request, scores)
        # (H or 1, T, T)
        self.mask = None if request.bias.by_query is None else scores.mask(0, request.length, 0, None)[0]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, far: tuple[Tensor, Tensor] | None, decay: Any) -> Tensor:
        if self.mask is not None:
            return chunked_recompute(q, k, v, self.mask, window=None, rows=scores.BLOCK)
        kernel = chunked_recompute if torch.is_grad_enabled() else by_distance.blocks
        return kernel(q, k, v, self.scores.by_distance, window=self.request.bias.window, rows=scores.BLOCK)


def chunked_recompute(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, window: int | None, rows: int) -> Tensor:
    """Causal attention with a bias, `rows` queries at a time, and with gradients of q, k, v and of the bias.

    q, k, v (B, H, T, D) -> (B, H, T, D). `bias`, fp32, is a vector by distance (H or 1, T), -inf from `window` on, or
    (H or 1, T, T) with -inf for all that is not seen, `window` None.
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
            out = by_distance.blocks(q, k, v, bias, window=window, rows=rows)
        else:
            out = torch.empty_like(q)
            for start in range(0, q.shape[2], rows):
                stop = min(start + rows, q.shape[2])
                # detached, since a view of an input wants a gradient even here, and torch's fused kernel gives none
                added = bias.detach()[None, :, start:stop, :stop]
                out[:, :, start:stop] = by_distance.fused(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], added)
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
                query, due, given = (_reversed(x[part, :, start:stop], in_full) for x in (q, gradient, out))
                added = bias[:, start:stop, first:stop] if in_full else by_distance.mask(bias, start, stop, first)
                key, value = k[part, :, first:stop], v[part, :, first:stop]  # (b, H, c, D)
                query = query * d_head**-0.5
                ds = score_gradients(query, key, value, due, given, added, dv[part, :, first:stop])  # (b, H, r, c)
                if needs_bias:
                    over = ds.sum(0) if bias.shape[0] == heads else ds.sum((0, 1))[None]  # (H or 1, r, c)
                    if dbias is not None:
                        dbias[:, start:stop, first:stop] += over
                    elif collected is not None:
                        collected[:, : stop - start, widest - (stop - first) :] += over
                ds = ds.to(q.dtype)
                dq[part, :, start:stop] = _reversed(ds @ key, in_full) * d_head**-0.5
                dk[part, :, first:stop] += ds.transpose(-2, -1) @ query
        if collected is not None:
            # (H, widest); what stands at r + c >= widest is the future
            by_sum = by_distance.anti_diagonals(collected)[:, :widest]
            dbias = pad(by_sum.flip(1), (0, length - widest))  # (H, T)
        return dq, dk.to(k.dtype), dv.to(v.dtype), dbias, None, None


def score_gradients(
    query: Tensor, key: Tensor, value: Tensor, due: Tensor, given: Tensor | None, added: Tensor, dvalue: Tensor
) -> Tensor:
    """dS (b, H, r, c) fp32 of a block; the gradient of its values is added to `dvalue` (b, H, c, D) fp32.

    query, already scaled, due and given (b, H, r, D): `due` is the gradient of the output `given`. key, value
    (b, H, c, D); `added` broadcasts to the scores. Without `given`, which is rounded to its type, rows of dS add up to
    0 as closely as fp32 allows.
    """
    scores = (query @ key.transpose(-2, -1)).float().add_(added)
    weights = torch.softmax(scores, dim=-1)
    dvalue += weights.to(due.dtype).transpose(-2, -1) @ due
    dweights = (due @ value.transpose(-2, -1)).float()  # (b, H, r, c)
    if given is None:
        weighted = dweights.mul_(weights)
        return weighted.addcmul_(weights, weighted.sum(-1, keepdim=True), value=-1)
    delta = (due.float() * given.float()).sum(-1, keepdim=True)  # (b, H, r, 1)
    return dweights.sub_(delta).mul_(weights)


def _reversed(x: Tensor, forwards: bool) -> Tensor:
    """x (b, H, r, D) with its rows backwards, or as they are."""
    return x if forwards else x.flip(2)
