"""FoX: a forget gate in attention."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ropelab.positions.base import Decay, Geometry
from ropelab.positions.content import ReadsContent, per_layer, project, running_total


class Fox(ReadsContent):
    """Lin et al. 2025 (2503.02130): the score gets the sum of log f_t over the tokens t = j+1 .. i.

    f_t = sigmoid(w x_t + b) per head and layer, x the layer's normalised input. b starts at `bias`: 0 in the authors'
    code (zhixuan-lin/forgetting-transformer), so that a gate starts by halving and learns to remember; x-transformers
    starts at 5. Without rotary positions, which is the paper's own choice.
    """

    def __init__(self, geometry: Geometry, *, bias: float) -> None:
        super().__init__()
        self.gates = per_layer(geometry, bias=bias)

    def content(self, layer: int, x: Tensor) -> Decay:
        # -log sigmoid(z) = softplus(-z) >= 0
        return Decay(running_total(F.softplus(-project(self.gates[layer], x))))
