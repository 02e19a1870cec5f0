"""Learned absolute positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ropelab.errors import ContextLengthError
from ropelab.positions.base import Geometry, PositionEncoding
from ropelab.positions.record import Positions


class Learned(PositionEncoding):
    """One trained vector per position, added to the tokens (Gehring et al. 2017; GPT-2).

    The table has as many rows as the training length. Past its end the encoding is undefined: clamping, wrapping or
    untrained rows would each be another experiment, so asking for them is a `ContextLengthError`, unless
    `scaling=clamp` or `scaling=interpolate` says which experiment it is.
    """

    name = "learned"

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(geometry.ctx, geometry.d_model))  # (L, C), drawn by the model's init

    def record(self, positions: Tensor, *, ctx: int) -> Positions:
        rows = self.table.shape[0]
        if ctx > rows:
            raise ContextLengthError(
                f"learned positions end at {rows}, the training length: use a ctx up to it, or evaluate with "
                "--scaling clamp or --scaling interpolate"
            )
        return Positions(embedding=self.table[positions])
