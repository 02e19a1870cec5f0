"""Text documents: one is a .txt file, a line of a .jsonl file, or a row of a dataset."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ropelab.data.overlap import EMPTY, Shingles

SUFFIXES = (".txt", ".jsonl")
COMPRESSIONS = ("", ".gz", ".xz")
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


def is_text_file(path: Path) -> bool:
    """Whether the name says that this is a file of documents: .txt or .jsonl, also .gz or .xz, and not hidden."""
    return not path.name.startswith(".") and path.name.lower().endswith(
        tuple(suffix + compression for suffix in SUFFIXES for compression in COMPRESSIONS)
    )


def stem(path: Path) -> str:
    """The file's name without .txt or .jsonl and without .gz or .xz."""
    name = path.name
    for endings in (COMPRESSIONS[1:], SUFFIXES):
        for ending in endings:
            if name.lower().endswith(ending):
                name = name[: -len(ending)]
                break
    return name


def read_documents(path: Path, name: str, text_field: str) -> list[Document]:
    """The documents of one file: one of a .txt file, one of each line of a .jsonl file that has text.

    name: what the documents are called after, where they have no title of their own.
    ValueError: names the file, and the line or the byte, when it is empty, binary, not UTF-8 or not JSON.
    """
    text = read_text(path)
    if _is_jsonl(path):
        return _parse_jsonl(text, path, name, text_field)
    return [document(name, text)]


def _is_jsonl(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").removesuffix(".xz").endswith(".jsonl")


def read_text(path: Path) -> str:
    """The text of a file, decompressed by its suffix (.gz, .xz), without a byte-order mark."""
    data = _read_bytes(path)
    if not data.removeprefix(b"\xef\xbb\xbf"):
        raise ValueError(f"{path} is empty: remove it or give a file that holds text")
    if (offset := data.find(b"\0")) >= 0:
        raise ValueError(f"{path} is binary (a NUL byte at offset {offset}), not text: remove it or give a text file")
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}): convert it, "
            "for example with iconv -f latin1 -t utf-8"
        ) from None


def _read_bytes(path: Path) -> bytes:
    ending = path.suffix.lower()
    try:
        if ending == ".gz":
            with gzip.open(path) as file:
                return file.read()
        if ending == ".xz":
            with lzma.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or no {ending} file ({error}): fetch it again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check its permissions") from None


def _parse_jsonl(text: str, path: Path, name: str, text_field: str) -> list[Document]:
    documents = []
    # not splitlines(): that also cuts at U+2028 and its like, which JSON strings may hold as they are
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number},"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error}): one object a line is needed") from None
        if not isinstance(row, dict):
            raise ValueError(f'{where} is no JSON object: it must look like {{"{text_field}": "..."}}')
        if body := text_of(row, text_field, where):
            try:
                documents.append(document(title_of(row) or f"{name}:{number}", body, author_of(row)))
            except UnicodeEncodeError as error:
                raise ValueError(f"{where} has half a surrogate pair at character {error.start}: repair it") from None
    if not documents:
        raise ValueError(f"{path} holds no text: every line's '{text_field}' is empty")
    return documents


def text_of(row: dict[str, Any], text_field: str, where: str) -> str:
    """The text of a row; ValueError, naming the row's fields, when it has no such field or no text in it."""
    value = row.get(text_field)
    if isinstance(value, str):
        return value
    if text_field in row:
        raise ValueError(f"{where} has no text in '{text_field}' but {type(value).__name__}")
    others = [key for key, value in row.items() if isinstance(value, str)]
    raise ValueError(f"{where} has no field '{text_field}': {offer_fields(others)}")


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
