"""CABLE: ALiBi whose steps are computed from the text."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ropelab.positions.base import Geometry
from ropelab.positions.content import ContentDependent, cumulative_sum, per_layer, project
from ropelab.positions.record import CumulativeDecay

VARIANTS = ("v3", "released", "unweighted")


class Cable(ContentDependent):
    """Veisi et al. 2025 (2503.08067): the score of query i and key j falls by what the tokens j+1 .. i add up to.

    | variant      | step of a token         | weight of the query      |
    |--------------|-------------------------|--------------------------|
    | `v3`         | relu(x W_c)             | softplus(x W_s)          |
    | `unweighted` | relu(x W_c)             | 1 (CABLE_NW of v3)       |
    | `released`   | softplus(x W + b)       | 1 (axiomlab/Cable, v1)   |

    All of it per head and layer, x being the layer's normalised input. v3's projections have no bias, as its formulas
    are written; the released code's has one, which starts at 0. That code also leaves out the scores' 1/sqrt(d_head),
    which is kept here: it is no part of the encoding.
    """

    name = "cable"

    def __init__(self, geometry: Geometry, *, variant: str) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"pos.variant must be one of {', '.join(VARIANTS)}, not '{variant}'")
        self.released = variant == "released"
        self.steps = per_layer(geometry, bias=0.0 if self.released else None)
        self.weights = per_layer(geometry, bias=None) if variant == "v3" else None

    def content_bias(self, layer: int, x: Tensor) -> CumulativeDecay:
        steps = project(self.steps[layer], x)  # (B, T, H)
        cumsum = cumulative_sum(F.softplus(steps) if self.released else torch.relu(steps))
        if self.weights is None:
            return CumulativeDecay(cumsum)
        return CumulativeDecay(cumsum, F.softplus(project(self.weights[layer], x)).transpose(1, 2))
