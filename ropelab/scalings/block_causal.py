"""Blockwise causal attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ropelab.positions import PositionEncoding, Positions
from ropelab.scalings.base import Scaling


@dataclass(frozen=True, kw_only=True)
class BlockCausal(Scaling):
    """A query sees its own block of tokens and the one before.

    Sun et al. 2022 (2212.10554), section 3.2, blocks of L/2 (`block=null`), so that no distance is longer than in
    training.
    """

    name = "block_causal"
    of_scores = True

    block: int | None

    def __post_init__(self) -> None:
        if self.block is not None and self.block < 1:
            raise ValueError(f"scaling.block must be >= 1 token or null, not {self.block}")

    @property
    def size(self) -> int:
        """Tokens of a block."""
        return self.block or max(1, self.original_ctx // 2)

    def is_identity(self, ctx: int) -> bool:
        return ctx <= 2 * self.size

    def record(self, encoding: PositionEncoding, positions: Tensor, *, ctx: int) -> Positions:
        record = encoding.record(positions, ctx=ctx)
        return record if self.is_identity(ctx) else record._replace(block=self.size)
