"""The corpora by name: what each reads, how it is split, and a cheap key of what would be read."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ropelab.config import FIRST_ENDINGS, DataConfig, SplitNames
from ropelab.data import hub, overlap, reading, stdlib
from ropelab.data.documents import SPLITS, Document, Progress, Texts, document
from ropelab.data.heads import without_repeated_heads
from ropelab.data.splits import make_splits, official_split, take

EVALUATE_ONLY = ("nonfiction", "wikitext")  # they have a test split alone
MOST_NAMES = 100  # of files or documents that a manifest lists

# what lies beside a corpus and says something about it
_ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|changelog|(sha\d+|md5)sums?|checksums?|requirements)([._-].*)?"
    r"|(dataset_infos?|dataset_dict|state|metadata)\.(json|csv)",
    re.IGNORECASE,
)
_log = logging.getLogger(__name__)

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
        case "text" | "hf" if config.test_path is not None:
            return _with_own_test(config, evaluate_only)
        case "text":
            return _text_source(_existing(config.path), config, evaluate_only)
        case "hf":
            return _hub_source(config, evaluate_only)
        case "wikitext":
            file = _one_file(preset_folder(config), "wiki.test.raw")
            return Source({"files": _states([file])}, lambda progress: _read_wikitext(file))
        case _:
            return _text_source(preset_folder(config), replace(config, endings=FIRST_ENDINGS), evaluate_only)


def _with_own_test(config: DataConfig, evaluate_only: bool) -> Source:
    """A corpus whose test text is that of `data.test_path`."""
    own = replace(config, name="text", path=config.test_path, test_path=None)
    test = _text_source(_existing(config.test_path, "data.test_path"), own, True)
    if evaluate_only:
        return test
    without = replace(config, test_path=None)
    if config.name == "hf":
        return _hub_source(without, False, test)
    return _text_source(_existing(config.path), without, False, test)


def _existing(path: str | None, key: str = "data.path") -> Path:
    assert path is not None  # DataConfig refuses text and hf without a path
    found = Path(path).expanduser()
    if not found.exists():
        raise ValueError(f"{key}={path} does not exist: give a .txt or .jsonl file, or a folder of them")
    return found


def _key(config: DataConfig, evaluate_only: bool, test: Source | None) -> dict[str, Any]:
    """What the reading of a corpus depends on beside its files; what is at its default is not said."""
    key: dict[str, Any] = {"text_field": config.text_field, "evaluate_only": evaluate_only}
    for name in ("held_out", "split_by", "overlap", "repeated_heads"):
        if getattr(config, name) != getattr(DataConfig, name):
            key[name] = getattr(config, name)
    if config.splits != SplitNames():
        key["splits"] = asdict(config.splits)
    return key if test is None else key | {"test": test.key}


def _states(files: Iterable[Path]) -> list[list[Any]]:
    """What changes when a file does: its name, size and times."""
    return [
        [str(file.resolve()), (state := file.stat()).st_size, state.st_mtime_ns, state.st_ctime_ns] for file in files
    ]


# --- text files -------------------------------------------------------------------------------------------------------


def _text_source(path: Path, config: DataConfig, evaluate_only: bool, test: Source | None = None) -> Source:
    """A file, or a folder of files; those named after splits are the official splits. `test`: the test text instead."""
    endings = config.endings or reading.ENDINGS
    if not path.is_dir():
        if not reading.is_regular(path):
            raise ValueError(f"{path} is no regular file (a pipe or a device has no end): give a file, or a folder")
        if not reading.has_ending(path, endings):
            ending = path.suffix or ".txt"
            raise ValueError(
                f"{path} is no {_in_words(endings)}: convert or rename it, or have it read as plain text with "
                f"data.endings=[{ending}]"
            )
        files = {"train": [path]}
        ignored: list[str] = []
    else:
        files, ignored = _files_by_split(path, config)
        if evaluate_only and "test" in files:
            files = {"test": files["test"]}
    if test is not None:
        files = {split: part for split, part in files.items() if split != "test"}
    everything = [file for part in files.values() for file in part]
    root = path if path.is_dir() else path.parent
    key = {"files": _states(everything), **_key(config, evaluate_only, test)}
    if config.endings is None and ignored:  # the manifest names them
        key["ignored"] = ignored

    def read(progress: Progress | None) -> Texts:
        total = sum(reading.size_of(file) for file in everything)
        told = (lambda n_bytes: progress("reading", n_bytes, total)) if progress else (lambda n_bytes: None)
        documents = iter(reading.read_files(everything, root, config.text_field, told))
        read_from = {split: [(file, next(documents)) for file in part] for split, part in files.items()}
        found: dict[str, Sequence[Document]] = {
            split: list(chain.from_iterable(documents for _, documents in part)) for split, part in read_from.items()
        }
        by_file = config.split_by == "file"
        groups = [str(file) for file, documents in read_from.get("train", []) for _ in documents] if by_file else None
        if test is not None:
            found["test"] = test.read(progress).test
        return _arrange(found, path, config, evaluate_only, {"ignored_files": ignored}, groups)

    return Source(key, read)


def _in_words(endings: Sequence[str]) -> str:
    """`.txt or .jsonl file (also .gz, .xz, .zst)`."""
    packed = [ending for ending in reading.COMPRESSIONS if any(item.endswith(ending) for item in endings)]
    plain = [item for item in endings if not item.endswith(tuple(reading.COMPRESSIONS))]
    words = f"{', '.join(plain[:-1])} or {plain[-1]}" if len(plain) > 1 else "".join(plain)
    return f"{words} file" + (f" (also {', '.join(packed)})" if packed else "")


def _files_by_split(folder: Path, config: DataConfig) -> tuple[dict[str, list[Path]], list[str]]:
    """A folder's files by official split, and those left aside; all are training text where none is named so.

    ValueError: there are none, or, where nobody said what to read, what is left aside is the larger part.
    """
    endings = config.endings or reading.ENDINGS
    everything = sorted(
        (path for path in folder.rglob("*") if not path.is_dir()), key=lambda path: path.relative_to(folder).as_posix()
    )
    everything = [path for path in everything if not any(part[0] == "." for part in path.relative_to(folder).parts)]
    files: list[Path] = []
    left_out: list[Path] = []
    for path in everything:
        wanted = reading.is_regular(path) and reading.has_ending(path, endings)
        if wanted and config.endings is None and reading.leads_outside(path, folder):
            raise ValueError(f"{path} is a link to outside of data.path={folder}: put the file itself there")
        about = config.endings is None and bool(_ABOUT.fullmatch(path.name))
        (files if wanted and not about else left_out).append(path)
    names = [path.relative_to(folder).as_posix() for path in left_out]
    if not files:
        there = f" but {_some(names)}" if names and config.endings is None else ""
        give = "data.endings=[ENDING] reads others as plain text" if there else "give another folder"
        raise ValueError(f"{folder} holds no {_in_words(endings)}{there}: {give}")
    if config.endings is None and left_out:
        _refuse_larger_part(folder, files, left_out, names)
        _say(f"{folder}: not read: {_some(names)}; data.endings says which files are")
    found: dict[str, list[Path]] = {}
    ignored = []
    for path in files:
        inside = path.relative_to(folder)
        split = official_split(inside.parts[0] if len(inside.parts) > 1 else reading.stem(path), config.splits)
        if split:
            found.setdefault(split, []).append(path)
        else:
            ignored.append(inside.as_posix())
    _check_names(config.splits, set(found), f"data.path={folder}", sorted({_label(path, folder) for path in files}))
    if not found:
        found, ignored = {"train": files}, []
    elif config.endings is None and ignored:
        _say(f"{folder}: in none of the splits {', '.join(found)}: {_some(ignored)}")
    # of those that the first versions never looked at no manifest of theirs speaks
    return found, sorted(ignored + names)[:MOST_NAMES] if config.endings is None else ignored


def _label(path: Path, folder: Path) -> str:
    """What `data.splits.*` can call the split that a file is of: the folder at the top, else the file."""
    inside = path.relative_to(folder)
    return inside.parts[0] if len(inside.parts) > 1 else reading.stem(path)


def _refuse_larger_part(folder: Path, files: Sequence[Path], left_out: Sequence[Path], names: Sequence[str]) -> None:
    n_read, n_left = (sum(reading.size_of(path) for path in part if path.is_file()) for part in (files, left_out))
    if n_left <= n_read:
        return
    mine = sorted({"".join(path.suffixes[-2:]) if reading.is_packed(path) else path.suffix for path in files})
    biggest = max(left_out, key=reading.size_of)
    raise ValueError(
        f"{folder}: of {n_read + n_left:,} bytes only {n_read:,} would be read, and not {_some(names)}: say which "
        f"files are meant, data.endings=[{','.join(mine)}] for these alone"
        + (f", data.endings=[{','.join([*mine, biggest.suffix])}] for more as plain text" if biggest.suffix else "")
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@cache
def _say(message: str) -> None:
    """A line on stderr, once a process."""
    _log.warning("%s", message)


def _check_names(splits: SplitNames, found: set[str], where: str, there: Sequence[str]) -> None:
    """ValueError: a split that is named is not there; lists what is."""
    for split, name in asdict(splits).items():
        if name is not None and split not in found:
            raise ValueError(f"{where} has no split '{name}' for data.splits.{split}: it has {_some(there)}")


def _arrange(
    found: dict[str, Sequence[Document]],
    path: Path | str,
    config: DataConfig,
    evaluate_only: bool,
    details: dict[str, Any],
    files: Sequence[str] | None = None,
) -> Texts:
    """The corpus of the splits that were found: missing ones are made from the training text.

    files: the file of each training document, where those of one file stay together.
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
    if config.repeated_heads == "drop":
        found, dropped = without_repeated_heads(found)
        details = details | {"repeated_heads": dropped}
        if files is not None:
            files = [file for file, d in zip(files, found["train"], strict=True) if d.n_bytes]
        found = {split: [d for d in documents if d.n_bytes] for split, documents in found.items()}
    how = "official"
    if missing := [split for split in SPLITS if split not in found]:
        made, how = make_splits(found["train"], missing, share=config.held_out, files=files)
        found = found | made
    train, validation, test = (found[split] for split in SPLITS)
    shingles = overlap.collect((d.text for d in train), sum(d.n_bytes for d in train))
    if places := overlapping(test, shingles, {d.digest for d in train}):
        names_of = [test[place].name for place in places]
        if config.overlap == "refuse":
            raise overlap.refusal(names_of)
        n_bytes = sum(test[place].n_bytes for place in places)
        details = details | {
            "overlap": {
                "documents": len(places), "of": len(test), "share": len(places) / len(test),
                "share_of_bytes": n_bytes / sum(d.n_bytes for d in test), "names": names_of[:MOST_NAMES],
                "kept": config.overlap == "warn",
            }
        }  # fmt: skip
        done = "they are scored all the same" if config.overlap == "warn" else "left out"
        _say(f"{overlap.sentence(names_of)}, {len(places) / len(test):.1%} of them: {done} (data.overlap)")
        if config.overlap == "drop":
            held = set(places)
            test = take(test, [place for place in range(len(test)) if place not in held])
            if not test:
                raise ValueError(f"{path}: data.overlap=drop leaves no test document: {overlap.sentence(names_of)}")
    found = found | {"test": test}
    if empty := [split for split in SPLITS if not found[split]]:
        raise ValueError(f"{path} is too short to be split, nothing is left for {empty[0]}: give more text")
    return Texts(train, validation, test, details | {"split": how}, shingles)


def overlapping(test: Iterable[Document], shingles: overlap.Shingles, digests: set[str]) -> list[int]:
    """Which documents occur in training text, given its shingles and its documents' digests."""
    return [
        place
        for place, document in enumerate(test)
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
    splits = {
        official_split(reading.stem(path)) for path in folder.iterdir() if reading.has_ending(path, FIRST_ENDINGS)
    }
    return "test" in splits and ("train" in splits) == (name == "books")


def _one_file(folder: Path, name: str) -> Path:
    """The file, or its compressed form."""
    return next((file for ending in (".xz", ".gz") if (file := folder / (name + ending)).is_file()), folder / name)


def _read_wikitext(file: Path) -> Texts:
    return Texts([], [], _articles(reading.read_text(file)), {"split": "official test split"})


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


def _hub_source(config: DataConfig, evaluate_only: bool, test: Source | None = None) -> Source:
    assert config.path is not None  # DataConfig refuses text and hf without a path
    path = str(Path(config.path).expanduser())
    if not Path(path).exists() and (path.count("/") > 1 or path.startswith((".", "/"))):
        raise ValueError(f"data.path={config.path} does not exist: give a folder, or a dataset's name on the hub")
    key: dict[str, Any] = {"path": path, "subset": config.subset, **_key(config, evaluate_only, test)}
    follow = config.endings == FIRST_ENDINGS  # the configuration of a run that the first versions made

    def read(loaded: Any, progress: Progress | None) -> Texts:
        return _read_hub(loaded, path, config, evaluate_only, None if test is None else test.read(progress), progress)

    if Path(path).exists():
        key["files"] = _states(sorted(file for file in Path(path).rglob("*") if file.is_file()))
        return Source(key, lambda progress: read(hub.load_hub(path, config.subset, follow=follow), progress))
    loaded = hub.load_hub(path, config.subset)
    # what the hub holds may change: `datasets` tells by a fingerprint what was downloaded
    key["fingerprints"] = [[str(label), rows._fingerprint] for label, rows in loaded.items()]
    return Source(key, lambda progress: read(loaded, progress))


def _read_hub(
    loaded: Any, path: str, config: DataConfig, evaluate_only: bool, own_test: Texts | None, progress: Progress | None
) -> Texts:
    labels = {str(label): official_split(str(label), config.splits) for label in loaded}
    _check_names(config.splits, {split for split in labels.values() if split}, f"data.path={path}", list(labels))
    ignored = [label for label, split in labels.items() if not split]
    if evaluate_only and "test" in labels.values():
        labels = {label: split for label, split in labels.items() if split == "test"}
    if own_test is not None:
        labels = {label: split for label, split in labels.items() if split != "test"}
    found: dict[str, Sequence[Document]] = {}
    for label, split in labels.items():
        if split and split not in found:
            documents: Sequence[Document] = hub.read_split(loaded[label], label, path, config.text_field, progress)
            if Path(path).name == "wikitext":  # a row is a line there: documents are articles
                documents = _articles("".join(hub.wikitext_lines(loaded[label], config.text_field)))
            if documents:
                found[split] = documents
    if not found or (ignored and "train" not in found and not evaluate_only):
        raise ValueError(
            f"data.path={path} has no {'training' if found else 'train, validation or test'} split with text in "
            f"'{config.text_field}': it has {_some([str(label) for label in loaded])}; choose with "
            f"data.splits.train={(ignored or ['NAME'])[0]}, data.splits.validation and data.splits.test"
        )
    if own_test is not None:
        found["test"] = own_test.test
    return _arrange(found, path, config, evaluate_only, {"ignored_splits": ignored})


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
    "text": "your own .txt, .jsonl, .json, .csv or .parquet files or folders, also packed (data.path)",
    "hf": "a dataset of the Hugging Face hub, or a local folder in its layout (data.path)",
    "books": "99 English novels of 1839 to 1917, split by author",
    "nonfiction": "5 English non-fiction works, evaluation only",
    "wikitext": "the 60 articles of the raw WikiText test set, evaluation only",
}
