"""Causal attention with positions: the one call that every layer makes, and the kernel that serves it.

Shapes: B sequences, H heads, T tokens, D head dimension. A position bias is a vector by distance, (H, T): no kernel
for long sequences builds (T, T) from it.

Kernels
    materialised  scores in full, (B, H, T, T): the fastest training step on a CPU at short T
    sdpa          torch's fused causal attention: no bias, no window
    blocks        torch's fused attention, query blocks over their key range; the mask of a block is an overlapping
                  view of one vector by distance (on a CPU; elsewhere a copy of that one block)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SHORT = 512  # longest T at which the materialised kernel wins on a CPU
BLOCK = 2048  # query rows of a block: large enough for the kernel, small enough that few masked keys are visited


def choose_kernel(device: torch.device, length: int, *, training: bool, plain: bool) -> str:
    """The kernel for sequences of `length` tokens; `plain` means neither bias nor window."""
    if training and device.type == "cpu" and length <= SHORT:
        return "materialised"
    return "sdpa" if plain else "blocks"


class Attend:
    """Causal attention over T tokens with one position bias, ready to be called by every layer.

    bias (H, T) fp32 by distance or None; window keeps the keys with 0 <= i - j < window, None all of them.
    """

    def __init__(
        self,
        length: int,
        *,
        bias: Tensor | None,
        window: int | None,
        device: torch.device,
        training: bool,
        kernel: str | None = None,
    ) -> None:
        if window is not None and window >= length:
            window = None  # no key is that far away
        plain = bias is None and window is None
        self.kernel = kernel or choose_kernel(device, length, training=training, plain=plain)
        assert plain or self.kernel != "sdpa"
        self.window = window
        if self.kernel != "sdpa":
            # what is added to a score, by distance: (H, T) or (1, T)
            visible = torch.zeros(1, length, device=device) if bias is None else bias
            if window is not None:
                far = torch.arange(length, device=device) >= window  # (T,)
                visible = visible.masked_fill(far, -math.inf)
            self.by_distance = visible
            self.mask = _toeplitz(visible) if self.kernel == "materialised" else None  # (H or 1, T, T)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, H, T, D) -> (B, H, T, D)."""
        if self.kernel == "sdpa":
            return scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.kernel == "materialised":
            assert self.mask is not None
            return _materialised(q, k, v, self.mask)
        return self._blocks(q, k, v)

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        out = torch.empty_like(q) if not q.requires_grad else None
        parts = []
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            first = 0 if self.window is None else max(0, start - self.window + 1)  # oldest key a row here can see
            mask = self._block_mask(start, stop, first)
            # rows run backwards, so that the mask's entry depends on row + column and is a view of one vector
            part = scaled_dot_product_attention(
                q[:, :, start:stop].flip(2), k[:, :, first:stop], v[:, :, first:stop], attn_mask=mask
            ).flip(2)
            if out is None:
                parts.append(part)
            else:
                out[:, :, start:stop] = part
        return torch.cat(parts, dim=2) if out is None else out

    def _block_mask(self, start: int, stop: int, first: int) -> Tensor:
        """(1, H or 1, rows, keys): the bias of rows stop-1 down to start and keys first..stop-1; -inf in the future.

        Row r and column c stand at distance (stop - 1 - r) - (first + c), a function of r + c alone.
        """
        rows, keys = stop - start, stop - first
        distance = stop - 1 - first - torch.arange(rows + keys - 1, device=self.by_distance.device)
        vector = self.by_distance[:, distance.clamp(min=0)].masked_fill(distance < 0, -math.inf)  # (H, rows + keys - 1)
        heads = vector.shape[0]
        view = vector.as_strided((1, heads, rows, keys), (0, rows + keys - 1, 1, 1))
        return view if view.device.type == "cpu" else view.contiguous()


def _toeplitz(by_distance: Tensor) -> Tensor:
    """(H, T) by distance -> (H, T, T): entry [h, i, j] = by_distance[h, i - j], -inf where j > i."""
    length = by_distance.shape[1]
    i = torch.arange(length, device=by_distance.device)
    distance = i[:, None] - i[None, :]  # (T, T)
    return by_distance[:, distance.clamp(min=0)].masked_fill(distance < 0, -math.inf)


def _materialised(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v with the scores in full; q, k, v (B, H, T, D), mask (H or 1, T, T)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, T, T)
    return torch.softmax(scores + mask.to(scores.dtype), dim=-1) @ v
