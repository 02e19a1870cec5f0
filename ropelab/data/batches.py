"""Training batches, addressed by (seed, step): the same for every encoding, and without any state to resume."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ropelab.data.tokens import Split


class Batches:
    """Windows of ctx + 1 tokens: ctx inputs and, one further, ctx targets.

    A document of at least ctx + 1 tokens contributes every window that lies in it. Shorter documents are joined in
    their order, with the separator between them, and contribute every window of that; attention is not masked at the
    joins. All windows are equally likely. Where only the joined documents are too short for a window they are left out.

    joined_share: share of the windows that come from joined documents.
    ValueError: not one window fits.
    """

    joined_share: float

    def __init__(self, split: Split, *, ctx: int, separator: int) -> None:
        assert ctx >= 1
        self.ctx = ctx
        self._tokens = split.tokens
        self._separator = separator
        lengths = np.diff(split.offsets)
        is_long = lengths > ctx
        self._long_begin = split.offsets[:-1][is_long]  # (n_long,) where each long document begins in `tokens`
        # (n_long + 1,) how many windows the long documents before this one have
        self._long_windows = np.concatenate([[0], np.cumsum(lengths[is_long] - ctx)])
        is_short = ~is_long & (lengths > 0)
        self._short_begin = split.offsets[:-1][is_short]  # (n_short,) the same for the joined ones
        self._short_length = lengths[is_short]
        # (n_short + 1,) where each begins among the joined, a separator behind each but the last
        self._joined_begin = np.concatenate([[0], np.cumsum(self._short_length + 1)])
        n_joined = max(0, int(self._joined_begin[-1]) - 1 - ctx)
        self.n_windows = int(self._long_windows[-1]) + n_joined
        if not self.n_windows:
            longest = max(int(lengths.max(initial=0)), int(self._joined_begin[-1]) - 1)
            raise ValueError(
                f"the {split.name} text has {longest} tokens, too few for one window of {ctx} + 1: "
                + (f"use train.ctx={_power_of_two_below(longest)} or more text" if longest > 2 else "use more text")
            )
        self.joined_share = n_joined / self.n_windows

    def at(self, step: int, *, seed: int, batch_size: int) -> NDArray[np.int64]:
        """The batch of a step, (batch_size, ctx + 1) int64; row i does not depend on batch_size.

        Counter-based: Philox keyed with (seed, step) (Salmon et al. 2011), of which numpy keeps the raw stream the
        same in all versions. The modulus favours the first windows by less than 1e-9 for any corpus on a disk.
        """
        raw = np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(batch_size)
        return self._gather((raw % np.uint64(self.n_windows)).astype(np.int64))

    def fixed(self, n: int) -> NDArray[np.int64]:
        """n evenly spaced windows, (n, ctx + 1) int64: the validation loss during training."""
        return self._gather((2 * np.arange(n, dtype=np.int64) + 1) * self.n_windows // (2 * n))

    def _gather(self, window: NDArray[np.int64]) -> NDArray[np.int64]:
        """The windows with these numbers, (n,) -> (n, ctx + 1)."""
        n_long = self._long_windows[-1]
        reach = np.arange(self.ctx + 1)
        place = np.zeros((len(window), self.ctx + 1), np.int64)  # in `tokens`; -1 for the separator
        in_long = window < n_long
        number = window[in_long]
        document = np.searchsorted(self._long_windows, number, side="right") - 1
        begin = self._long_begin[document] + number - self._long_windows[document]
        place[in_long] = begin[:, None] + reach  # (n, 1) + (ctx + 1,) -> (n, ctx + 1)
        joined = (window[~in_long] - n_long)[:, None] + reach  # (n, ctx + 1) among the joined
        document = np.searchsorted(self._joined_begin, joined, side="right") - 1
        within = joined - self._joined_begin[document]
        place[~in_long] = np.where(within < self._short_length[document], self._short_begin[document] + within, -1)
        batch = np.take(self._tokens, place).astype(np.int64)
        batch[place < 0] = self._separator
        return batch


def _power_of_two_below(n: int) -> int:
    """The largest power of two p with a window of p + 1 tokens in n."""
    return 1 << ((n - 1).bit_length() - 1)
