"""YaRN and its parts: fast pairs kept, slow pairs interpolated, a ramp between, and a temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ropelab.positions import Rope, Spectrum
from ropelab.scalings.base import DynamicScaling, HfRope, SpectralScaling


def blend(inv_freq: Tensor, keep: Tensor, s: float) -> Tensor:
    """inv_freq (keep + (1 - keep) / s), with keep (R/2,) in [0, 1]."""
    return inv_freq * (1 - (1 - keep) * (1 - 1 / s))


def keep_by_turns(inv_freq: Tensor, original_ctx: int, slow: float, fast: float) -> Tensor:
    """(R/2,): 0 for pairs with at most `slow` turns inside original_ctx, 1 from `fast` turns on, linear between."""
    turns = original_ctx * inv_freq / (2 * math.pi)
    return ((turns - slow) / (fast - slow)).clamp(0, 1)


def _keep_by_index(
    pairs: int, base: float, original_ctx: int, beta_slow: float, beta_fast: float, truncate: bool
) -> Tensor:
    """(R/2,): 1 up to the pair that makes `beta_fast` turns inside original_ctx, 0 from the one that makes `beta_slow`.

    Linear in the pair's index between; `truncate` rounds both ends outwards.
    """

    def pair_turning(turns: float) -> float:
        return pairs * math.log(original_ctx / (2 * math.pi * turns)) / math.log(base)

    low, high = pair_turning(beta_fast), pair_turning(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    # the released code stops at R - 1 although pairs run to R/2 - 1; it matters above original_ctx = 2 pi base
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    width = high - low if high != low else 0.001  # the released code's guard against a step of no width
    return 1 - ((torch.arange(pairs, dtype=torch.float64) - low) / width).clamp(0, 1)


def _temperature(s: float) -> float:
    """YaRN's factor on cosines and sines, sqrt(1/t) = 0.1 ln s + 1: Peng et al. 2023 (2309.00071), section 3.4."""
    return 0.1 * math.log(s) + 1 if s > 1 else 1.0


def check_attention_factor(attention_factor: float | None) -> None:
    """`ValueError` unless it is positive, or left to the method."""
    if attention_factor is not None and not 0 < attention_factor < math.inf:
        raise ValueError(f"scaling.attention_factor must be > 0 or null, not {attention_factor}")


@dataclass(frozen=True, kw_only=True)
class NtkByParts(SpectralScaling):
    """YaRN without its temperature: Peng et al. 2023 (2309.00071), section 3.2, definition 2.

    `ramp=index` is the authors' released code: linear in the pair's index between the pairs that turn `beta_fast` and
    `beta_slow` times inside original_ctx, rounded outwards unless `truncate` is false. `ramp=rotations` is the paper's
    text: linear in the number of turns. They are different functions.
    """

    name = "ntk_by_parts"

    beta_fast: float
    beta_slow: float
    ramp: str
    truncate: bool

    def __post_init__(self) -> None:
        fast, slow = self.beta_fast, self.beta_slow
        if not fast > slow > 0:
            raise ValueError(f"scaling.beta_fast must be above scaling.beta_slow > 0, not {fast} and {slow}")
        if self.ramp not in ("index", "rotations"):
            raise ValueError(f"scaling.ramp must be index or rotations, not '{self.ramp}'")
        if self.ramp == "rotations" and not self.truncate:
            raise ValueError("scaling.truncate=false rounds no pair index under scaling.ramp=rotations; leave it out")

    def by_parts(self, inv_freq: Tensor, base: float, s: float) -> Tensor:
        """inv_freq (R/2,) with its slow pairs divided by s."""
        if self.ramp == "rotations":
            keep = keep_by_turns(inv_freq, self.original_ctx, self.beta_slow, self.beta_fast)
        else:
            keep = _keep_by_index(
                inv_freq.shape[0], base, self.original_ctx, self.beta_slow, self.beta_fast, self.truncate
            )
        return blend(inv_freq, keep, s)

    def spectrum(self, inv_freq: Tensor, *, base: float, ctx: int) -> Spectrum:
        return Spectrum(self.by_parts(inv_freq, base, self.factor))

    def to_hf_rope(self, encoding: Rope, *, max_ctx: int | None) -> HfRope:
        if self.ramp != "index":
            raise ValueError(
                f"scaling={self.name} with ramp={self.ramp}: transformers has YaRN's released ramp only"
            )  # fmt: skip
        reach = max_ctx or math.ceil(self.original_ctx * self.factor)
        return HfRope(encoding.base, {
            "rope_type": "yarn", "factor": self.factor, "original_max_position_embeddings": self.original_ctx,
            "beta_fast": self.beta_fast, "beta_slow": self.beta_slow, "truncate": self.truncate,
            "attention_factor": encoding.spectrum(reach).attention_factor,
        }, reach)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Yarn(NtkByParts):
    """Fast pairs kept, slow pairs divided by s, a ramp between, and a temperature.

    Peng et al. 2023 (2309.00071), section 3.2 to 3.4. `attention_factor` replaces 0.1 ln s + 1.
    """

    name = "yarn"

    attention_factor: float | None

    def __post_init__(self) -> None:
        check_attention_factor(self.attention_factor)
        super().__post_init__()

    def is_identity(self, ctx: int) -> bool:
        return self.factor == 1 and self.attention_factor in (None, 1)

    def spectrum(self, inv_freq: Tensor, *, base: float, ctx: int) -> Spectrum:
        parts = self.by_parts(inv_freq, base, self.factor)
        return Spectrum(parts, self.attention_factor or _temperature(self.factor))


@dataclass(frozen=True, kw_only=True)
class DynamicYarn(DynamicScaling, NtkByParts):
    """YaRN that follows the context, its temperature too: Peng et al. 2023 (2309.00071), appendix B.3."""

    name = "dynamic_yarn"

    def spectrum(self, inv_freq: Tensor, *, base: float, ctx: int) -> Spectrum:
        s = self.at(ctx)
        return Spectrum(self.by_parts(inv_freq, base, s), _temperature(s))
