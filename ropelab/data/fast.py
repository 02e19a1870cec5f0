"""tokenizer.json, the format of the `tokenizers` library: our tokenisers written to it, and any read from it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ropelab.data.tokenizers import LIMIT, Bpe, Bytes, Tokenizer, Tokens, alphabet, merge_pair
from ropelab.files import load_json

if TYPE_CHECKING:
    import tokenizers

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte that no token holds, in vocabularies with byte fallback
_SPACE = "▁"  # U+2581, for a space in vocabularies of SentencePiece
MAX_IDS = 2**24  # the largest vocabularies that there are have some 2**18
TRIAL_SECONDS = 10  # of work for a trial, and one for each MiB of the tokeniser: a vocabulary of 256,000 takes 0.06
_PATIENCE = 300  # seconds by the clock, beside them
_SPARE = 2**30  # bytes that a trial may take, and 64 for each of the tokeniser's: that vocabulary takes 15
_GROWTH = 64  # characters made of one: Unicode's own compatibility forms have 18 at most
_LIMITED = """
import json, os, resource, signal, sys
given = json.load(sys.stdin)
try:
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + given["spare"], resource.RLIM_INFINITY))
except (OSError, ValueError):
    pass  # no /proc, or a limit already: the time is limited all the same
signal.signal(signal.SIGPROF, signal.SIG_DFL)
signal.setitimer(signal.ITIMER_PROF, given["seconds"])  # of work: a busy machine is no fault
"""
_TRIAL = """
try:
    encoder = Tokenizer.from_str(given["source"])
except Exception as error:
    print(" ".join(str(error).split())[:200])
    sys.exit(4)
for line in given["text"].splitlines(keepends=True):
    most = given["growth"] * len(line)
    if encoder.normalizer is not None and len(encoder.normalizer.normalize_str(line)) > most:
        sys.exit(3)
    if encoder.pre_tokenizer is not None:
        if sum(len(piece) for piece, _ in encoder.pre_tokenizer.pre_tokenize_str(line)) > most:
            sys.exit(3)
(encoded,) = encoder.encode_batch_fast([given["text"]], add_special_tokens=True)
encoder.decode(encoded.ids, skip_special_tokens=False)
"""


class Fast(Tokenizer):
    """A tokeniser of the `tokenizers` library, of a checkpoint whose text pieces are not ours.

    source: the parsed tokenizer.json. rows: ids that the model has, where they are more than the tokeniser's.
    Special tokens are never added. Byte lengths are those of the tokens' text: `keeps_bytes` says whether they add up.
    Only what came through a trial (`tried`) is loaded: a stranger's tokenizer.json may have no end already there.
    ValueError: it is no tokenizer.json.
    """

    name = "fast"

    def __init__(self, source: Mapping[str, Any], rows: int = 0) -> None:
        if isinstance(rows, bool) or not isinstance(rows, int) or not 0 <= rows <= MAX_IDS:
            raise ValueError(f"a tokeniser has no {str(rows)[:40]} rows")
        self._source = dict(source) | {"padding": None, "truncation": None}
        with _failing_as("it cannot be read"):
            vocabulary = self._encoder.get_vocab(with_added_tokens=True)
            added = {token["content"] for token in self._source.get("added_tokens") or []}
            by_letter = alphabet() if _byte_level(self._source) else None
        if not vocabulary:
            raise ValueError("it has no vocabulary")
        self.size = 1 + max(vocabulary.values())
        if self.size > MAX_IDS:
            raise ValueError(f"it has the id {self.size - 1}, which no model has a row for")
        self.n_vocab = max(self.size, rows) + 1
        self.byte_lengths = np.zeros(self.n_vocab - 1, np.int64)
        for token, index in vocabulary.items():
            self.byte_lengths[index] = _n_bytes(token, None if token in added else by_letter)

    def definition(self) -> dict[str, Any]:
        return {"name": self.name, "rows": self.n_vocab - 1, "source": self._source}

    @cached_property
    def _encoder(self) -> tokenizers.Tokenizer:
        from tokenizers import Tokenizer as Encoder

        return Encoder.from_str(json.dumps(self._source))

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        with _failing_as("the checkpoint's tokeniser fails on this text"):
            encoded = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, self.dtype) for one in encoded]

    def ids(self, text: str, *, special: bool) -> list[int]:
        """Ids of a short text, with or without what the post-processor puts around it."""
        with _failing_as("the checkpoint's tokeniser fails on a text"):
            return list(self._encoder.encode(text, add_special_tokens=special).ids)

    def id_of(self, content: str) -> int | None:
        """The id of the token that is written so; None where there is none."""
        found: int | None = self._encoder.token_to_id(content)
        return found

    def decode_bytes(self, tokens: ArrayLike) -> bytes:
        ids = [token for token in np.asarray(tokens).tolist() if token != self.separator]
        return self._encoder.decode(ids, skip_special_tokens=False).encode()


@contextmanager
def _failing_as(what: str) -> Iterator[None]:
    """`ValueError` in one line for whatever the library raises: a plain Exception, or a panic of what is beneath it."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{what} ({said})") from None


def tried(source: Mapping[str, Any], rows: int) -> Fast:
    """A `Fast`, after it was loaded and encoded a short text in a process of its own, with little time and memory.

    For a stranger's steps may have no end. The text has runs of every printable ASCII character, on which a pattern
    with one quantifier inside another never ends. `ValueError` where it is no tokenizer.json, or its steps do not come
    to an end, fail, or make far more text than they are given.
    """
    letters = [*map(chr, range(32, 127)), "\t", "\n", "é", "汉", "🙂"]
    runs = "\n".join(letter * 64 for letter in letters)
    text = f"The quick brown fox, aged 1234, jumps over a bad cabbage; it didn't fade. \n{runs}"
    try:
        written = json.dumps(source)
    except (RecursionError, TypeError, ValueError):
        raise ValueError("it cannot be read (it is nested too deeply)") from None
    seconds, spare = TRIAL_SECONDS + len(written) / 2**20, _SPARE + 64 * len(written)
    given = {"source": written, "text": text, "growth": _GROWTH}
    status, said = apart("from tokenizers import Tokenizer", _TRIAL, given, seconds=seconds, spare=spare)
    if status == 4:
        raise ValueError(f"it cannot be read ({said})")
    if status == -signal.SIGPROF:
        why = f"is not done with {len(text)} characters in {seconds:.0f} seconds; its steps may have no end"
    elif status == 3:
        why = f"makes more than {_GROWTH} characters of each"
    elif status:
        why = f"fails on {len(text)} characters of plain text, or takes more than {spare >> 20} MiB for them"
    else:
        return Fast(source, rows)
    raise ValueError(f"it {why}: it is damaged or hostile")


def apart(imports: str, work: str, given: Mapping[str, Any], *, seconds: float, spare: int = _SPARE) -> tuple[int, str]:
    """Python statements in a process of its own, with limits: its exit status and what it printed.

    imports: come before the limits. given: JSON values, which `work` finds under this name. seconds: of work, after
    which the status is -SIGPROF. spare: bytes that may be taken beside the imports.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", f"{imports}\n{_LIMITED}{work}"], capture_output=True, text=True, check=False,
            input=json.dumps({**given, "seconds": seconds, "spare": spare}), timeout=_PATIENCE + seconds,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -signal.SIGPROF, ""
    return done.returncode, done.stdout.strip()


def _byte_level(source: Mapping[str, Any]) -> bool:
    """Are the tokens written in GPT-2's alphabet of bytes?"""
    kinds = []
    for part in ("pre_tokenizer", "decoder"):
        found = source.get(part) or {}
        steps = found.get("pretokenizers") or found.get("decoders") or [found]
        kinds += [step.get("type") for step in steps]
    return "ByteLevel" in kinds


def _n_bytes(token: str, by_letter: Mapping[str, int] | None) -> int:
    if by_letter is not None:
        return len(token)  # a letter is a byte
    if _BYTE.fullmatch(token):
        return 1
    return len(token.replace(_SPACE, " ").encode())


def keeps_bytes(tokenizer: Tokenizer, documents: Sequence[Tokens], n_bytes: NDArray[np.int64]) -> bool:
    """Do the byte lengths of the tokens add up to those of the texts? A space put before a text is allowed."""
    sums = np.array([tokenizer.byte_lengths[tokens].sum() for tokens in documents])
    return bool((np.abs(sums - n_bytes) <= 1).all())


def to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json of one of ours, without its separator: no text has it and no model predicts it."""
    from tokenizers import Tokenizer as Encoder
    from tokenizers import decoders, pre_tokenizers
    from tokenizers.models import BPE

    if isinstance(tokenizer, Fast):
        return dict(tokenizer.definition()["source"])
    if isinstance(tokenizer, Bytes):
        encoder = Encoder(BPE(alphabet(), []))
    else:
        assert isinstance(tokenizer, Bpe)
        known = tokenizer.definition()
        merges = [merge_pair(pair) for pair in known["merges"]]
        encoder = Encoder(BPE({token: index for index, token in enumerate(known["vocabulary"])}, merges))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=isinstance(tokenizer, Bpe))
    encoder.decoder = decoders.ByteLevel()
    written: dict[str, Any] = json.loads(encoder.to_str())
    return written


def from_json(source: Mapping[str, Any], rows: int) -> Tokenizer:
    """The tokeniser of a tokenizer.json for a model of `rows` tokens: one of ours where it is one, else a `Fast`.

    It may have ids that the model has not: special tokens that no text has. `ValueError`, without the file's name, for
    what is no tokenizer.json, or does not pass its trial.
    """
    try:
        found = _ours(source)
    except (AttributeError, LookupError, TypeError, ValueError):  # not even the shape of one: `Fast` says what is wrong
        found = None
    return found if found is not None and rows == found.n_vocab - 1 else tried(source, rows)


def prefix(tokenizer: Tokenizer) -> list[int]:
    """The ids that a tokeniser's own post-processor puts before a text."""
    if not isinstance(tokenizer, Fast):
        return []
    plain, whole = (tokenizer.ids("a", special=special) for special in (False, True))
    starts = [k for k in range(len(whole)) if plain and whole[k : k + len(plain)] == plain]
    return whole[: starts[0]] if starts else []


def token_id(tokenizer: Tokenizer, content: str) -> int | None:
    """The id of a token that is written so; None where there is none, and for a tokeniser of ours."""
    return tokenizer.id_of(content) if isinstance(tokenizer, Fast) else None


def _ours(source: Mapping[str, Any]) -> Tokenizer | None:
    """`Bytes` or `Bpe`, if every text has the same tokens under it; None else."""
    model = source.get("model") or {}
    before = source.get("pre_tokenizer") or {}
    after = (source.get("post_processor") or {}).get("type", "ByteLevel")  # others put tokens before a text
    plain = model.get("type") == "BPE" and not source.get("normalizer") and before.get("type") == "ByteLevel"
    odd = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    if not plain or after != "ByteLevel" or before.get("add_prefix_space") or any(model.get(key) for key in odd):
        return None
    # a token that was added is one wherever a text spells it, which ours know nothing of
    if source.get("added_tokens"):
        return None
    vocabulary = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if sorted(model["vocab"].values()) != list(range(len(vocabulary))):
        return None
    if any(letter not in alphabet() for token in vocabulary for letter in token):
        return None
    merges = [merge_pair(merge) for merge in model["merges"]]
    if before.get("use_regex", True):
        return Bpe("gpt2" if len(vocabulary) == 50256 else "bpe", vocabulary, merges)
    return Bytes() if model["vocab"] == alphabet() and not merges else None


def load_tokenizer(path: Path) -> Tokenizer:
    """Read what `Tokenizer.save` wrote. `ValueError`: the file is no tokeniser, or one that does not pass its trial."""
    try:
        value = load_json(Path(path), limit=LIMIT)
        if value["name"] == Bytes.name:
            return Bytes()
        if value["name"] == "fast":
            return tried(value["source"], value["rows"])
        if value["name"] not in ("bpe", "gpt2"):
            raise ValueError("its name is none of bytes, bpe, gpt2, fast")
        return Bpe(value["name"], value["vocabulary"], [merge_pair(pair) for pair in value["merges"]])
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: the run's tokeniser is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} is no tokeniser ({said}): it is damaged or another file") from None
