"""Changes of a rotary spectrum for longer contexts: pure functions of their arguments.

Each takes `inv_freq` (R/2,) fp64, radians per token, fastest pair first, and

- `base`: the base of the spectrum,
- `ctx`: the length of the sequence at hand,
- `original_ctx`: the length that the model was trained for, to which every formula refers,
- `factor`: the extension s,

and returns a `Spectrum`. The parameters of a method are its further keywords; their defaults are in
`configs/scaling/`. A pair that does not turn (frequency 0, as in p-RoPE) never starts to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Spectrum(NamedTuple):
    """What a scaling makes of a rotary spectrum."""

    inv_freq: Tensor  # (R/2,) fp64, radians per token
    attention_factor: float = 1.0  # multiplies cosines and sines, so scores get its square
    start_tokens: int = 0  # positions below keep the angles of the unscaled spectrum


def linear(inv_freq: Tensor, *, base: float, ctx: int, original_ctx: int, factor: float) -> Spectrum:
    """Position interpolation: positions, hence frequencies, divided by s. Chen et al. (2306.15595), section 2.3."""
    return Spectrum(inv_freq / factor)


def _ntk_spectrum(inv_freq: Tensor, base: float, stretch: float) -> Tensor:
    """The spectrum of base x stretch^(R/(R-2)): the fastest pair unchanged, the slowest divided by `stretch`."""
    pairs = inv_freq.shape[0]
    if pairs < 2:
        raise ValueError("NTK scaling needs at least two rotary pairs: a rotated dimension of 4 or more")
    new_base = base * stretch ** (2 * pairs / (2 * pairs - 2))
    exponents = torch.arange(pairs, dtype=torch.float64) / pairs
    return torch.pow(new_base, -exponents)


def ntk(inv_freq: Tensor, *, base: float, ctx: int, original_ctx: int, factor: float) -> Spectrum:
    """NTK-aware: base' = base s^(R/(R-2)). bloc97 2023; Peng et al. 2023 (2309.00071), section 3.1."""
    return Spectrum(_ntk_spectrum(inv_freq, base, factor))


def dynamic_ntk(inv_freq: Tensor, *, base: float, ctx: int, original_ctx: int, factor: float) -> Spectrum:
    """NTK-aware that follows the context: s = factor ctx/original_ctx - (factor - 1), RoPE up to original_ctx.

    emozilla 2023, in the form that transformers computes; factor 1 gives s = ctx/original_ctx.
    """
    if ctx <= original_ctx:
        return Spectrum(inv_freq)
    return Spectrum(_ntk_spectrum(inv_freq, base, factor * ctx / original_ctx - (factor - 1)))


def yarn(
    inv_freq: Tensor,
    *,
    base: float,
    ctx: int,
    original_ctx: int,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    ramp: str,
) -> Spectrum:
    """YaRN: fast pairs kept, slow pairs divided by s, a ramp between, and a temperature.

    Peng et al. 2023 (2309.00071), section 3.2 to 3.4. `ramp=index` is the authors' released code: linear in the pair's
    index between the pairs that turn `beta_fast` and `beta_slow` times inside original_ctx, rounded outwards.
    `ramp=rotations` is the paper's text: linear in the number of turns. They are different functions.
    """
    if not beta_fast > beta_slow > 0:
        raise ValueError(f"scaling.beta_fast must be above scaling.beta_slow > 0, not {beta_fast} and {beta_slow}")
    if ramp not in ("index", "rotations"):
        raise ValueError(f"scaling.ramp must be index or rotations, not '{ramp}'")
    pairs = inv_freq.shape[0]
    if ramp == "rotations":
        turns = original_ctx * inv_freq / (2 * math.pi)
        keep = ((turns - beta_slow) / (beta_fast - beta_slow)).clamp(0, 1)
    else:

        def pair_turning(turns: float) -> float:
            return 2 * pairs * math.log(original_ctx / (2 * math.pi * turns)) / (2 * math.log(base))

        low = max(math.floor(pair_turning(beta_fast)), 0)
        # the released code stops at R - 1 although pairs run to R/2 - 1; it matters above original_ctx = 2 pi base
        high = min(math.ceil(pair_turning(beta_slow)), 2 * pairs - 1)
        width = high - low if high != low else 0.001  # the released code's guard against a step of no width
        keep = 1 - ((torch.arange(pairs, dtype=torch.float64) - low) / width).clamp(0, 1)
    attention_factor = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return Spectrum(inv_freq / factor * (1 - keep) + inv_freq * keep, attention_factor)


def factor_is_one(parameters: Mapping[str, Any], ctx: int) -> bool:
    """Where a static scaling changes nothing: at factor 1."""
    return bool(parameters["factor"] == 1)


def inside(parameters: Mapping[str, Any], ctx: int) -> bool:
    """Where a dynamic scaling changes nothing: up to the length that the model was trained for."""
    return bool(ctx <= parameters["original_ctx"])


ROTARY = ("rope", "p_rope")


class Scaling(NamedTuple):
    """A scaling method, as the table in `positions/__init__.py` holds it.

    `apply` is a function of the spectrum as in this module, or, where `spectral` is False, one from `changes.py` that
    is called with the encoding and the parameters and changes what the encoding says. Its keywords are the parameters
    of its YAML, `original_ctx` resolved to a length.
    """

    apply: Callable[..., Any]
    applies_to: tuple[str, ...] | None = ROTARY  # names of encodings; None: any
    spectral: bool = True
    dynamic: bool = False  # the factor follows ctx, and `auto` is 1
    evaluation_only: bool = False  # no run is trained with it
    idle: Callable[[Mapping[str, Any], int], bool] = factor_is_one  # (parameters, ctx): must it change nothing there?

    def length_dependent(self, parameters: Mapping[str, Any]) -> bool:
        """Does what is said at a position depend on ctx?"""
        return self.dynamic or bool(parameters.get("short_factors"))
