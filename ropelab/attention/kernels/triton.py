"""Own fused kernels in Triton, on CUDA: three kinds of bias."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ropelab.attention import row_bands
from ropelab.attention.kernels.base import Kernel
from ropelab.attention.scores import Request, Scores

# Longest T at which a bias by query is made in full, once for all layers, and not in each: at 8192 tokens 1.7 GB with
# 12 heads, beside twice as much while the gradients of two layers are added.
SHARED = 8192
HELD = 2**27  # numbers of a bias by query that are made at a time where each layer makes its own: 512 MB


def has_triton() -> bool:
    """Is Triton installed, as it is with torch's CUDA builds?"""
    return importlib.util.find_spec("triton") is not None


class _Triton(Kernel):
    summary = "own fused kernels, forward and backward: a bias by distance, by query or read off the text"

    @classmethod
    def suits(cls, request: Request) -> bool:
        return request.device.type == "cuda" and has_triton()


class TritonByDistance(_Triton):
    """A bias by distance, a window, or both."""

    name = "triton"
    priority = 50

    @classmethod
    def supports(cls, request: Request) -> bool:
        return not request.bias.pairwise

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, far: tuple[Tensor, Tensor] | None, decay: Any) -> Tensor:
        from ropelab.attention.triton_kernels import attend_by_distance

        vector = self.scores.by_distance.expand(q.shape[1], -1)  # (H, T)
        return attend_by_distance(q, k, v, vector, window=self.request.bias.window)


class TritonDecay(_Triton):
    """A bias computed from the text."""

    name = "triton"
    priority = 50

    @classmethod
    def supports(cls, request: Request) -> bool:
        return request.bias.only("decays")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, far: tuple[Tensor, Tensor] | None, decay: Any) -> Tensor:
        from ropelab.attention.triton_kernels import attend_with_decays

        return attend_with_decays(q, k, v, decay.cumsum, decay.gate, window=self.request.bias.window)


class TritonByQuery(_Triton):
    """A bias of the query's index and the distance, in bands: those of all layers, or of some queries at a time."""

    name = "triton"
    priority = 50

    @classmethod
    def supports(cls, request: Request) -> bool:
        return request.bias.only("by_query")

    @classmethod
    def suits(cls, request: Request) -> bool:
        return request.training and super().suits(request)

    def __init__(self, request: Request, scores: Scores) -> None:
        super().__init__(request, scores)
        self.bands = self._bands(0, request.length, again=True) if request.length <= SHARED else None  # (H, N)

    def _bands(self, start: int, stop: int, *, again: bool) -> Tensor:
        by_query = self.request.bias.by_query
        assert by_query is not None
        return row_bands.make(by_query, start, stop, device=self.request.device, again=again)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, far: tuple[Tensor, Tensor] | None, decay: Any) -> Tensor:
        from ropelab.attention.triton_kernels import attend_by_query

        window, length = self.request.bias.window, self.request.length
        if self.bands is not None:
            return attend_by_query(q, k, v, self.bands, window=window)

        def attended(start: int, stop: int) -> Tensor:
            part = q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]
            return attend_by_query(*part, self._bands(start, stop, again=False), window=window)

        rows = max(row_bands.BAND, HELD // (q.shape[1] * length) // row_bands.BAND * row_bands.BAND)
        parts = [
            checkpoint(attended, start, min(start + rows, length), use_reentrant=False, preserve_rng_state=False)
            for start in range(0, length, rows)
        ]
        return torch.cat(parts, dim=2)
