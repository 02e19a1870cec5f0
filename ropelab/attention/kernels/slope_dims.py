"""ALiBi inside a fused kernel that knows no bias: six more dimensions of queries and keys.

Causal softmax ignores what is the same for all keys of a query, so that -m (i - j) may be +m j: a product of a number
of the query's head and a number of the key. bf16 holds integers to 256 only, hence the key's position goes in as three
digits to the base 256, each exact, and the slope as the sum of two bf16 numbers. `ropelab bench attention` prints
what is left of the error.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ropelab.attention.kernels.base import Kernel
from ropelab.attention.scores import Request

BASE, DIGITS = 256, 3
ADDED = 8  # dimensions: two slopes x three digits, and two zeros, since kernels want multiples of 8


def augment(q: Tensor, k: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """q, k (B, H, T, D), slopes (H,) -> q, k (B, H, T, D + 8) whose product is larger by sqrt(D) m j."""
    batch, heads, length, d_head = q.shape
    target = slopes.double() * math.sqrt(d_head)  # (H,)
    coarse = target.to(q.dtype)
    fine = (target - coarse.double()).to(q.dtype)
    powers = torch.tensor([BASE**n for n in range(DIGITS)], device=q.device, dtype=q.dtype)  # powers of 2: exact
    of_query = torch.cat((coarse[:, None] * powers, fine[:, None] * powers), dim=-1)  # (H, 6)
    j = torch.arange(length, device=q.device)
    digits = torch.stack([(j // BASE**n) % BASE for n in range(DIGITS)], dim=-1).to(q.dtype)  # (T, 3)
    of_key = digits.repeat(1, 2)  # (T, 6)
    empty = (0, ADDED - 2 * DIGITS)
    of_query = pad(of_query, empty)[None, :, None].expand(batch, heads, length, ADDED)
    of_key = pad(of_key, empty)[None, None].expand(batch, heads, length, ADDED)
    return torch.cat((q, of_query), dim=-1), torch.cat((k, of_key), dim=-1)


def attend_with_slopes(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """Causal attention with the bias -slopes[h] (i - j): q, k, v (B, H, T, D), slopes (H,) -> (B, H, T, D)."""
    assert q.shape[2] <= BASE**DIGITS
    d_head = q.shape[-1]
    wide_q, wide_k = augment(q, k, slopes)
    # values as wide as keys: not every kernel takes two widths
    out = scaled_dot_product_attention(wide_q, wide_k, pad(v, (0, ADDED)), is_causal=True, scale=d_head**-0.5)
    return out[..., :d_head]


class SlopeDims(Kernel):
    """ALiBi's bias, and nothing else, in torch's fused causal attention."""

    name = "digits"
    summary = "torch's fused causal attention, ALiBi's bias as eight more dimensions of queries and keys"
    priority = 60

    @classmethod
    def supports(cls, request: Request) -> bool:
        bias = request.bias
        return bias.slopes is not None and bias.window is None and not bias.pairwise

    @classmethod
    def suits(cls, request: Request) -> bool:
        return request.device.type == "cuda" and request.training and request.dtype == torch.bfloat16

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, far: tuple[Tensor, Tensor] | None, decay: Any) -> Tensor:
        assert self.request.bias.slopes is not None
        return attend_with_slopes(q, k, v, self.request.bias.slopes)
