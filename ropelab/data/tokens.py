"""Tokenised corpora: memory-mapped files in the cache, one folder for each pair of corpus and tokeniser."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropelab import files
from ropelab.data.documents import SPLITS, Document, Progress, Texts
from ropelab.data.overlap import Shingles
from ropelab.data.tokenizers import Tokenizer, Tokens

FORMAT = 1  # of the folders; another number is rebuilt
BATCH = 2**23  # bytes of text tokenised at a time
INDEX_LIMIT = 2**32  # bytes of index.json: a line for every document
ALWAYS_READ = 2**25  # bytes up to which a file is compared with its sha256 whenever it is opened: 20 ms

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a tokenised corpus.

    name: "train", "validation" or "test".
    tokens: (n_tokens,) uint16 or uint32, read-only, all documents back to back without separators.
    offsets: (n_documents + 1,) int64; document i is tokens[offsets[i]:offsets[i+1]].
    digests: sha256 of each document's text. n_bytes: (n_documents,) int64, UTF-8 bytes of each.
    authors: who wrote each, or what else makes documents alike; `unit` is the word for it.
    """

    name: str
    tokens: Tokens
    offsets: NDArray[np.int64]
    names: list[str]
    authors: list[str | None]
    digests: list[str]
    n_bytes: NDArray[np.int64]
    unit: str = "author"

    def __len__(self) -> int:
        return len(self.names)

    def document(self, index: int) -> Tokens:
        """The tokens (n,) of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def select(self, indices: Sequence[int]) -> Split:
        """Only these of the documents, their tokens in memory."""
        documents = [self.document(index) for index in indices]
        return Split(
            self.name,
            np.concatenate([self.tokens[:0], *documents]),
            np.cumsum([0, *map(len, documents)]),
            [self.names[index] for index in indices],
            [self.authors[index] for index in indices],
            [self.digests[index] for index in indices],
            self.n_bytes[list(indices)],
        )


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenised corpus.

    digest: of the documents' texts, names and splits; where the files lie does not enter.
    details: facts for the manifest, JSON values only (how it was split, what was left out, counts).
    shingles: the sampled shingles of the training text, for `check_overlap`.
    """

    name: str
    digest: str
    tokenizer: Tokenizer
    train: Split
    validation: Split
    test: Split
    details: dict[str, Any]
    shingles: Shingles


def load_or_build(
    folder: Path, tokenizer: Tokenizer, texts: Callable[[], Texts], progress: Progress | None
) -> tuple[dict[str, Split], Shingles]:
    """The splits and the training shingles in a folder of the cache, which is built if it is missing or damaged."""
    for _ in range(3):  # another process may find the same damage and remove what was just built
        if folder.exists():
            try:
                return _load(folder, tokenizer)
            except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
                _log.warning("the token cache %s is damaged (%s): it is built again", folder, error)
                files.remove(folder, within=folder.parent)
        with files.new_folder(folder) as temporary:
            _build(temporary, tokenizer, texts(), progress)
            # where another process was first, its folder is loaded: the contents are the same
            files.publish(temporary, folder)
    return _load(folder, tokenizer)


def _build(folder: Path, tokenizer: Tokenizer, texts: Texts, progress: Progress | None) -> None:
    total = texts.n_bytes()
    done = 0

    def encoded(documents: Iterable[Document], rows: list[Document], lengths: list[int]) -> Iterator[Tokens]:
        """The tokens of each document; what the index says of it goes to `rows` and `lengths`."""
        nonlocal done
        for batch in _batches(documents):
            if progress:
                progress("tokenising", done, total)
            for document, tokens in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
                rows.append(document._replace(text=""))
                lengths.append(len(tokens))
                done += document.n_bytes
                yield tokens

    index: dict[str, Any] = {"format": FORMAT, "dtype": tokenizer.dtype.str}
    for split, documents in texts.splits():
        rows: list[Document] = []
        lengths: list[int] = []
        index[split] = _write(folder / f"{split}.bin", encoded(documents, rows, lengths)) | {
            "offsets": np.cumsum([0, *lengths]).tolist(),
            "names": [row.name for row in rows],
            "authors": [row.author for row in rows],
            "digests": [row.digest for row in rows],
            "n_bytes": [row.n_bytes for row in rows],
        }
    index["shingles"] = _write(folder / "shingles.bin", [texts.shingles.hashes.astype("<u8")]) | {
        "modulus": texts.shingles.modulus
    }
    files.write_sealed(folder / "index.json", index)
    if progress:
        progress("tokenising", total, total)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents of about `BATCH` bytes at a time."""
    batch: list[Document] = []
    n_bytes = 0
    for document in documents:
        batch.append(document)
        n_bytes += document.n_bytes
        if n_bytes >= BATCH:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch


def _write(path: Path, arrays: Iterable[NDArray[Any]]) -> dict[str, Any]:
    """Write arrays back to back; what `_map` needs to see that the file is whole."""
    digest = hashlib.sha256()
    with files.naming(path), path.open("wb") as file:
        for array in arrays:
            data = array.tobytes()
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    state = path.stat()
    return {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": digest.hexdigest()}


def _load(folder: Path, tokenizer: Tokenizer) -> tuple[dict[str, Split], Shingles]:
    index = files.read_json(folder / "index.json", limit=INDEX_LIMIT)
    if not isinstance(index, dict) or index.get("format") != FORMAT or index["dtype"] != tokenizer.dtype.str:
        raise ValueError("its index.json is missing, cut short or of another version")
    splits = {}
    for split in SPLITS:
        facts = index[split]
        tokens = _map(folder / f"{split}.bin", tokenizer.dtype, facts)
        offsets = np.array(facts["offsets"], np.int64)
        columns = [facts[key] for key in ("names", "authors", "digests", "n_bytes")]
        if {len(column) + 1 for column in columns} != {len(offsets)} or offsets[-1] != len(tokens):
            raise ValueError(f"its index.json does not fit {split}.bin")
        names, authors, digests, n_bytes = columns
        splits[split] = Split(split, tokens, offsets, names, authors, digests, np.array(n_bytes, np.int64))
    shingles = _map(folder / "shingles.bin", np.dtype("<u8"), index["shingles"])
    return splits, Shingles(shingles, index["shingles"]["modulus"])


def _map(path: Path, dtype: np.dtype[Any], facts: dict[str, Any]) -> NDArray[Any]:
    """Memory-map a file; ValueError when it is not the one that was written.

    A large file whose size and time are those it was written with is taken as it is, so that a large cache opens at
    once. One that was touched since (or copied), and any of up to `ALWAYS_READ` bytes, is compared with its sha256.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    state = path.stat()
    if state.st_size != facts["size"]:
        raise ValueError(f"{path.name} has {state.st_size} bytes instead of {facts['size']}")
    touched = state.st_mtime_ns != facts["mtime_ns"]
    if touched or state.st_size <= ALWAYS_READ:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                raise ValueError(f"{path.name} was altered")
    if touched:
        try:
            os.utime(path, ns=(state.st_atime_ns, facts["mtime_ns"]))
        except OSError:
            _log.debug("%s belongs to someone else: it is read through each time", path)
    if not state.st_size:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    # a plain array over the map: indexing a memmap object is slower
    return np.asarray(np.memmap(path, dtype, mode="r"))
