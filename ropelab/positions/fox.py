"""FoX: a forget gate in attention."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ropelab.positions.base import Geometry
from ropelab.positions.content import ContentDependent, cumulative_sum, per_layer, project
from ropelab.positions.record import CumulativeDecay


class Fox(ContentDependent):
    """Lin et al. 2025 (2503.02130): the score gets the sum of log f_t over the tokens t = j+1 .. i.

    f_t = sigmoid(w x_t + b) per head and layer, x the layer's normalised input. b starts at `bias`: 0 in the authors'
    code (zhixuan-lin/forgetting-transformer), so that a gate starts by halving and learns to remember; x-transformers
    starts at 5. Without rotary positions, which is the paper's own choice.
    """

    name = "fox"

    def __init__(self, geometry: Geometry, *, bias: float) -> None:
        super().__init__()
        self.gates = per_layer(geometry, bias=bias)

    def content_bias(self, layer: int, x: Tensor) -> CumulativeDecay:
        # -log sigmoid(z) = softplus(-z) >= 0
        return CumulativeDecay(cumulative_sum(F.softplus(-project(self.gates[layer], x))))
