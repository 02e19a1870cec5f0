"""First lines that several documents share: a licence, a banner of the site that they come from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ropelab.data.documents import Document, document
from ropelab.data.overlap import WIDTH

FEWEST = 3  # documents that begin alike


def without_repeated_heads(
    found: Mapping[str, Sequence[Document]],
) -> tuple[dict[str, Sequence[Document]], dict[str, Any]]:
    """The documents of each split without the first lines that they share with others; and what that came to.

    A head is the longest run of whole first lines with which at least `FEWEST` documents of the corpus begin, of
    `WIDTH` bytes or more: what is shorter is no overlap. A document that is nothing but its head is empty then.
    """
    everything = [one for documents in found.values() for one in documents]
    ends = _heads([one.text for one in everything])
    rest: dict[str, Sequence[Document]] = {}
    whole = iter(zip(everything, ends, strict=True))
    for split, documents in found.items():
        rest[split] = [_without_head(*next(whole)) for _ in range(len(documents))]
    cut = [
        (before.n_bytes - after.n_bytes, after.n_bytes)
        for before, after in zip(everything, (one for documents in rest.values() for one in documents), strict=True)
        if before.n_bytes != after.n_bytes
    ]
    facts = {"documents": len(cut), "bytes": sum(head for head, _ in cut), "nothing_else": sum(not n for _, n in cut)}
    return rest, facts


def _without_head(whole: Document, end: int) -> Document:
    if len(whole.text[:end].encode()) < WIDTH:
        return whole
    return document(whole.name, whole.text[end:], whole.author)


def _heads(texts: Sequence[str]) -> list[int]:
    """Where the shared head of each text ends: line by line, in groups of texts that were equal so far."""
    ends = [0] * len(texts)
    groups = [list(range(len(texts)))] if len(texts) >= FEWEST else []
    while groups:
        finer: list[list[int]] = []
        for group in groups:
            by_line: dict[str, list[int]] = defaultdict(list)
            for index in group:
                text, start = texts[index], ends[index]
                if start < len(text):
                    by_line[text[start : text.find("\n", start) + 1 or len(text)]].append(index)
            for line, alike in by_line.items():
                if len(alike) >= FEWEST:
                    for index in alike:
                        ends[index] += len(line)
                    finer.append(alike)
        groups = finer
    return ends
