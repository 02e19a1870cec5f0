"""Which targets of which documents an evaluation scores, the same for every ctx of its ladder; and its windows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ropelab.config import EvalConfig
from ropelab.evaluation.results import LONGEST
from ropelab.protocols import PROTOCOLS

MIN_DOCUMENTS = 6  # a span longer than the largest ctx is laid out only where this many documents hold it


def context_lengths(text: str | None, train_ctx: int) -> tuple[int, ...]:
    """The contexts that `--ctx` names.

    `8192` is train_ctx, 2x, 4x, ... and 8192 itself (below train_ctx: that one alone); `512,8192` is exactly that,
    and so is `8192,`; None is the ladder to 8 x train_ctx.
    """
    if text is None:
        return context_lengths(str(8 * train_ctx), train_ctx)
    items = [item.strip() for item in text.split(",")]
    if len(items) > 1 and items[-1] == "":
        items.pop()
        exact = True
    else:
        exact = len(items) > 1
    try:
        contexts = [int(item) for item in items]
    except ValueError:
        raise ValueError(f"--ctx takes a length such as 8192 or a list such as 512,8192, not '{text}'") from None
    if min(contexts) < 2:
        raise ValueError(f"--ctx needs lengths of at least 2 tokens, not {min(contexts)}")
    if max(contexts) > LONGEST:
        raise ValueError(f"--ctx takes lengths up to {LONGEST} tokens, not one of {len(str(max(contexts)))} digits")
    if exact:
        if sorted(set(contexts)) != contexts:
            raise ValueError(f"--ctx takes growing lengths, each once, not '{text}'")
        return tuple(contexts)
    (longest,) = contexts
    steps = [train_ctx * 2**k for k in range(64) if train_ctx * 2**k < longest]
    return (*steps, longest)


class Windows(NamedTuple):
    """The windows of one ctx, document by document in the order of their targets."""

    ctx: int
    scored: int  # the last so many targets of every window count
    document: NDArray[np.int64]  # (N,) index into the layout's documents
    start: NDArray[np.int64]  # (N,) first token


@dataclass(frozen=True)
class TargetPlan:
    """Which targets of which documents an evaluation scores; the same for every ctx of its ladder."""

    protocol: str
    contexts: tuple[int, ...]
    span: int  # C: length of the unit that every document holds at least once
    scored: int  # targets of a window (sliding, last); 0: all of them
    documents: tuple[int, ...]  # indices of the documents used
    units: tuple[int, ...]  # spans in each of them
    left_out: int  # documents too short for the span
    unused: int  # documents long enough, beyond the budget

    def windows(self, ctx: int) -> Windows:
        """The windows of one ctx of the ladder."""
        protocol = PROTOCOLS[self.protocol]
        document: list[int] = []
        start: list[int] = []
        for number, units in enumerate(self.units):
            starts = protocol.starts(blocks=units, span=self.span, ctx=ctx, scored=self.scored)
            document += [number] * len(starts)
            start += starts
        return Windows(ctx, self.scored or ctx, np.array(document, np.int64), np.array(start, np.int64))

    def targets_digest(self, digests: Sequence[str], ctx: int) -> str:
        """sha256 over (document, first target, count) of everything scored at `ctx`: equal iff the targets are."""
        hasher = hashlib.sha256()
        windows = self.windows(ctx)
        runs: list[tuple[int, int, int]] = []
        for number, start in zip(windows.document.tolist(), windows.start.tolist(), strict=True):
            first = start + ctx - windows.scored + 1
            if runs and runs[-1][0] == number and runs[-1][1] + runs[-1][2] == first:
                runs[-1] = (number, runs[-1][1], runs[-1][2] + windows.scored)
            else:
                runs.append((number, first, windows.scored))
        for number, first, count in runs:
            hasher.update(f"{digests[self.documents[number]]} {first} {count}\n".encode())
        return hasher.hexdigest()


def plan_targets(lengths: Sequence[int], contexts: tuple[int, ...], config: EvalConfig) -> TargetPlan:
    """Choose span, documents and quota for documents of the given lengths (tokens).

    Every document of at least span + 1 tokens is used, up to the same quota of targets; shorter ones are left out at
    every ctx. `ValueError` when a protocol's parameters do not fit the ladder, or no document is long enough.
    """
    smallest, largest = min(contexts), max(contexts)
    if config.max_ctx is not None and config.max_ctx < largest:
        raise ValueError(f"eval.max_ctx={config.max_ctx} is below the largest ctx, {largest}")
    span = max(largest, config.max_ctx or 0)
    protocol = PROTOCOLS[config.protocol]
    scored = 0 if protocol.parameter is None else int(getattr(config, protocol.parameter))
    protocol.check(smallest, scored)
    longest = max(lengths, default=0)
    enlarged = False
    if protocol.whole_windows and longest >= span + 1:
        common = _common_span(lengths, contexts, span)
        enlarged, span = common > span, common
    usable = [i for i, length in enumerate(lengths) if length >= span + 1]
    if not usable:
        raise ValueError(
            f"no test document is long enough for ctx {span}: that needs {span + 1} tokens, the longest has {longest}; "
            f"use --ctx {max(longest - 1, 0)} or less, or other text"
        )
    if config.tokens < len(usable) * span:
        used, quota = usable[: max(1, config.tokens // span)], 1
    else:
        used, quota = usable, config.tokens // (len(usable) * span)
    if enlarged and len(used) < min(MIN_DOCUMENTS, len(usable)):
        raise ValueError(
            f"the ladder divides a span of {span} tokens only, and eval.tokens={config.tokens} holds {len(used)} such "
            f"documents; set eval.tokens={span * min(MIN_DOCUMENTS, len(usable))} or more, or use --protocol last"
        )
    if protocol.one_pass:
        quota = 1  # one pass over the head of each document
    units = tuple(min(quota, (lengths[i] - 1) // span) for i in used)
    return TargetPlan(
        config.protocol, contexts, span, scored, tuple(used), units, len(lengths) - len(usable), len(usable) - len(used)
    )


def _common_span(lengths: Sequence[int], contexts: tuple[int, ...], span: int) -> int:
    """The least length that every ctx divides and that at least `span` tokens reach; else `ValueError`."""
    unit = math.lcm(*contexts)
    common = unit * math.ceil(span / unit)
    if common == span:
        return span
    holding = sum(length >= common + 1 for length in lengths)
    if holding < min(MIN_DOCUMENTS, len(lengths)):
        largest = max(contexts)
        odd = next(c for c in contexts if largest % c)
        fits = max(c for c in range(1, odd + 1) if largest % c == 0)
        raise ValueError(
            f"ctx {odd} does not divide {largest}, and too few documents hold {common} tokens, the length that all "
            f"divide; use {fits} instead of {odd}, or --protocol last"
        )
    return common


Scorer = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
"""(inputs (B, ctx), targets (B, scored)) -> losses (B, scored) in nats, of the last `scored` inputs' predictions."""
