"""Sinusoidal embeddings, in the paper's layout and in fairseq's."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ropelab.positions.base import Geometry, PositionEncoding, Positions

RMS_OF_TABLE = math.sqrt(0.5)  # a row of sines and cosines has mean square 1/2


def _check(d_model: int, base: float) -> None:
    if d_model % 2:
        raise ValueError(f"sinusoidal positions need an even model.d_model, not {d_model}")
    if not base > 1:
        raise ValueError(f"pos.base must be > 1, not {base}")


class Sinusoidal(PositionEncoding):
    """Vaswani et al. 2017 (1706.03762), section 3.5: table[p, 2i] = sin(p base^(-2i/C)), table[p, 2i+1] = cos(...).

    The table is multiplied by one learned scalar, which starts where its rows have the root mean square of freshly
    drawn token embeddings (0.02): with the bare table (0.71) the text would be drowned at the start of training. The
    scalar is trained in the units of an embedding, so that it can grow as fast as the tokens do.
    """

    def __init__(self, geometry: Geometry, *, base: float) -> None:
        super().__init__()
        _check(geometry.d_model, base)
        self.d_model = geometry.d_model
        self.base = base
        self.scale = nn.Parameter(torch.tensor(self.token_std(geometry.d_model) / RMS_OF_TABLE))

    def table(self, positions: Tensor) -> Tensor:
        """The bare table, (T, C) fp32; angles in fp64."""
        k = torch.arange(0, self.d_model, 2, dtype=torch.float64)
        angles = positions.cpu().double()[:, None] * self.base ** (-k / self.d_model)  # (T, C/2)
        # (T, C/2, 2) -> (T, C): sine and cosine of a frequency side by side
        return torch.stack((angles.sin(), angles.cos()), dim=-1).reshape(len(positions), self.d_model).float()

    def record(self, positions: Tensor, *, ctx: int) -> Positions:
        return Positions(embedding=self.table(positions).to(self.scale.device) * self.scale)


class SinusoidalFairseq(PositionEncoding):
    """Sinusoidal as fairseq builds it and the ALiBi paper ran it (Press et al. 2022, 2108.12409, section 2.2).

    Sines then cosines, exponents k / (C/2 - 1), positions from 2 (padding index 1 comes before them), the tokens
    multiplied by sqrt(C) on an N(0, 1/C) table so that they have root mean square 1; the table is not scaled.
    """

    FIRST = 2

    def __init__(self, geometry: Geometry, *, base: float) -> None:
        super().__init__()
        _check(geometry.d_model, base)
        if geometry.d_model < 4:
            raise ValueError(f"sinusoidal_fairseq needs model.d_model >= 4, not {geometry.d_model}")
        self.d_model = geometry.d_model
        self.base = base

    def token_scale(self) -> float:
        return math.sqrt(self.d_model)

    def token_std(self, d_model: int) -> float:
        return float(d_model**-0.5)

    def table(self, positions: Tensor) -> Tensor:
        """The bare table, (T, C) fp32; angles in fp64."""
        half = self.d_model // 2
        k = torch.arange(half, dtype=torch.float64)
        angles = (positions.cpu().double() + self.FIRST)[:, None] * self.base ** (-k / (half - 1))  # (T, C/2)
        return torch.cat((angles.sin(), angles.cos()), dim=-1).float()

    def record(self, positions: Tensor, *, ctx: int) -> Positions:
        return Positions(embedding=self.table(positions).to(positions.device))
