"""Position encodings: the tables of names, and how one is built from a configuration."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ropelab.positions import scaling as spectra
from ropelab.positions.alibi import Alibi
from ropelab.positions.base import Decay, Far, Geometry, PositionEncoding, Positions, QueryBias, Rotation
from ropelab.positions.drope import Drope
from ropelab.positions.learned import Learned
from ropelab.positions.none import NoPositions
from ropelab.positions.rope import Rope
from ropelab.positions.scaling import Scaling
from ropelab.positions.sinusoidal import Sinusoidal, SinusoidalFairseq
from ropelab.schema import Method

__all__ = [
    "ENCODINGS",
    "SCALINGS",
    "Decay",
    "Far",
    "Geometry",
    "PositionEncoding",
    "Positions",
    "QueryBias",
    "Rope",
    "Rotation",
    "Scaling",
    "applied_parameters",
    "build",
    "resolve_factor",
]

# The explicit tables of names: a new encoding is one file here, one line in this table, one `configs/pos/NAME.yaml`.
ENCODINGS: dict[str, type[PositionEncoding]] = {
    "none": NoPositions,
    "sinusoidal": Sinusoidal,
    "sinusoidal_fairseq": SinusoidalFairseq,
    "learned": Learned,
    "alibi": Alibi,
    "rope": Rope,
    "drope": Drope,
}

SCALINGS: dict[str, Scaling] = {
    "linear": Scaling(spectra.linear),
    "ntk": Scaling(spectra.ntk),
    "dynamic_ntk": Scaling(spectra.dynamic_ntk, dynamic=True, idle=spectra.inside),
    "yarn": Scaling(spectra.yarn),
}


def build(pos: Method, scaling: Method, geometry: Geometry) -> PositionEncoding:
    """The encoding that a configuration names, its scaling applied with a resolved numeric factor.

    The parameters in the YAML are the keyword arguments of the class; it raises `ValueError` for a value out of
    range, and so does a scaling on an encoding that it does not apply to.
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
        for ctx in (1, geometry.ctx, 2 * geometry.ctx):  # what is out of range is refused before anything is written
            encoding.spectrum(ctx)
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
