"""The embedded corpus: sources of the running Python's standard library, real text that is on every machine."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from ropelab.data import overlap
from ropelab.data.documents import Document, Progress, Texts, document

N_TEST = 64  # test documents
SHORTEST_TEST = 2049  # bytes of one: ctx 2048 and its last target
MOST_OF_ONE_MODULE = 8  # test documents
VALIDATION_SHARE = 0.05  # of all bytes

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# written when Python was built or installed, other on every machine
_MACHINE_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")
# what a file of `encodings` holds if it is a table, or the few lines around one that is compiled in
_CODE_PAGE_MARKS = ("decoding_table", "decoding_map", "import _codecs_")


def stdlib_folder() -> Path:
    """Where the running Python's standard library lies."""
    return Path(sysconfig.get_path("stdlib"))


def module_of(name: str) -> str:
    """The package of a document, or its own file at the top: what is of one hand, as an author's books are."""
    return name.partition("/")[0]


def python() -> str:
    """Implementation and version of the running Python, whose text this is."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def source_files(root: Path) -> list[Path]:
    """The library's own .py files below `root`, without installed packages and tests, in the order of their names."""
    return sorted(_walk(root), key=lambda path: path.relative_to(root).as_posix())


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        # config-*: the build's own makefile and script
        folders[:] = [
            name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith((".", "config-"))
        ]
        for name in files:
            if name.endswith(".py") and not name.startswith((".", "test_", *_MACHINE_FILES)):
                yield Path(folder, name)


def read_stdlib(root: Path, progress: Progress | None = None) -> Texts:
    """The corpus of the sources below `root`.

    A module is a package or a file at the top. Modules in the order of sha256(name) give documents of at least 2049
    bytes, at most 8 each, to the test split until it holds 64; what else these modules hold belongs to no split. The
    next ones are validation text until that is 5% of all bytes; the rest is training text. A test document that
    overlaps training text is dropped and the next one takes its place.

    ValueError: there are no sources, or not enough for 64 test documents and a training text.
    """
    modules, left_out = _read_modules(root, progress)
    documents = [document for module in modules.values() for document in module]
    n_bytes = sum(document.n_bytes for document in documents)
    modulus = overlap.modulus_for(n_bytes)
    hashes = {document.name: overlap.hashes(document.text, modulus) for document in documents}
    dropped: set[str] = set()
    while True:  # ends: every round drops a document or is the last
        train, validation, test = _assign(modules, dropped, n_bytes)
        if len(test) < N_TEST or not train:
            raise ValueError(
                f"the standard library in {root} has too few source files for the stdlib corpus: "
                "install Python with its sources or use data=text data.path=FILE_OR_FOLDER"
            )
        shingles = overlap.merge((hashes[document.name] for document in train), modulus)
        found = {document.name for document in test if overlap.occurs(hashes[document.name], shingles)}
        if not found:
            break
        dropped |= found
    unused = len(documents) - len(train) - len(validation) - len(test) - len(dropped)
    details = {
        "split": f"modules by sha256 of the name: {N_TEST} test documents, validation {VALIDATION_SHARE:.0%} of bytes",
        "python": python(),
        "dropped_overlapping_test_documents": sorted(dropped),
        "unused_documents_of_test_modules": unused,
        "left_out": left_out,
    }
    return Texts(train, validation, test, details, shingles)


def _read_modules(root: Path, progress: Progress | None) -> tuple[dict[str, list[Document]], dict[str, int]]:
    """The documents of each module, and how many files were left out for what reason."""
    modules: dict[str, list[Document]] = defaultdict(list)
    left_out = {"empty": 0, "not_utf8": 0, "code_pages": 0, "duplicates": 0}
    seen: set[str] = set()
    files = source_files(root)
    for number, path in enumerate(files):
        if progress and number % 100 == 0:
            progress("reading", number, len(files))
        name = path.relative_to(root).as_posix()
        try:
            source = document(name, path.read_bytes().decode("utf-8-sig"))
        except UnicodeDecodeError:
            left_out["not_utf8"] += 1
            continue
        if not source.n_bytes:
            left_out["empty"] += 1
        elif _is_code_page(name, source.text):
            left_out["code_pages"] += 1
        elif source.digest in seen:
            left_out["duplicates"] += 1
        else:
            seen.add(source.digest)
            modules[module_of(name)].append(source)
    if progress:
        progress("reading", len(files), len(files))
    return modules, left_out


def _is_code_page(name: str, text: str) -> bool:
    folder, _, file = name.rpartition("/")
    return folder == "encodings" and (
        file.startswith(("cp", "iso", "mac")) or any(mark in text for mark in _CODE_PAGE_MARKS)
    )


def _assign(
    modules: dict[str, list[Document]], dropped: set[str], n_bytes: int
) -> tuple[list[Document], list[Document], list[Document]]:
    """The train, validation and test documents when those named in `dropped` are left out of the test split."""
    train: list[Document] = []
    validation: list[Document] = []
    test: list[Document] = []
    for module in sorted(modules, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if len(test) < N_TEST:
            fit = [d for d in modules[module] if d.n_bytes >= SHORTEST_TEST and d.name not in dropped]
            test += fit[: min(MOST_OF_ONE_MODULE, N_TEST - len(test))]
        elif sum(document.n_bytes for document in validation) < VALIDATION_SHARE * n_bytes:
            validation += modules[module]
        else:
            train += modules[module]
    return train, validation, test
