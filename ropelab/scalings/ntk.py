"""NTK-aware scaling: a larger base."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ropelab.positions import Rope, Spectrum
from ropelab.scalings.base import DynamicScaling, HfRope, SpectralScaling


def _larger_base(inv_freq: Tensor, s: float) -> Tensor:
    """The spectrum of base s^(R/(R-2)): pair i divided by s^(i / (R/2 - 1)), the first unchanged, the last by s."""
    pairs = inv_freq.shape[0]
    if pairs < 2:
        raise ValueError("NTK scaling needs at least two rotary pairs: a rotated dimension of 4 or more")
    return inv_freq * s ** (-torch.arange(pairs, dtype=torch.float64) / (pairs - 1))


@dataclass(frozen=True, kw_only=True)
class Ntk(SpectralScaling):
    """base' = base s^(R/(R-2)). bloc97 2023; Peng et al. 2023 (2309.00071), section 3.1."""

    name = "ntk"

    def spectrum(self, inv_freq: Tensor, *, base: float, ctx: int) -> Spectrum:
        return Spectrum(_larger_base(inv_freq, self.factor))

    def to_hf_rope(self, encoding: Rope, *, max_ctx: int | None) -> HfRope:
        pairs = encoding.rotated // 2
        base = encoding.base * self.factor ** (pairs / (pairs - 1))  # a larger base is all it is
        return HfRope(base, {"rope_type": "default"}, max_ctx or math.ceil(self.original_ctx * self.factor))


@dataclass(frozen=True, kw_only=True)
class DynamicNtk(DynamicScaling):
    """NTK-aware that follows the context: emozilla 2023, in the form that transformers computes."""

    name = "dynamic_ntk"

    def spectrum(self, inv_freq: Tensor, *, base: float, ctx: int) -> Spectrum:
        return Spectrum(_larger_base(inv_freq, self.at(ctx)))

    def to_hf_rope(self, encoding: Rope, *, max_ctx: int | None) -> HfRope:
        if max_ctx not in (None, self.original_ctx):
            raise ValueError("--max-ctx: transformers' `dynamic` reads the original length there; leave it out")
        return HfRope(encoding.base, {"rope_type": "dynamic", "factor": self.factor}, self.original_ctx)
