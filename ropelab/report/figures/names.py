"""What a reader calls a method: encoding, scaling, and the parameters of both that are not the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ropelab import files

NAMES = {
    "unigram": "unigram frequencies",
    "none": "NoPE",
    "learned": "learned",
    "sinusoidal": "sinusoidal",
    "sinusoidal_fairseq": "sinusoidal (fairseq)",
    "sinusoidal_scaled": "sinusoidal (x-transformers)",
    "sinusoidal_qk": "sinusoidal in q and k",
    "rope": "RoPE",
    "p_rope": "p-RoPE",
    "drope": "DroPE",
    "alibi": "ALiBi",
    "t5": "T5 bias",
    "kerple_log": "KERPLE-log",
    "kerple_power": "KERPLE-power",
    "sandwich": "Sandwich",
    "xpos": "xPos",
    "fire": "FIRE",
    "cable": "CABLE",
    "fox": "FoX",
    "linear": "PI",
    "ntk": "NTK-aware",
    "dynamic_ntk": "dynamic NTK",
    "dynamic_linear": "dynamic PI",
    "dynamic_yarn": "dynamic YaRN",
    "ntk_by_parts": "NTK-by-parts",
    "yarn": "YaRN",
    "longrope": "LongRoPE",
    "llama3": "Llama 3",
    "rerope": "ReRoPE",
    "self_extend": "Self-Extend",
    "proportional": "proportional",
    "temperature": "temperature",
    "interpolated_slopes": "interpolated slopes",
    "block_causal": "block-causal",
    "clamp": "clamped",
    "interpolate": "interpolated",
    "own": "its own scaling",  # a checkpoint's, that is none of ours
}

OF_FACTORS = ("long_factors", "short_factors", "start_tokens", "attention_factor", "original_ctx")  # of a factors file

WITHOUT_FACTOR = ("rerope", "self_extend", "block_causal", "clamp")  # scalings that have none


def method_name(
    pos: str,
    scaling: str,
    factor: float | None,
    window: int | None,
    *,
    pos_changed: Mapping[str, Any] | None = None,
    scaling_changed: Mapping[str, Any] | None = None,
) -> str:
    """A method as a reader knows it: "RoPE + YaRN ×8", "RoPE (base=500000)", "ALiBi, window 128"."""
    name = NAMES.get(pos, pos)
    if pos_changed:
        name += f" ({changed_words(pos_changed)})"
    if scaling != "none":
        name += f" + {scaling_name(scaling, factor, scaling_changed)}"
    return name if window is None else f"{name}, window {window}"


def scaling_name(scaling: str, factor: float | None, changed: Mapping[str, Any] | None = None) -> str:
    """A scaling as a reader knows it: "YaRN ×8 (ramp=rotations)", "ReRoPE", "NTK-aware, factor per ctx"."""
    if scaling == "none":
        return "none"
    name = NAMES.get(scaling, scaling)
    if factor is None:
        name = name if scaling in (*WITHOUT_FACTOR, "own") else f"{name}, factor per ctx"
    elif not (scaling.startswith("dynamic") and factor == 1):  # dynamic methods find their own factor
        name = f"{name} ×{factor:g}"
    return f"{name} ({changed_words(changed)})" if changed else name


def changed_words(changed: Mapping[str, Any]) -> str:
    """Parameters that are not the defaults: "ramp=rotations"; searched factors by a digest: "factors 1f3a9c"."""
    if "long_factors" in changed:
        rest = {key: value for key, value in changed.items() if key not in OF_FACTORS}
        own = {key: changed[key] for key in OF_FACTORS if key in changed}
        return ", ".join([f"factors {files.digest_of(own)[:6]}", *([changed_words(rest)] if rest else [])])
    return ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in sorted(changed.items())
    )
