"""The base of all encodings: positions in, a record of tensors out.

An encoding computes everything once per forward pass; the model knows only the record. Letters of the shapes as in
`record`.
"""

from __future__ import annotations

import copy
from typing import ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from ropelab.config import ModelConfig, about
from ropelab.positions.record import CumulativeDecay, Positions, Spectrum

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


class ScalingLike(Protocol):
    """A scaling as an encoding sees it; the methods are in `ropelab.scalings`."""

    @property
    def length_dependent(self) -> bool:
        """Does the record at a position depend on ctx?"""
        ...

    def record(self, encoding: PositionEncoding, positions: Tensor, *, ctx: int) -> Positions:
        """The record of the scaled encoding, from that of the encoding itself."""
        ...

    def spectrum(self, inv_freq: Tensor, *, base: float, ctx: int) -> Spectrum:
        """The spectrum in use, from inv_freq (R/2,) fp64 as trained."""
        ...


class PositionEncoding(nn.Module):
    """Base of all encodings. A parameter-free encoding owns no tensors: its `state_dict` is empty.

    A subclass with a `name` is in the table of encodings; it implements `record`. Its label, summary and paper stand in
    the head of its YAML, where a list of methods can be read without torch.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    any_positions: ClassVar[bool] = False  # may positions be other than 0..T-1? Not with a bias by distance
    content_dependent: ClassVar[bool] = False  # does `content_bias` return a CumulativeDecay?
    unlimited: ClassVar[str] = "theory names no length: no prediction"  # why `unmet` answers None at every length
    length_dependent: bool = False  # does the record at a position depend on ctx?
    pairwise_numbers: int = 0  # kept in training for each query and key beside a bias: the hidden layer of a network
    scaling: ScalingLike | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls):
            cls.label, cls.summary, cls.paper, *_ = about("pos", cls.name)

    def with_scaling(self, scaling: ScalingLike) -> Self:
        """The encoding under a scaling: another object, of the same parameters."""
        scaled = copy.copy(self)
        scaled.scaling = scaling
        scaled.length_dependent = self.length_dependent or scaling.length_dependent
        return scaled

    def forward(self, positions: Tensor, *, ctx: int) -> Positions:
        """The record of positions (N,) int64 in sequences of `ctx` tokens. `ContextLengthError` where undefined."""
        if self.scaling is None:
            return self.record(positions, ctx=ctx)
        return self.scaling.record(self, positions, ctx=ctx)

    def record(self, positions: Tensor, *, ctx: int) -> Positions:
        """The record of positions (N,) int64, but for what a scaling changes in it. `ContextLengthError` as above."""
        raise NotImplementedError

    def content_bias(self, layer: int, x: Tensor) -> CumulativeDecay | None:
        """The bias that layer `layer` (0 ..) computes from its normalised input x (B, T, C); None for most."""
        return None

    def set_training_fraction(self, done: float) -> bool:
        """Called before every step with the fraction of the training that is done, 0 .. 1; with 1 before an evaluation.

        Returns whether the record is another one from now on.
        """
        return False

    def token_scale(self) -> float:
        """Factor on the token embeddings before anything is added."""
        return 1.0

    def token_std(self, d_model: int) -> float:
        """Standard deviation of the initial token table (GPT-2: 0.02)."""
        return STD

    def init_parameter(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """The initial value of the parameter `name`, from a generator of its own; None: as the constructor set it.

        Here: matrices and tables N(0, 0.02), scalars and vectors as they were set.
        """
        return torch.randn(shape, generator=generator) * STD if len(shape) >= 2 else None

    def unmet(self, ctx: int, trained: int) -> str | None:
        """What at ctx tokens a training on `trained` positions did not show, in words; None: nothing, or unknown."""
        return None


def distances(positions: Tensor) -> Tensor:
    """Distances 0..T-1 of T contiguous positions, (T,) fp32, on their device: what a bias is computed from."""
    return torch.arange(positions.shape[0], device=positions.device, dtype=torch.float32)
