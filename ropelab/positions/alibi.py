"""ALiBi: attention with linear biases."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ropelab.positions.base import Geometry, PositionEncoding, distances
from ropelab.positions.record import Positions


def slopes(n_head: int) -> Tensor:
    """Slope of every head, (H,) fp32: Press et al. 2022 (2108.12409), section 3, and their code for other head counts.

    For H a power of two: 2^(-8h/H), h = 1..H. Otherwise, with c the power of two below H: the c slopes of c heads,
    then every other slope of 2c heads.
    """
    c = 2 ** math.floor(math.log2(n_head))
    exponents = [-8 * h / c for h in range(1, c + 1)] + [-8 * h / (2 * c) for h in range(1, 2 * c + 1, 2)][: n_head - c]
    return torch.tensor([2.0**e for e in exponents], dtype=torch.float32)


class Alibi(PositionEncoding):
    """Score of query i and key j lowered by slope x (i - j); Press et al. 2022 (2108.12409), section 3."""

    name = "alibi"

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.n_head = geometry.n_head

    def record(self, positions: Tensor, *, ctx: int) -> Positions:
        slope = slopes(self.n_head).to(positions.device)
        return Positions(bias=-slope[:, None] * distances(positions), slopes=slope)  # (H, T), (H,)
