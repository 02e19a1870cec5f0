"""xPos: RoPE whose scores fall with distance, fast pairs faster than slow ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ropelab.errors import ContextLengthError
from ropelab.positions.base import Geometry
from ropelab.positions.record import Positions, Rotation
from ropelab.positions.rope import Rope

# What the size of a query's pair times that of a key's may come to. With the growth of the factors below the largest
# fp32 number divided by this, no score overflows, not even of a key in the masked future, where the factors grow.
HEADROOM = 2.0**12


class Xpos(Rope):
    """Sun et al. 2022 (2212.10554): pair i of the score of query m and key n is RoPE's times a decay.

    The decay is zeta_i^((m - n) / scale_base), zeta_i = (2i/d + gamma) / (1 + gamma); queries are multiplied by
    zeta_i^((m - centre) / scale_base), keys by its inverse. The centre, half the sequence, cancels in exact arithmetic
    and keeps the factors near 1; so the record at a position depends on ctx. Factors are formed in fp64 and stored in
    fp32 (microsoft/torchscale, xpos_relative_position.py, whose layout is interleaved).

    `ContextLengthError` beyond `longest` tokens, where a query before a distant key would overflow fp32.
    """

    name = "xpos"

    any_positions = False
    length_dependent = True

    def __init__(self, geometry: Geometry, *, base: float, layout: str, gamma: float, scale_base: float) -> None:
        super().__init__(geometry, base=base, layout=layout, fraction=1.0)
        if not (math.isfinite(gamma) and gamma > 0):
            raise ValueError(f"pos.gamma must be > 0, not {gamma}")
        if not (math.isfinite(scale_base) and scale_base > 0):
            raise ValueError(f"pos.scale_base must be > 0, not {scale_base}")
        self.gamma = gamma
        self.scale_base = scale_base

    def zeta(self) -> Tensor:
        """CumulativeDecay of every pair per scale_base tokens, (d/2,) fp64 in (0, 1), fast pairs first."""
        share = torch.arange(0, self.rotated, 2, dtype=torch.float64) / self.rotated
        return (share + self.gamma) / (1 + self.gamma)

    @property
    def longest(self) -> int:
        """The longest sequence whose scores stay finite: the factors' product grows to zeta_0^(-(ctx-1)/scale_base)."""
        room = math.log(torch.finfo(torch.float32).max / HEADROOM)
        growth = math.log((1 + self.gamma) / self.gamma) / self.scale_base  # of the fastest pair, per token
        return 1 + math.floor(room / growth)

    def record(self, positions: Tensor, *, ctx: int) -> Positions:
        if ctx > self.longest:
            raise ContextLengthError(
                f"xpos at pos.gamma={self.gamma}, pos.scale_base={self.scale_base} leaves the range of fp32 beyond "
                f"{self.longest} tokens: ctx {self.longest} is the longest that works"
            )
        exponents = (positions.cpu().double() - ctx // 2)[:, None] / self.scale_base  # (T, 1)
        scale = self.zeta() ** exponents  # (T, d/2) fp64
        angles = self.angles(positions, self.spectrum(ctx))  # (T, d/2) fp64
        cos, sin = angles.cos(), angles.sin()
        parts = (cos * scale, sin * scale, cos / scale, sin / scale)
        cos_q, sin_q, cos_k, sin_k = (part.float().to(positions.device) for part in parts)
        return Positions(rotation=Rotation(cos_q, sin_q, cos_k, sin_k, self.interleaved))
