"""What an encoding has to say: positions in, a record of tensors out.

An encoding computes everything once per forward pass; the model knows only the record. Letters of the shapes:
B sequences, T positions, C model width, H heads, R rotated dimensions of a head. N positions are T, or B x T where
every sequence has positions of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ropelab.config import ModelConfig

STD = 0.02  # GPT-2's initial standard deviation


class Geometry(NamedTuple):
    """The sizes an encoding is built for."""

    d_model: int
    n_head: int
    ctx: int  # original_ctx: the length that tables and scalings refer to; train.ctx, of a fine-tuned run its root's
    n_layer: int = 1

    @classmethod
    def of(cls, model: ModelConfig, ctx: int) -> Geometry:
        return cls(model.d_model, model.n_head, ctx, model.n_layer)

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_head


class Rotation(NamedTuple):
    """Cosines and sines of the rotary angles, an attention factor folded in; every tensor (N, R/2) fp32."""

    cos_q: Tensor
    sin_q: Tensor
    cos_k: Tensor
    sin_k: Tensor
    interleaved: bool = False  # pairs (2i, 2i+1) instead of (i, i + R/2)

    def at(self, rows: slice) -> Rotation:
        """The angles of some positions."""
        return Rotation(self.cos_q[rows], self.sin_q[rows], self.cos_k[rows], self.sin_k[rows], self.interleaved)


class Far(NamedTuple):
    """A second rotation, whose scores replace the first one's where a key is `window` or more tokens back."""

    rotation: Rotation
    window: int
    query_at: Tensor  # (N,) int64, the positions that it turns queries to
    key_at: Tensor  # (N,) int64, and keys

    def at(self, rows: slice) -> Far:
        """The same for some positions."""
        return Far(self.rotation.at(rows), self.window, self.query_at[rows], self.key_at[rows])


class Decay(NamedTuple):
    """A bias that the text decides: gain_i (total_i - total_j) is taken from the score of query i and key j."""

    total: Tensor  # (B, H, T) fp64 where the device has it, never falling along T
    gain: Tensor | None = None  # (B, H, T) fp32 >= 0, of the query; None: 1


QueryBias = Callable[[Tensor, Tensor], Tensor]
"""(query index (Q, 1) fp32, distance (Q, K) fp32 >= 0) -> (H, Q, K) fp32, added to the scores."""


class Positions(NamedTuple):
    """All that one encoding says about N positions. A field that it does not use is None."""

    embedding: Tensor | None = None  # (N, C) fp32, added to the token embeddings
    rotation: Rotation | None = None  # applied to the queries and keys of every layer
    bias: Tensor | None = None  # (H, T) fp32: bias[h, i - j] is added to the score of query i and key j
    slopes: Tensor | None = None  # (H,) fp32 where the bias is -slopes[h] (i - j): a kernel may compute it itself
    qk_embedding: Tensor | None = None  # (N, C) fp32, added before the query and key projections of every layer
    far: Far | None = None  # another score for distant keys
    logit_scale: Tensor | None = None  # (T,) fp32: scores of query i are multiplied by it, before any bias
    query_bias: QueryBias | None = None  # a bias of the query's index and the distance
    block: int | None = (
        None  # block-causal: a query sees the keys of its own block of so many tokens and the one before
    )

    def at(self, rows: slice) -> Positions:
        """What of this queries and keys at `rows` see before their scores; the rest is as it was."""
        return self._replace(
            qk_embedding=None if self.qk_embedding is None else self.qk_embedding[rows],
            rotation=None if self.rotation is None else self.rotation.at(rows),
            far=None if self.far is None else self.far.at(rows),
        )


class PositionEncoding(nn.Module):
    """Base of all encodings. A parameter-free encoding owns no tensors: its `state_dict` is empty.

    A subclass implements `record`; `forward` is that, and what a scaling makes of it.
    """

    any_positions: ClassVar[bool] = False  # may positions be other than 0..T-1? Not with a bias by distance
    reads_content: ClassVar[bool] = False  # does `content` return a Decay?
    length_dependent: bool = False  # does the record at a position depend on ctx?
    pairwise_numbers: int = 0  # kept in training for each query and key beside a bias: the hidden layer of a network
    change: Callable[[Positions, Tensor, int], Positions] | None = (
        None  # a scaling's: (record, positions, ctx) -> record
    )

    def forward(self, positions: Tensor, *, ctx: int) -> Positions:
        """The record of positions (N,) int64 in sequences of `ctx` tokens. `ContextLengthError` where undefined."""
        said = self.record(positions, ctx=ctx)
        return said if self.change is None else self.change(said, positions, ctx)

    def record(self, positions: Tensor, *, ctx: int) -> Positions:
        """What the encoding says by itself: positions (N,) int64 -> record. `ContextLengthError` where undefined."""
        raise NotImplementedError

    def content(self, layer: int, x: Tensor) -> Decay | None:
        """The bias that layer `layer` (0 ..) reads off its normalised input x (B, T, C); None for most encodings."""
        return None

    def progress(self, done: float) -> bool:
        """Told before every step what share of the training is over, 0 .. 1; 1 before an evaluation.

        Returns whether the encoding says something else from now on.
        """
        return False

    def token_scale(self) -> float:
        """Factor on the token embeddings before anything is added."""
        return 1.0

    def token_std(self, d_model: int) -> float:
        """Standard deviation of the initial token table (GPT-2: 0.02)."""
        return STD

    def draw(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """The start of the parameter `name`, drawn from a generator of its own; None: as the constructor set it.

        Here: matrices and tables N(0, 0.02), scalars and vectors as they were set.
        """
        return torch.randn(shape, generator=generator) * STD if len(shape) >= 2 else None


def distances(positions: Tensor) -> Tensor:
    """Distances 0..T-1 of T contiguous positions, (T,) fp32, on their device: what a bias is computed from."""
    return torch.arange(positions.shape[0], device=positions.device, dtype=torch.float32)
