"""DroPE: a rotary model whose rotation is dropped for the last part of its training."""

from __future__ import annotations

from torch import Tensor

from ropelab.positions.base import Geometry
from ropelab.positions.record import Positions
from ropelab.positions.rope import Rope


class Drope(Rope):
    """RoPE for the share `drop_after` of the training, then no positions at all, in training as in evaluation.

    Gelberg et al. 2025 (2512.12167), section 4: recalibration without positions at the original length. 0 drops the
    rotation at once, which is how a finished RoPE run is recalibrated: `ropelab train --from RUN --pos drope`.
    """

    name = "drope"

    def __init__(self, geometry: Geometry, *, base: float, layout: str, fraction: float, drop_after: float) -> None:
        super().__init__(geometry, base=base, layout=layout, fraction=fraction)
        if not 0 <= drop_after < 1:
            raise ValueError(f"pos.drop_after must be in [0, 1), the share of the training, not {drop_after}")
        self.drop_after = drop_after
        self.dropped = drop_after == 0

    def set_training_fraction(self, done: float) -> bool:
        before, self.dropped = self.dropped, done >= self.drop_after
        return self.dropped != before

    def record(self, positions: Tensor, *, ctx: int) -> Positions:
        return Positions() if self.dropped else super().record(positions, ctx=ctx)
