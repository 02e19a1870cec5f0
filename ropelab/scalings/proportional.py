"""Pairs stopped: transformers' name for p-RoPE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ropelab.positions import Rope, Spectrum
from ropelab.scalings.base import HfRope, SpectralScaling


@dataclass(frozen=True, kw_only=True)
class Proportional(SpectralScaling):
    """The floor(p R/2) fastest pairs, divided by s; the others stop turning.

    Barbero et al. 2024 (2410.06205), section 6: `pos=p_rope` trains with it.
    """

    name = "proportional"

    p: float

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"scaling.p must be in [0, 1], the share of pairs that turn, not {self.p}")

    def is_identity(self, ctx: int) -> bool:
        return self.factor == 1 and self.p == 1

    def spectrum(self, inv_freq: Tensor, *, base: float, ctx: int) -> Spectrum:
        pairs = inv_freq.shape[0]
        turning = torch.arange(pairs) < int(self.p * pairs)
        return Spectrum(torch.where(turning, inv_freq / self.factor, 0.0))

    def to_hf_rope(self, encoding: Rope, *, max_ctx: int | None) -> HfRope:
        if encoding.fraction != 1:
            raise ValueError("scaling=proportional on partial rotary: transformers spreads it over the whole head")
        reach = max_ctx or math.ceil(self.original_ctx * self.factor)
        return HfRope(encoding.base, proportional_rope(self.p, self.factor), reach)


def proportional_rope(p: float, factor: float) -> dict[str, Any]:
    """transformers' `proportional` for a share p of pairs that turn, divided by a factor."""
    scaled = {} if factor == 1 else {"factor": factor}
    return {"rope_type": "proportional", "partial_rotary_factor": float(p), **scaled}
