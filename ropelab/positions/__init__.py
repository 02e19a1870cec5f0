"""Position encodings: what each says about positions, and the table of names."""

from ropelab.positions.alibi import slopes
from ropelab.positions.base import STD, Decay, Far, Geometry, PositionEncoding, Positions, QueryBias, Rotation
from ropelab.positions.drope import Drope
from ropelab.positions.learned import Learned
from ropelab.positions.registry import ENCODINGS, learned_numbers
from ropelab.positions.rope import Rope, Spectrum
from ropelab.positions.sinusoidal import Sinusoidal, SinusoidalFairseq, SinusoidalQK
from ropelab.positions.t5 import T5, bucket
from ropelab.positions.xpos import Xpos

__all__ = [
    "ENCODINGS",
    "STD",
    "T5",
    "Decay",
    "Drope",
    "Far",
    "Geometry",
    "Learned",
    "PositionEncoding",
    "Positions",
    "QueryBias",
    "Rope",
    "Rotation",
    "Sinusoidal",
    "SinusoidalFairseq",
    "SinusoidalQK",
    "Spectrum",
    "Xpos",
    "bucket",
    "learned_numbers",
    "slopes",
]
