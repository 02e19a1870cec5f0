"""Does text that a model is tested on occur in the text it was trained on?

Both are cut into shingles: every run of 64 bytes of the UTF-8 text, blanks and control characters left out, so that
the same text wrapped at another column is still the same text. A document overlaps when more than a fifth of its
shingles occur in the training text. Broder, "On the resemblance and containment of documents" (1997), section 2:
the share is his containment, and of a large text, as there, only every m-th shingle by its hash is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WIDTH = 64  # bytes of a shingle
LARGEST_SHARE = 0.2  # of a document's shingles that may occur in training text
LARGEST_SET = 2**22  # hashes kept for a training text (32 MiB)
FEWEST = 16  # sampled shingles below which a share says nothing

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 2**16  # shingles hashed at a time: the intermediate arrays stay in the processor's cache


@dataclass(frozen=True)
class Shingles:
    """The shingles of a text, one in `modulus`: `hashes` (n,) uint64, sorted and distinct."""

    hashes: NDArray[np.uint64]
    modulus: int


EMPTY = Shingles(np.empty(0, np.uint64), 1)


def modulus_for(n_bytes: int) -> int:
    """The sampling of a text of `n_bytes`: the smallest power of two that keeps at most `LARGEST_SET` shingles."""
    return 1 << max(0, (max(n_bytes, 1) - 1) // LARGEST_SET).bit_length()


def hashes(text: str, modulus: int = 1) -> NDArray[np.uint64]:
    """The sampled shingle hashes of a text, (n,), in the order of the text and as often as they occur."""
    letters = np.frombuffer(text.encode(), dtype=np.uint8)
    letters = letters[letters > 32]
    kept = [
        _sample(_polynomial(letters[start : start + _BLOCK + WIDTH - 1]), modulus)
        for start in range(0, len(letters) - WIDTH + 1, _BLOCK)
    ]
    return np.concatenate(kept) if kept else np.empty(0, np.uint64)


def _polynomial(letters: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """sum_k letters[i+k] * MULTIPLIER**(64-k) modulo 2**64 for every run of 64: doubling the width six times."""
    value = letters.astype(np.uint64) * _MULTIPLIER
    power, width = _MULTIPLIER, 1
    while width < WIDTH:
        value = value[:-width] * power + value[width:]
        with np.errstate(over="ignore"):
            power = power * power
        width *= 2
    return value


def _sample(value: NDArray[np.uint64], modulus: int) -> NDArray[np.uint64]:
    """Keep one in `modulus` (a power of two), by the high bits: the low bits of a product depend on few bytes."""
    return value if modulus == 1 else value[value < np.uint64(2**64 // modulus)]


def collect(texts: Iterable[str], n_bytes: int) -> Shingles:
    """The shingles of a training text that comes in documents and has `n_bytes` in all."""
    modulus = modulus_for(n_bytes)
    return merge((hashes(text, modulus) for text in texts), modulus)


def merge(parts: Iterable[NDArray[np.uint64]], modulus: int) -> Shingles:
    """One set of several documents' hashes, all sampled with `modulus`."""
    return Shingles(_distinct(np.concatenate([np.empty(0, np.uint64), *map(_distinct, parts)])), modulus)


def _distinct(found: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Sorted and each once. `np.unique` goes through a hash table since numpy 2.3, many times as slow on these."""
    found = np.sort(found)
    return found[np.concatenate([[True], found[1:] != found[:-1]])] if len(found) else found


def share(found: NDArray[np.uint64], train: Shingles) -> float | None:
    """The share of a document's hashes, sampled with `train.modulus`, that occur in the training text.

    None for a document with too few shingles for a share (shorter than about 80 bytes, in a large corpus longer).
    """
    if len(found) < FEWEST:
        return None
    if not len(train.hashes):
        return 0.0
    place = np.searchsorted(train.hashes, found).clip(max=len(train.hashes) - 1)
    return float(np.mean(train.hashes[place] == found))


def occurs(found: NDArray[np.uint64], train: Shingles) -> bool:
    """Whether more than a fifth of a document's hashes, sampled with `train.modulus`, occur in the training text."""
    part = share(found, train)
    return part is not None and part > LARGEST_SHARE


def refusal(names: Sequence[str]) -> ValueError:
    """The error for test documents, by name, whose text occurs in the training text."""
    return ValueError(
        f"{sentence(names)}: remove what is repeated from one of the two, or set data.overlap=drop (leaves them out of "
        "the test text) or data.overlap=warn (keeps them, and the manifest says so); where they only begin alike, with "
        "a licence, data.repeated_heads=drop; where a file holds several of a kind, data.split_by=file"
    )


def sentence(names: Sequence[str]) -> str:
    """How many test documents occur in the training text, and the first of their names."""
    shown = ", ".join(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    occur = "1 test document occurs" if len(names) == 1 else f"{len(names)} test documents occur"
    return f"{occur} in the training text ({shown})"
