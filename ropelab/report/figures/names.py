"""What a reader calls a method: encoding, scaling, and the parameters of both that are not the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ropelab import files
from ropelab.config import about

LABELS = {"unigram": "unigram frequencies", "own": "its own scaling"}  # a baseline; a checkpoint's, none of ours

OF_FACTORS = ("long_factors", "short_factors", "start_tokens", "attention_factor", "original_ctx")  # of a factors file


def label(group: str, name: str) -> str:
    """What the head of a method's YAML calls it: "RoPE" of pos, "YaRN" of scaling."""
    return LABELS.get(name) or about(group, name).label


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
    name = label("pos", pos)
    if pos_changed:
        name += f" ({changed_words(pos_changed)})"
    if scaling != "none":
        name += f" + {scaling_name(scaling, factor, scaling_changed)}"
    return name if window is None else f"{name}, window {window}"


def scaling_name(scaling: str, factor: float | None, changed: Mapping[str, Any] | None = None) -> str:
    """A scaling as a reader knows it: "YaRN ×8 (ramp=rotations)", "ReRoPE", "NTK-aware, factor per ctx"."""
    if scaling == "none":
        return "none"
    name, told = label("scaling", scaling), about("scaling", scaling)
    if factor is None:
        name = f"{name}, factor per ctx" if told.has_factor and scaling != "own" else name
    elif not (told.dynamic and factor == 1):  # dynamic methods find their own factor
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
