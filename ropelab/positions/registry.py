"""The table of encodings, by name."""

from __future__ import annotations

import torch

from ropelab.config import Method, ModelConfig
from ropelab.plugins import registered
from ropelab.positions.base import Geometry, PositionEncoding

# Filled from the modules of this package: a new encoding is one file here and one `configs/pos/NAME.yaml`.
ENCODINGS: dict[str, type[PositionEncoding]] = registered(__package__, PositionEncoding)


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
