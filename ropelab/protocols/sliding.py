"""Windows that move by a few targets: every target has nearly a full context (Press et al. 2022, appendix B)."""

from __future__ import annotations

from collections.abc import Sequence

from ropelab.protocols.base import Protocol


class Sliding(Protocol):
    """`stride` targets at a time from target span - stride + 1 on, whatever the ctx; windows end with them."""

    name = "sliding"
    summary = (
        "{scored} targets a window, each with at least ctx − {scored} tokens before it; the same targets at every ctx"
    )
    parameter = "stride"
    meaning = "targets per window (stride)"
    shows_breakdown = 1
    shows_positions = 2

    def starts(self, *, blocks: int, span: int, ctx: int, scored: int) -> Sequence[int]:
        first = span - scored + 1
        count = (blocks * span - first + 1) // scored
        return [first + j * scored + scored - 1 - ctx for j in range(count)]

    def check(self, smallest: int, scored: int) -> None:
        if scored > smallest:
            raise ValueError(f"eval.stride={scored} is above the smallest ctx; set eval.stride to {smallest} or less")

    def check_term(self, ctx: int, span: int, scored: int) -> None:
        if scored > ctx:
            raise ValueError(f"sliding moves by {scored} targets and needs a ctx of at least that, not {ctx}")
