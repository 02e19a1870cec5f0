"""p-RoPE: RoPE without its slowest frequencies."""

from __future__ import annotations

from torch import Tensor

from ropelab.positions.base import Geometry
from ropelab.positions.rope import Rope


class PRope(Rope):
    """The int(p d/2) fastest pairs of RoPE's spectrum, d the head dimension; the others do not turn.

    Barbero et al. 2025 (2410.06205), appendix D: p = 1 is RoPE, p = 0 no positions. Not partial rotary
    (`pos.fraction` of rope), which spreads the whole spectrum over fewer pairs. `proportional` in transformers.
    """

    name = "p_rope"

    def __init__(self, geometry: Geometry, *, base: float, layout: str, p: float) -> None:
        super().__init__(geometry, base=base, layout=layout, fraction=1.0)
        if not 0 <= p <= 1:
            raise ValueError(f"pos.p must be in [0, 1], the share of pairs that turn, not {p}")
        self.turning = int(p * geometry.d_head / 2)
        if p > 0 and self.turning == 0:
            raise ValueError(f"pos.p={p} of a head dimension of {geometry.d_head} turns no pair; pos.p=0.0 says that")

    def inv_freq(self) -> Tensor:
        spectrum = super().inv_freq()
        spectrum[self.turning :] = 0
        return spectrum
