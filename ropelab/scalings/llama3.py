"""Llama 3.1's scaling: by parts in the number of turns, without a temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ropelab.positions import Rope, Spectrum
from ropelab.scalings.base import HfRope, SpectralScaling
from ropelab.scalings.yarn import blend, keep_by_turns


@dataclass(frozen=True, kw_only=True)
class Llama3(SpectralScaling):
    """By parts in the number of turns inside original_ctx, between low_ and high_freq_factor turns.

    `apply_scaling` in meta-llama/llama-models `models/llama3/model.py`. No temperature.
    """

    name = "llama3"

    low_freq_factor: float
    high_freq_factor: float

    def __post_init__(self) -> None:
        low, high = self.low_freq_factor, self.high_freq_factor
        if not high > low > 0:
            raise ValueError(
                f"scaling.high_freq_factor must be above scaling.low_freq_factor > 0, not {high} and {low}"
            )  # fmt: skip

    def spectrum(self, inv_freq: Tensor, *, base: float, ctx: int) -> Spectrum:
        keep = keep_by_turns(inv_freq, self.original_ctx, self.low_freq_factor, self.high_freq_factor)
        return Spectrum(blend(inv_freq, keep, self.factor))

    def to_hf_rope(self, encoding: Rope, *, max_ctx: int | None) -> HfRope:
        return HfRope(encoding.base, {
            "rope_type": "llama3", "factor": self.factor, "original_max_position_embeddings": self.original_ctx,
            "low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor,
        }, max_ctx or math.ceil(self.original_ctx * self.factor))  # fmt: skip
