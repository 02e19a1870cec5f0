"""No position encoding (NoPE): the causal mask is the only order signal."""

from __future__ import annotations

from torch import Tensor

from ropelab.positions.base import Geometry, PositionEncoding
from ropelab.positions.record import Positions


class NoPositions(PositionEncoding):
    """Says nothing. Haviv et al. 2022 (2203.16634); Kazemnejad et al. 2023 (2305.19466)."""

    name = "none"

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()

    def record(self, positions: Tensor, *, ctx: int) -> Positions:
        return Positions()
