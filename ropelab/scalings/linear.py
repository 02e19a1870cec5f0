"""Position interpolation: every angle divided by the factor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ropelab.positions import Rope, Spectrum
from ropelab.scalings.base import DynamicScaling, HfRope, SpectralScaling


@dataclass(frozen=True, kw_only=True)
class Linear(SpectralScaling):
    """Positions, hence frequencies, divided by s. Chen et al. 2023 (2306.15595), section 2.3."""

    name = "linear"

    def spectrum(self, inv_freq: Tensor, *, base: float, ctx: int) -> Spectrum:
        return Spectrum(inv_freq / self.factor)

    def to_hf_rope(self, encoding: Rope, *, max_ctx: int | None) -> HfRope:
        reach = max_ctx or math.ceil(self.original_ctx * self.factor)
        return HfRope(encoding.base, {"rope_type": "linear", "factor": self.factor}, reach)


@dataclass(frozen=True, kw_only=True)
class DynamicLinear(DynamicScaling):
    """Position interpolation that follows the context: Peng et al. 2023 (2309.00071), section 3.3."""

    name = "dynamic_linear"

    def spectrum(self, inv_freq: Tensor, *, base: float, ctx: int) -> Spectrum:
        return Spectrum(inv_freq / self.at(ctx))
