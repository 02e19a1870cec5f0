"""Blocks of queries with their scores in full, from two pairs of queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ropelab.attention.kernels.base import Kernel
from ropelab.attention.scores import Request


class ChunkedTwoPass(Kernel):
    """Far keys are scored by a second pair of queries and keys; or scores have a cap."""

    name = "scores"
    summary = "blocks of queries with their scores in full: far keys by a second pair of queries and keys, or a cap"
    priority = 90

    @classmethod
    def supports(cls, request: Request) -> bool:
        return request.bias.scored

    @classmethod
    def suits(cls, request: Request) -> bool:
        return True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, far: tuple[Tensor, Tensor] | None, decay: Any) -> Tensor:
        def attended(start: int, stop: int, first: int) -> Tensor:
            weights = torch.softmax(self.scores.scores(q, k, start, stop, first, far, decay), dim=-1)
            return weights.to(v.dtype) @ v[:, :, first:stop]

        return self.scores.by_blocks(q, v, attended)
