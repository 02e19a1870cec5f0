"""Train, validation and test text of a corpus without official splits: by document, file, or within each document."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence

from ropelab.config import SplitNames
from ropelab.data.documents import SPLITS, Document, document
from ropelab.data.hub import HubDocuments

FEWEST_DOCUMENTS = 10  # with fewer, every document is split

# folders and files of these names are official splits, in one file or in the hub's numbered ones
_OFFICIAL = re.compile(r"(train|validation|valid|val|dev|test)(-\d+(-of-\d+)?)?")


def official_split(name: str, names: SplitNames = SplitNames()) -> str | None:
    """The split that a file or folder (without its endings) is named after: "train", "validation", "test" or None.

    names: what splits are called in this corpus; one that is named so has no other name.
    """
    given = {split: getattr(names, split) for split in SPLITS}
    chosen = next((split for split, called in given.items() if called == name), None)
    if chosen is None and (usual := _usual_split(name)) is not None and given[usual] is None:
        return usual
    return chosen


def _usual_split(name: str) -> str | None:
    match = _OFFICIAL.fullmatch(name.lower())
    if not match:
        return None
    return match[1] if match[1] in SPLITS else "validation"


def make_splits(
    documents: Sequence[Document],
    held_out: Sequence[str] = ("validation", "test"),
    *,
    share: float = 0.05,
    files: Sequence[str] | None = None,
) -> tuple[dict[str, Sequence[Document]], str]:
    """Split documents into "train" and what is to be held out, `share` for each; and how it was done, in words.

    files: the file of each document, where those of one file are to stay in one split. Of few and very short documents
    nothing may be left for a split. ValueError: there are too few files.
    """
    names = ("train", *held_out)
    part = f"{100 * share:g}% each for {' and '.join(held_out)}"
    if files is not None:
        groups: dict[str, list[int]] = defaultdict(list)
        for index, file in enumerate(files):
            groups[file].append(index)
        if len(groups) <= len(held_out):
            raise ValueError(f"data.split_by=file needs more than {len(groups)} files: leave it out, or give more")
        digests = [_digest([documents[index].digest for index in group]) for group in groups.values()]
        members = list(groups.values())
        parts = [
            sorted(index for group in chosen for index in members[group])
            for chosen in split_by_digest(digests, len(held_out), share)
        ]
        how = f"files by sha256 of their documents', {part}"
        return {name: take(documents, part) for name, part in zip(names, parts, strict=True)}, how
    if len(documents) >= FEWEST_DOCUMENTS:
        parts = split_by_digest([document.digest for document in documents], len(held_out), share)
        how = f"documents by sha256 of the text, {part}"
        return {name: take(documents, part) for name, part in zip(names, parts, strict=True)}, how
    splits: dict[str, list[Document]] = {name: [] for name in names}
    for whole in documents:
        for name, text in zip(names, split_contiguously(whole.text, len(held_out), share), strict=True):
            if text:
                splits[name].append(document(f"{whole.name} ({name})", text, whole.author))
    return dict(splits), f"each document at line ends, the last {part}"


def _digest(digests: Sequence[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def take(documents: Sequence[Document], indices: Sequence[int]) -> Sequence[Document]:
    """Only these of the documents."""
    # rows of a dataset stay on the disk
    return documents.select(indices) if isinstance(documents, HubDocuments) else [documents[i] for i in indices]


def split_by_digest(digests: Sequence[str], n_held_out: int = 2, share: float = 0.05) -> list[list[int]]:
    """Indices of the documents of the training text and of each held-out split, each in the order of the corpus.

    In the order of their digests the first 5% (`share`; at least one document) are the first held-out split, the next
    5% the second: the split depends on the contents alone, neither on names nor on a seed.
    """
    assert len(digests) > n_held_out
    order = sorted(range(len(digests)), key=lambda index: (digests[index], index))
    size = min(max(1, round(share * len(digests))), (len(digests) - 1) // n_held_out)
    held_out = [order[start : start + size] for start in range(0, n_held_out * size, size)]
    return [sorted(part) for part in (order[n_held_out * size :], *held_out)]


def split_contiguously(text: str, n_held_out: int = 2, share: float = 0.05) -> list[str]:
    """The beginning of a text and its last pieces of 5% (`share`), cut at the line ends nearest to that.

    A text of fewer than 20 lines is cut at blanks, one of fewer than 20 words anywhere.
    """
    mark = next((mark for mark in "\n " if text.count(mark) >= 20), "")
    cuts = [0]
    for index in range(n_held_out, 0, -1):
        cuts.append(_cut(text, mark, round((1 - share * index) * len(text)), cuts[-1]))
    return [text[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _cut(text: str, mark: str, target: int, low: int) -> int:
    """The end of the piece nearest to `target`, behind `low` and before the text's end; `target` if there is none."""
    if not mark:
        return target
    ends = (text.rfind(mark, 0, target) + 1, text.find(mark, target) + 1)
    return min((end for end in ends if low < end < len(text)), key=lambda end: abs(end - target), default=target)
