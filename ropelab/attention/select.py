"""The one attention call of every layer, and the choice of the kernel behind it.

Shapes: B sequences, H heads, T tokens, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ropelab.attention.bias import Bias
from ropelab.attention.kernels import KERNELS, Kernel
from ropelab.attention.scores import Request, Scores


def choose_kernel(request: Request) -> type[Kernel]:
    """The kernel for a request: a fixed rule, never a timing."""
    return next(kernel for kernel in KERNELS if kernel.supports(request) and kernel.suits(request))


def kernel_named(name: str, request: Request) -> type[Kernel]:
    """The first kernel of a name that supports a request; `ValueError` where none does."""
    for kernel in KERNELS:
        if kernel.name == name and kernel.supports(request):
            return kernel
    raise ValueError(f"no kernel '{name}' computes attention with this bias")


class Attend:
    """Causal attention over T tokens with the biases of one record, ready to be called by every layer.

    `dtype` is that of the products: bf16 under autocast, fp32 without. `kernel` names another than the chosen one.
    """

    def __init__(
        self,
        length: int,
        *,
        bias: Bias,
        device: torch.device,
        training: bool,
        dtype: torch.dtype = torch.float32,
        kernel: str | None = None,
    ) -> None:
        self.bias = bias.within(length)
        request = Request(length, self.bias, device, training, dtype)
        chosen = choose_kernel(request) if kernel is None else kernel_named(kernel, request)
        self.kernel = chosen.name
        self._scores = Scores(request)
        self._run = chosen(request, self._scores)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, far: tuple[Tensor, Tensor] | None = None, decay: Any = None
    ) -> Tensor:
        """q, k (B, H, T, D), v (B, H, T, E), in most kernels E = D -> (B, H, T, E).

        far: the queries and keys of the second score. decay: `cumsum` (B, H, T) and `gate` (B, H, T) or None.
        """
        assert (decay is not None) == self.bias.decays
        if self.bias.scale is not None:
            scale = self.bias.scale[:, None]  # (T, 1)
            q = (q * scale).to(v.dtype)
            far = None if far is None else ((far[0] * scale).to(v.dtype), far[1])
        return self._run(q, k, v, far=far, decay=decay)

    def weights(
        self, q: Tensor, k: Tensor, rows: range, *, far: tuple[Tensor, Tensor] | None = None, decay: Any = None
    ) -> Tensor:
        """The attention weights of a block of queries, (B, H, rows, rows.stop) fp32: q, k (B, H, T, D).

        They are those of the other calls, whatever the kernel, for who wants to look at them.
        """
        if self.bias.scale is not None:
            scale = self.bias.scale[:, None]  # (T, 1)
            q, far = q * scale, None if far is None else (far[0] * scale, far[1])
        return torch.softmax(self._scores.scores(q, k, rows.start, rows.stop, 0, far, decay), dim=-1)
