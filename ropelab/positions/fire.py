"""FIRE: a small network of the distance, measured against how far the query can look back."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ropelab.positions.base import Geometry, PositionEncoding, Positions

# Numbers in the hidden layer that are alive at once: on a CPU they stay in its cache (1 MiB; 11 times faster than 64
# MiB), elsewhere few launches count (256 MiB).
CHUNK = {"cpu": 2**18}
CHUNK_ELSEWHERE = 2**26


class Fire(PositionEncoding):
    """f(psi(i - j) / psi(max(M, i))) is added to the score, psi(x) = log(|c x| + 1); Li et al. 2024 (2310.04418).

    f is a network 1-width-H with one ReLU layer; c is learned and starts at `c`. M = |threshold_factor x threshold|,
    with a learned factor that starts at 1: below M the distance is measured against M, not against the query's index.
    All of it is shared by the layers. `threshold` null is half the training length: the paper's listing starts M at
    512, Zheng et al.'s code (DAPE, 2405.14722) at 512 // 2 for a training length of 512. The network starts as
    torch.nn.Linear does there: with GPT-2's 0.02 its output and its gradients would be next to nothing.
    """

    def __init__(self, geometry: Geometry, *, width: int, c: float, threshold: int | None, eps: float) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"pos.width must be >= 1, not {width}")
        if not (math.isfinite(c) and c > 0):
            raise ValueError(f"pos.c must be > 0, not {c}")
        if threshold is not None and threshold < 1:
            raise ValueError(f"pos.threshold must be >= 1, or null for half of train.ctx, not {threshold}")
        if not 0 < eps < 1:
            raise ValueError(f"pos.eps must be in (0, 1), not {eps}")
        self.threshold = geometry.ctx // 2 if threshold is None else threshold
        self.eps = eps
        self.c = nn.Parameter(torch.tensor(c))
        self.threshold_factor = nn.Parameter(torch.tensor(1.0))
        self.hidden = nn.Linear(1, width)
        self.output = nn.Linear(width, geometry.n_head)

    def draw(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        if name in ("c", "threshold_factor"):
            return None
        inputs = 1 if name.startswith("hidden") else self.output.in_features
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(inputs)  # uniform, as torch.nn.Linear

    def record(self, positions: Tensor, *, ctx: int) -> Positions:
        return Positions(query_bias=self.bias)

    def bias(self, query: Tensor, distance: Tensor) -> Tensor:
        """Query index (Q, 1), distance (Q, K) -> (H, Q, K) fp32."""
        with torch.autocast(distance.device.type, enabled=False):
            longest = torch.maximum(query.float(), (self.threshold_factor * self.threshold).abs())  # (Q, 1)
            share = self._psi(distance.float()) / (self._psi(longest) + self.eps)  # (Q, K), 0 .. 1
            chunk = CHUNK.get(distance.device.type, CHUNK_ELSEWHERE)
            rows = max(1, chunk // (self.hidden.out_features * distance.shape[1]))
            parts = [self._network(part) for part in torch.split(share, rows)]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _psi(self, x: Tensor) -> Tensor:
        return torch.log1p((self.c * x).abs())

    def _network(self, x: Tensor) -> Tensor:
        """x (Q, K) -> (H, Q, K). Hidden units come first, so that heads do too without a copy."""
        # (1, QK) -> (width, QK) -> (H, QK)
        hidden = torch.addmm(self.hidden.bias[:, None], self.hidden.weight, x.reshape(1, -1)).relu_()
        out = torch.addmm(self.output.bias[:, None], self.output.weight, hidden)
        return out.view(-1, *x.shape)
