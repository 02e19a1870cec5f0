"""T5's relative bias: one learned number per head and bucket of distances."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ropelab.positions.base import Geometry, PositionEncoding
from ropelab.positions.record import Positions


def bucket(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Bucket 0 .. buckets-1 of distances (T,) int64 >= 0, on the CPU: (T,) int64. Causal form of Raffel et al. 2020.

    Half of the buckets hold one distance each, the others grow geometrically up to max_distance; whatever is farther
    shares the last one. In fp32, operation by operation as in T5's own code: a distance that lies exactly on a border
    falls where the rounding of fp32 puts it.
    """
    exact = buckets // 2
    grown = torch.log(distance.float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    # distance 0 has log -inf, and its branch is not taken
    far = (exact + grown.clamp(min=0).long()).clamp(max=buckets - 1)
    return torch.where(distance < exact, distance, far)


class T5(PositionEncoding):
    """scale x table[bucket(i - j), head] is added to the score; Raffel et al. 2020 (1910.10683), section 2.1.

    T5 does not divide scores by sqrt(d_head), a GPT does: `scale` says how large the table's numbers are beside such
    scores. 1 adds them as they are; x-transformers and KERPLE's code multiply the table by sqrt(d_head). The table
    is shared by all layers, as in T5, and starts at 0: no preference.
    """

    name = "t5"
    unlimited = "training met every bucket of distances: no prediction"

    def __init__(self, geometry: Geometry, *, buckets: int, max_distance: int, scale: float) -> None:
        super().__init__()
        if buckets < 2:
            raise ValueError(f"pos.buckets must be >= 2, not {buckets}")
        if max_distance <= buckets // 2:
            raise ValueError(f"pos.max_distance must be > pos.buckets // 2 = {buckets // 2}, not {max_distance}")
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"pos.scale must be > 0, not {scale}")
        self.buckets = buckets
        self.max_distance = max_distance
        self.scale = scale
        self.table = nn.Parameter(torch.zeros(buckets, geometry.n_head))

    def init_parameter(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        return torch.zeros(shape)

    def record(self, positions: Tensor, *, ctx: int) -> Positions:
        rows = bucket(torch.arange(positions.shape[0]), self.buckets, self.max_distance).to(self.table.device)
        return Positions(bias=(self.table[rows] * self.scale).t().contiguous())  # (T, H) -> (H, T)

    def unmet(self, ctx: int, trained: int) -> str | None:
        reached = bucket(torch.tensor([trained - 1, ctx - 1]), self.buckets, self.max_distance)
        return "distances fall into a bucket that training never reached" if reached[1] > reached[0] else None
