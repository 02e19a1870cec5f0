"""The end of every block: the targets stay, and only what stands before them grows."""

from __future__ import annotations

from collections.abc import Sequence

from ropelab.protocols.base import Protocol


class Last(Protocol):
    """The final `last` targets of every block of span tokens: only the context grows."""

    name = "last"
    summary = "the final {scored} targets of each block; the targets stay, only the context grows"
    parameter = "last"
    meaning = "targets per block (k)"
    only_context_grows = True
    shows_breakdown = 0
    shows_positions = 3

    def starts(self, *, blocks: int, span: int, ctx: int, scored: int) -> Sequence[int]:
        return [(block + 1) * span - ctx for block in range(blocks)]

    def check(self, smallest: int, scored: int) -> None:
        if scored > smallest // 2:
            raise ValueError(
                f"eval.last={scored} is above half of the smallest ctx; set it to {max(1, smallest // 2)} or less"
            )

    def check_term(self, ctx: int, span: int, scored: int) -> None:
        if 2 * scored > ctx:
            raise ValueError(f"last scores {scored} targets and needs a ctx of at least {2 * scored}, not {ctx}")
