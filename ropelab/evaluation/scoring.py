"""Losses of a protocol's targets, and what belongs to each of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ropelab.evaluation.targets import Scorer, Windows


def score(
    windows: Windows,
    documents: Sequence[NDArray[np.unsignedinteger]],
    scorer: Scorer,
    *,
    rows: int,
    progress: Callable[[int], None] | None = None,
    bos: int | None = None,
) -> NDArray[np.float32]:
    """Losses of all scored targets in nats, (N x scored,), document by document in the order of the targets.

    `rows` windows are scored in one forward pass; `progress` is told how many tokens were done. `bos` stands in the
    place of the first token of every window, which is no target of it.
    """
    count, ctx, scored = len(windows.start), windows.ctx, windows.scored
    losses = np.empty((count, scored), np.float32)
    for low in range(0, count, rows):
        high = min(low + rows, count)
        batch = np.stack(
            [
                documents[d][a : a + ctx + 1].astype(np.int64)
                for d, a in zip(windows.document[low:high], windows.start[low:high], strict=True)
            ]
        )  # (B, ctx + 1)
        if bos is not None:
            batch[:, 0] = bos
        losses[low:high] = scorer(batch[:, :-1], batch[:, ctx - scored + 1 :])
        if progress is not None:
            progress((high - low) * ctx)
    return losses.reshape(-1)


def target_tokens(windows: Windows, documents: Sequence[NDArray[np.unsignedinteger]]) -> NDArray[np.int64]:
    """The scored tokens themselves, in the order of `score`'s losses: (N x scored,)."""
    first = windows.ctx - windows.scored + 1
    pieces = [
        documents[d][a + first : a + windows.ctx + 1] for d, a in zip(windows.document, windows.start, strict=True)
    ]
    return np.concatenate(pieces).astype(np.int64)


def target_documents(windows: Windows) -> NDArray[np.int64]:
    """The document of every scored target, as an index into the layout's documents: (N x scored,)."""
    return np.repeat(windows.document, windows.scored)


def position_curve(losses: NDArray[np.float32], windows: Windows, *, buckets: int = 16) -> dict[str, list[float]]:
    """Mean loss by position in the window, in buckets of equal width: {"edges": (n + 1), "nll": (n)}, nats.

    Edges are contexts: bucket (e_k, e_{k+1}] holds the targets with that many tokens before them.
    """
    table = losses.reshape(-1, windows.scored).astype(np.float64)  # (N, scored)
    low = windows.ctx - windows.scored
    edges = np.unique(np.linspace(low, windows.ctx, min(buckets, windows.scored) + 1).round().astype(int))
    means = [float(table[:, a - low : b - low].mean()) for a, b in itertools.pairwise(edges)]
    return {"edges": [float(edge) for edge in edges], "nll": means}
