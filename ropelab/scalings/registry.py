"""The table of scalings, by name, and how an encoding is built with one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ropelab.config import Method
from ropelab.positions import ENCODINGS, Geometry, PositionEncoding, Rope
from ropelab.scalings import spectra, transforms
from ropelab.scalings.base import Scaling

SCALINGS: dict[str, Scaling] = {
    "linear": Scaling(spectra.linear),
    "dynamic_linear": Scaling(spectra.dynamic_linear, dynamic=True, idle=spectra.inside),
    "ntk": Scaling(spectra.ntk),
    "dynamic_ntk": Scaling(spectra.dynamic_ntk, dynamic=True, idle=spectra.inside),
    "ntk_by_parts": Scaling(spectra.ntk_by_parts),
    "yarn": Scaling(spectra.yarn, idle=spectra.untempered),
    "dynamic_yarn": Scaling(spectra.dynamic_yarn, dynamic=True, idle=spectra.inside),
    "llama3": Scaling(spectra.llama3),
    "longrope": Scaling(spectra.longrope, idle=spectra.unrescaled),
    "proportional": Scaling(spectra.proportional, idle=spectra.all_turning),
    "rerope": Scaling(transforms.rerope, spectral=False, evaluation_only=True, idle=transforms.rerope_idle),
    "self_extend": Scaling(
        transforms.self_extend, spectral=False, evaluation_only=True, idle=transforms.self_extend_idle
    ),
    "temperature": Scaling(transforms.temperature, ("none", "drope"), spectral=False, idle=transforms.temperature_idle),
    "interpolated_slopes": Scaling(transforms.interpolated_slopes, ("alibi",), spectral=False),
    "block_causal": Scaling(transforms.block_causal, None, spectral=False, idle=transforms.block_causal_idle),
    "clamp": Scaling(transforms.clamp, ("learned",), spectral=False, idle=spectra.inside),
    "interpolate": Scaling(transforms.interpolate, ("learned",), spectral=False),
}


def build(pos: Method, scaling: Method, geometry: Geometry) -> PositionEncoding:
    """The encoding that a configuration names, its scaling applied with a resolved numeric factor.

    The parameters in the YAML are the keyword arguments of the class; it raises `ValueError` for a value out of
    range, and so does a scaling on an encoding that it does not apply to or whose spectrum it leaves as it was.
    """
    encoding = ENCODINGS[pos.name](geometry, **pos.parameters)
    if scaling.name == "none":
        return encoding
    method = SCALINGS[scaling.name]
    if method.applies_to is not None and pos.name not in method.applies_to:
        allowed = ", ".join(f"pos={name}" for name in method.applies_to)
        raise ValueError(f"scaling={scaling.name} applies to {allowed}, not to pos={pos.name}")
    parameters = applied_parameters(scaling, geometry.ctx)
    if method.spectral:
        assert isinstance(encoding, Rope)
        encoding.scaling = functools.partial(method.apply, **parameters)
        for ctx in (1, parameters["original_ctx"], 2 * parameters["original_ctx"]):
            # what is out of range is refused before anything is written, and so is a name for what is plain RoPE
            used = encoding.spectrum(ctx)
            same = used.attention_factor == 1 and used.inv_freq.equal(encoding.inv_freq())
            if same and not method.idle(parameters, ctx):
                raise ValueError(
                    f"scaling={scaling.name} changes no pair of this model: all that turn are fast enough to be kept; "
                    "leave it out or choose another scaling"
                )
    else:
        method.apply(encoding, **parameters)
    encoding.length_dependent = encoding.length_dependent or method.length_dependent(parameters)
    return encoding


def applied_parameters(scaling: Method, original_ctx: int) -> Mapping[str, Any]:
    """The parameters of a scaling with its original_ctx as a length: its own, else the run's."""
    assert isinstance(scaling.parameters.get("factor", 1.0), float), "resolve_factor comes first"
    own = scaling.parameters.get("original_ctx")
    return {**scaling.parameters, "original_ctx": own or original_ctx}


def resolve_factor(scaling: Method, *, longest: int, original_ctx: int) -> Method:
    """`scaling` with a factor of `auto` or `auto-row` replaced by a number.

    That is the smallest power of two that covers `longest`: for `auto` the longest ctx of the ladder (published curves
    hold one factor along a curve), for `auto-row` the row's own. For a dynamic method it is 1, which is transformers'
    s = max(1, ctx/original_ctx). A scaling without a factor stays as it is.
    """
    if "factor" not in scaling.parameters:
        return scaling
    factor = scaling.parameters["factor"]
    if factor in ("auto", "auto-row"):
        original_ctx = scaling.parameters.get("original_ctx") or original_ctx
        factor = 1.0
        while not SCALINGS[scaling.name].dynamic and factor * original_ctx < longest:
            factor *= 2
    return Method(scaling.name, {**scaling.parameters, "factor": float(factor)})
