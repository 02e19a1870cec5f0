"""Position encodings: the table of names, and how one is built from a configuration."""

from __future__ import annotations

import functools

from ropelab.positions.alibi import Alibi
from ropelab.positions.base import Geometry, PositionEncoding, Positions, Rotation
from ropelab.positions.learned import Learned
from ropelab.positions.none import NoPositions
from ropelab.positions.rope import Rope
from ropelab.positions.scaling import SCALINGS
from ropelab.positions.sinusoidal import Sinusoidal, SinusoidalFairseq
from ropelab.schema import Method

__all__ = ["ENCODINGS", "SCALINGS", "Geometry", "PositionEncoding", "Positions", "Rotation", "build", "resolve_factor"]

# The explicit table of names: a new encoding is one file here, one line in this table, one `configs/pos/NAME.yaml`.
ENCODINGS: dict[str, type[PositionEncoding]] = {
    "none": NoPositions,
    "sinusoidal": Sinusoidal,
    "sinusoidal_fairseq": SinusoidalFairseq,
    "learned": Learned,
    "alibi": Alibi,
    "rope": Rope,
}


def build(pos: Method, scaling: Method, geometry: Geometry) -> PositionEncoding:
    """The encoding that a configuration names, its scaling applied with a resolved numeric factor.

    The parameters in the YAML are the keyword arguments of the class; it raises `ValueError` for a value out of
    range, and so does a scaling on an encoding that it does not apply to.
    """
    encoding = ENCODINGS[pos.name](geometry, **pos.parameters)
    if scaling.name == "none":
        return encoding
    if not isinstance(encoding, Rope):
        raise ValueError(f"scaling={scaling.name} applies to rotary encodings (pos=rope), not to pos={pos.name}")
    method = SCALINGS[scaling.name]
    parameters = dict(scaling.parameters)
    parameters["original_ctx"] = parameters["original_ctx"] or geometry.ctx
    assert isinstance(parameters["factor"], float), "resolve_factor comes first"
    encoding.scaling = functools.partial(method.function, **parameters)
    encoding.spectrum(geometry.ctx)  # a parameter out of range is refused here, before anything is written
    encoding.length_dependent = method.length_dependent
    return encoding


def resolve_factor(scaling: Method, *, longest: int, train_ctx: int) -> Method:
    """`scaling` with a factor of `auto` or `auto-row` replaced by a number.

    That is the smallest power of two that covers `longest`: for `auto` the longest ctx of the ladder (published curves
    hold one factor along a curve), for `auto-row` the row's own. For a dynamic method it is 1, which is transformers'
    s = max(1, ctx/original_ctx).
    """
    if scaling.name == "none":
        return scaling
    factor = scaling.parameters["factor"]
    if factor in ("auto", "auto-row"):
        original_ctx = scaling.parameters["original_ctx"] or train_ctx
        factor = 1.0
        while not SCALINGS[scaling.name].length_dependent and factor * original_ctx < longest:
            factor *= 2
    return Method(scaling.name, {**scaling.parameters, "factor": float(factor)})
