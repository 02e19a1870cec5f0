"""The base of all scalings: changes of a trained encoding for longer contexts.

A scaling is a value whose fields are the keys of its YAML, `original_ctx` resolved to a length and `factor` to a
number. It adds, removes and renames no parameter, so that trained weights load strictly.

- `original_ctx`: the length L that the model was trained for, to which every formula refers,
- `factor`: the extension s; of a dynamic method the f in s = f ctx/L - (f - 1), so that f = 1 means s = ctx/L.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ropelab.config import about
from ropelab.positions import PositionEncoding, Positions, Rope, Spectrum


class HfRope(NamedTuple):
    """A rotary encoding in transformers' words."""

    base: float
    parameters: dict[str, Any]  # rope_type and its keys, without base and share of the dimensions
    max_ctx: int  # max_position_embeddings, from which `dynamic` takes its original length


@dataclass(frozen=True, kw_only=True)
class Scaling(ABC):
    """A change of the record. A subclass with a `name` is in the table of scalings; it implements `record`.

    `ValueError`, which names the key, for a value that is out of range. Label, summary, paper, the encodings that it
    applies to and whether it is dynamic stand in the head of its YAML, where a list of methods can be read without
    torch.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    applies_to: ClassVar[tuple[str, ...] | None]  # names of encodings; None: any
    dynamic: ClassVar[bool]  # the factor follows ctx, and `auto` is 1
    evaluation_only: ClassVar[bool] = False  # no run is trained with it
    spectral: ClassVar[bool] = False  # a change of the spectrum alone
    of_scores: ClassVar[bool] = False  # a change of scores and masks that adds no bias: any model can be given it

    original_ctx: int

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls):
            cls.label, cls.summary, cls.paper, cls.applies_to, cls.dynamic, _ = about("scaling", cls.name)

    @property
    def length_dependent(self) -> bool:
        """Does the record at a position depend on ctx?"""
        return self.dynamic

    @abstractmethod
    def is_identity(self, ctx: int) -> bool:
        """Does it change nothing at this length, by its definition?"""

    def record(self, encoding: PositionEncoding, positions: Tensor, *, ctx: int) -> Positions:
        """The record of the scaled encoding at positions (N,) int64."""
        return encoding.record(positions, ctx=ctx)

    def spectrum(self, inv_freq: Tensor, *, base: float, ctx: int) -> Spectrum:
        """The spectrum in use at ctx tokens, from inv_freq (R/2,) fp64, radians per token, fastest pair first."""
        return Spectrum(inv_freq)

    def to_hf_rope(self, encoding: Rope, *, max_ctx: int | None) -> HfRope:
        """What transformers calls it; `max_ctx`: the longest text that the model is said to hold.

        `ValueError` with the reason where transformers has no word for it.
        """
        raise ValueError(f"scaling={self.name}: transformers has nothing like it")


@dataclass(frozen=True, kw_only=True)
class SpectralScaling(Scaling):
    """A change of a rotary spectrum: a subclass implements `spectrum`.

    A pair that does not turn (frequency 0, as in p-RoPE) never starts to. With s = 1 the frequencies come back bit for
    bit.
    """

    spectral = True

    factor: float

    def is_identity(self, ctx: int) -> bool:
        return self.factor == 1


@dataclass(frozen=True, kw_only=True)
class DynamicScaling(SpectralScaling):
    """A scaling of the spectrum whose s follows the context."""

    def at(self, ctx: int) -> float:
        """s: 1 up to original_ctx, then factor ctx/original_ctx - (factor - 1)."""
        return max(1.0, self.factor * ctx / self.original_ctx - (self.factor - 1))

    def is_identity(self, ctx: int) -> bool:
        return ctx <= self.original_ctx

    def to_hf_rope(self, encoding: Rope, *, max_ctx: int | None) -> HfRope:
        raise ValueError(f"scaling={self.name} follows the length in a way that transformers does not know")
