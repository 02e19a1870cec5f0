"""Overlap: against sets of literal 64-byte strings."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ropelab.data import overlap


def words(seed: int, n: int) -> str:
    source = random.Random(seed)
    return " ".join("".join(source.choices("abcdefghij", k=source.randint(2, 9))) for _ in range(n))


def literal_shingles(text: str) -> list[bytes]:
    """Every run of 64 bytes that are neither blank nor control characters."""
    letters = bytes(byte for byte in text.encode() if byte > 32)
    return [letters[start : start + 64] for start in range(len(letters) - 63)]


def literal_share(test: str, train: str) -> float:
    known = set(literal_shingles(train))
    found = literal_shingles(test)
    return sum(shingle in known for shingle in found) / len(found)


@pytest.mark.parametrize("copied", [0, 30, 200, 1000])
def test_share_is_that_of_the_literal_sets(copied: int) -> None:
    """Without sampling the share is exact; the text is longer than a block of the computation."""
    train = words(1, 20_000) + " naïve – 東京 " + words(2, 300)
    test = words(3, 500) + train[5000 : 5000 + copied * 7] + words(4, 500)
    shingles = overlap.collect([train], 0)
    assert shingles.modulus == 1
    assert overlap.share(overlap.hashes(test), shingles) == pytest.approx(literal_share(test, train))
    assert len(shingles.hashes) == len(set(literal_shingles(train)))
    assert len(overlap.hashes(train)) == len(literal_shingles(train))


def test_equal_shingles_have_equal_hashes_and_others_not() -> None:
    text = words(5, 3000) + "x" * 200 + words(6, 3000)
    literal = literal_shingles(text)
    found = overlap.hashes(text).tolist()
    assert len(found) == len(literal)
    assert len(set(zip(found, literal, strict=True))) == len(set(found)) == len(set(literal))


def test_sampling_keeps_one_in_m_and_a_fair_share() -> None:
    train = words(7, 60_000)
    test = words(8, 8000) + train[1000:21_000]
    sampled = overlap.merge([overlap.hashes(train, 16)], 16)
    assert len(sampled.hashes) == pytest.approx(len(literal_shingles(train)) / 16, rel=0.05)
    assert set(sampled.hashes.tolist()) <= set(overlap.hashes(train).tolist())
    part = overlap.share(overlap.hashes(test, 16), sampled)
    assert part == pytest.approx(literal_share(test, train), abs=0.05)


def test_modulus_bounds_the_memory() -> None:
    assert [overlap.modulus_for(n) for n in (0, 2**22, 2**22 + 1, 2**23, 2**23 + 1, 68_509_090)] == [1, 1, 2, 2, 4, 32]
    for n_bytes in (1, 10**6, 10**8, 10**10):
        assert n_bytes / overlap.modulus_for(n_bytes) <= overlap.LARGEST_SET


def test_line_ends_and_blanks_do_not_hide_a_copy() -> None:
    train = words(9, 400)
    rewrapped = "\n".join(train[start : start + 50] for start in range(0, len(train), 50)).replace(" ", "  ")
    assert overlap.share(overlap.hashes(rewrapped), overlap.collect([train], 0)) == 1.0


def test_occurs_above_a_fifth_and_needs_enough_shingles() -> None:
    train = overlap.Shingles(np.arange(0, 1000, dtype=np.uint64), 1)
    known, unknown = np.arange(20, dtype=np.uint64), np.arange(5000, 5080, dtype=np.uint64)
    assert not overlap.occurs(np.concatenate([known, unknown]), train)  # 20 of 100
    assert overlap.occurs(np.concatenate([known, unknown[:79]]), train)  # 20 of 99
    assert overlap.share(known[:15], train) is None
    assert not overlap.occurs(known[:15], train)
    assert overlap.share(unknown, overlap.EMPTY) == 0.0


def test_short_and_empty_texts_have_no_shingles() -> None:
    assert len(overlap.hashes("")) == 0
    assert len(overlap.hashes("x" * 63)) == 0
    assert len(overlap.hashes("x" * 64)) == 1


def test_refusal_names_the_documents() -> None:
    assert "1 test document occurs in the training text ('a')" in str(overlap.refusal(["a"]))
    assert "('a', 'b', 'c' and 2 more)" in str(overlap.refusal(list("abcde")))
