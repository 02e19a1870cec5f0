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

    q, k (B, H, T, D), v (B, H, T, E); vector (H or 1, T) holds -inf from `window` on -> (B, H, T, E). Not for
    gradients: those of `recomputed` take less time and memory.
    """
    out = v.new_empty(*q.shape[:3], v.shape[-1])
    for start in range(0, q.shape[2], rows):
        stop = min(start + rows, q.shape[2])
        first = 0 if window is None else max(0, start - window + 1)
        added = mask(vector, start, stop, first)[None]
        part = fused(q[:, :, start:stop].flip(2), k[:, :, first:stop], v[:, :, first:stop], added)
        out[:, :, start:stop] = part.flip(2)
    return out
