"""FIRE: a small network of the distance, measured against how far the query can look back."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ropelab.positions.base import Geometry, PositionEncoding
from ropelab.positions.record import Positions

# Numbers in the hidden layer that are alive at once: on a CPU they stay in its cache (1 MiB; 11 times faster than 64
# MiB), elsewhere few launches count (256 MiB).
CHUNK = {"cpu": 2**18}
CHUNK_ELSEWHERE = 2**26
# Query rows that share the pieces of one set of distances. More rows: more distances at which a knot lies between the
# first row and the last; fewer: more calls. On CPUs 128 and 256 are the fastest of 32 .. 1024 up to 2048 keys, and more
# keys hide the difference; elsewhere all rows at once, for few launches (not measured).
ROWS = {"cpu": 256}


class Pieces(NamedTuple):
    """A network of one ReLU layer as the piecewise linear function that it is, for n units and H heads.

    Right of p knots head h is slope[h, n - p] x + intercept[h, n - p].
    """

    knots: Tensor  # (n,) fp64, falling; +-inf: a unit that has none
    bend: Tensor  # (H, n) fp64, what the slope gains at a knot
    slope: Tensor  # (H, n + 1) fp64, from the rightmost piece to the leftmost
    intercept: Tensor  # (H, n + 1) fp64


class Fire(PositionEncoding):
    """f(psi(i - j) / psi(max(M, i))) is added to the score, psi(x) = log(|c x| + 1); Li et al. 2024 (2310.04418).

    f is a network 1-width-H with one ReLU layer; c is learned and starts at `c`. M = |threshold_factor x threshold|,
    with a learned factor that starts at 1: below M the distance is measured against M, not against the query's index.
    All of it is shared by the layers. `threshold` null is half the training length: the paper's listing starts M at
    512, Zheng et al.'s code (DAPE, 2405.14722) at 512 // 2 for a training length of 512. The network starts as
    torch.nn.Linear does there: with GPT-2's 0.02 its output and its gradients would be next to nothing.

    f is piecewise linear. Without gradients the bias of a block of consecutive queries and keys comes from the pieces,
    the same numbers up to rounding; in training it comes from the network.
    """

    name = "fire"

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
        self.pairwise_numbers = width

    def init_parameter(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
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
            divisor = self._psi(longest) + self.eps  # (Q, 1)
            learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
            diagonals = None if learning else _diagonals(distance.float())
            if diagonals is not None:
                return self._by_pieces(divisor, diagonals)
            share = self._psi(distance.float()) / divisor  # (Q, K), 0 .. 1
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

    def pieces(self) -> Pieces:
        """The network's pieces from its weights as they are now, computed on the CPU: 0.2 ms at width 32."""
        a, b = (p.detach().to("cpu", torch.float64).flatten() for p in (self.hidden.weight, self.hidden.bias))  # (n,)
        v, shift = (p.detach().to("cpu", torch.float64) for p in (self.output.weight, self.output.bias))  # (H, n), (H,)
        knots, order = torch.nan_to_num(-b / a, nan=math.inf, posinf=math.inf, neginf=-math.inf).sort(descending=True)
        # left of all knots the units with a < 0 are on; masks multiply, so that a NaN stays one
        leftmost = v @ a.clamp(max=0), shift + v @ (b * (a < 0) + b.relu() * (a == 0))
        # at its knot a unit with a > 0 adds v (a x + b), one with a < 0 stops doing so
        changes = (v * a.abs())[:, order], (v * (b * a.sign()))[:, order]
        slope, intercept = (
            torch.cat((change, start[:, None]), dim=1).flip(1).cumsum(1).flip(1)
            for start, change in zip(leftmost, changes, strict=True)
        )
        return Pieces(knots, changes[0], slope, intercept)

    def _by_pieces(self, divisor: Tensor, diagonals: Tensor) -> Tensor:
        """Divisor (Q, 1), the distance by diagonal (Q + K - 1,), falling -> (H, Q, K) fp32.

        Within some rows a distance has one piece, unless x passes a knot between the smallest and the largest divisor.
        What has one piece is slope psi / divisor + intercept, two vectors by diagonal and a factor by row; where x
        passes a knot, the bend is added right of it. Rows of the result are written shifted by one number each: column
        d of the shifted view is diagonal d in every row. What stands over falls into a margin between the rows.
        """
        total, device = divisor.shape[0], divisor.device
        keys = diagonals.shape[0] - total + 1
        knots, bend, slope, intercept = (part.to(device, torch.float32) for part in self.pieces())
        heads, psi = bend.shape[0], self._psi(diagonals)  # (Q + K - 1,)
        group = min(total, ROWS.get(device.type, total))
        margin = group - 1
        wide = margin + keys
        flat = torch.empty(heads * total * wide + margin, device=device)
        for start in range(0, total, group):
            rows = min(group, total - start)
            last = total - start - rows  # the first diagonal of the last row; each row above begins one later
            part = psi[last : last + rows - 1 + keys]  # (N,), N = rows - 1 + K
            span = divisor[start : start + rows]  # (rows, 1)
            # (2, n): so many diagonals are right of a knot in all rows; in any row
            reach = torch.stack((span.max(), span.min()))[:, None] * knots
            ends = torch.searchsorted(-part, -reach, right=True)
            sizes = ends[0].diff(prepend=ends.new_zeros(1), append=ends.new_tensor([len(part)]))  # (n + 1,)
            steep, level = (t.repeat_interleave(sizes, dim=1, output_size=len(part)) for t in (slope, intercept))
            # (H, rows, N), entry [h, r, d] is the bias of row start + r and its key d + r - (rows - 1)
            begin = start * wide + margin - (rows - 1)
            shifted = flat.as_strided((heads, rows, len(part)), (total * wide, wide + 1, 1), begin)
            inverse = 1 / span
            torch.addcmul(level[:, None], (steep * part)[:, None], inverse, out=shifted)
            for unit, (low, high) in enumerate(zip(*ends.tolist(), strict=True)):
                if low < high:
                    beyond = (part[low:high] * inverse).sub_(knots[unit]).relu_()  # (rows, high - low)
                    shifted[:, :, low:high].addcmul_(bend[:, unit, None, None], beyond)
        # (H x Q x wide,) -> (H, Q, wide) -> (H, Q, K)
        return flat[: heads * total * wide].view(heads, total, wide)[:, :, margin:]


def _diagonals(distance: Tensor) -> Tensor | None:
    """Distance (Q, K) -> its vector by diagonal, (Q + K - 1,): entry [k - q + Q - 1] for row q and column k.

    None where a diagonal has several distances, or where they do not fall along a row, to 0 at the least.
    """
    vector = torch.cat((distance[1:, 0].flip(0), distance[0]))
    falling = bool((vector.diff(append=vector.new_zeros(1)) <= 0).all())
    return vector if falling and torch.equal(distance[1:, 1:], distance[:-1, :-1]) else None
