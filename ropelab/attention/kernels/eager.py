"""Scores in full."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ropelab.attention.kernels.base import Kernel
from ropelab.attention.scores import Request, Scores, decay_bias

# Longest T at which scores in full make the fastest training step on a CPU: in bf16, and in fp32. Where the text
# decides the bias, the second holds for both; where it is left to dense blocks, which are slower, the first.
SHORT, SHORT_FP32 = 512, 128


class Eager(Kernel):
    """softmax(q k^T / sqrt(D) + mask) v, the mask made once for all layers but for what each computes from the text."""

    name = "materialised"
    summary = "scores in full: the fastest training step on a CPU at a short ctx"
    priority = 80

    @classmethod
    def supports(cls, request: Request) -> bool:
        return not request.bias.scored

    @classmethod
    def suits(cls, request: Request) -> bool:
        bias, content = request.bias, request.bias.only("decays")
        shared = bias.by_query is not None and not bias.decays  # one mask for all sequences and layers
        bf16 = request.dtype == torch.bfloat16
        short = SHORT if not content and (bf16 or (bias.pairwise and not shared)) else SHORT_FP32
        return request.training and request.device.type == "cpu" and request.length <= short

    def __init__(self, request: Request, scores: Scores) -> None:
        super().__init__(request, scores)
        mask = scores.mask(0, request.length, 0, None)  # (1, H or 1, T, T)
        if not (mask.requires_grad or request.bias.decays):
            mask = mask.to(request.dtype)  # a learned bias stays fp32, or its gradient would be summed in bf16
        self.mask = mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, far: tuple[Tensor, Tensor] | None, decay: Any) -> Tensor:
        mask = self.mask
        if decay is not None:  # a sum over the text outgrows what bf16 can tell apart
            mask = mask + decay_bias(decay.cumsum, decay.gate, 0, self.request.length, 0)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, T, T)
        return torch.softmax(scores + mask, dim=-1).to(v.dtype) @ v
