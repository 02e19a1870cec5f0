"""What a protocol is: which targets of a document are scored, and which tokens stand before each of them.

Document: tokens x_0 .. x_{n-1}. A target is an index t >= 1; x_0 is never scored. A window starts at token `a`, reads
`ctx` tokens x_a .. x_{a+ctx-1} at positions 0 .. ctx-1 and predicts the targets a+1 .. a+ctx, of which the last
`scored` count. Documents are never joined and no token is put before them; under `eval.bos` a checkpoint's
beginning-of-text token is read in the place of x_a. The text of a document is laid out in blocks of `span` tokens,
which is the longest ctx or more. The definitions to the index are in docs/protocols.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar


class Protocol(ABC):
    """A way to measure perplexity; a subclass in a module of this package is found by its name."""

    name: ClassVar[str]
    summary: ClassVar[str]  # what it scores, in one clause; {scored} is the value of its parameter
    parameter: ClassVar[str | None] = None  # its key under `eval`: targets of a window; None: all of them count
    meaning: ClassVar[str] = ""  # of the parameter, for a reader
    same_targets: ClassVar[bool] = True  # at every ctx
    whole_windows: ClassVar[bool] = False  # must every ctx divide the span?
    one_pass: ClassVar[bool] = False  # does the longest ctx's pass hold the losses of every shorter one?
    only_context_grows: ClassVar[bool] = False  # is a difference between two ctxs what the context between them gives?
    shows_breakdown: ClassVar[int | None] = None  # the least shows best at which ctx losses begin to rise; None: not
    shows_positions: ClassVar[int] = 0  # the least shows best how losses go by position within a window

    @abstractmethod
    def starts(self, *, blocks: int, span: int, ctx: int, scored: int) -> Sequence[int]:
        """The first token of every window of `ctx` tokens over a document's first blocks x span targets."""

    def check(self, smallest: int, scored: int) -> None:  # noqa: B027 - most have nothing to check
        """`ValueError` where its parameter does not fit the smallest ctx."""

    def check_term(self, ctx: int, span: int, scored: int) -> None:  # noqa: B027
        """`ValueError` where a ctx cannot be measured on text that is laid out for `span`."""

    def words(self, scored: int | None) -> str:
        """What it scores, in one clause."""
        return self.summary.format(scored=scored)
