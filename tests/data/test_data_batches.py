"""Batches: which windows there are, that all are equally likely, and that (seed, step) is their whole address."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ropelab.data import Batches, Split

SEPARATOR = 999


def split_of(lengths: list[int], name: str = "train") -> Split:
    """Documents of these lengths; every token of the corpus is another number."""
    offsets = np.cumsum([0, *lengths])
    n = len(lengths)
    tokens = np.arange(offsets[-1], dtype=np.uint16)
    return Split(name, tokens, offsets, [f"d{i}" for i in range(n)], [None] * n, [""] * n, np.array(lengths))


def all_windows(lengths: list[int], ctx: int) -> list[tuple[int, ...]]:
    """The definition, literally: long documents by themselves, the short ones joined by separators."""
    documents, joined, next_token = [], [], 0
    for length in lengths:
        document = list(range(next_token, next_token + length))
        next_token += length
        if length >= ctx + 1:
            documents.append(document)
        elif length:
            joined += ([SEPARATOR] if joined else []) + document
    return [tuple(text[start : start + ctx + 1]) for text in [*documents, joined] for start in range(len(text) - ctx)]


@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6), ctx=st.integers(1, 9))
def test_windows_are_those_of_the_definition(lengths: list[int], ctx: int) -> None:
    """Asked for as many evenly spaced windows as there are, `fixed` gives each of them once."""
    expected = all_windows(lengths, ctx)
    if not expected:
        with pytest.raises(ValueError, match="too few for one window"):
            Batches(split_of(lengths), ctx=ctx, separator=SEPARATOR)
        return
    batches = Batches(split_of(lengths), ctx=ctx, separator=SEPARATOR)
    assert batches.n_windows == len(expected)
    assert [tuple(row) for row in batches.fixed(len(expected))] == expected
    share = sum(1 for window in expected if SEPARATOR in window or window[0] in short_tokens(lengths, ctx))
    assert batches.joined_share == pytest.approx(share / len(expected))


def short_tokens(lengths: list[int], ctx: int) -> set[int]:
    offsets = np.cumsum([0, *lengths])
    return {t for i, n in enumerate(lengths) if n <= ctx for t in range(offsets[i], offsets[i + 1])}


def test_random_windows_are_uniform() -> None:
    """20,000 draws over 25 windows of long and joined documents: a chi-square test does not see a difference."""
    lengths, ctx = [14, 3, 9, 4, 2, 11], 5
    expected = all_windows(lengths, ctx)
    batches = Batches(split_of(lengths), ctx=ctx, separator=SEPARATOR)
    drawn = [tuple(row) for step in range(20) for row in batches.at(step, seed=0, batch_size=1000)]
    counts = [drawn.count(window) for window in expected]
    assert sum(counts) == len(drawn)
    assert stats.chisquare(counts).pvalue > 1e-3


def philox_4x64(key: tuple[int, int], counter: int) -> list[int]:
    """Philox4x64-10 as published (Salmon et al. 2011, section 3.3), with Python's integers."""
    mask = 2**64 - 1
    words = [counter, 0, 0, 0]
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [(p1 >> 64) ^ words[1] ^ k0, p1 & mask, (p0 >> 64) ^ words[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return words


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 17), (2**32 - 1, 10**9)])
def test_draws_are_philox_of_seed_and_step(seed: int, step: int) -> None:
    """Against the published generator: key (seed, step), counter from 1 (numpy counts before it draws)."""
    batches = Batches(split_of([1000]), ctx=10, separator=SEPARATOR)
    words = philox_4x64((seed, step), 1) + philox_4x64((seed, step), 2)
    assert batches.at(step, seed=seed, batch_size=8)[:, 0].tolist() == [word % 990 for word in words]


def test_seed_and_step_are_the_whole_address() -> None:
    batches = Batches(split_of([5000, 7, 8, 9]), ctx=16, separator=SEPARATOR)
    again = Batches(split_of([5000, 7, 8, 9]), ctx=16, separator=SEPARATOR)
    again.at(3, seed=0, batch_size=4)  # what was drawn before has no influence
    batch = batches.at(7, seed=1, batch_size=64)
    np.testing.assert_array_equal(batch, again.at(7, seed=1, batch_size=64))
    np.testing.assert_array_equal(batch[:8], again.at(7, seed=1, batch_size=8))
    assert (batch != batches.at(8, seed=1, batch_size=64)).any()
    assert (batch != batches.at(7, seed=2, batch_size=64)).any()
    assert batch.shape == (64, 17)
    assert batch.dtype == np.int64


def test_fixed_windows_are_spread_over_the_text() -> None:
    rows = Batches(split_of([1010]), ctx=10, separator=SEPARATOR).fixed(4)
    assert rows[:, 0].tolist() == [125, 375, 625, 875]
    assert rows.shape == (4, 11)


def test_too_short_a_text_says_which_ctx_fits() -> None:
    with pytest.raises(ValueError, match=r"validation text has 100 tokens.*128 \+ 1.*train\.ctx=64") as raised:
        Batches(split_of([100], "validation"), ctx=128, separator=SEPARATOR)
    assert "\n" not in str(raised.value)
    assert Batches(split_of([100]), ctx=64, separator=SEPARATOR).n_windows == 36
    with pytest.raises(ValueError, match=r"use train\.ctx=8 "):  # 4 + 4 + 1 tokens with the separator
        Batches(split_of([4, 4]), ctx=16, separator=SEPARATOR)
    Batches(split_of([4, 4]), ctx=8, separator=SEPARATOR)
    with pytest.raises(ValueError, match="use more text"):
        Batches(split_of([0]), ctx=16, separator=SEPARATOR)
