"""Train, validation and test text of a corpus that has no official splits: by document, or within each document."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ropelab.data.documents import SPLITS, Document, document
from ropelab.data.hub import HubDocuments

FEWEST_DOCUMENTS = 10  # with fewer, every document is split
HELD_OUT = 0.05  # of the documents, or of each document, for validation and for test

# folders and files of these names are official splits, in one file or in the hub's numbered ones
_OFFICIAL = re.compile(r"(train|validation|valid|val|dev|test)(-\d+(-of-\d+)?)?")


def official_split(name: str) -> str | None:
    """The split that a file or folder (without its endings) is named after: "train", "validation", "test" or None."""
    match = _OFFICIAL.fullmatch(name.lower())
    if not match:
        return None
    return match[1] if match[1] in SPLITS else "validation"


def make_splits(
    documents: Sequence[Document], held_out: Sequence[str] = ("validation", "test")
) -> tuple[dict[str, Sequence[Document]], str]:
    """Split documents into "train" and what is to be held out; and how it was done, in words.

    Of few and very short documents nothing may be left for a split.
    """
    names = ("train", *held_out)
    if len(documents) >= FEWEST_DOCUMENTS:
        parts = split_by_digest([document.digest for document in documents], len(held_out))
        how = f"documents by sha256 of the text, {HELD_OUT:.0%} each for {' and '.join(held_out)}"
        return {name: _take(documents, part) for name, part in zip(names, parts, strict=True)}, how
    splits: dict[str, list[Document]] = {name: [] for name in names}
    for whole in documents:
        for name, text in zip(names, split_contiguously(whole.text, len(held_out)), strict=True):
            if text:
                splits[name].append(document(f"{whole.name} ({name})", text, whole.author))
    return dict(splits), f"each document at line ends, the last {HELD_OUT:.0%} each for {' and '.join(held_out)}"


def _take(documents: Sequence[Document], indices: Sequence[int]) -> Sequence[Document]:
    # rows of a dataset stay on the disk
    return documents.select(indices) if isinstance(documents, HubDocuments) else [documents[i] for i in indices]


def split_by_digest(digests: Sequence[str], n_held_out: int = 2) -> list[list[int]]:
    """Indices of the documents of the training text and of each held-out split, each in the order of the corpus.

    In the order of their digests the first 5% (at least one document) are the first held-out split, the next 5% the
    second: the split depends on the contents alone, neither on names nor on a seed.
    """
    assert len(digests) > n_held_out
    order = sorted(range(len(digests)), key=lambda index: (digests[index], index))
    size = max(1, round(HELD_OUT * len(digests)))
    held_out = [order[start : start + size] for start in range(0, n_held_out * size, size)]
    return [sorted(part) for part in (order[n_held_out * size :], *held_out)]


def split_contiguously(text: str, n_held_out: int = 2) -> list[str]:
    """The beginning of a text and its last pieces of 5%, cut at the line ends nearest to that.

    A text of fewer than 20 lines is cut at blanks, one of fewer than 20 words anywhere.
    """
    mark = next((mark for mark in "\n " if text.count(mark) >= 20), "")
    cuts = [0]
    for index in range(n_held_out, 0, -1):
        cuts.append(_cut(text, mark, round((1 - HELD_OUT * index) * len(text)), cuts[-1]))
    return [text[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _cut(text: str, mark: str, target: int, low: int) -> int:
    """The end of the piece nearest to `target`, behind `low` and before the text's end; `target` if there is none."""
    if not mark:
        return target
    ends = (text.rfind(mark, 0, target) + 1, text.find(mark, target) + 1)
    return min((end for end in ends if low < end < len(text)), key=lambda end: abs(end - target), default=target)
