"""A learned table past its end."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ropelab.errors import ContextLengthError
from ropelab.positions import Learned, PositionEncoding, Positions
from ropelab.scalings.base import Scaling


@dataclass(frozen=True, kw_only=True)
class Clamp(Scaling):
    """All positions past the end of a learned table read its last row."""

    name = "clamp"

    def is_identity(self, ctx: int) -> bool:
        return ctx <= self.original_ctx

    def record(self, encoding: PositionEncoding, positions: Tensor, *, ctx: int) -> Positions:
        assert isinstance(encoding, Learned)
        return Positions(embedding=encoding.table[positions.clamp(max=encoding.table.shape[0] - 1)])  # (N, C)


@dataclass(frozen=True, kw_only=True)
class Interpolate(Scaling):
    """A learned table stretched s times: position p reads the point p/s between its two nearest rows.

    The linear resampling that vision transformers use when they change resolution (Dosovitskiy et al. 2021,
    2010.11929, section 3.2). The last s - 1 positions lie past the last row and read it as it is. Beyond s L positions
    a `ContextLengthError`.
    """

    name = "interpolate"

    factor: float

    def is_identity(self, ctx: int) -> bool:
        return self.factor == 1

    def record(self, encoding: PositionEncoding, positions: Tensor, *, ctx: int) -> Positions:
        assert isinstance(encoding, Learned)
        table, factor = encoding.table, self.factor
        last = table.shape[0] - 1
        if ctx > factor * (last + 1):
            raise ContextLengthError(
                f"learned positions end at {last + 1}, interpolated by {factor:g} at {math.floor(factor * (last + 1))}"
            )
        if factor == 1:
            return Positions(embedding=table[positions])
        at = positions.double() / factor  # (N,), below L
        below = at.floor().long()
        weight = (at - below).to(table.dtype)[:, None]  # (N, 1), of the row above
        return Positions(embedding=table[below] * (1 - weight) + table[(below + 1).clamp(max=last)] * weight)  # (N, C)
