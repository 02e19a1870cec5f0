"""ALiBi's slopes divided by the factor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ropelab.positions import PositionEncoding, Positions
from ropelab.scalings.base import Scaling


@dataclass(frozen=True, kw_only=True)
class InterpolatedSlopes(Scaling):
    """ALiBi's slopes divided by s, which is its bias at positions divided by s: Al-Khateeb et al. 2023 (2310.13017)."""

    name = "interpolated_slopes"

    factor: float

    def is_identity(self, ctx: int) -> bool:
        return self.factor == 1

    def record(self, encoding: PositionEncoding, positions: Tensor, *, ctx: int) -> Positions:
        record = encoding.record(positions, ctx=ctx)
        assert record.bias is not None
        assert record.slopes is not None
        return record._replace(bias=record.bias / self.factor, slopes=record.slopes / self.factor)
