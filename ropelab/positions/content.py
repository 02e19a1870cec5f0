"""What the content-dependent encodings share: per-layer projections in fp32 and the cumulative sum of their steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ropelab.positions.base import Geometry, PositionEncoding
from ropelab.positions.record import Positions


class ContentDependent(PositionEncoding):
    """Base of the biases computed from the text: a subclass implements `content_bias`."""

    content_dependent = True

    def record(self, positions: Tensor, *, ctx: int) -> Positions:
        return Positions()


def per_layer(geometry: Geometry, *, bias: float | None) -> nn.ModuleList:
    """One projection (C) -> (H) for every layer; its bias starts at a number, or there is none. Weights N(0, 0.02)."""
    layers = nn.ModuleList(
        nn.Linear(geometry.d_model, geometry.n_head, bias=bias is not None) for _ in range(geometry.n_layer)
    )
    if bias is not None:
        for layer in layers:
            nn.init.constant_(layer.bias, bias)  # type: ignore[arg-type]
    return layers


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """x (B, T, C) of any type -> (B, T, H) fp32, also inside a region of automatic mixed precision."""
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = layer(x.float())
        return out


def cumulative_sum(steps: Tensor) -> Tensor:
    """Steps (B, T, H) fp32 >= 0 -> their sum up to and with each token, (B, H, T) fp64; fp32 on MPS, which has no fp64.

    Scores see differences of it: in fp32 those of neighbours would be lost in a sum of many tokens.
    """
    wide = torch.float32 if steps.device.type == "mps" else torch.float64
    return steps.transpose(1, 2).to(wide).cumsum(dim=-1)
