"""Corpora that failed in the wild: read in silence, without an end, leading elsewhere, refused without a way."""

from __future__ import annotations

import gzip
import io
import json
import logging
import lzma
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_data_corpora import jsonl, prose, texts, write

from ropelab import config as configs
from ropelab.config import FIRST_ENDINGS, DataConfig, SplitNames
from ropelab.data import Corpus, check_overlap, prepare, reading
from ropelab.data import corpora as corpora_module
from ropelab.data import tokenizers as tokenizers_module
from ropelab.data.documents import document
from ropelab.data.heads import without_repeated_heads
from ropelab.data.hub import load_hub
from ropelab.data.tokenizers import train_bpe

pytestmark = pytest.mark.integration

MakeConfig = Callable[..., DataConfig]


@pytest.fixture(autouse=True)
def _said_anew() -> None:
    corpora_module._say.cache_clear()


def read(settings: DataConfig, tmp_path: Path, **options: Any) -> Corpus:
    return prepare(settings, cache_dir=tmp_path / "cache", **options)


def zstd(data: bytes) -> bytes:
    import pyarrow

    return bytes(pyarrow.compress(data, "zstd", asbytes=True))


def parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


# --- what is read, and what is left out -------------------------------------------------------------------------------


def test_every_kind_of_file_is_read(tmp_path: Path, config: MakeConfig) -> None:
    root = tmp_path / "in"
    write(root / "a.jsonl.zst", zstd(jsonl([{"text": prose(1), "title": "zst"}]).encode()))
    write(root / "b.json", json.dumps([{"text": prose(2), "title": "list"}, {"text": None, "title": "null"}]))
    write(root / "c.json", json.dumps({"text": prose(3), "title": "object"}, indent=1))
    write(root / "d.json", jsonl([{"text": prose(4), "title": "line"}, {"text": "", "title": "empty"}]))
    write(root / "e.csv", 'title,text,n\ncsv,"' + prose(5, 5000).replace("\n", "\r\n") + '",3\nshort\n')
    parquet(root / "f.parquet", {"text": [prose(6), None, ""], "title": ["parquet", "null", "empty"]})
    expected = {name: prose(seed) for seed, name in enumerate(("zst", "list", "object", "line"), start=1)}
    expected |= {"csv": prose(5, 5000), "parquet": prose(6)}
    corpus = read(config(path=root), tmp_path, evaluate_only=True)
    assert texts(corpus.test, corpus) == expected
    for file in root.iterdir():
        assert len(read(config(path=file), tmp_path, evaluate_only=True).test) == 1


def test_shards_that_cannot_be_read_are_never_replaced_by_the_readme(tmp_path: Path, config: MakeConfig) -> None:
    root = tmp_path / "pile"
    for number in range(3):
        write(root / f"0{number}.jsonl.zst", b"\x28\xb5\x2f\xfd" + random.Random(number).randbytes(20_000))
    write(root / "README.txt", prose(1, 100))
    with pytest.raises(ValueError, match=r"3 files cannot be read: .*00\.jsonl\.zst is damaged.*02\.jsonl\.zst"):
        read(config(path=root), tmp_path)
    for file in root.glob("*.zst"):
        file.rename(file.with_suffix(".rar"))
    with pytest.raises(ValueError, match=r"holds no \.txt, .* but 00\.jsonl\.rar, .*README\.txt: data\.endings"):
        read(config(path=root), tmp_path)


def test_the_larger_part_is_not_left_out_in_silence(
    tmp_path: Path, config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """A smaller part is left out by name; which files are meant can be said."""
    root = tmp_path / "in"
    write(root / "notes.txt", prose(1, 100))
    write(root / "book.md", prose(2, 300))
    message = r"bytes only 5,600 would be read, and not book\.md: .*data\.endings=\[\.txt\].*\[\.txt,\.md\]"
    with pytest.raises(ValueError, match=message):
        read(config(path=root), tmp_path)
    assert read(config(path=root, endings=(".txt",)), tmp_path).details["documents"]["train"] == 1
    assert read(config(path=root, endings=(".txt", ".md")), tmp_path).details["documents"]["train"] == 2
    assert not caplog.text
    write(root / "book.md", prose(2, 30))
    with caplog.at_level(logging.WARNING):
        assert read(config(path=root), tmp_path).details["ignored_files"] == ["book.md"]
    assert "not read: book.md" in caplog.text


def test_a_file_of_an_unknown_kind_is_read_when_it_is_asked_for(tmp_path: Path, config: MakeConfig) -> None:
    file = write(tmp_path / "a.md", prose(1))
    with pytest.raises(ValueError, match=r"a\.md is no .*data\.endings=\[\.md\]"):
        read(config(path=file), tmp_path)
    corpus = read(config(path=file, endings=(".md",)), tmp_path, evaluate_only=True)
    assert texts(corpus.test, corpus) == {"a.md": prose(1)}


def test_a_run_of_an_earlier_version_rereads_what_it_read(
    tmp_path: Path, config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """A stored configuration without the keys: the digests that the version before them printed, in the same folder."""
    root = tmp_path / "in"
    for number in range(12):
        write(root / f"{number}.txt", prose(number))
    write(root / "README.txt", prose(50))
    write(root / "notes.md", prose(60, 2000))
    write(root / "rows.csv", "text\nx\n")
    tree = configs.to_dict(
        configs.load(["data=text", f"data.path={root}", "data.tokenizer=bpe", "data.vocab_size=300"])
    )
    for key in ("splits", "test_path", "held_out", "split_by", "endings", "overlap", "repeated_heads"):
        del tree["data"][key]
    stored = configs.from_dict(tree).data
    assert stored.endings == FIRST_ENDINGS
    corpus = read(stored, tmp_path)
    assert corpus.digest == "17bb5cd469c5bc07b5ef77fe6c87581310627eb73caaf0a1d00cac829fbeae60"
    assert corpus.tokenizer.digest == "34b393da97f23dd10f2806affe59dea0dbb94c8ef14d506e65fe1c0f0316d83e"
    assert corpus.details["ignored_files"] == []
    assert not caplog.text
    with pytest.raises(ValueError, match=r"not README\.txt, notes\.md"):
        read(configs.load(["data=text", f"data.path={root}"]).data, tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_utf16_is_known_by_its_mark(encoding: str, tmp_path: Path, config: MakeConfig) -> None:
    body = "größe 東京 🙂\u2028x\n" + prose(1)
    data = body.encode(encoding)
    data = data if encoding != "utf-16-be" else b"\xfe\xff" + data
    for name, content in (("a.txt", data), ("b.jsonl", jsonl([{"text": body}]).encode("utf-16"))):
        file = write(tmp_path / encoding / name, content)
        corpus = read(config(path=file), tmp_path, evaluate_only=True)
        assert list(texts(corpus.test, corpus).values()) == [body]
    cut = write(tmp_path / encoding / "c.txt", data[:-1])
    with pytest.raises(ValueError, match=r"is not UTF-(16|32)"):
        read(config(path=cut), tmp_path)
    file = write(tmp_path / encoding / "d.txt", "a\0b".encode("utf-16"))
    with pytest.raises(ValueError, match="is binary"):
        read(config(path=file), tmp_path)


@pytest.mark.parametrize("packed", ["", ".gz", ".xz"])
def test_characters_and_lines_over_the_edge_of_a_piece(
    packed: str, tmp_path: Path, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of three bytes: characters of two to four and lines are whole, and a bad byte is at its offset."""
    from ropelab.data import reading

    monkeypatch.setattr(reading, "_CHUNK", 3)
    body = "aé東🙂" * 9 + "\nend"
    for name, content in ((f"a.txt{packed}", body), (f"b.jsonl{packed}", jsonl([{"text": body}] * 2))):
        corpus = read(config(path=write(tmp_path / name, content)), tmp_path, evaluate_only=True)
        assert set(texts(corpus.test, corpus).values()) == {body}
    file = write(tmp_path / f"c.txt{packed}", b"\xef\xbb\xbf" + "é東".encode() + b"ab\xffcd")
    with pytest.raises(ValueError, match=r"byte 0xff at offset 10\)"):
        read(config(path=file), tmp_path)
    write(file, "é東".encode() + b"\xe6\x9d")
    with pytest.raises(ValueError, match=r"byte 0xe6 at offset 5\)"):
        read(config(path=file), tmp_path)
    write(file, b"abcdefgh\0")
    with pytest.raises(ValueError, match=r"NUL byte at offset 8\)"):
        read(config(path=file), tmp_path)


def test_nulls_are_the_same_in_all_tables(tmp_path: Path, config: MakeConfig) -> None:
    rows = [{"title": f"n{i}", "text": None if i in (7, 13) else prose(i, 4)} for i in range(40)]
    write(tmp_path / "a" / "a.jsonl", jsonl(rows))
    parquet(tmp_path / "b" / "b.parquet", {key: [row[key] for row in rows] for key in ("title", "text")})
    lines = read(config(path=tmp_path / "a"), tmp_path)
    assert lines.details["documents"] == {"train": 34, "validation": 2, "test": 2}
    assert read(config(path=tmp_path / "b"), tmp_path).digest == lines.digest
    assert read(config("hf", tmp_path / "b"), tmp_path).digest == lines.digest
    assert read(config("hf", tmp_path / "a"), tmp_path).digest == lines.digest


def test_nested_fields(tmp_path: Path, config: MakeConfig) -> None:
    rows = [{"id": f"n{i}", "document": {"text": prose(i, 4), "lang": "en"}} for i in range(20)]
    rows[3]["document"] = None  # type: ignore[assignment]
    write(tmp_path / "a" / "train.jsonl", jsonl(rows))
    parquet(tmp_path / "b" / "train.parquet", {key: [row[key] for row in rows] for key in ("id", "document")})
    offered = r"'text': set data\.text_field to one of id, document\.text, document\.lang"
    digests = set()
    for name, path in (("text", "a"), ("text", "b"), ("hf", "a"), ("hf", "b")):
        with pytest.raises(ValueError, match=offered):
            read(config(name, tmp_path / path), tmp_path)
        with pytest.raises(ValueError, match=r"to one of document\.text, document\.lang"):
            read(config(name, tmp_path / path, text_field="document"), tmp_path)
        corpus = read(config(name, tmp_path / path, text_field="document.text"), tmp_path)
        assert corpus.details["documents"] == {"train": 17, "validation": 1, "test": 1}
        digests.add(corpus.digest)
    assert len(digests) == 1
    flat = write(tmp_path / "flat.jsonl", jsonl([{"document.text": "x", "document": {"text": "y"}}]))
    corpus = read(config(path=flat, text_field="document.text"), tmp_path, evaluate_only=True)
    assert list(texts(corpus.test, corpus).values()) == ["x"]


def test_all_bad_files_are_named_at_once(tmp_path: Path, config: MakeConfig) -> None:
    for number in range(8):
        write(tmp_path / "in" / f"{number}.txt", b"caf\xe9" if number else prose(1).encode())
    with pytest.raises(ValueError, match=r"7 files cannot be read: .*1\.txt.*5\.txt.*; and 2 more files") as raised:
        read(config(path=tmp_path / "in"), tmp_path)
    assert "6.txt" not in str(raised.value)


def test_a_name_for_every_split(tmp_path: Path, config: MakeConfig) -> None:
    for number, split in enumerate(("train_sft", "test_sft", "train_gen")):
        body = jsonl({"text": prose(100 * number + i, 4)} for i in range(20))
        write(tmp_path / "files" / f"{split}.jsonl", body)
        write(tmp_path / "hub" / "README.md", "x")
        parquet(tmp_path / "hub" / f"{split}.parquet", {"text": [prose(100 * number + i, 4) for i in range(20)]})
    card = "".join(f"  - split: {s}\n    path: {s}.parquet\n" for s in ("train_sft", "test_sft", "train_gen"))
    write(tmp_path / "hub" / "README.md", f"---\nconfigs:\n- config_name: default\n  data_files:\n{card}---\n")
    with pytest.raises(ValueError, match=r"it has train_sft, test_sft, train_gen; choose with data\.splits\.train="):
        read(config("hf", tmp_path / "hub"), tmp_path)
    named = configs.load(
        ["data=hf", f"data.path={tmp_path / 'hub'}", "data.splits.train=train_sft", "data.splits.test=test_sft"]
    ).data
    assert named.splits == SplitNames("train_sft", None, "test_sft")
    hub = read(named, tmp_path)
    assert hub.details["documents"] == {"train": 19, "validation": 1, "test": 20}
    assert hub.details["ignored_splits"] == ["train_gen"]
    assert read(named, tmp_path, evaluate_only=True).test.digests == hub.test.digests
    of_files = read(config(path=tmp_path / "files", splits=named.splits), tmp_path)
    assert set(of_files.test.digests) == set(hub.test.digests)
    for name, where in (("hf", "hub"), ("text", "files")):
        with pytest.raises(ValueError, match=r"has no split 'dev' for data\.splits\.validation: it has .*train_gen"):
            read(config(name, tmp_path / where, splits=SplitNames("train_sft", "dev")), tmp_path)


@pytest.mark.parametrize("key", ["data.splits.training", "data.splits", "data.splits.train.x"])
def test_names_of_splits_are_keys_of_their_own(key: str) -> None:
    with pytest.raises(ValueError, match=r"data\.splits\.train, data\.splits\.validation, data\.splits\.test"):
        configs.load(["data=text", "data.path=x", f"{key}=a"])


# --- overlap, heads, test files ---------------------------------------------------------------------------------------


@pytest.fixture
def boiler(tmp_path: Path) -> Path:
    """40 documents that begin with one licence, 6 lines of their own each."""
    licence = prose(999, 10)
    return write(tmp_path / "boiler" / "a.jsonl", jsonl({"text": licence + prose(i, 6)} for i in range(40)))


def test_a_licence_at_every_head(boiler: Path, tmp_path: Path, config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"data\.overlap=drop.*data\.overlap=warn.*data\.repeated_heads=drop"):
        read(config(path=boiler), tmp_path)
    corpus = read(config(path=boiler, repeated_heads="drop"), tmp_path)
    found = {**texts(corpus.train, corpus), **texts(corpus.validation, corpus), **texts(corpus.test, corpus)}
    assert set(found.values()) == {prose(i, 6) for i in range(40)}
    assert corpus.details["repeated_heads"] == {"documents": 40, "bytes": 40 * 560, "nothing_else": 0}
    with pytest.raises(ValueError, match=r"data\.overlap=drop leaves no test document: 2 test documents occur"):
        read(config(path=boiler, overlap="drop"), tmp_path)


def test_heads_are_whole_lines_that_three_documents_share() -> None:
    head = "x" * 40 + "\n" + "y" * 40 + "\n"
    bodies = [head + "one\n", head + "two", head + "two", "x" * 40 + "\nother\n", head, "alone\n" * 30]
    found, facts = without_repeated_heads({"train": [document(str(i), body) for i, body in enumerate(bodies)]})
    assert [one.text for one in found["train"]] == ["one\n", "two", "two", *bodies[3:4], "", bodies[5]]
    assert facts == {"documents": 4, "bytes": 4 * 82, "nothing_else": 1}
    pair = {"train": [document(str(i), head + str(i)) for i in range(2)]}
    assert without_repeated_heads(pair)[0] == pair


def test_overlap_can_be_kept_or_dropped(tmp_path: Path, config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    """Exact copies between official splits; the share is in the manifest, and the corpus is another."""
    root = tmp_path / "in"
    train = [prose(i, 4) for i in range(20)]
    write(root / "train.jsonl", jsonl({"text": text} for text in train))
    write(root / "validation.jsonl", jsonl({"text": prose(100 + i, 4)} for i in range(3)))
    write(root / "test.jsonl", jsonl({"text": text} for text in [*(prose(200 + i, 4) for i in range(9)), train[4]]))
    with pytest.raises(ValueError, match=r"1 test document occurs in the training text \('test\.jsonl:10'\)"):
        read(config(path=root), tmp_path)
    with caplog.at_level(logging.WARNING):
        kept = read(config(path=root, overlap="warn"), tmp_path)
    assert "1 test document occurs" in caplog.text
    assert len(kept.test) == 10
    facts = {"documents": 1, "of": 10, "share": 0.1, "share_of_bytes": 0.1, "names": ["test.jsonl:10"]}
    assert kept.details["overlap"] == facts | {"kept": True}
    dropped = read(config(path=root, overlap="drop"), tmp_path)
    assert dropped.test.names == kept.test.names[:9]
    assert dropped.details["overlap"] == facts | {"kept": False}
    write(root / "test.jsonl", jsonl({"text": prose(200 + i, 4)} for i in range(9)))
    clean = read(config(path=root), tmp_path)
    assert clean.digest == dropped.digest
    assert read(config(path=root, overlap="warn"), tmp_path).digest != clean.digest


def test_overlap_of_other_text_under_each_policy(
    tmp_path: Path, config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    own = read(config(path=write(tmp_path / "a.txt", prose(1, 400))), tmp_path)
    write(tmp_path / "other" / "a.txt", prose(2))
    write(tmp_path / "other" / "b.txt", prose(1, 400)[:3000])
    write(tmp_path / "other" / "c.txt", prose(3))
    other = read(config(path=tmp_path / "other"), tmp_path, evaluate_only=True)
    with pytest.raises(ValueError, match=r"'b\.txt'"):
        check_overlap(own, other)
    assert check_overlap(own, other, "warn") is other
    assert "'b.txt'" in caplog.text
    without = check_overlap(own, other, "drop")
    assert texts(without.test, without) == {"a.txt": prose(2), "c.txt": prose(3)}
    assert without.test.n_bytes.tolist() == [len(prose(2)), len(prose(3))]
    assert without.digest != other.digest


def test_files_stay_together(tmp_path: Path, config: MakeConfig) -> None:
    """Chapters of one book overlap: by document they are refused, by file not."""
    for book in range(20):
        part = prose(1000 + book, 10)
        rows = [{"text": part + prose(10 * book + i, 5), "title": f"{book}.{i}"} for i in range(5)]
        write(tmp_path / "in" / f"{book:02}.jsonl", jsonl(rows))
    with pytest.raises(ValueError, match=r"data\.split_by=file"):
        read(config(path=tmp_path / "in"), tmp_path)
    corpus = read(config(path=tmp_path / "in", split_by="file", held_out=0.1), tmp_path)
    assert corpus.details["documents"] == {"train": 80, "validation": 10, "test": 10}
    books = [{name.partition(".")[0] for name in s.names} for s in (corpus.train, corpus.validation, corpus.test)]
    assert sum(map(len, books)) == len(set.union(*books)) == 20
    with pytest.raises(ValueError, match=r"data\.split_by=file needs more than 1 files"):
        read(config(path=tmp_path / "in" / "00.jsonl", split_by="file"), tmp_path)


@pytest.mark.parametrize(("n", "share", "held_out"), [(20, 0.3, 6), (12, 0.4, 4 + 1), (10, 0.4, 4)])
def test_a_share_that_can_be_chosen(n: int, share: float, held_out: int, tmp_path: Path, config: MakeConfig) -> None:
    file = write(tmp_path / "a.jsonl", jsonl({"text": prose(i, 5)} for i in range(n)))
    corpus = read(config(path=file, held_out=share), tmp_path)
    assert corpus.details["documents"] == {"train": n - 2 * held_out, "validation": held_out, "test": held_out}
    assert f"{100 * share:g}% each" in corpus.details["split"]


@pytest.mark.parametrize("name", ["text", "hf"])
def test_own_test_files(name: str, tmp_path: Path, config: MakeConfig) -> None:
    """They replace the official test text, nothing is held out for them, and they are checked for overlap."""
    body = jsonl({"text": prose(i, 5)} for i in range(20))
    write(tmp_path / "in" / "train.jsonl", body)
    write(tmp_path / "in" / "test.jsonl", jsonl([{"text": prose(50, 5)}]))
    for number in range(6):
        write(tmp_path / "mine" / f"{number}.txt", prose(100 + number, 5))
    settings = config(name, tmp_path / "in", test_path=str(tmp_path / "mine"))
    corpus = read(settings, tmp_path)
    assert corpus.test.names == [f"{number}.txt" for number in range(6)]
    assert corpus.details["documents"] == {"train": 19, "validation": 1, "test": 6}
    assert read(settings, tmp_path, evaluate_only=True).test.names == corpus.test.names
    write(tmp_path / "mine" / "3.txt", prose(3, 5))
    with pytest.raises(ValueError, match=r"1 test document occurs in the training text \('3\.txt'\)"):
        read(settings, tmp_path)
    with pytest.raises(ValueError, match=r"data\.test_path=.*nowhere does not exist"):
        read(config(name, tmp_path / "in", test_path=str(tmp_path / "nowhere")), tmp_path)


# --- text that never ends, and text that leads elsewhere --------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
def test_pipes_and_devices_are_not_waited_for(inside: bool, tmp_path: Path, config: MakeConfig) -> None:
    pipe, zero = tmp_path / "in" / "a.txt", tmp_path / "in" / "b.jsonl"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    zero.symlink_to("/dev/zero")
    if inside:
        write(tmp_path / "in" / "c.txt", prose(1))
        assert read(config(path=tmp_path / "in"), tmp_path).details["ignored_files"] == ["a.txt", "b.jsonl"]
        return
    for path in (pipe, zero):
        with pytest.raises(ValueError, match="is no regular file"):
            read(config(path=path), tmp_path)


def bomb(path: Path) -> Path:
    """40 MiB of one line again and again, in about 40 KB."""
    content = (b'{"text": "' + b"a" * 1000 + b'"}\n') * 40_000
    kind = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}[path.suffix]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(kind(content))
    return path


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["text", "hf"])
def test_a_bomb_is_refused(name: str, ending: str, tmp_path: Path, config: MakeConfig) -> None:
    file = bomb(tmp_path / "in" / f"train.jsonl{ending}")
    with pytest.raises(ValueError, match=r"train\.jsonl.* unpacks to more than 100 times its size"):
        read(config(name, file.parent), tmp_path)


def test_a_bomb_of_parquet_is_refused(tmp_path: Path, config: MakeConfig) -> None:
    file = parquet(tmp_path / "a.parquet", {"text": ["a" * 100_000] * 400})
    assert file.stat().st_size < 100_000
    with pytest.raises(ValueError, match="unpacks to more than 100 times its size"):
        read(config(path=file), tmp_path)


def repeated(path: Path, **how: Any) -> Path:
    """200 MiB of text: one that is in the file once, for all of its rows."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"text": ["a" * 2**20] * 200})
    pyarrow.parquet.write_table(table, path, **{"compression": "zstd", "dictionary_pagesize_limit": 2**30, **how})
    return path


def nulls(path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.nulls(2**24, pyarrow.string())}), path)
    return path


def zeros(path: Path) -> Path:
    """Texts, and beside them numbers that are there once for 100 million."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    beside = pyarrow.array([[0] * 10**6] * 100, pyarrow.list_(pyarrow.int64()))
    pyarrow.parquet.write_table(pyarrow.table({"text": [prose(i, 4) for i in range(100)], "n": beside}), path)
    return path


DELTAS = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}, "compression": "none"}


@pytest.mark.parametrize("name", ["text", "hf"])
@pytest.mark.parametrize(
    "made", [repeated, lambda path: repeated(path, **DELTAS), nulls], ids=["a dictionary", "continued", "nulls"]
)
def test_a_parquet_that_holds_a_text_once_for_many_rows_is_refused_before_it_is_read(
    name: str, made: Callable[[Path], Path], tmp_path: Path, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = made(tmp_path / "in" / "train.parquet")
    assert file.stat().st_size < 3 * 2**20
    monkeypatch.setattr(
        reading, "_rows_to_documents", lambda rows, *about: pytest.fail(f"it was read: {next(rows)[0]}")
    )
    with pytest.raises(ValueError, match=r"train\.parquet unpacks to more than 100 times its size"):
        read(config(name, file.parent), tmp_path)


def test_numbers_beside_the_text_are_not_read_and_count_only_where_they_would_be(
    tmp_path: Path, config: MakeConfig
) -> None:
    file = zeros(tmp_path / "in" / "train.parquet")
    assert read(config("text", file.parent), tmp_path).details["documents"]["train"] > 80
    with pytest.raises(ValueError, match=r"train\.parquet unpacks to more than 100 times its size"):
        read(config("hf", file.parent), tmp_path)


def archive(path: Path, name: str, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as packed:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    return path


LINES = b"".join(json.dumps({"text": prose(i, 4)}).encode() + b"\n" for i in range(30))


@pytest.mark.parametrize("kind", [".zip", ".tar.gz"])
def test_an_archive_of_a_dataset_is_looked_into_before_it_is_unpacked(
    kind: str, tmp_path: Path, config: MakeConfig
) -> None:
    if kind == ".zip":  # a .tar is for `datasets` one of samples with several files, none of which is a table
        good = archive(tmp_path / "good" / f"train{kind}", "train.jsonl", LINES)
        assert sum(read(config("hf", good.parent), tmp_path).details["documents"].values()) == 30
    for number, (name, content, why) in enumerate([
        ("train.jsonl", b'{"text": "' + b"a" * 2**25 + b'"}', "unpacks to more than 100 times its size"),
        ("train.jsonl", b'{"text": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n", "nested too deeply"),
        ("train.jsonl.gz", gzip.compress(LINES), r"holds a packed file, 'train\.jsonl\.gz'"),
    ]):  # fmt: skip
        file = archive(tmp_path / f"bad{number}" / f"train{kind}", name, content)
        with pytest.raises(ValueError, match=why):
            read(config("hf", file.parent), tmp_path)


def test_a_bomb_is_known_by_what_it_begins_with(tmp_path: Path, config: MakeConfig) -> None:
    """`datasets` unpacks whatever it can, however a file is called."""
    bomb(tmp_path / "in" / "train.jsonl.gz").rename(tmp_path / "in" / "train.txt")
    with pytest.raises(ValueError, match=r"train\.txt unpacks to more than 100 times its size"):
        read(config("hf", tmp_path / "in"), tmp_path)


def test_what_is_fetched_from_the_hub_is_checked_as_a_local_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    file = bomb(tmp_path / "in" / "train.jsonl.gz")
    builder = datasets.load_dataset_builder("json", data_files={"train": str(file)}, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, subset: builder)
    with pytest.raises(ValueError, match=r"train\.jsonl\.gz unpacks to more than 100 times its size"):
        load_hub("somebody/something", None)


def test_a_packed_vocabulary_is_read_up_to_a_size(tmp_path: Path, config: MakeConfig) -> None:
    for name, content in (("vocab.json.gz", b"{" + b" " * 2**25 + b"}"), ("merges.txt.gz", b"#version: 0.2\n")):
        (tmp_path / name).write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=r"are no GPT-2 tokeniser \(.*unpacks to more than 100 times its size"):
        tokenizers_module.read_gpt2(tmp_path)


def test_the_progress_of_reading_is_told_in_bytes(tmp_path: Path, config: MakeConfig) -> None:
    """Within a file, not only between files."""
    file = write(tmp_path / "a.txt", prose(1, 60_000))
    calls: list[tuple[str, int, int]] = []
    read(config(path=file), tmp_path, progress=lambda *call: calls.append(call), evaluate_only=True)
    size = file.stat().st_size
    done = [done for what, done, total in calls if what == "reading" and total == size]
    assert done == sorted(done)
    assert done[-1] == size
    assert any(0 < one < size for one in done)


DEEP = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_that_is_nested_too_deeply(name: str, tmp_path: Path, config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        read(config(path=write(tmp_path / name, DEEP)), tmp_path)


def test_a_dataset_that_is_nested_too_deeply_does_not_end_the_process(tmp_path: Path) -> None:
    """`datasets` parses JSON in C and dies of it: in a process of its own."""
    write(tmp_path / "in" / "train.jsonl", DEEP)
    program = (
        "import sys, pathlib; from ropelab.data import prepare; from ropelab.config import DataConfig\n"
        "settings = DataConfig('hf', sys.argv[1], None, 'bytes', 300, None, 'text')\n"
        "try: prepare(settings, cache_dir=pathlib.Path(sys.argv[2]))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "in"), str(tmp_path / "cache")],
        capture_output=True, text=True, env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "hf")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "nested too deeply" in done.stdout


@pytest.mark.parametrize("content", ["[" * 5000 + "]" * 5000, "pos: " + "{a: " * 5000 + "1" + "}" * 5000])
def test_yaml_that_is_nested_too_deeply(content: str, tmp_path: Path) -> None:
    from ropelab.claims import load_claim
    from ropelab.config import sweep_grammar

    file = write(tmp_path / "deep.yaml", content)
    with pytest.raises(ValueError, match="nested too deeply"):
        sweep_grammar.named_sweep(str(file))
    with pytest.raises(ValueError, match="nested too deeply"):
        load_claim(file, configs.config_dir())


def test_factors_that_are_nested_too_deeply(tmp_path: Path) -> None:
    file = write(tmp_path / "deep.json", "[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match=r"scaling\.factors=.* cannot be read"):
        configs.load(["scaling=longrope", f"scaling.factors={file}"])


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    return write(tmp_path / "secret" / "key.txt", prose(77))


@pytest.mark.parametrize("pattern", ["../secret/*.txt", "{secret}", "x/../../secret/key.txt"])
def test_a_card_cannot_name_files_outside(pattern: str, secret: Path, tmp_path: Path, config: MakeConfig) -> None:
    root = tmp_path / "set"
    write(root / "x" / "a.txt", prose(1))
    named = pattern.format(secret=secret)
    write(root / "README.md", f'---\nconfigs:\n- config_name: default\n  data_files: "{named}"\n---\n')
    with pytest.raises(ValueError, match=r"names a file outside of itself, .*secret"):
        read(config("hf", root), tmp_path)
    write(root / "README.md", '---\nconfigs:\n- config_name: default\n  data_files: "x/*.txt"\n---\n')
    assert read(config("hf", root), tmp_path).details["documents"]["train"]


@pytest.mark.parametrize("name", ["text", "hf"])
def test_links_to_outside_are_not_followed(name: str, secret: Path, tmp_path: Path, config: MakeConfig) -> None:
    """But those that the user names, that stay inside, or that a run of an earlier version read."""
    root = tmp_path / "set"
    write(root / "a.txt", prose(1))
    (root / "b.txt").symlink_to(write(root / "x.bin", prose(2)))
    (tmp_path / "link").symlink_to(root)
    assert read(config(name, tmp_path / "link"), tmp_path).details["documents"]["train"]
    (root / "c.txt").symlink_to(secret)
    with pytest.raises(ValueError, match=r"c\.txt is a link to outside of data\.path"):
        read(config(name, root), tmp_path)
    assert read(config(name, root, endings=FIRST_ENDINGS), tmp_path).details["documents"]["train"]


def test_links_of_a_snapshot_lead_to_its_blobs(tmp_path: Path, config: MakeConfig) -> None:
    blob = write(tmp_path / "datasets--x" / "blobs" / "abc", prose(1))
    snapshot = tmp_path / "datasets--x" / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    (snapshot / "a.txt").symlink_to(blob)
    assert read(config(path=snapshot), tmp_path).details["documents"]["train"] == 1


# --- BPE --------------------------------------------------------------------------------------------------------------


def test_bpe_of_texts_with_blanks_is_as_it_was() -> None:
    """The digest that the version before the limit printed; long words below the limit are in the text."""
    parts = [prose(1, 200), "größer, naïve, 東京, 🙂🙂\n" * 10, "x" * 900 + " " + "-" * 200 + "\n"]
    assert any(map(tokenizers_module._has_long_run, parts))
    assert train_bpe(parts, 400).digest == "329ca502c5bf705d938e230cd6cade60df6888e26964bf6985571c236582c0d7"


def test_bpe_of_a_text_without_blanks_is_that_of_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on 8 letters at a time, the tokens are those of the text with a line end there; and nothing is lost."""
    monkeypatch.setattr(tokenizers_module, "LONGEST", 8)
    source = random.Random(3)
    genome = "".join(source.choices("acgt", k=4000))
    tokenizer = train_bpe([genome], 300)
    pieces = [genome[start : start + 8] for start in range(0, len(genome), 8)]
    assert tokenizer.digest == train_bpe(pieces, 300).digest
    assert tokenizer.decode(tokenizer.encode(genome)) == genome
    assert max(tokenizer.byte_lengths) <= 8


def test_bpe_of_a_genome_ends_in_seconds() -> None:
    """600,000 letters: the time grew with the square, more than a minute for these."""
    import time

    source = random.Random(3)
    texts = ["".join(source.choices("ACGT", k=300_000)) for _ in range(2)]
    began = time.process_time()
    tokenizer = train_bpe(texts, 1024)
    assert time.process_time() - began < 30
    assert tokenizer.n_vocab == 1024


@pytest.mark.parametrize(
    "place", ["http://127.0.0.1:9/k.jsonl", "zip://k.jsonl::/nowhere/k.zip", "../k.jsonl", "/nowhere/k.jsonl"]
)
def test_a_card_that_leads_away_is_refused_before_anything_looks_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **how: pytest.fail("it was looked for"))
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    for name, text in (
        (
            "README.md",
            f'---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: "{place}"\n---\n',
        ),
        (".huggingface.yaml", f'data_files: "{place}"\n'),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="names a file outside of itself"):
            load_hub(str(tmp_path), None)
        (tmp_path / name).unlink()
