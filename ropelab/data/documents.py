"""Text documents: one is a file of plain text, or a row of a table or of a dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ropelab.data.overlap import EMPTY, Shingles

SPLITS = ("train", "validation", "test")

Progress = Callable[[str, int, int], None]  # (what is being done, done, total)


class Document(NamedTuple):
    """A text with its name; `digest` is the sha256 of the text in UTF-8, `n_bytes` its length there."""

    name: str
    text: str
    author: str | None
    digest: str
    n_bytes: int


def document(name: str, text: str, author: str | None = None) -> Document:
    """A document of a text as it is, but for line ends of two characters."""
    text = text.replace("\r\n", "\n")
    data = text.encode()
    return Document(name, text, author, hashlib.sha256(data).hexdigest(), len(data))


class TextsOf(Sequence[str]):
    """The texts of documents, each read when it is asked for."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __iter__(self) -> Iterator[str]:
        return (document.text for document in self._documents)

    def __getitem__(self, index: Any) -> Any:
        return self._documents[index].text


@dataclass(frozen=True)
class Texts:
    """A corpus before it is tokenised: the documents of each split.

    details: facts for the manifest, JSON values only.
    shingles: of the training text, empty without one.
    """

    train: Sequence[Document]
    validation: Sequence[Document]
    test: Sequence[Document]
    details: dict[str, Any]
    shingles: Shingles = EMPTY

    def splits(self) -> Iterator[tuple[str, Sequence[Document]]]:
        """The three splits with their names."""
        for name in SPLITS:
            yield name, getattr(self, name)

    def n_bytes(self) -> int:
        """Length of all texts in UTF-8."""
        return sum(document.n_bytes for _, documents in self.splits() for document in documents)


def text_of(row: dict[str, Any], text_field: str, where: str) -> str | None:
    """The text of a row, None where it has a null there. ValueError, naming the row's fields: it has no such field."""
    value: Any = row
    # a field may be called so as it stands
    for key in (text_field,) if text_field in row else text_field.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"{where} has no field '{text_field}': {offer_fields(_text_fields(row))}")
        value = value[key]
    if value is None or isinstance(value, str):
        return value
    inside = [f for f in _text_fields(row) if f.startswith(f"{text_field}.")] if isinstance(value, dict) else []
    fix = f": {offer_fields(inside)}" if inside else ""
    raise ValueError(f"{where} has no text in '{text_field}' but {type(value).__name__}{fix}")


def _text_fields(row: dict[str, Any]) -> list[str]:
    """The fields of a row that hold text, also those one level down."""
    found = []
    for key, value in row.items():
        if isinstance(value, str):
            found.append(key)
        elif isinstance(value, dict):
            found += [f"{key}.{inner}" for inner, deeper in value.items() if isinstance(deeper, str)]
    return found


def offer_fields(fields: list[str]) -> str:
    """What to set data.text_field to, among the fields that hold text."""
    return f"set data.text_field to one of {', '.join(fields)}" if fields else "no other field holds text"


def title_of(row: dict[str, Any]) -> str | None:
    """What a row calls itself: its title, else its id."""
    return next((row[key] for key in ("title", "id") if isinstance(row.get(key), str) and row[key]), None)


def author_of(row: dict[str, Any]) -> str | None:
    """The author that a row names."""
    author = row.get("author")
    return author if isinstance(author, str) and author else None
