"""Tokenisers: bytes, byte-level BPE trained on the corpus, GPT-2's.

All three are lossless on any text and know the exact UTF-8 length of each token, also of one that holds a part of a
character; bits per byte depend on it. The last id is the separator between joined documents: no text encodes to it.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ropelab.data.documents import Progress
from ropelab.data.reading import chunks
from ropelab.files import digest_of, write_sealed

if TYPE_CHECKING:
    import tokenizers

Tokens = NDArray[np.unsignedinteger[Any]]  # uint16 or uint32, see Tokenizer.dtype

LONGEST = 1024  # bytes of a piece of text that BPE is trained on
LIMIT = 2**28  # bytes of a tokeniser's file
_PIECE = 2**20  # characters encoded at a time
_BLANKS = re.compile(rf"\s{{{LONGEST // 4}}}")  # a blank has up to three bytes
# A single line end between two visible ASCII characters: GPT-2's pattern splits behind it, whatever is around.
_LINE_END = re.compile(r"(?<=[!-~]\n)(?=[!-~])")


class Tokenizer(ABC):
    """Text to token ids and back.

    name: "bytes", "bpe" or "gpt2".
    n_vocab: ids are 0..n_vocab-1.
    byte_lengths: (n_vocab - 1,) int64, UTF-8 bytes of each token but the separator.
    """

    name: str
    n_vocab: int
    byte_lengths: NDArray[np.int64]

    @property
    def separator(self) -> int:
        """The last id: between joined documents, never scored, without a byte length."""
        return self.n_vocab - 1

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The narrowest integer type, little-endian, that holds every id."""
        return np.dtype("<u2") if self.n_vocab <= 2**16 else np.dtype("<u4")

    @cached_property
    def digest(self) -> str:
        """sha256 of the definition: equal if and only if every text has the same tokens."""
        return digest_of(self.definition())

    @abstractmethod
    def definition(self) -> dict[str, Any]:
        """All that defines the tokeniser, as JSON values."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of several texts, in parallel where that pays."""

    @abstractmethod
    def decode_bytes(self, tokens: ArrayLike) -> bytes:
        """The UTF-8 bytes of tokens (n,); a separator has none."""

    def encode(self, text: str) -> Tokens:
        """Tokens (n,) of a text; `decode` gives back exactly this text."""
        return self.encode_batch([text])[0]

    def decode(self, tokens: ArrayLike) -> str:
        """The text of tokens (n,); bytes that are no whole character become U+FFFD, separators nothing."""
        return self.decode_bytes(tokens).decode(errors="replace")

    def save(self, path: Path) -> None:
        """Write the definition to one JSON file, for `load_tokenizer`."""
        write_sealed(Path(path), self.definition())


class Bytes(Tokenizer):
    """The bytes of the text in UTF-8: 256 ids and the separator, 256."""

    name = "bytes"
    n_vocab = 257
    byte_lengths = np.ones(256, np.int64)

    def definition(self) -> dict[str, Any]:
        return {"name": self.name}

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]

    def decode_bytes(self, tokens: ArrayLike) -> bytes:
        ids = np.asarray(tokens, np.int64)
        return bytes(ids[ids != self.separator].astype(np.uint8))


class Bpe(Tokenizer):
    """Byte-level byte-pair encoding as in GPT-2 (Radford et al. 2019, section 2.2), with its pattern of pieces.

    vocabulary: the tokens in the order of their ids, in GPT-2's alphabet of one printable character a byte.
    merges: pairs of tokens in the order in which they are merged.
    ValueError: a token occurs twice, or a merge is not of tokens.
    """

    def __init__(self, name: str, vocabulary: Sequence[str], merges: Sequence[tuple[str, str]]) -> None:
        self.name = name
        self.n_vocab = len(vocabulary) + 1
        self._vocabulary = list(vocabulary)
        self._merges = [(left, right) for left, right in merges]
        known = set(vocabulary)
        if len(known) != len(self._vocabulary):
            raise ValueError("a token of its vocabulary occurs twice")
        if odd := next((pair for pair in self._merges if not {*pair, "".join(pair)} <= known), None):
            raise ValueError(f"its merge of {odd[0][:40]!r} and {odd[1][:40]!r} is not of tokens to a token")
        letters = alphabet()
        self._bytes = [bytes(letters[letter] for letter in token) for token in vocabulary]
        self.byte_lengths = np.array([len(token) for token in self._bytes], np.int64)

    def definition(self) -> dict[str, Any]:
        return {"name": self.name, "vocabulary": self._vocabulary, "merges": [" ".join(pair) for pair in self._merges]}

    @cached_property
    def _encoder(self) -> tokenizers.Tokenizer:
        from tokenizers import Tokenizer as Encoder
        from tokenizers.models import BPE

        encoder = Encoder(BPE({token: index for index, token in enumerate(self._vocabulary)}, self._merges))
        encoder.pre_tokenizer = _pieces()
        return encoder

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        pieces = [list(_cut_at_line_ends(text)) for text in texts]
        encoded = iter(self._encoder.encode_batch_fast([piece for parts in pieces for piece in parts]))
        return [np.concatenate([np.array(next(encoded).ids, self.dtype) for _ in parts]) for parts in pieces]

    def decode_bytes(self, tokens: ArrayLike) -> bytes:
        return b"".join(self._bytes[token] for token in np.asarray(tokens).tolist() if token != self.separator)


def train_bpe(texts: Sequence[str], vocab_size: int, progress: Progress | None = None) -> Bpe:
    """Train byte-level BPE (`vocab_size` entries, the separator included) on texts; equal texts give equal tokens.

    Training takes time that grows with the square of a piece's length, so where a text has pieces of more than
    `LONGEST` bytes (no blanks: a genome, Chinese) they are cut there for the training; encoding needs no such limit.
    A small corpus may run out of pairs to merge: then `n_vocab` is smaller than `vocab_size`.
    """
    from tokenizers import Tokenizer as Encoder
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    encoder = Encoder(BPE())
    encoder.pre_tokenizer = _short_pieces() if any(map(_has_long_run, texts)) else _pieces()
    trainer = BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=sorted(alphabet()), show_progress=False)
    told = progress or (lambda description, done, total: None)
    total = len(texts) + 1  # its pieces are counted text by text; then they are merged

    def parts() -> Iterator[str]:
        for done, text in enumerate(texts):
            told("training the tokeniser", done, total)
            yield from _cut_at_line_ends(text)

    encoder.train_from_iterator(parts(), trainer)
    told("training the tokeniser", total, total)
    model = json.loads(encoder.to_str())["model"]
    return Bpe(
        "bpe", sorted(model["vocab"], key=model["vocab"].__getitem__), [merge_pair(pair) for pair in model["merges"]]
    )


def merge_pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """A merge as a pair: older versions of `tokenizers` write "left right"."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def read_gpt2(folder: Path) -> Bpe:
    """GPT-2's tokeniser from encoder.json and vocab.bpe, or vocab.json and merges.txt (also .gz) in a folder.

    ValueError: names the folder and the files that it needs.
    """
    for names in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        files = [_plain_or_gz(folder / name) for name in names]
        if None not in files:
            break
    else:
        raise ValueError(
            f"{folder} has neither encoder.json and vocab.bpe nor vocab.json and merges.txt (or these with .gz)"
        )
    try:
        vocabulary: dict[str, int] = json.loads(_read(files[0]))
        lines = [line for line in _read(files[1]).split("\n") if line and not line.startswith("#version")]
        ordered = sorted(vocabulary, key=vocabulary.__getitem__)
        if ordered[-1] != "<|endoftext|>" or vocabulary[ordered[-1]] != len(ordered) - 1:
            raise ValueError("the last token must be <|endoftext|>")
        return Bpe("gpt2", ordered[:-1], [merge_pair(line) for line in lines])
    except (ValueError, KeyError, OSError, EOFError, AttributeError, RecursionError) as error:
        raise ValueError(f"{files[0]} and {files[1]} are no GPT-2 tokeniser ({error}): fetch them again") from None


def _plain_or_gz(path: Path) -> Path | None:
    return next((file for file in (path, path.with_name(path.name + ".gz")) if file.is_file()), None)


def _read(path: Path | None) -> str:
    assert path is not None
    pieces, done = [], 0
    for piece in chunks(path, lambda n_bytes: None):
        done += len(piece)
        if done > LIMIT:
            raise ValueError(f"{path} has more than {LIMIT} bytes")
        pieces.append(piece)
    return b"".join(pieces).decode()


def _pieces() -> Any:
    """GPT-2's pattern: words with their leading blank, numbers, punctuation, blanks; then bytes as characters."""
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel(add_prefix_space=False, use_regex=True)


def _short_pieces() -> Any:
    """GPT-2's pattern, and pieces of more than `LONGEST` bytes cut after so many."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Sequence as Steps
    from tokenizers.pre_tokenizers import Split

    return Steps([_pieces(), Split(Regex(f".{{{LONGEST}}}"), "isolated")])


def _has_long_run(text: str) -> bool:
    """Could the text have a piece of more than `LONGEST` bytes? That has no blanks in it, or is nothing but blanks."""
    longest = max(map(len, text.split()), default=0)  # of a character UTF-8 makes at most four bytes
    return longest > LONGEST // 4 or bool(_BLANKS.search(text))


def alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: itself where it is printable Latin-1, else one from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _cut_at_line_ends(text: str) -> Iterator[str]:
    """A long text in pieces of about a million characters, whose tokens are together those of the text."""
    start = 0
    while len(text) - start > 2 * _PIECE and (end := _LINE_END.search(text, start + _PIECE)):
        yield text[start : end.start()]
        start = end.start()
    yield text[start:]
