"""KERPLE: relative biases from conditionally positive definite kernels, two learned numbers per head."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ropelab.positions.base import Geometry, PositionEncoding, distances
from ropelab.positions.record import Positions


class _Kerple(PositionEncoding):
    """Two positive vectors r1, r2 (H,), shared by all layers; Chi et al. 2022 (2205.09921).

    Starts and bounds are those of the authors' code (chijames/KERPLE, megatron/mpu/layers.py). It moves the parameters
    back into their bounds before every forward pass; here that happens before every step, so that a value on its bound
    still has a gradient and can come back. The paper divides the bias by sqrt(d) with the scores; the code, and we, do
    not.
    """

    LOW: ClassVar[float] = 0.01
    HIGHEST_R2: ClassVar[float] = math.inf
    DRAWN_BELOW: ClassVar[tuple[float, float]]  # r1 and r2 start uniformly between 0 and these

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.r1 = nn.Parameter(torch.full((geometry.n_head,), self.DRAWN_BELOW[0] / 2))
        self.r2 = nn.Parameter(torch.full((geometry.n_head,), self.DRAWN_BELOW[1] / 2))

    def init_parameter(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        return torch.rand(shape, generator=generator) * self.DRAWN_BELOW[("r1", "r2").index(name)]

    @torch.no_grad()
    def set_training_fraction(self, done: float) -> bool:
        self.r1.clamp_(self.LOW)
        self.r2.clamp_(self.LOW, self.HIGHEST_R2)
        return False

    def bounded(self) -> tuple[Tensor, Tensor]:
        """r1 and r2 within their bounds, (H, 1) each."""
        return self.r1.clamp(self.LOW)[:, None], self.r2.clamp(self.LOW, self.HIGHEST_R2)[:, None]


class KerpleLog(_Kerple):
    """-r1 log(1 + r2 (i - j)) is added to the score."""

    name = "kerple_log"

    DRAWN_BELOW = (2.0, 1.0)

    def record(self, positions: Tensor, *, ctx: int) -> Positions:
        r1, r2 = self.bounded()
        return Positions(bias=-r1 * torch.log1p(r2 * distances(positions)))  # (H, T)


class KerplePower(_Kerple):
    """-r1 (i - j)^r2 is added to the score, r2 <= 2. ALiBi is r2 = 1 with fixed r1."""

    name = "kerple_power"

    HIGHEST_R2 = 2.0
    DRAWN_BELOW = (1.0, 2.0)

    def record(self, positions: Tensor, *, ctx: int) -> Positions:
        r1, r2 = self.bounded()
        return Positions(bias=-r1 * distances(positions).pow(r2))  # (H, T)
