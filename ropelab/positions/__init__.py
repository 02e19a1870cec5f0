"""Position encodings: the record that each makes of positions, and the table of names."""

from ropelab.positions.alibi import slopes
from ropelab.positions.base import STD, Geometry, PositionEncoding, ScalingLike
from ropelab.positions.drope import Drope
from ropelab.positions.learned import Learned
from ropelab.positions.record import (
    READ_BY,
    CumulativeDecay,
    Far,
    Positions,
    QueryBias,
    Reader,
    Rotation,
    Spectrum,
    encoding_digest,
)
from ropelab.positions.registry import ENCODINGS, learned_numbers
from ropelab.positions.rope import Rope
from ropelab.positions.sinusoidal import FixedTable, Sinusoidal
from ropelab.positions.t5 import T5, bucket
from ropelab.positions.xpos import Xpos

__all__ = [
    "ENCODINGS",
    "READ_BY",
    "STD",
    "T5",
    "CumulativeDecay",
    "Drope",
    "Far",
    "FixedTable",
    "Geometry",
    "Learned",
    "PositionEncoding",
    "Positions",
    "QueryBias",
    "Reader",
    "Rope",
    "Rotation",
    "ScalingLike",
    "Sinusoidal",
    "Spectrum",
    "Xpos",
    "bucket",
    "encoding_digest",
    "learned_numbers",
    "slopes",
]
