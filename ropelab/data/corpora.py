"""The corpora by name: what each reads, how it is split, and a cheap key of what would be read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ropelab.data import hub, overlap, stdlib
from ropelab.data.documents import (
    SPLITS,
    Document,
    Progress,
    Texts,
    document,
    is_text_file,
    read_documents,
    read_text,
    stem,
)
from ropelab.data.splits import make_splits, official_split
from ropelab.schema import DataConfig

EVALUATE_ONLY = ("nonfiction", "wikitext")  # they have a test split alone

# an article of WikiText begins with a line " = Title = " (sections have more marks) between two empty ones
_ARTICLE = re.compile(r"(?:\A\s*|^ ?\n) (= (?!= )[^\n]+(?<! =) =) ?\n(?= ?\n)", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """Where a corpus comes from. key: JSON values, equal only if `read` would read the same again."""

    key: dict[str, Any]
    read: Callable[[Progress | None], Texts]


class CorpusInfo(NamedTuple):
    """A corpus as `ropelab data list` shows it; present is None where only data.path can say."""

    name: str
    summary: str
    present: bool | None


def find_source(config: DataConfig, *, evaluate_only: bool) -> Source:
    """The source of a corpus. ValueError: it is not there, or has no text to train on."""
    if config.name in EVALUATE_ONLY and not evaluate_only:
        raise ValueError(f"{config.name} only evaluates; train on books")
    match config.name:
        case "stdlib":
            root = stdlib.stdlib_folder()
            key = {"files": _states(stdlib.source_files(root)), "python": stdlib.python()}
            return Source(key, lambda progress: stdlib.read_stdlib(root, progress))
        case "text":
            return _text_source(_existing(config.path), config.text_field, evaluate_only)
        case "hf":
            return _hub_source(config, evaluate_only)
        case "wikitext":
            file = _one_file(preset_folder(config), "wiki.test.raw")
            return Source({"files": _states([file])}, lambda progress: _read_wikitext(file))
        case _:
            return _text_source(preset_folder(config), config.text_field, evaluate_only)


def _existing(path: str | None) -> Path:
    assert path is not None  # DataConfig refuses text and hf without a path
    found = Path(path).expanduser()
    if not found.exists():
        raise ValueError(f"data.path={path} does not exist: give a .txt or .jsonl file, or a folder of them")
    return found


def _states(files: Iterable[Path]) -> list[list[Any]]:
    """What changes when a file does: its name, size and times."""
    return [
        [str(file.resolve()), (state := file.stat()).st_size, state.st_mtime_ns, state.st_ctime_ns] for file in files
    ]


# --- text files -------------------------------------------------------------------------------------------------------


def _text_source(path: Path, text_field: str, evaluate_only: bool) -> Source:
    """A file, or a folder of files; those named after splits are the official splits."""
    if not path.is_dir():
        if not is_text_file(path):
            raise ValueError(f"{path} is no .txt or .jsonl file (also .gz, .xz): convert or rename it")
        files = {"train": [path]}
        ignored: list[str] = []
    else:
        files, ignored = _files_by_split(path)
        if evaluate_only and "test" in files:
            files = {"test": files["test"]}
    everything = [file for part in files.values() for file in part]
    root = path if path.is_dir() else path.parent
    key = {"files": _states(everything), "text_field": text_field, "evaluate_only": evaluate_only}

    def read(progress: Progress | None) -> Texts:
        found: dict[str, Sequence[Document]] = {}
        done = 0
        for split, part in files.items():
            documents = []
            for file in part:
                if progress:
                    progress("reading", done, len(everything))
                documents += read_documents(file, file.relative_to(root).as_posix(), text_field)
                done += 1
            found[split] = documents
        if progress:
            progress("reading", done, done)
        return _arrange(found, path, evaluate_only, {"ignored_files": ignored})

    return Source(key, read)


def _files_by_split(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """A folder's files by official split, and those left aside; all are training text where none is named so."""
    files = sorted(
        (path for path in folder.rglob("*") if path.is_file() and is_text_file(path)),
        key=lambda path: path.relative_to(folder).as_posix(),
    )
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not files:
        raise ValueError(f"{folder} holds no .txt or .jsonl file (also .gz, .xz): give another folder")
    found: dict[str, list[Path]] = {}
    ignored = []
    for path in files:
        inside = path.relative_to(folder)
        split = official_split(inside.parts[0] if len(inside.parts) > 1 else stem(path))
        if split:
            found.setdefault(split, []).append(path)
        else:
            ignored.append(inside.as_posix())
    return (found, ignored) if found else ({"train": files}, [])


def _arrange(
    found: dict[str, Sequence[Document]], path: Path | str, evaluate_only: bool, details: dict[str, Any]
) -> Texts:
    """The corpus of the splits that were found: missing ones are made from the training text.

    ValueError: there is no training text, too little to split, or test text occurs in it.
    """
    if evaluate_only:
        if "test" in found:
            return Texts([], [], found["test"], details | {"split": "official test split"})
        parts = list(found.values())
        everything = parts[0] if len(parts) == 1 else list(chain.from_iterable(parts))
        return Texts([], [], everything, details | {"split": "all of it is test text"})
    if "train" not in found:
        raise ValueError(f"{path} has no training text, only {' and '.join(found)}: name a file or folder train")
    how = "official"
    if missing := [split for split in SPLITS if split not in found]:
        made, how = make_splits(found["train"], missing)
        found = found | made
        if empty := [split for split in SPLITS if not found[split]]:
            raise ValueError(f"{path} is too short to be split, nothing is left for {empty[0]}: give more text")
    train, validation, test = (found[split] for split in SPLITS)
    shingles = overlap.collect((d.text for d in train), sum(d.n_bytes for d in train))
    if names := overlapping(test, shingles, {d.digest for d in train}):
        raise overlap.refusal(names)
    return Texts(train, validation, test, details | {"split": how}, shingles)


def overlapping(test: Iterable[Document], shingles: overlap.Shingles, digests: set[str]) -> list[str]:
    """The names of the documents that occur in training text, given its shingles and its documents' digests."""
    return [
        document.name
        for document in test
        if document.digest in digests or overlap.occurs(overlap.hashes(document.text, shingles.modulus), shingles)
    ]


# --- presets ----------------------------------------------------------------------------------------------------------


def preset_folder(config: DataConfig) -> Path:
    """The folder of books, nonfiction or wikitext: data.path or ROPELAB_DATA, itself or the folder above it."""
    given = config.path or os.environ.get("ROPELAB_DATA")
    if not given:
        raise ValueError(f"data={config.name} needs data.path or ROPELAB_DATA: the folder that holds {config.name}/")
    base = Path(given).expanduser()
    for folder in (base / config.name, base):
        if _is_preset(folder, config.name):
            return folder
    key = "data.path" if config.path else "ROPELAB_DATA"
    needed = "wiki.test.raw.xz" if config.name == "wikitext" else "test.jsonl.xz"
    raise ValueError(
        f"neither {base / config.name} nor {base} holds {config.name} ({needed}): set {key} to the folder of it"
    )


def _is_preset(folder: Path, name: str) -> bool:
    if not folder.is_dir():
        return False
    if name == "wikitext":
        return _one_file(folder, "wiki.test.raw").is_file()
    # books and nonfiction are told apart by the training text
    splits = {official_split(stem(path)) for path in folder.iterdir() if is_text_file(path)}
    return "test" in splits and ("train" in splits) == (name == "books")


def _one_file(folder: Path, name: str) -> Path:
    """The file, or its compressed form."""
    return next((file for ending in (".xz", ".gz") if (file := folder / (name + ending)).is_file()), folder / name)


def _read_wikitext(file: Path) -> Texts:
    return Texts([], [], _articles(read_text(file)), {"split": "official test split"})


def _articles(text: str) -> list[Document]:
    return [document(title, article) for title, article in wikitext_articles(text)]


def wikitext_articles(text: str) -> list[tuple[str, str]]:
    """(title, text with the title's line) of each article; together, in order, they are the whole text."""
    found = list(_ARTICLE.finditer(text))
    if not found:
        raise ValueError("the file has no line ' = Title = ' between empty lines: it is no raw WikiText")
    starts = [0, *(match.start(1) - 1 for match in found[1:])]  # an empty line before the first title stays with it
    titles = [match[1].strip("= ") for match in found]
    return [
        (title, text[start:end]) for title, start, end in zip(titles, starts, [*starts[1:], len(text)], strict=True)
    ]


# --- hub --------------------------------------------------------------------------------------------------------------


def _hub_source(config: DataConfig, evaluate_only: bool) -> Source:
    assert config.path is not None  # DataConfig refuses text and hf without a path
    path = str(Path(config.path).expanduser())
    if not Path(path).exists() and (path.count("/") > 1 or path.startswith((".", "/"))):
        raise ValueError(f"data.path={config.path} does not exist: give a folder, or a dataset's name on the hub")
    key: dict[str, Any] = {
        "path": path,
        "subset": config.subset,
        "text_field": config.text_field,
        "evaluate_only": evaluate_only,
    }
    if Path(path).exists():
        key["files"] = _states(sorted(file for file in Path(path).rglob("*") if file.is_file()))
        return Source(
            key,
            lambda progress: _read_hub(
                hub.load_hub(path, config.subset), path, config.text_field, evaluate_only, progress
            ),
        )
    loaded = hub.load_hub(path, config.subset)
    # what the hub holds may change: `datasets` tells by a fingerprint what was downloaded
    key["fingerprints"] = [[str(label), rows._fingerprint] for label, rows in loaded.items()]
    return Source(key, lambda progress: _read_hub(loaded, path, config.text_field, evaluate_only, progress))


def _read_hub(loaded: Any, path: str, text_field: str, evaluate_only: bool, progress: Progress | None) -> Texts:
    labels = {str(label): official_split(str(label)) for label in loaded}
    if evaluate_only and "test" in labels.values():
        labels = {label: split for label, split in labels.items() if split == "test"}
    found: dict[str, Sequence[Document]] = {}
    for label, split in labels.items():
        if split and split not in found:
            documents: Sequence[Document] = hub.read_split(loaded[label], label, path, text_field, progress)
            if Path(path).name == "wikitext":  # a row is a line there: documents are articles
                documents = _articles("".join(hub.wikitext_lines(loaded[label], text_field)))
            if documents:
                found[split] = documents
    if not found:
        raise ValueError(f"data.path={path} has no train, validation or test split with text in '{text_field}'")
    ignored = [str(label) for label in loaded if not official_split(str(label))]
    return _arrange(found, path, evaluate_only, {"ignored_splits": ignored})


def describe(path: str | None = None) -> list[CorpusInfo]:
    """Every corpus with a line about it, and whether it is on this machine (presets: below `path` or ROPELAB_DATA)."""
    return [CorpusInfo(name, summary, _is_present(name, path)) for name, summary in _SUMMARIES.items()]


def _is_present(name: str, path: str | None) -> bool | None:
    if name in ("text", "hf"):
        return None
    if name == "stdlib":
        return any(stdlib.stdlib_folder().glob("*.py"))
    base = path or os.environ.get("ROPELAB_DATA")
    return bool(base) and any(_is_preset(folder, name) for folder in (Path(str(base)) / name, Path(str(base))))


_SUMMARIES = {
    "stdlib": "sources of the running Python's standard library",
    "text": "your own .txt or .jsonl files or folders, also .gz or .xz (data.path)",
    "hf": "a dataset of the Hugging Face hub, or a local folder in its layout (data.path)",
    "books": "99 English novels of 1839 to 1917, split by author",
    "nonfiction": "5 English non-fiction works, evaluation only",
    "wikitext": "the 60 articles of the raw WikiText test set, evaluation only",
}
