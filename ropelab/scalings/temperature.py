"""A temperature on the scores of a model without positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ropelab.positions import PositionEncoding, Positions
from ropelab.scalings.base import Scaling


@dataclass(frozen=True, kw_only=True)
class Temperature(Scaling):
    """Scores multiplied by 1 + a ln s, so that attention stays as sharp over more keys.

    Gelberg et al. 2025 (2512.12167) fit a = 0.412 to a model trained from scratch and 0.103 to SmolLM; Wang et al. 2024
    (2404.12224) tune one such scale for NoPE.
    """

    name = "temperature"
    of_scores = True

    factor: float
    a: float

    def __post_init__(self) -> None:
        if not 0 <= self.a < math.inf:
            raise ValueError(f"scaling.a must be >= 0, not {self.a}")

    def is_identity(self, ctx: int) -> bool:
        return self.factor == 1 or self.a == 0

    def record(self, encoding: PositionEncoding, positions: Tensor, *, ctx: int) -> Positions:
        record, scale = encoding.record(positions, ctx=ctx), 1 + self.a * math.log(self.factor)
        if scale == 1:
            return record
        return record._replace(logit_scale=torch.full((ctx,), scale, dtype=torch.float32, device=positions.device))
