"""The table of encodings, by name."""

from __future__ import annotations

import torch

from ropelab.config import Method, ModelConfig
from ropelab.positions.alibi import Alibi
from ropelab.positions.base import Geometry, PositionEncoding
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
from ropelab.positions.sinusoidal import Sinusoidal, SinusoidalFairseq, SinusoidalQK, SinusoidalScaled
from ropelab.positions.t5 import T5
from ropelab.positions.xpos import Xpos

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
