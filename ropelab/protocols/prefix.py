"""One pass over the head of a document: the targets change with ctx, so its rows are no curve of one text."""

from __future__ import annotations

from collections.abc import Sequence

from ropelab.protocols.base import Protocol


class Prefix(Protocol):
    """One window at 0: targets 1 .. ctx."""

    name = "prefix"
    summary = "one pass over the first ctx tokens of each document; the targets change with ctx"
    same_targets = False
    one_pass = True
    shows_positions = 1

    def starts(self, *, blocks: int, span: int, ctx: int, scored: int) -> Sequence[int]:
        return [0]
