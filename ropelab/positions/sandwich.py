"""Sandwich: the inner products of sinusoidal embeddings as a bias by distance."""

from __future__ import annotations

import torch
from torch import Tensor

from ropelab.positions.base import Geometry, PositionEncoding
from ropelab.positions.record import Positions

BASE = 10000.0  # of the sinusoids


class Sandwich(PositionEncoding):
    """(sum_k cos((i - j) 10000^(-2k/d)) - d/2) / (8h/H) is added to the score of head h = 1..H, k = 1..d/2.

    Chi et al. 2023 (2212.10356), as in NVIDIA NeMo (sandwich_relative_position_embedding.py): two sinusoidal embeddings
    of dimension d have this inner product, a function of their distance that falls roughly like its logarithm; it is 0
    at distance 0 and negative beyond. d is a free number that sets the depth of the bias; NeMo takes the head
    dimension. Nothing is learned.
    """

    name = "sandwich"

    def __init__(self, geometry: Geometry, *, d: int) -> None:
        super().__init__()
        if not 2 <= d <= 2**16 or d % 2:
            raise ValueError(f"pos.d must be even and from 2 to {2**16}, not {d}")
        self.n_head = geometry.n_head
        self.d = d

    def record(self, positions: Tensor, *, ctx: int) -> Positions:
        distance = torch.arange(positions.shape[0], dtype=torch.float64)
        total = torch.full_like(distance, -self.d / 2)  # (T,) fp64
        for k in range(1, self.d // 2 + 1):  # one frequency at a time: (T, d/2) would be large at long lengths
            total += (distance * BASE ** (-2 * k / self.d)).cos()
        compression = 8 * torch.arange(1, self.n_head + 1, dtype=torch.float64) / self.n_head  # (H,)
        return Positions(bias=(total / compression[:, None]).float().to(positions.device))  # (H, T)
