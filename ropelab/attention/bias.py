"""What changes a score besides queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

ByQuery = Callable[[Tensor, Tensor], Tensor]  # i (Q, 1), distance (Q, K) -> (H, Q, K)


class Bias(NamedTuple):
    """The fields of the position record that attention reads, and the evaluation's window. H heads, T tokens."""

    by_distance: Tensor | None = None  # (H, T) fp32: [h, i - j] is added
    slopes: Tensor | None = None  # (H,) fp32 where by_distance[h, d] is -slopes[h] d: then a kernel may compute it
    by_query: ByQuery | None = None  # a bias of the query's index and the distance, added
    window: int | None = None  # keys with 0 <= i - j < window are seen
    block: int | None = None  # keys of the query's own block of so many tokens, and of the block before it, are seen
    far: int | None = None  # keys this many tokens back or more have scores of their own
    decays: bool = False  # each layer takes gate_i (cumsum_i - cumsum_j) of its own
    scale: Tensor | None = None  # (T,) fp32: factor on the scores of query i
    cap: float | None = None  # c tanh(score / c) in place of a score, before anything is added: Gemma 2's

    def within(self, length: int) -> Bias:
        """The same for sequences of `length` tokens, without what no key is far enough away for."""
        return self._replace(
            window=None if self.window is None or self.window >= length else self.window,
            block=None if self.block is None or 2 * self.block >= length else self.block,
            far=None if self.far is None or self.far >= length else self.far,
        )

    def only(self, field: str) -> bool:
        """Is this field all that is added to a score, but for a window?"""
        rest = self._replace(**{field: self._field_defaults[field], "window": None})
        return bool(getattr(self, field)) and rest.plain

    @property
    def pairwise(self) -> bool:
        """Does the mask of a block depend on more than the distance?"""
        return self.by_query is not None or self.block is not None or self.decays or self.scored

    @property
    def scored(self) -> bool:
        """Do scores take more than a product and a mask?"""
        return self.far is not None or self.cap is not None

    @property
    def plain(self) -> bool:
        """Is there nothing to add to the scores?"""
        return self.by_distance is None and self.window is None and not self.pairwise

    @property
    def learned(self) -> bool:
        """Does a bias by distance need a gradient?"""
        return self.by_distance is not None and self.by_distance.requires_grad
