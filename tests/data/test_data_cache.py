"""The cache: read once, whole or not at all, for several processes at once."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ropelab.data.reading as reading_module
from ropelab.config import DataConfig
from ropelab.data import Corpus, prepare

MakeConfig = Callable[..., DataConfig]
BODY = "".join(f"{i} {i * i} {i**3}\n" for i in range(1000))


def content(corpus: Corpus) -> list[object]:
    splits = (corpus.train, corpus.validation, corpus.test)
    return [corpus.digest, corpus.details, *([s.tokens.tolist(), s.offsets.tolist(), s.names] for s in splits)]


def token_folder(cache: Path) -> Path:
    (folder,) = (cache / "tokens").iterdir()
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(BODY)
    return path


def test_second_time_reads_nothing(
    file: Path, tmp_path: Path, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tokenizer in ("bytes", "bpe"):
        prepare(config(path=file, tokenizer=tokenizer), cache_dir=tmp_path / "cache")
    first = content(prepare(config(path=file), cache_dir=tmp_path / "cache"))
    bpe = content(prepare(config(path=file, tokenizer="bpe"), cache_dir=tmp_path / "cache"))

    def unreadable(path: Path, told: object) -> bytes:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr(reading_module, "chunks", unreadable)
    assert content(prepare(config(path=file), cache_dir=tmp_path / "cache")) == first
    assert content(prepare(config(path=file, tokenizer="bpe"), cache_dir=tmp_path / "cache")) == bpe
    with pytest.raises(AssertionError, match="read again"):
        prepare(config(path=file), cache_dir=tmp_path / "another cache")


def test_changed_text_is_read_again(file: Path, tmp_path: Path, config: MakeConfig) -> None:
    """Also when size and modification time are the same as before."""
    before = file.stat()
    first = prepare(config(path=file), cache_dir=tmp_path / "cache")
    file.write_text(BODY.replace("1", "7"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = prepare(config(path=file), cache_dir=tmp_path / "cache")
    assert second.digest != first.digest
    assert "7" in second.tokenizer.decode(second.train.document(0)[:9])


def test_digest_is_of_the_content(file: Path, tmp_path: Path, config: MakeConfig) -> None:
    """Equal text elsewhere has the same digest and shares the tokens; a name or a character more is another corpus."""
    cache = tmp_path / "cache"
    first = prepare(config(path=file), cache_dir=cache)
    copy = tmp_path / "elsewhere" / "text.txt"
    copy.parent.mkdir()
    shutil.copy(file, copy)
    assert prepare(config(path=copy), cache_dir=cache).digest == first.digest
    assert len(list((cache / "tokens").iterdir())) == 1
    renamed = copy.rename(copy.with_name("other.txt"))
    assert prepare(config(path=renamed), cache_dir=cache).digest != first.digest
    file.write_text(BODY + "x")
    assert prepare(config(path=file), cache_dir=cache).digest != first.digest


def test_trained_tokenizer_is_that_of_its_training_text(file: Path, tmp_path: Path, config: MakeConfig) -> None:
    """Another text or another size is another tokeniser, with a cache of its own."""
    other = tmp_path / "other.txt"
    other.write_text(BODY.translate(str.maketrans("0123456789", "abcdefghij")))
    cases = [config(path=path, tokenizer="bpe", vocab_size=size) for path in (file, other) for size in (280, 300)]
    corpora = [prepare(case, cache_dir=tmp_path / "cache") for case in cases]
    assert len({corpus.tokenizer.digest for corpus in corpora}) == 4
    assert [corpus.tokenizer.n_vocab for corpus in corpora] == [280, 300, 280, 300]
    learned = [corpora[index].tokenizer.decode(range(256, 279)) for index in (0, 2)]
    assert any(letter in "0123456789" for letter in learned[0])
    assert not any(letter in "0123456789" for letter in learned[1])


def test_tokens_are_read_only_maps_of_plain_little_endian_files(file: Path, tmp_path: Path, config: MakeConfig) -> None:
    corpus = prepare(config(path=file), cache_dir=tmp_path / "cache")
    raw = (token_folder(tmp_path / "cache") / "train.bin").read_bytes()
    assert raw[::2].decode() == BODY[: len(raw) // 2]
    assert set(raw[1::2]) == {0}
    assert isinstance(corpus.train.tokens.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        corpus.train.tokens[0] = 1


def truncate(folder: Path) -> None:
    os.truncate(folder / "train.bin", 100)


def truncate_and_hide_it(folder: Path) -> None:
    file = folder / "shingles.bin"
    before = file.stat()
    os.truncate(file, before.st_size - 8)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip(folder: Path) -> None:
    with (folder / "validation.bin").open("r+b") as file:
        file.write(b"\xff")


def cut_index(folder: Path) -> None:
    os.truncate(folder / "index.json", 50)


def lie_in_index(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["train"]["offsets"][-1] += 1
    (folder / "index.json").write_text(json.dumps(index))


def remove_file(folder: Path) -> None:
    (folder / "shingles.bin").unlink()


def remove_key(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    del index["test"]
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "damage", [truncate, truncate_and_hide_it, flip, cut_index, lie_in_index, remove_file, remove_key]
)
def test_damaged_cache_is_built_again_and_said(
    damage: Callable[[Path], None], file: Path, tmp_path: Path, config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    first = content(prepare(config(path=file), cache_dir=cache))
    damage(token_folder(cache))
    with caplog.at_level(logging.WARNING):
        assert content(prepare(config(path=file), cache_dir=cache)) == first
    assert "is damaged" in caplog.text
    caplog.clear()
    assert content(prepare(config(path=file), cache_dir=cache)) == first
    assert not caplog.text
    assert [path.name for path in (cache / "tokens").iterdir()] == [token_folder(cache).name]


def test_warning_goes_to_standard_error(file: Path, tmp_path: Path, config: MakeConfig) -> None:
    prepare(config(path=file), cache_dir=tmp_path / "cache")
    truncate(token_folder(tmp_path / "cache"))
    done = subprocess.run(command(file, tmp_path / "cache"), capture_output=True, text=True, check=True)
    assert "is damaged" in done.stderr
    assert "damaged" not in done.stdout


def test_copied_cache_is_verified_and_used(
    file: Path, tmp_path: Path, config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy has other times: its contents are compared, and taken when they are the same."""
    first = content(prepare(config(path=file), cache_dir=tmp_path / "cache"))
    shutil.copytree(tmp_path / "cache", tmp_path / "copy", copy_function=shutil.copyfile)
    assert content(prepare(config(path=file), cache_dir=tmp_path / "copy")) == first
    assert not caplog.text


@pytest.mark.parametrize("kind", ["sources", "tokenizers"])
def test_damaged_facts_are_made_again(kind: str, file: Path, tmp_path: Path, config: MakeConfig) -> None:
    values = config(path=file, tokenizer="bpe")
    first = content(prepare(values, cache_dir=tmp_path / "cache"))
    for path in (tmp_path / "cache" / kind).rglob("*.json"):
        path.write_text(path.read_text()[:-30])
    assert content(prepare(values, cache_dir=tmp_path / "cache")) == first


def command(file: Path, cache: Path) -> list[str]:
    program = (
        "import sys, pathlib; from ropelab.data import prepare; from ropelab.config import DataConfig\n"
        "values = DataConfig('text', sys.argv[1], None, 'bpe', 300, None, 'text')\n"
        "corpus = prepare(values, cache_dir=pathlib.Path(sys.argv[2]))\n"
        "print(corpus.digest, corpus.tokenizer.digest, int(corpus.train.tokens.astype(int).sum()))"
    )
    if cache.exists():  # the bytes' cache that is there
        program = program.replace("'bpe'", "'bytes'")
    return [sys.executable, "-c", program, str(file), str(cache)]


def test_processes_that_build_at_once_all_succeed(file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    running = [
        subprocess.Popen(command(file, cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    results = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    assert all(not path.name.startswith(".") for path in cache.rglob("*"))


def test_interrupted_build_leaves_nothing_behind(file: Path, tmp_path: Path, config: MakeConfig) -> None:
    def interrupt(description: str, done: int, total: int) -> None:
        if description == "tokenising":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config(path=file), cache_dir=tmp_path / "cache", progress=interrupt)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_progress_comes_to_its_end(file: Path, tmp_path: Path, config: MakeConfig) -> None:
    calls: list[tuple[str, int, int]] = []
    prepare(config(path=file, tokenizer="bpe"), cache_dir=tmp_path / "cache", progress=lambda *call: calls.append(call))
    ends = {description: (done, total) for description, done, total in calls}
    n = len(BODY)
    assert ends == {"reading": (n, n), "training the tokeniser": (2, 2), "tokenising": (n, n)}


def test_cache_that_cannot_be_written_is_named(file: Path, tmp_path: Path, config: MakeConfig) -> None:
    (tmp_path / "occupied").write_text("a file")
    with pytest.raises(ValueError, match=r"cache_dir=.*occupied cannot be written.*ROPELAB_CACHE"):
        prepare(config(path=file), cache_dir=tmp_path / "occupied")


def test_bytes_need_neither_datasets_nor_tokenizers(file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    program = command(file, tmp_path / "cache")
    program[2] += "\nassert not {'datasets', 'tokenizers', 'torch', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run(program, check=True, capture_output=True)
