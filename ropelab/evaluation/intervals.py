"""Confidence intervals of one model's perplexity over the texts that it was evaluated on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

FloatArray = NDArray[np.float64]

TAIL = 0.025  # beyond each end of a 95% interval
MIN_BLOCK = 4096  # targets; neighbouring losses are correlated over far fewer


@dataclass(frozen=True)
class Interval:
    """A 95% confidence interval of PPL over `n` units (`author`, `document`, `block`) of the evaluated text."""

    lo: float
    hi: float
    unit: str
    n: int


def _ppl(nats: float) -> float:
    return math.exp(nats) if nats < 709 else math.inf  # exp(710) overflows


def interval(nll_sum: FloatArray, tokens: FloatArray, *, unit: str = "document") -> Interval | None:
    """95% interval of one model's PPL = exp(sum of losses / sum of targets) over clusters of text.

    A t interval on ln PPL with the jackknife's variance of a ratio (Cochran 1977, section 6.17): what leaving out one
    cluster changes. With clusters of one size it is the one-sample t interval of their means.

    Args:
        nll_sum: (n,) summed losses of each cluster, nats.
        tokens: (n,) scored targets of each cluster, > 0.
        unit: what a cluster is, for the reader.

    Returns None for fewer than two clusters and for a loss that is not finite.
    """
    n = len(nll_sum)
    assert nll_sum.shape == tokens.shape == (n,), (nll_sum.shape, tokens.shape)
    assert (tokens > 0).all(), tokens
    if n < 2 or not np.isfinite(nll_sum).all():
        return None
    total = float(tokens.sum())
    mean = float(nll_sum.sum()) / total
    without = (nll_sum.sum() - nll_sum) / (total - tokens)  # (n,) means without each cluster
    half = float(stdtrit(n - 1, 1 - TAIL)) * math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
    return Interval(_ppl(mean - half), _ppl(mean + half), unit, n)


def row_interval(
    losses: Sequence[FloatArray], *, max_ctx: int, authors: Sequence[str | None] | None = None, unit: str = "author"
) -> Interval | None:
    """95% interval of the PPL of one evaluated row, with the widest unit that the text offers.

    The unit is the author where the data names one (books by one author are no independent sample; a document without
    an author stands for itself), else the document. One document is cut into blocks of max(max_ctx, `MIN_BLOCK`)
    targets; a shorter rest joins the last block.

    Args:
        losses: one (n_targets,) array per document, nats, in the order of the text.
        max_ctx: the longest context of the ladder, tokens.
        authors: one name (or None) per document.
        unit: what the names are of.

    Returns None for fewer than two clusters or blocks.
    """
    documents = [loss for loss in losses if len(loss)]
    if len(documents) == 1:
        loss = documents[0].astype(np.float64)
        block = max(max_ctx, MIN_BLOCK)
        starts = np.arange(max(1, len(loss) // block)) * block  # (n_blocks,)
        return interval(
            np.add.reduceat(loss, starts), np.diff(starts, append=len(loss)).astype(np.float64), unit="block"
        )
    names = authors if authors is not None else [None] * len(losses)
    sums: dict[tuple[str, str | int], tuple[float, int]] = {}
    for index, (loss, author) in enumerate(zip(losses, names, strict=True)):
        if len(loss):
            key: tuple[str, str | int] = ("document", index) if author is None else ("author", author)
            total, count = sums.get(key, (0.0, 0))
            sums[key] = (total + float(loss.sum(dtype=np.float64)), count + len(loss))
    table = np.array(list(sums.values()), dtype=np.float64).reshape(-1, 2)  # (n, 2)
    named = any(kind == "author" for kind, _ in sums)
    return interval(table[:, 0], table[:, 1], unit=unit if named else "document")
