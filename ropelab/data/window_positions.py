"""Which position numbers the tokens of a training window get: the `positions` group. Free of torch.

Drawn by (seed, step), as the batches are, so that nothing but the step has to be remembered; row i does not depend on
the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from ropelab.config import Method

Draw = Callable[[int, int, int], NDArray[np.int64]]
"""(seed, step, n) -> (n, T): the positions of n windows, growing along T."""

STREAM = 1  # the batches of (seed, step) are drawn from stream 0


def drawn_positions(method: Method, *, ctx: int, original_ctx: int, factor: float | None) -> Draw | None:
    """How the positions of training windows of `ctx` tokens are drawn; None: they are 0 .. ctx - 1.

    `factor` is that of the run's scaling. `ValueError` for a range that cannot hold the window.
    """
    if method.name == "contiguous":
        return None
    longest = method.parameters["max_ctx"]
    if longest is None:
        if method.name == "pose" and (factor is None or factor == 1):
            raise ValueError("positions=pose needs a length to reach: add --scaling NAME with scaling.factor=S, or "
                             "positions.max_ctx=N")  # fmt: skip
        longest = round((factor if method.name == "pose" and factor is not None else 8) * original_ctx)
    if longest <= ctx:
        raise ValueError(f"positions.max_ctx must be above train.ctx={ctx}, not {longest}")
    return {"randomized": _randomized, "pose": _pose}[method.name](method.parameters, ctx, longest)


def _raw(seed: int, step: int, n: int, per_row: int) -> NDArray[np.uint64]:
    """(n, per_row) random 64-bit words of (seed, step)."""
    generator = np.random.Philox(key=np.array([seed, step], np.uint64), counter=np.array([0, 0, 0, STREAM], np.uint64))
    return generator.random_raw(n * per_row).reshape(n, per_row)


def _randomized(parameters: Mapping[str, object], ctx: int, longest: int) -> Draw:
    """Ruoss et al. (2305.16843), section 3: ctx of the positions 0 .. longest - 1 without replacement, sorted."""

    def draw(seed: int, step: int, n: int) -> NDArray[np.int64]:
        raw = _raw(seed, step, n, longest)
        # the places of the ctx smallest words are a uniform sample without replacement
        return np.sort(np.argpartition(raw, ctx - 1, axis=1)[:, :ctx], axis=1).astype(np.int64)

    return draw


def _pose(parameters: Mapping[str, object], ctx: int, longest: int) -> Draw:
    """Zhu et al. (2309.10400), section 3.2: chunk i is moved by u_i ~ U{u_(i-1) .. longest - ctx}, the first by 0.

    The cuts between the chunks are distinct and uniform over the window. The text of the chunks is that of one
    contiguous window (the paper's v_i = 0; its released code also skips text, and cuts two chunks in the first half).
    """
    chunks = parameters["chunks"]
    if not isinstance(chunks, int) or not 2 <= chunks <= ctx:
        raise ValueError(f"positions.chunks must be from 2 to train.ctx={ctx}, not {chunks}")

    def draw(seed: int, step: int, n: int) -> NDArray[np.int64]:
        raw = _raw(seed, step, n, (ctx - 1) + (chunks - 1))
        # (n, chunks - 1) cuts: where chunk 1, 2, ... begins
        cuts = np.sort(np.argpartition(raw[:, : ctx - 1], chunks - 2, axis=1)[:, : chunks - 1], axis=1) + 1
        shares = raw[:, ctx - 1 :] / 2.0**64  # (n, chunks - 1) in [0, 1)
        places = np.broadcast_to(np.arange(ctx), (n, ctx)).copy()
        skip = np.zeros(n, np.int64)
        for chunk in range(chunks - 1):
            before = skip
            skip = before + np.floor(shares[:, chunk] * (longest - ctx - before + 1)).astype(np.int64)
            places += np.where(np.arange(ctx) >= cuts[:, chunk : chunk + 1], (skip - before)[:, None], 0)
        return places

    return draw
