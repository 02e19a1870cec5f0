"""Windows side by side: the cheapest protocol, in which a target has 1 to ctx tokens before it."""

from __future__ import annotations

from collections.abc import Sequence

from ropelab.protocols.base import Protocol


class Nonoverlapping(Protocol):
    """Windows at 0, ctx, 2 ctx, ... over the first N targets, N a multiple of the span; all targets count."""

    name = "nonoverlapping"
    summary = "windows of ctx tokens side by side; the same targets at every ctx, each with 1 to ctx tokens before it"
    whole_windows = True
    shows_breakdown = 2
    shows_positions = 0

    def starts(self, *, blocks: int, span: int, ctx: int, scored: int) -> Sequence[int]:
        return range(0, blocks * span, ctx)

    def check_term(self, ctx: int, span: int, scored: int) -> None:
        if span % ctx:
            nearest = min((c for c in range(1, span + 1) if span % c == 0), key=lambda c: abs(c - ctx))
            raise ValueError(f"nonoverlapping needs a ctx that divides {span}; nearest {nearest}, or use |last")
