"""The table of scalings, by name, and how an encoding is built with one."""

from __future__ import annotations

from ropelab.config import Method
from ropelab.plugins import registered
from ropelab.positions import ENCODINGS, Geometry, PositionEncoding, Rope
from ropelab.scalings.base import Scaling

# Filled from the modules of this package: a new scaling is one file here and one `configs/scaling/NAME.yaml`.
SCALINGS: dict[str, type[Scaling]] = registered(__package__, Scaling)


def build(pos: Method, scaling: Method, geometry: Geometry) -> PositionEncoding:
    """The encoding that a configuration names, under its scaling with a resolved numeric factor.

    The parameters in the YAML are the keyword arguments of the class; it raises `ValueError` for a value out of
    range, and so does a scaling on an encoding that it does not apply to or whose spectrum it leaves as it was.
    """
    encoding = ENCODINGS[pos.name](geometry, **pos.parameters)
    if scaling.name == "none":
        return encoding
    applies_to = SCALINGS[scaling.name].applies_to
    if applies_to is not None and pos.name not in applies_to:
        allowed = ", ".join(f"pos={name}" for name in applies_to)
        raise ValueError(f"scaling={scaling.name} applies to {allowed}, not to pos={pos.name}")
    method = make_scaling(scaling, geometry.ctx)
    scaled = encoding.with_scaling(method)
    if method.spectral:
        assert isinstance(scaled, Rope)
        for ctx in (1, method.original_ctx, 2 * method.original_ctx):
            # what is out of range is refused before anything is written, and so is a name for what is plain RoPE
            used = scaled.spectrum(ctx)
            same = used.attention_factor == 1 and used.inv_freq.equal(scaled.inv_freq())
            if same and not method.is_identity(ctx):
                raise ValueError(
                    f"scaling={scaling.name} changes no pair of this model: all that turn are fast enough to be kept; "
                    "leave it out or choose another scaling"
                )
    return scaled


def make_scaling(scaling: Method, original_ctx: int) -> Scaling:
    """The scaling that a configuration names, with the original_ctx of its own, else the run's.

    `ValueError` for a parameter out of range.
    """
    assert isinstance(scaling.parameters.get("factor", 1.0), float), "resolve_factor comes first"
    own = scaling.parameters.get("original_ctx")
    return SCALINGS[scaling.name](**{**scaling.parameters, "original_ctx": own or original_ctx})


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
