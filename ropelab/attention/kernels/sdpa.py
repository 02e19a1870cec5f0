"""torch's fused causal attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ropelab.attention.kernels.base import Kernel
from ropelab.attention.scores import Request


class Sdpa(Kernel):
    """Nothing is added to the scores."""

    name = "sdpa"
    summary = "torch's fused causal attention: nothing is added to the scores"
    priority = 70

    @classmethod
    def supports(cls, request: Request) -> bool:
        return request.bias.plain

    @classmethod
    def suits(cls, request: Request) -> bool:
        return True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, far: tuple[Tensor, Tensor] | None, decay: Any) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)
