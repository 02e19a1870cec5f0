"""Changes of a rotary spectrum for longer contexts: pure functions of their arguments.

Each takes `inv_freq` (R/2,) fp64, radians per token, fastest pair first, and

- `base`: the base of the spectrum,
- `ctx`: the length of the sequence at hand,
- `original_ctx`: the length L that the model was trained for, to which every formula refers,
- `factor`: the extension s; of a dynamic method the f in s = f ctx/L - (f - 1), so that f = 1 means s = ctx/L,

and returns a `Spectrum`. The parameters of a method are its further keywords; their defaults are in
`configs/scaling/`. A pair that does not turn (frequency 0, as in p-RoPE) never starts to. With s = 1 the frequencies
come back bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ropelab.positions import Spectrum
from ropelab.scalings.base import factor_is_one


def _following(factor: float, ctx: int, original_ctx: int) -> float:
    """The s of a dynamic method: 1 up to original_ctx, then factor ctx/original_ctx - (factor - 1)."""
    return max(1.0, factor * ctx / original_ctx - (factor - 1))


# --- position interpolation -----------------------------------------------------------------------------------------


def linear(inv_freq: Tensor, *, base: float, ctx: int, original_ctx: int, factor: float) -> Spectrum:
    """Position interpolation: positions, hence frequencies, divided by s. Chen et al. (2306.15595), section 2.3."""
    return Spectrum(inv_freq / factor)


def dynamic_linear(inv_freq: Tensor, *, base: float, ctx: int, original_ctx: int, factor: float) -> Spectrum:
    """Position interpolation that follows the context: Peng et al. 2023 (2309.00071), section 3.3."""
    return Spectrum(inv_freq / _following(factor, ctx, original_ctx))


# --- a larger base --------------------------------------------------------------------------------------------------


def _larger_base(inv_freq: Tensor, s: float) -> Tensor:
    """The spectrum of base s^(R/(R-2)): pair i divided by s^(i / (R/2 - 1)), the first unchanged, the last by s."""
    pairs = inv_freq.shape[0]
    if pairs < 2:
        raise ValueError("NTK scaling needs at least two rotary pairs: a rotated dimension of 4 or more")
    return inv_freq * s ** (-torch.arange(pairs, dtype=torch.float64) / (pairs - 1))


def ntk(inv_freq: Tensor, *, base: float, ctx: int, original_ctx: int, factor: float) -> Spectrum:
    """NTK-aware: base' = base s^(R/(R-2)). bloc97 2023; Peng et al. 2023 (2309.00071), section 3.1."""
    return Spectrum(_larger_base(inv_freq, factor))


def dynamic_ntk(inv_freq: Tensor, *, base: float, ctx: int, original_ctx: int, factor: float) -> Spectrum:
    """NTK-aware that follows the context: emozilla 2023, in the form that transformers computes."""
    return Spectrum(_larger_base(inv_freq, _following(factor, ctx, original_ctx)))


# --- fast pairs kept, slow pairs interpolated -----------------------------------------------------------------------


def _blend(inv_freq: Tensor, keep: Tensor, s: float) -> Tensor:
    """inv_freq (keep + (1 - keep) / s), with keep (R/2,) in [0, 1]."""
    return inv_freq * (1 - (1 - keep) * (1 - 1 / s))


def _keep_by_turns(inv_freq: Tensor, original_ctx: int, slow: float, fast: float) -> Tensor:
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


def _keep_by_parts(
    inv_freq: Tensor, base: float, original_ctx: int, beta_fast: float, beta_slow: float, ramp: str, truncate: bool
) -> Tensor:
    if not beta_fast > beta_slow > 0:
        raise ValueError(f"scaling.beta_fast must be above scaling.beta_slow > 0, not {beta_fast} and {beta_slow}")
    if ramp not in ("index", "rotations"):
        raise ValueError(f"scaling.ramp must be index or rotations, not '{ramp}'")
    if ramp == "rotations":
        if not truncate:
            raise ValueError("scaling.truncate=false rounds no pair index under scaling.ramp=rotations; leave it out")
        return _keep_by_turns(inv_freq, original_ctx, beta_slow, beta_fast)
    return _keep_by_index(inv_freq.shape[0], base, original_ctx, beta_slow, beta_fast, truncate)


def _temperature(s: float) -> float:
    """YaRN's factor on cosines and sines, sqrt(1/t) = 0.1 ln s + 1: Peng et al. 2023 (2309.00071), section 3.4."""
    return 0.1 * math.log(s) + 1 if s > 1 else 1.0


def _check_attention_factor(attention_factor: float | None) -> None:
    if attention_factor is not None and not 0 < attention_factor < math.inf:
        raise ValueError(f"scaling.attention_factor must be > 0 or null, not {attention_factor}")


def ntk_by_parts(
    inv_freq: Tensor,
    *,
    base: float,
    ctx: int,
    original_ctx: int,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    ramp: str,
    truncate: bool,
) -> Spectrum:
    """YaRN without its temperature: Peng et al. 2023 (2309.00071), section 3.2, definition 2. `ramp` as in `yarn`."""
    keep = _keep_by_parts(inv_freq, base, original_ctx, beta_fast, beta_slow, ramp, truncate)
    return Spectrum(_blend(inv_freq, keep, factor))


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
    truncate: bool,
    attention_factor: float | None,
) -> Spectrum:
    """YaRN: fast pairs kept, slow pairs divided by s, a ramp between, and a temperature.

    Peng et al. 2023 (2309.00071), section 3.2 to 3.4. `ramp=index` is the authors' released code: linear in the pair's
    index between the pairs that turn `beta_fast` and `beta_slow` times inside original_ctx, rounded outwards unless
    `truncate` is false. `ramp=rotations` is the paper's text: linear in the number of turns. They are different
    functions. `attention_factor` replaces 0.1 ln s + 1.
    """
    _check_attention_factor(attention_factor)
    keep = _keep_by_parts(inv_freq, base, original_ctx, beta_fast, beta_slow, ramp, truncate)
    return Spectrum(_blend(inv_freq, keep, factor), attention_factor or _temperature(factor))


def dynamic_yarn(
    inv_freq: Tensor,
    *,
    base: float,
    ctx: int,
    original_ctx: int,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    ramp: str,
    truncate: bool,
) -> Spectrum:
    """YaRN that follows the context, its temperature too: Peng et al. 2023 (2309.00071), appendix B.3."""
    s = _following(factor, ctx, original_ctx)
    keep = _keep_by_parts(inv_freq, base, original_ctx, beta_fast, beta_slow, ramp, truncate)
    return Spectrum(_blend(inv_freq, keep, s), _temperature(s))


def llama3(
    inv_freq: Tensor,
    *,
    base: float,
    ctx: int,
    original_ctx: int,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
) -> Spectrum:
    """Llama 3.1: by parts in the number of turns inside original_ctx, between low_ and high_freq_factor turns.

    `apply_scaling` in meta-llama/llama-models `models/llama3/model.py`. No temperature.
    """
    if not high_freq_factor > low_freq_factor > 0:
        raise ValueError(
            "scaling.high_freq_factor must be above scaling.low_freq_factor > 0, "
            f"not {high_freq_factor} and {low_freq_factor}"
        )
    return Spectrum(_blend(inv_freq, _keep_by_turns(inv_freq, original_ctx, low_freq_factor, high_freq_factor), factor))


# --- one rescale factor per pair ------------------------------------------------------------------------------------


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


def longrope(
    inv_freq: Tensor,
    *,
    base: float,
    ctx: int,
    original_ctx: int,
    factor: float,
    long_factors: Sequence[float],
    short_factors: Sequence[float],
    start_tokens: int,
    attention_factor: float | None,
) -> Spectrum:
    """LongRoPE: the frequency of pair i divided by a factor of its own, which a search has found.

    Ding et al. 2024 (2402.13753), section 3. `short_factors`, if any, serve up to original_ctx and `long_factors`
    beyond it (transformers `longrope`); the first `start_tokens` positions keep their angles. `attention_factor`
    replaces sqrt(1 + ln s / ln L) of the released code.
    """
    if not long_factors:
        raise ValueError(
            "scaling=longrope has no factors; give scaling.factors=FILE, of ropelab search longrope, "
            "or scaling.long_factors=[...]"
        )
    _check_rescale("long_factors", long_factors, inv_freq.shape[0])
    if short_factors:
        _check_rescale("short_factors", short_factors, inv_freq.shape[0])
    if start_tokens < 0:
        raise ValueError(f"scaling.start_tokens must be >= 0, not {start_tokens}")
    _check_attention_factor(attention_factor)
    if original_ctx < 2:
        raise ValueError(f"scaling.original_ctx must be >= 2 for longrope, not {original_ctx}")
    used = torch.tensor(_rescale_at(ctx, original_ctx, long_factors, short_factors), dtype=torch.float64)
    default = math.sqrt(1 + math.log(factor) / math.log(original_ctx))
    return Spectrum(inv_freq / used, attention_factor or default, start_tokens)


def _rescale_at(
    ctx: int, original_ctx: int, long_factors: Sequence[float], short_factors: Sequence[float]
) -> Sequence[float]:
    return short_factors if short_factors and ctx <= original_ctx else long_factors


# --- pairs stopped --------------------------------------------------------------------------------------------------


def proportional(inv_freq: Tensor, *, base: float, ctx: int, original_ctx: int, factor: float, p: float) -> Spectrum:
    """The floor(p R/2) fastest pairs, divided by s; the others stop turning. transformers' name for p-RoPE.

    Barbero et al. 2024 (2410.06205), section 6: `pos=p_rope` trains with it.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"scaling.p must be in [0, 1], the share of pairs that turn, not {p}")
    pairs = inv_freq.shape[0]
    turning = torch.arange(pairs) < int(p * pairs)
    return Spectrum(torch.where(turning, inv_freq / factor, 0.0))


# --- where nothing must change --------------------------------------------------------------------------------------


def inside(parameters: Mapping[str, Any], ctx: int) -> bool:
    """Where a dynamic scaling changes nothing: up to the length that the model was trained for."""
    return bool(ctx <= parameters["original_ctx"])


def untempered(parameters: Mapping[str, Any], ctx: int) -> bool:
    """Where YaRN changes nothing: at factor 1, unless it is given an attention factor."""
    return factor_is_one(parameters, ctx) and parameters["attention_factor"] in (None, 1)


def unrescaled(parameters: Mapping[str, Any], ctx: int) -> bool:
    """Where LongRoPE changes nothing: with factors of 1, or none but start tokens, and an attention factor of 1."""
    lists = parameters["long_factors"], parameters["short_factors"]
    same = all(value == 1 for value in _rescale_at(ctx, parameters["original_ctx"], *lists))
    attention_factor = parameters["attention_factor"]
    tempered = parameters["factor"] > 1 if attention_factor is None else attention_factor != 1
    return not tempered and (same or ctx <= parameters["start_tokens"])


def all_turning(parameters: Mapping[str, Any], ctx: int) -> bool:
    """Where p-RoPE changes nothing: with all pairs turning, and at factor 1."""
    return factor_is_one(parameters, ctx) and bool(parameters["p"] == 1)
