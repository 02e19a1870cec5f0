"""Position encodings: the tables of names, and how one is built from a configuration."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from ropelab.positions import changes
from ropelab.positions import scaling as spectra
from ropelab.positions.alibi import Alibi
from ropelab.positions.base import Decay, Far, Geometry, PositionEncoding, Positions, QueryBias, Rotation
from ropelab.positions.cable import Cable
from ropelab.positions.drope import Drope
from ropelab.positions.fire import Fire
from ropelab.positions.fox import Fox
from ropelab.positions.kerple import KerpleLog, KerplePower
from ropelab.positions.learned import Learned
from ropelab.positions.none import NoPositions
from ropelab.positions.p_rope import PRope
from ropelab.positions.rope import Rope
from ropelab.positions.sandwich import Sandwich
from ropelab.positions.scaling import Scaling
from ropelab.positions.sinusoidal import Sinusoidal, SinusoidalFairseq, SinusoidalQK, SinusoidalScaled
from ropelab.positions.t5 import T5
from ropelab.positions.xpos import Xpos
from ropelab.schema import Method, ModelConfig

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
    "learned_numbers",
    "resolve_factor",
]

# The explicit tables of names: a new encoding is one file here, one line in this table, one `configs/pos/NAME.yaml`.
ENCODINGS: dict[str, type[PositionEncoding]] = {
    "none": NoPositions,
    "sinusoidal": Sinusoidal,
    "sinusoidal_fairseq": SinusoidalFairseq,
    "sinusoidal_scaled": SinusoidalScaled,
    "sinusoidal_qk": SinusoidalQK,
    "learned": Learned,
    "alibi": Alibi,
    "t5": T5,
    "kerple_log": KerpleLog,
    "kerple_power": KerplePower,
    "sandwich": Sandwich,
    "fire": Fire,
    "cable": Cable,
    "fox": Fox,
    "rope": Rope,
    "p_rope": PRope,
    "xpos": Xpos,
    "drope": Drope,
}

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
    "rerope": Scaling(changes.rerope, spectral=False, evaluation_only=True, idle=changes.rerope_idle),
    "self_extend": Scaling(changes.self_extend, spectral=False, evaluation_only=True, idle=changes.self_extend_idle),
    "temperature": Scaling(changes.temperature, ("none", "drope"), spectral=False, idle=changes.temperature_idle),
    "interpolated_slopes": Scaling(changes.interpolated_slopes, ("alibi",), spectral=False),
    "block_causal": Scaling(changes.block_causal, None, spectral=False, idle=changes.block_causal_idle),
    "clamp": Scaling(changes.clamp, ("learned",), spectral=False, idle=spectra.inside),
    "interpolate": Scaling(changes.interpolate, ("learned",), spectral=False),
}


def learned_numbers(pos: Method, model: ModelConfig, ctx: int) -> tuple[int, int]:
    """What an encoding learns, and keeps for each pair of tokens in training: numbers, counted without making them.

    `ctx` is the length that its tables are for. `ValueError` as `build`.
    """

    def of(n_layer: int) -> tuple[int, int]:
        try:
            with torch.device("meta"):
                encoding = ENCODINGS[pos.name](Geometry(model.d_model, model.n_head, ctx, n_layer), **pos.parameters)
        except (RuntimeError, OverflowError):  # a tensor whose size needs more than 64 bits
            return 2**64, 0
        return sum(parameter.numel() for parameter in encoding.parameters()), encoding.pairwise_numbers

    (one, pairs), (two, _) = of(1), of(2)
    return one + (model.n_layer - 1) * (two - one), pairs


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
