"""What an encoding has to say: positions in, a record of tensors out.

An encoding computes everything once per forward pass; the model knows only the record. Letters of the shapes:
T positions, C model width, H heads, R rotated dimensions of a head.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Geometry(NamedTuple):
    """The sizes an encoding is built for."""

    d_model: int
    n_head: int
    ctx: int  # training length L: the size of a learned table, the reference length of a scaling

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_head


class Rotation(NamedTuple):
    """Cosines and sines of the rotary angles, an attention factor folded in; every tensor (T, R/2) fp32."""

    cos_q: Tensor
    sin_q: Tensor
    cos_k: Tensor
    sin_k: Tensor
    interleaved: bool = False  # pairs (2i, 2i+1) instead of (i, i + R/2)


class Positions(NamedTuple):
    """All that one encoding says about T positions. A field that it does not use is None."""

    embedding: Tensor | None = None  # (T, C) fp32, added to the token embeddings
    rotation: Rotation | None = None  # applied to the queries and keys of every layer
    bias: Tensor | None = None  # (H, T) fp32: bias[h, i - j] is added to the score of query i and key j


class PositionEncoding(nn.Module):
    """Base of all encodings. A parameter-free encoding owns no tensors: its `state_dict` is empty.

    `forward(positions, ctx=...)` takes positions (T,) int64 and the context length of the sequence they come from,
    and returns the record. It raises `ContextLengthError` where the encoding is undefined.
    """

    rotary: ClassVar[bool] = False  # can a spectral scaling be applied?
    length_dependent: bool = False  # does the record at a position depend on ctx?

    def forward(self, positions: Tensor, *, ctx: int) -> Positions:
        raise NotImplementedError

    def token_scale(self) -> float:
        """Factor on the token embeddings before anything is added."""
        return 1.0

    def token_std(self, d_model: int) -> float:
        """Standard deviation of the initial token table (GPT-2: 0.02)."""
        return 0.02


def distances(positions: Tensor) -> Tensor:
    """Distances 0..T-1 of T contiguous positions, (T,) fp32, on their device: what a bias is computed from."""
    return torch.arange(positions.shape[0], device=positions.device, dtype=torch.float32)
