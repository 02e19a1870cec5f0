"""From a configuration to a tokenised corpus: read, split, checked and tokenised once, then from the cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache as once
from pathlib import Path
from typing import Any

from ropelab import files
from ropelab.config import DataConfig
from ropelab.data import overlap
from ropelab.data.corpora import Source, find_source, overlapping
from ropelab.data.documents import Document, Progress, Texts, TextsOf
from ropelab.data.fast import load_tokenizer
from ropelab.data.stdlib import module_of
from ropelab.data.tokenizers import Bytes, Tokenizer, read_gpt2, train_bpe
from ropelab.data.tokens import Corpus, Split, load_or_build
from ropelab.errors import CacheError

_log = logging.getLogger(__name__)

VERSION = 1  # of how corpora are read, split and checked: another number reads them again


@dataclass(frozen=True)
class Facts:
    """What is kept of a corpus that was read, so that the next command need not read it."""

    digest: str
    train_digest: str
    details: dict[str, Any]


def prepare(
    config: DataConfig,
    *,
    cache_dir: Path,
    evaluate_only: bool = False,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """The corpus of a configuration, from the cache where the text was not changed since.

    evaluate_only: only the test split is wanted (the official one, else all of the text).
    tokenizer: encode with this one instead of the configured one (a run's own, to evaluate it on other text).
    CacheError: the cache cannot be written.
    ValueError: names the file and the fix when the text is missing, damaged, or in train and test at once.
    """
    cache_dir = Path(cache_dir).expanduser()
    source = find_source(config, evaluate_only=evaluate_only)
    texts = once(lambda: source.read(progress))
    try:
        facts = _facts(source, config, cache_dir, texts)
        if tokenizer is None:
            tokenizer = _tokenizer(config, cache_dir, facts, texts, progress)
        folder = cache_dir / "tokens" / files.digest_of([facts.digest, tokenizer.digest])
        splits, shingles = load_or_build(folder, tokenizer, lambda: _unchanged(texts(), config, facts), progress)
    except OSError as error:  # text that cannot be read is a ValueError by here, so this is the cache
        raise CacheError(
            f"cache_dir={cache_dir} cannot be written ({error.strerror}): set it or ROPELAB_CACHE to another folder"
        ) from None
    if config.name == "stdlib":  # no author is part of its digest
        splits = {
            name: replace(s, authors=[module_of(n) for n in s.names], unit="module") for name, s in splits.items()
        }
    return Corpus(config.name, facts.digest, tokenizer, **splits, details=facts.details, shingles=shingles)


def _facts(source: Source, config: DataConfig, cache_dir: Path, texts: Callable[[], Texts]) -> Facts:
    path = cache_dir / "sources" / f"{files.digest_of([VERSION, config.name, source.key])}.json"
    stored = files.read_json(path)
    try:
        return Facts(**stored)
    except TypeError:  # there is none, or it is damaged
        facts = _read_facts(texts(), config)
        files.write_sealed(path, vars(facts))
        return facts


def _read_facts(texts: Texts, config: DataConfig) -> Facts:
    rows = {
        split: [[document.name, document.author, document.digest] for document in documents]
        for split, documents in texts.splits()
    }
    counts = {split: len(documents) for split, documents in texts.splits()}
    sizes = {split: sum(document.n_bytes for document in documents) for split, documents in texts.splits()}
    # the rest of the configuration shows in the documents and their splits
    kept = {"overlap": "warn"} if config.overlap == "warn" else None
    return Facts(
        digest=files.digest_of([rows, kept] if kept else rows),
        train_digest=files.digest_of([digest for _, _, digest in rows["train"]]),
        details=texts.details | {"documents": counts, "bytes": sizes},
    )


def _unchanged(texts: Texts, config: DataConfig, facts: Facts) -> Texts:
    """The texts, if they are still those that the facts are about."""
    if _read_facts(texts, config).digest != facts.digest:
        raise ValueError("the text was changed while it was prepared: start again when it is complete")
    return texts


def _tokenizer(
    config: DataConfig, cache_dir: Path, facts: Facts, texts: Callable[[], Texts], progress: Progress | None
) -> Tokenizer:
    if config.tokenizer == "bytes":
        return Bytes()
    if config.tokenizer == "gpt2":
        return read_gpt2(_gpt2_folder(config))
    if not facts.details["documents"]["train"]:
        raise ValueError(f"data.tokenizer=bpe is trained on training text, which {config.name} has not: use bytes")
    key = files.digest_of([facts.train_digest, config.vocab_size])
    path = cache_dir / "tokenizers" / key / "tokenizer.json"
    try:
        return load_tokenizer(path)
    except ValueError:  # there is none, or it is damaged
        trained = train_bpe(TextsOf(texts().train), config.vocab_size, progress)
        trained.save(path)
        return trained


def _gpt2_folder(config: DataConfig) -> Path:
    if config.tokenizer_path:
        return Path(config.tokenizer_path).expanduser()
    bases = [Path(base).expanduser() for base in (config.path, os.environ.get("ROPELAB_DATA")) if base]
    for base in bases:
        for folder in (base / "gpt2-tokenizer", base.parent / "gpt2-tokenizer"):
            if folder.is_dir():
                return folder
    return _gpt2_from_hub()


def _gpt2_from_hub() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        files = [hf_hub_download("openai-community/gpt2", name) for name in ("vocab.json", "merges.txt")]
    except Exception as error:  # whatever goes wrong in there is the network's or the hub's
        raise ValueError(
            f"data.tokenizer=gpt2 is neither here nor to be had from the hub ({type(error).__name__}): set "
            "data.tokenizer_path to a folder with encoder.json and vocab.bpe, or vocab.json and merges.txt"
        ) from None
    return Path(files[0]).parent


def check_overlap(train: Corpus, other: Corpus, policy: str = "refuse") -> Corpus:
    """The other corpus, its test text held against training text by a policy of `data.overlap`.

    With "drop" the documents that occur there are left out, and the digest is another. ValueError, naming them, with
    "refuse", and where nothing is left.
    """
    documents = (_document(other.test, index, other.tokenizer) for index in range(len(other.test)))
    places = overlapping(documents, train.shingles, set(train.train.digests))
    if not places:
        return other
    names = [other.test.names[place] for place in places]
    if policy == "refuse" or len(places) == len(other.test):
        raise overlap.refusal(names)
    share = f"{len(places) / len(other.test):.1%} of them"
    if policy == "warn":
        _log.warning("%s, %s: they are scored all the same (data.overlap)", overlap.sentence(names), share)
        return other
    _log.warning("%s, %s: left out (data.overlap)", overlap.sentence(names), share)
    test = other.test.select([index for index in range(len(other.test)) if index not in set(places)])
    return replace(other, digest=files.digest_of([other.digest, test.digests]), test=test)


def _document(split: Split, index: int, tokenizer: Tokenizer) -> Document:
    return Document(
        split.names[index],
        tokenizer.decode(split.document(index)),
        split.authors[index],
        split.digests[index],
        int(split.n_bytes[index]),
    )
