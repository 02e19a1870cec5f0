"""Blocks of queries: what serves every bias that a mask can hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ropelab.attention import by_distance, scores
from ropelab.attention.kernels.base import Kernel
from ropelab.attention.kernels.chunked_recompute import chunked_recompute
from ropelab.attention.scores import Request


class Chunked(Kernel):
    """torch's fused attention, the mask of a block made when it is needed: of a bias by distance as a view."""

    name = "blocks"
    summary = "torch's fused attention by blocks of queries, the bias of a block made when it is needed"
    priority = 10

    @classmethod
    def supports(cls, request: Request) -> bool:
        return not request.bias.scored

    @classmethod
    def suits(cls, request: Request) -> bool:
        return True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, far: tuple[Tensor, Tensor] | None, decay: Any) -> Tensor:
        if not self.request.bias.pairwise:
            kernel = chunked_recompute if torch.is_grad_enabled() else by_distance.blocks
            return kernel(q, k, v, self.scores.by_distance, window=self.request.bias.window, rows=scores.BLOCK)

        def attended(start: int, stop: int, first: int) -> Tensor:
            mask = self.scores.mask(start, stop, first, decay)
            return by_distance.fused(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], mask)

        return self.scores.by_blocks(q, v, attended)
