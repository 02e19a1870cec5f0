"""Corpora of files and datasets: what is read, how it is split, and what is refused in which words."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropelab.config import DataConfig
from ropelab.data import Corpus, Split, check_overlap, describe, prepare
from ropelab.data.corpora import wikitext_articles
from ropelab.data.splits import official_split, split_by_digest, split_contiguously

MakeConfig = Callable[..., DataConfig]


def prose(seed: int, n_lines: int = 20) -> str:
    """Lines of random words: two seeds have no 64 bytes in common."""
    source = random.Random(seed)
    return "".join(
        " ".join("".join(source.choices("abcdefghijklmno", k=6)) for _ in range(8)) + "\n" for _ in range(n_lines)
    )


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode() if isinstance(text, str) else text
    packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(data)
    path.write_bytes(packed)
    return path


def jsonl(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def texts(split: Split, corpus: Corpus) -> dict[str, str]:
    return {name: corpus.tokenizer.decode(split.document(i)) for i, name in enumerate(split.names)}


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["plain", "a b=c", 'it\'s "quoted"', "größe 東京", "{x},[y]#@;~("])
def test_folder_of_all_kinds_of_files(folder: str, tmp_path: Path, config: MakeConfig) -> None:
    """Plain and packed .txt and .jsonl files, in folders of any name; other and hidden files are not read."""
    root = tmp_path / folder
    rows = [{"text": prose(i), "title": f"T{i}", "author": "A"} for i in range(3)]
    write(root / "a.txt", prose(10))
    write(root / "b.txt.gz", prose(11))
    write(root / "sub dir" / "c.TXT.xz", prose(12))
    write(root / "d.jsonl", jsonl(rows))
    write(root / "e.jsonl.xz", jsonl({"text": prose(20 + i), "id": f"i{i}"} for i in range(3)))
    write(root / "f.jsonl.gz", jsonl([{"text": prose(30)}, {"text": ""}]))
    for other in ("notes.md", ".hidden.txt", ".git/x.txt"):
        write(root / other, "not this")
    corpus = prepare(config(path=root), cache_dir=tmp_path / "cache", evaluate_only=True)
    expected = {"a.txt": prose(10), "b.txt.gz": prose(11), "sub dir/c.TXT.xz": prose(12)}
    expected |= {f"T{i}": prose(i) for i in range(3)} | {f"i{i}": prose(20 + i) for i in range(3)}
    expected["f.jsonl.gz:1"] = prose(30)
    assert texts(corpus.test, corpus) == expected
    assert [corpus.test.authors[corpus.test.names.index(name)] for name in ("T0", "i0", "a.txt")] == ["A", None, None]
    assert not len(corpus.train)
    for name, digest, n_bytes in zip(corpus.test.names, corpus.test.digests, corpus.test.n_bytes, strict=True):
        assert digest == hashlib.sha256(expected[name].encode()).hexdigest()
        assert n_bytes == len(expected[name].encode())


def test_text_is_kept_but_for_the_mark_and_line_ends(tmp_path: Path, config: MakeConfig) -> None:
    """Byte-order mark dropped, \\r\\n to \\n; lone \\r, blanks, U+2028 and the like stay."""
    write(tmp_path / "in" / "a.txt", b"\xef\xbb\xbf one\r\ntwo\rthree \x0c\xe2\x80\xa8 \n\n")
    write(tmp_path / "in" / "b.jsonl", b'\xef\xbb\xbf{"text": "x\\r\\ny\xe2\x80\xa8z"}\r\n\r\n{"text": "w"}')
    corpus = prepare(config(path=tmp_path / "in"), cache_dir=tmp_path / "cache", evaluate_only=True)
    assert list(texts(corpus.test, corpus).values()) == [" one\ntwo\rthree \x0c\u2028 \n\n", "x\ny\u2028z", "w"]


def test_text_field_by_name(tmp_path: Path, config: MakeConfig) -> None:
    file = write(tmp_path / "a.jsonl", jsonl([{"body": "hello", "text": 3}]))
    corpus = prepare(config(path=file, text_field="body"), cache_dir=tmp_path / "cache", evaluate_only=True)
    assert texts(corpus.test, corpus) == {"a.jsonl:1": "hello"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty\.txt is empty"),
        ("mark.txt", b"\xef\xbb\xbf", r"mark\.txt is empty"),
        ("empty.txt.gz", b"", r"empty\.txt\.gz is empty"),
        ("binary.txt", b"abc\0def", r"binary\.txt is binary \(a NUL byte at offset 3\)"),
        ("latin.txt", "caf\u00e9 au lait".encode("latin1"), r"latin\.txt is not UTF-8 \(byte 0xe9 at offset 3\)"),
        ("mark.txt", b"\xef\xbb\xbfab\xff", r"not UTF-8 \(byte 0xff at offset 5\)"),
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": \n', r"bad\.jsonl, line 3, is not JSON"),
        ("list.jsonl", b'{"text": "a"}\n["b"]\n', r"list\.jsonl, line 2, is no JSON object"),
        (
            "field.jsonl",
            b'{"text": "a"}\n{"body": "b", "n": 1, "lang": "en"}\n',
            r"field\.jsonl, line 2, has no field 'text': set data\.text_field to one of body, lang",
        ),
        ("type.jsonl", b'{"text": 3}', r"type\.jsonl, line 1, has no text in 'text' but int"),
        ("null.jsonl", b'{"text": null}', r"null\.jsonl holds no text"),
        ("none.jsonl", b'{"text": ""}\n', r"none\.jsonl holds no text"),
        ("half.jsonl", b'{"text": "ok \\ud83d"}', r"half\.jsonl, line 1, has half a surrogate pair at character 3"),
    ],
)
@pytest.mark.parametrize("folder", ["plain", "it's a=b größe"])
def test_bad_files_are_named(
    folder: str, name: str, content: bytes, message: str, tmp_path: Path, config: MakeConfig
) -> None:
    file = write(tmp_path / folder / name, content)
    for path in (file, file.parent):
        with pytest.raises(ValueError, match=message) as raised:
            prepare(config(path=path), cache_dir=tmp_path / "cache")
        assert str(file) in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("ending", ["gz", "xz"])
def test_truncated_packed_files_are_named(ending: str, tmp_path: Path, config: MakeConfig) -> None:
    file = write(tmp_path / f"a.txt.{ending}", prose(1))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"a\.txt\.{ending} is damaged"):
        prepare(config(path=file), cache_dir=tmp_path / "cache")
    file.write_bytes(b"plain text")
    with pytest.raises(ValueError, match=rf"a\.txt\.{ending} is damaged or no \.{ending} file"):
        prepare(config(path=file), cache_dir=tmp_path / "cache")


def test_wrong_paths_are_named(tmp_path: Path, config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"data\.path=.*nothing here.* does not exist"):
        prepare(config(path=tmp_path / "nothing here"), cache_dir=tmp_path / "cache")
    (tmp_path / "empty folder").mkdir()
    with pytest.raises(ValueError, match=r"empty folder holds no \.txt, .* or \.parquet file \(also \.gz, \.xz"):
        prepare(config(path=tmp_path / "empty folder"), cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"a\.pdf is no \.txt, .* or \.parquet file .*data\.endings=\[\.pdf\]"):
        prepare(config(path=write(tmp_path / "a.pdf", "x")), cache_dir=tmp_path / "cache")


# --- splits -----------------------------------------------------------------------------------------------------------


def test_documents_are_split_by_their_digests(tmp_path: Path, config: MakeConfig) -> None:
    """40 documents: the two of the smallest sha256 are validation text, the next two test, in the files' order."""
    bodies = {f"T{i}": prose(i, 5) for i in range(40)}
    file = write(tmp_path / "a.jsonl", jsonl({"text": body, "title": name} for name, body in bodies.items()))
    corpus = prepare(config(path=file), cache_dir=tmp_path / "cache")
    ranked = sorted(bodies, key=lambda name: hashlib.sha256(bodies[name].encode()).hexdigest())
    assert set(corpus.validation.names) == set(ranked[:2])
    assert set(corpus.test.names) == set(ranked[2:4])
    assert corpus.train.names == [name for name in bodies if name in ranked[4:]]
    assert corpus.details["documents"] == {"train": 36, "validation": 2, "test": 2}
    assert "sha256" in corpus.details["split"]
    assert texts(corpus.train, corpus) == {name: bodies[name] for name in corpus.train.names}


@given(st.integers(3, 300), st.integers(1, 2))
def test_split_by_digest_is_a_partition(n: int, held_out: int) -> None:
    """Every document is in one split, none is empty, and renaming (reordering) documents changes nothing."""
    digests = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(n)]
    parts = split_by_digest(digests, held_out)
    assert sorted(index for part in parts for index in part) == list(range(n))
    assert all(parts)
    assert all(len(part) == max(1, round(n / 20)) for part in parts[1:])
    reordered = split_by_digest(digests[::-1], held_out)
    assert [{digests[i] for i in part} for part in parts] == [{digests[::-1][i] for i in part} for part in reordered]


def test_few_documents_are_split_at_line_ends(tmp_path: Path, config: MakeConfig) -> None:
    lines = [f"line {i} {prose(i, 1)}" for i in range(200)]
    file = write(tmp_path / "one.txt", "".join(lines))
    corpus = prepare(config(path=file), cache_dir=tmp_path / "cache")
    parts = [texts(split, corpus) for split in (corpus.train, corpus.validation, corpus.test)]
    assert [list(part) for part in parts] == [[f"one.txt ({name})"] for name in ("train", "validation", "test")]
    bodies = [next(iter(part.values())) for part in parts]
    assert "".join(bodies) == "".join(lines)
    assert all(body.endswith("\n") for body in bodies)
    assert [body.count("\n") for body in bodies] == pytest.approx([180, 10, 10], abs=1)
    assert "line ends" in corpus.details["split"]


@given(st.text(alphabet="ab \n", max_size=300), st.integers(1, 2))
def test_contiguous_pieces_are_the_text(text: str, held_out: int) -> None:
    """Whatever the text, the pieces together are the text again."""
    pieces = split_contiguously(text, held_out)
    assert "".join(pieces) == text
    assert len(pieces) == held_out + 1


def test_contiguous_cuts_are_the_nearest_line_ends() -> None:
    text = "".join("x" * 9 + "\n" for _ in range(100))
    assert [len(piece) for piece in split_contiguously(text)] == [900, 50, 50]
    assert [len(piece) for piece in split_contiguously(text, 1)] == [950, 50]
    assert [len(piece) for piece in split_contiguously("word " * 100)] == [450, 25, 25]
    assert [len(piece) for piece in split_contiguously("x" * 100)] == [90, 5, 5]


def test_too_short_a_text_cannot_be_split(tmp_path: Path, config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"a\.txt is too short to be split, nothing is left for"):
        prepare(config(path=write(tmp_path / "a.txt", "x")), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("train.txt", "validation.txt", "test.txt"), {"train": 1, "validation": 1, "test": 1}),
        (("train.jsonl.xz", "valid.txt.gz", "test.txt"), {"train": 1, "validation": 1, "test": 1}),
        (("train/a.txt", "train/b.txt", "dev/c.txt", "test/d.txt"), {"train": 2, "validation": 1, "test": 1}),
        (("train-00000-of-00002.txt", "train-00001-of-00002.txt", "val.txt", "test.txt"), {"train": 2}),
    ],
)
def test_official_splits_by_name(
    files: tuple[str, ...], expected: dict[str, int], tmp_path: Path, config: MakeConfig
) -> None:
    root = tmp_path / "in"
    for number, name in enumerate((*files, "README.txt")):
        body = prose(number)
        write(root / name, jsonl([{"text": body}]) if ".jsonl" in name else body)
    corpus = prepare(config(path=root), cache_dir=tmp_path / "cache")
    assert corpus.details["documents"] == {"validation": 1, "test": 1} | expected
    assert corpus.details["split"] == "official"
    assert corpus.details["ignored_files"] == ["README.txt"]
    only = prepare(config(path=root), cache_dir=tmp_path / "cache", evaluate_only=True)
    assert (len(only.train), only.test.names) == (0, corpus.test.names)


def test_missing_official_splits_are_made_of_the_training_text(tmp_path: Path, config: MakeConfig) -> None:
    write(tmp_path / "in" / "train.jsonl", jsonl({"text": prose(i, 5)} for i in range(20)))
    write(tmp_path / "in" / "test.txt", prose(100))
    corpus = prepare(config(path=tmp_path / "in"), cache_dir=tmp_path / "cache")
    assert corpus.details["documents"] == {"train": 19, "validation": 1, "test": 1}
    assert corpus.test.names == ["test.txt"]
    (tmp_path / "in" / "train.jsonl").unlink()
    with pytest.raises(ValueError, match="has no training text, only test"):
        prepare(config(path=tmp_path / "in"), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "split"),
    [("train", "train"), ("Dev", "validation"), ("test-00000-of-00001", "test"), ("training", None), ("test_a", None)],
)
def test_official_names(name: str, split: str | None) -> None:
    assert official_split(name) == split


# --- overlap ----------------------------------------------------------------------------------------------------------


def test_overlap_of_train_and_test_is_refused(tmp_path: Path, config: MakeConfig) -> None:
    """An exact copy however short, and a document of which more than a fifth is training text."""
    root = tmp_path / "in"
    write(root / "train.jsonl", jsonl([{"text": prose(1, 200)}, {"text": "tiny"}]))
    write(root / "validation.txt", prose(2))
    write(root / "test.jsonl", jsonl([{"text": prose(3), "title": "new"}, {"text": "tiny", "title": "copy"}]))
    with pytest.raises(ValueError, match=r"1 test document occurs in the training text \('copy'\)"):
        prepare(config(path=root), cache_dir=tmp_path / "cache")
    third = prose(1, 200)[2000:3000] + prose(4, 36)
    write(root / "test.jsonl", jsonl([{"text": prose(3), "title": "new"}, {"text": third, "title": "third"}]))
    with pytest.raises(ValueError, match=r"'third'"):
        prepare(config(path=root), cache_dir=tmp_path / "cache")
    tenth = prose(1, 200)[2000:2300] + prose(4, 60)
    write(root / "test.jsonl", jsonl([{"text": prose(3), "title": "new"}, {"text": tenth, "title": "tenth"}]))
    assert prepare(config(path=root), cache_dir=tmp_path / "cache").test.names == ["new", "tenth"]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_overlap_of_other_text_with_a_corpus(tokenizer: str, tmp_path: Path, config: MakeConfig) -> None:
    """The check of an evaluation on other text, from cached tokens of either corpus."""
    train = write(tmp_path / "train.txt", prose(1, 400))
    corpus = prepare(config(path=train, tokenizer=tokenizer), cache_dir=tmp_path / "cache")
    other = write(tmp_path / "other" / "a.txt", prose(2))
    write(tmp_path / "other" / "b.txt", prose(1, 400)[:3000])
    with_copy = prepare(
        config(path=other.parent), cache_dir=tmp_path / "cache", evaluate_only=True, tokenizer=corpus.tokenizer
    )
    with pytest.raises(ValueError, match=r"1 test document occurs in the training text \('b\.txt'\)"):
        check_overlap(corpus, with_copy)
    alone = prepare(config(path=other), cache_dir=tmp_path / "cache", evaluate_only=True, tokenizer=corpus.tokenizer)
    assert alone.tokenizer is corpus.tokenizer
    check_overlap(corpus, alone)


# --- presets ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def presets(tmp_path: Path) -> Path:
    """The layout of the real texts, small."""
    root = tmp_path / "data"
    for number, split in enumerate(("train", "validation", "test")):
        rows = [
            {"id": f"{split}{i}", "title": f"{split} {i}", "author": f"A{i}", "text": prose(10 * number + i)}
            for i in range(2)
        ]
        write(root / "books" / f"{split}.jsonl.xz", jsonl(rows))
    write(root / "nonfiction" / "test.jsonl.xz", jsonl([{"title": "N", "author": "B", "text": prose(50)}]))
    wiki = " \n = One = \n \n text \n = = Section = = \n \n x \n = 1 not a title = \n y \n \n = Two ( b ) = \n \n z \n"
    write(root / "wikitext" / "wiki.test.raw.xz", wiki)
    write(root / "wikitext" / "wiki.valid.tokens.xz", "ignored")
    return root


def test_presets_are_found_in_or_below_the_folder(
    presets: Path, tmp_path: Path, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ROPELAB_DATA", raising=False)
    cache = tmp_path / "cache"
    books = prepare(config("books", presets), cache_dir=cache)
    assert books.train.names == ["train 0", "train 1"]
    assert books.test.authors == ["A0", "A1"]
    assert prepare(config("books", presets / "books"), cache_dir=cache).digest == books.digest
    monkeypatch.setenv("ROPELAB_DATA", str(presets))
    assert prepare(config("books"), cache_dir=cache).digest == books.digest
    assert prepare(config("nonfiction"), cache_dir=cache, evaluate_only=True).test.names == ["N"]
    articles = prepare(config("wikitext"), cache_dir=cache, evaluate_only=True)
    assert articles.test.names == ["One", "Two ( b )"]
    assert articles.tokenizer.decode(articles.test.document(1)) == " = Two ( b ) = \n \n z \n"
    assert {info.name: info.present for info in describe()} == {
        "stdlib": True, "text": None, "hf": None, "books": True, "nonfiction": True, "wikitext": True,
    }  # fmt: skip
    # the folder of one preset is not taken for another one
    monkeypatch.setenv("ROPELAB_DATA", str(presets / "books"))
    for other in ("nonfiction", "wikitext"):
        with pytest.raises(ValueError, match=rf"books/{other} nor .*books holds {other}.*ROPELAB_DATA"):
            prepare(config(other), cache_dir=cache, evaluate_only=True)
    assert [info.present for info in describe()] == [True, None, None, True, False, False]


def test_presets_that_are_absent(tmp_path: Path, config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROPELAB_DATA", raising=False)
    with pytest.raises(ValueError, match=r"data=books needs data\.path or ROPELAB_DATA"):
        prepare(config("books"), cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"neither .*x/books nor .*x holds books \(test\.jsonl\.xz\): set data\.path"):
        prepare(config("books", tmp_path / "x"), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", ["nonfiction", "wikitext"])
def test_evaluation_texts_are_not_trained_on(name: str, presets: Path, tmp_path: Path, config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=f"^{name} only evaluates; train on books$"):
        prepare(config(name, presets), cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="bpe is trained on training text"):
        prepare(config(name, presets, tokenizer="bpe"), cache_dir=tmp_path / "cache", evaluate_only=True)


def test_real_wikitext_has_60_articles(real_data: Path) -> None:
    text = lzma.decompress((real_data / "wikitext" / "wiki.test.raw.xz").read_bytes()).decode()
    articles = wikitext_articles(text)
    assert len(articles) == 60
    assert "".join(body for _, body in articles) == text
    assert articles[0][0] == "Robert Boulter"
    assert articles[-1][0] == "The Hustler ( film )"


def test_real_nonfiction(real_data: Path, tmp_path: Path, config: MakeConfig) -> None:
    corpus = prepare(config("nonfiction", real_data), cache_dir=tmp_path / "cache", evaluate_only=True)
    assert (len(corpus.test), int(corpus.test.n_bytes.sum())) == (5, 6_213_812)
    index = (real_data / "nonfiction" / "index.tsv").read_text(encoding="utf-8")
    assert all(digest in index for digest in corpus.test.digests)


def test_gpt2_files_are_found_beside_the_texts(real_data: Path, tmp_path: Path, config: MakeConfig) -> None:
    given = prepare(
        config(
            path=write(tmp_path / "a.txt", "Hello world"),
            tokenizer="gpt2",
            tokenizer_path=str(real_data / "gpt2-tokenizer"),
        ),
        cache_dir=tmp_path / "cache",
        evaluate_only=True,
    )
    assert given.test.document(0).tolist() == [15496, 995]
    found = prepare(
        config("wikitext", real_data / "wikitext", tokenizer="gpt2"), cache_dir=tmp_path / "cache", evaluate_only=True
    )
    assert found.tokenizer.digest == given.tokenizer.digest
    assert len(found.test.tokens) == 286221


def test_gpt2_without_files_or_network(tmp_path: Path, config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*arguments: object) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.delenv("ROPELAB_DATA", raising=False)
    with pytest.raises(ValueError, match=r"data\.tokenizer=gpt2 is neither here.*set data\.tokenizer_path"):
        prepare(
            config(path=write(tmp_path / "a.txt", "x"), tokenizer="gpt2"), cache_dir=tmp_path / "c", evaluate_only=True
        )


# --- hub --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, keeping what it prepares in the test's folder."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    return library


def test_dataset_of_parquet_with_official_splits(datasets: Any, tmp_path: Path, config: MakeConfig) -> None:
    """A folder in the hub's layout; empty rows are left out, missing splits are made."""
    root = tmp_path / "a set"
    rows = {"train": [prose(i, 4) for i in range(20)] + ["", None], "test": [prose(100)]}
    for split, column in rows.items():
        (root / "data").mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_dict({"body": column, "title": [f"{split} {i}" for i in range(len(column))]})
        table.to_parquet(str(root / "data" / f"{split}-00000-of-00001.parquet"))
    corpus = prepare(config("hf", root, text_field="body"), cache_dir=tmp_path / "cache")
    assert corpus.details["documents"] == {"train": 19, "validation": 1, "test": 1}
    assert texts(corpus.test, corpus) == {"test 0": prose(100)}
    everything = texts(corpus.train, corpus) | texts(corpus.validation, corpus)
    assert everything == {f"train {i}": prose(i, 4) for i in range(20)}
    only = prepare(config("hf", root, text_field="body"), cache_dir=tmp_path / "cache", evaluate_only=True)
    assert only.test.names == ["test 0"]
    with pytest.raises(ValueError, match=r"has no field 'text': set data\.text_field to one of body, title"):
        prepare(config("hf", root), cache_dir=tmp_path / "cache")


def test_dataset_without_splits_is_split_like_files(datasets: Any, tmp_path: Path, config: MakeConfig) -> None:
    """The same rows as a dataset and as a .jsonl file have the same test documents."""
    body = jsonl({"text": prose(i, 4), "title": str(i)} for i in range(30))
    root = write(tmp_path / "set" / "train.jsonl", body).parent
    hub = prepare(config("hf", root), cache_dir=tmp_path / "cache")
    files = prepare(config("text", write(tmp_path / "a.jsonl", body)), cache_dir=tmp_path / "cache")
    assert hub.digest == files.digest
    assert hub.details["documents"] == {"train": 26, "validation": 2, "test": 2}


def test_wikitext_of_the_hub_is_joined_to_articles(
    datasets: Any, presets: Path, tmp_path: Path, config: MakeConfig
) -> None:
    """A row is a line there and an empty line an empty string: the articles are those of the raw file."""
    raw = lzma.decompress((presets / "wikitext" / "wiki.test.raw.xz").read_bytes()).decode()
    rows = ["" if line == " \n" else line for line in raw.splitlines(keepends=True)]
    root = tmp_path / "wikitext"
    root.mkdir()
    datasets.Dataset.from_dict({"text": rows}).to_parquet(str(root / "test-00000-of-00001.parquet"))
    hub = prepare(config("hf", root), cache_dir=tmp_path / "cache", evaluate_only=True)
    preset = prepare(config("wikitext", presets), cache_dir=tmp_path / "cache", evaluate_only=True)
    assert hub.digest == preset.digest


def test_dataset_that_cannot_be_loaded(datasets: Any, tmp_path: Path, config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"data\.path=.*no/such/folder does not exist"):
        prepare(config("hf", "no/such/folder"), cache_dir=tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be loaded as a dataset") as raised:
        prepare(config("hf", tmp_path / "empty"), cache_dir=tmp_path / "cache")
    assert "\n" not in str(raised.value)
