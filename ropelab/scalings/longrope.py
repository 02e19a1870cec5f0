"""LongRoPE: one searched rescale factor per pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ropelab.positions import Rope, Spectrum
from ropelab.scalings.base import HfRope, SpectralScaling
from ropelab.scalings.yarn import check_attention_factor


def _check_rescale(name: str, factors: Sequence[float], pairs: int) -> None:
    """`ValueError` unless there is one factor per pair, finite, >= 1 and never falling: 2402.13753, section 3.2."""
    what = f"scaling.factors: {name}"
    if len(factors) != pairs:
        raise ValueError(f"{what} must hold {pairs} numbers, one per rotary pair of the model, not {len(factors)}")
    for i, value in enumerate(factors):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < math.inf:
            raise ValueError(f"{what} must be finite numbers >= 1; number {i + 1} of {pairs} is {value}")
        if i and value < factors[i - 1]:
            raise ValueError(f"{what} must never fall; number {i + 1} of {pairs} is {value} after {factors[i - 1]}")


@dataclass(frozen=True, kw_only=True)
class LongRope(SpectralScaling):
    """The frequency of pair i divided by a factor of its own, which a search has found.

    Ding et al. 2024 (2402.13753), section 3. `short_factors`, if any, serve up to original_ctx and `long_factors`
    beyond it (transformers `longrope`); the first `start_tokens` positions keep their angles. `attention_factor`
    replaces sqrt(1 + ln s / ln L) of the released code.
    """

    name = "longrope"

    long_factors: Sequence[float]
    short_factors: Sequence[float]
    start_tokens: int
    attention_factor: float | None

    @property
    def length_dependent(self) -> bool:
        return bool(self.short_factors)

    def at(self, ctx: int) -> Sequence[float]:
        """The factors in use at ctx tokens."""
        return self.short_factors if self.short_factors and ctx <= self.original_ctx else self.long_factors

    def is_identity(self, ctx: int) -> bool:
        same = all(value == 1 for value in self.at(ctx))
        tempered = self.factor > 1 if self.attention_factor is None else self.attention_factor != 1
        return not tempered and (same or ctx <= self.start_tokens)

    def spectrum(self, inv_freq: Tensor, *, base: float, ctx: int) -> Spectrum:
        if not self.long_factors:
            raise ValueError(
                "scaling=longrope has no factors; give scaling.factors=FILE, of ropelab search longrope, "
                "or scaling.long_factors=[...]"
            )
        _check_rescale("long_factors", self.long_factors, inv_freq.shape[0])
        if self.short_factors:
            _check_rescale("short_factors", self.short_factors, inv_freq.shape[0])
        if self.start_tokens < 0:
            raise ValueError(f"scaling.start_tokens must be >= 0, not {self.start_tokens}")
        check_attention_factor(self.attention_factor)
        if self.original_ctx < 2:
            raise ValueError(f"scaling.original_ctx must be >= 2 for longrope, not {self.original_ctx}")
        used = torch.tensor(self.at(ctx), dtype=torch.float64)
        default = math.sqrt(1 + math.log(self.factor) / math.log(self.original_ctx))
        return Spectrum(inv_freq / used, self.attention_factor or default, self.start_tokens)

    def to_hf_rope(self, encoding: Rope, *, max_ctx: int | None) -> HfRope:
        if self.start_tokens:
            raise ValueError(
                "scaling=longrope with start_tokens: transformers turns all positions alike; search for factors "
                "with search.start_tokens=[0]"
            )
        reach = max_ctx or math.ceil(self.original_ctx * self.factor)
        return HfRope(encoding.base, {
            "rope_type": "longrope", "factor": self.factor, "original_max_position_embeddings": self.original_ctx,
            "short_factor": list(self.short_factors or self.long_factors), "long_factor": list(self.long_factors),
            "attention_factor": encoding.spectrum(reach).attention_factor,
        }, reach)  # fmt: skip
