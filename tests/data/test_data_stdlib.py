"""The embedded corpus: the rules on a made-up library, and what they come to on the running one."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from ropelab.config import DataConfig
from ropelab.data import prepare
from ropelab.data.stdlib import read_stdlib, stdlib_folder


def source(seed: int, n_bytes: int) -> str:
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz_(): \n", k=n_bytes))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """120 modules of one file, 6 packages of 12; and all that must be left out."""
    root = tmp_path / "lib"
    for number in range(120):
        # every fifth is a byte too short for a test document
        write(root / f"m{number}.py", source(number, 2048 if number % 5 == 0 else 2049))
    for package in range(6):
        for number in range(12):
            write(root / f"p{package}" / "sub" / f"f{number:02}.py", source(1000 + 100 * package + number, 2100))
    return root


def write(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def by_hash(names: set[str]) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def test_modules_go_to_splits_in_the_order_of_their_hashes(library: Path) -> None:
    """The rule, literally, over the file names of the made-up library (nothing overlaps in it)."""
    files = {path.relative_to(library).as_posix(): path.stat().st_size for path in library.rglob("*.py")}
    modules: dict[str, list[str]] = {}
    for name in sorted(files):
        modules.setdefault(name.split("/")[0], []).append(name)
    train, validation, test = [], [], []
    for module in by_hash(set(modules)):
        if len(test) < 64:
            test += [name for name in modules[module] if files[name] >= 2049][:8]
            test = test[:64]
        elif sum(files[name] for name in validation) < 0.05 * sum(files.values()):
            validation += modules[module]
        else:
            train += modules[module]
    texts = read_stdlib(library)
    assert [d.name for d in texts.test] == test
    assert [d.name for d in texts.validation] == validation
    assert [d.name for d in texts.train] == train
    assert texts.details["dropped_overlapping_test_documents"] == []
    assert texts.details["unused_documents_of_test_modules"] == len(files) - len(train) - len(validation) - 64


def test_overlapping_test_documents_are_dropped_and_replaced(library: Path) -> None:
    """Two copies of test documents, changed a little, in training modules: both leave, others take their places."""
    before = read_stdlib(library)
    copied = [before.test[3], before.test[40]]
    last = by_hash({name for name in (d.name.split("/")[0] for d in before.train) if name.startswith("m")})[-1]
    write(library / last, (library / last).read_text() + "".join("# a comment\n" + d.text[:900] for d in copied))
    after = read_stdlib(library)
    assert after.details["dropped_overlapping_test_documents"] == sorted(d.name for d in copied)
    assert len(after.test) == 64
    assert {d.name for d in before.test} - {d.name for d in after.test} == {d.name for d in copied}
    assert not {d.name for d in copied} & {d.name for d in (*after.train, *after.validation)}


@pytest.mark.parametrize(
    "name",
    [
        "site-packages/numpy/a.py",
        "dist-packages/b.py",
        "test/test_os.py",
        "unittest/test/c.py",
        "distutils/tests/d.py",
        "idlelib/idle_test/e.py",
        "lib2to3/tests/data/f.py",
        "encodings/cp1252.py",
        "encodings/iso8859_1.py",
        "encodings/mac_roman.py",
        "__pycache__/g.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "sitecustomize.py",
        "README.txt",
    ],
)
def test_what_is_no_source_of_the_library_is_left_out(name: str, library: Path) -> None:
    before = read_stdlib(library)
    write(library / name, source(9999, 5000))
    after = read_stdlib(library)
    assert [d.name for _, split in after.splits() for d in split] == [d.name for _, s in before.splits() for d in s]


def test_tables_duplicates_empty_and_undecodable_files_are_counted(library: Path) -> None:
    write(library / "encodings" / "koi8_r.py", "decoding_table = (\n")
    write(library / "encodings" / "gbk.py", "import _codecs_cn, codecs\n")
    write(library / "encodings" / "utf_8.py", "import codecs\n")
    write(library / "a_copy.py", (library / "m1.py").read_bytes())
    write(library / "latin.py", "# caf\u00e9\n".encode("latin1"))
    write(library / "p1" / "__init__.py", "")
    texts = read_stdlib(library)
    assert texts.details["left_out"] == {"empty": 1, "not_utf8": 1, "code_pages": 2, "duplicates": 1}
    names = {d.name for _, split in texts.splits() for d in split}
    assert not names & {"encodings/koi8_r.py", "encodings/gbk.py", "latin.py"}
    assert "m1.py" not in names  # a_copy.py comes first


def test_library_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"too few source files.*data=text"):
        read_stdlib(tmp_path)


def test_running_library(tmp_path: Path, config: Callable[..., DataConfig]) -> None:
    """64 documents of at least 2049 bytes, at most 8 of a module, no module in two splits, 5% for validation."""
    corpus = prepare(config("stdlib"), cache_dir=tmp_path / "cache")
    assert len(corpus.test) == 64
    assert corpus.test.n_bytes.min() >= 2049
    modules = [[name.split("/")[0] for name in s.names] for s in (corpus.train, corpus.validation, corpus.test)]
    assert max(Counter(modules[2]).values()) <= 8
    assert not set(modules[0]) & set(modules[1])
    assert not set(modules[2]) & {*modules[0], *modules[1]}
    assert corpus.details["bytes"]["train"] > 4_000_000
    names = [name for s in (corpus.train, corpus.validation, corpus.test) for name in s.names]
    assert not [name for name in names if {"test", "tests", "idle_test"} & set(name.split("/"))]
    assert not [name for name in names if name.startswith(("encodings/cp", "encodings/iso", "encodings/mac"))]
    # the text is the file's
    text = (stdlib_folder() / corpus.test.names[5]).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    assert corpus.tokenizer.decode(corpus.test.document(5)) == text
    assert corpus.test.digests[5] == hashlib.sha256(text.encode()).hexdigest()
    # no seed, no state: prepared anew, it is the same
    assert prepare(config("stdlib"), cache_dir=tmp_path / "another").digest == corpus.digest
