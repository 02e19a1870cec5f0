"""Tokenisers: lossless on any text, exact byte lengths, GPT-2's own ids."""

from __future__ import annotations

import base64
import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ropelab.data.tokenizers as tokenizers_module
from ropelab.data import Bpe, Bytes, Tokenizer, load_tokenizer
from ropelab.data.tokenizers import read_gpt2, train_bpe

ENGLISH = "the cat sat on the mat; the rat sat on the cat. That hat! 123 1234\n" * 20
TRAINED = train_bpe([ENGLISH, "größer, naïve, 東京, 🙂🙂\n" * 10], 400)


@pytest.fixture(scope="module")
def gpt2(real_data: Path) -> Bpe:
    return read_gpt2(real_data / "gpt2-tokenizer")


def check_lossless(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    data = text.encode()
    assert tokenizer.decode(tokens) == text
    assert tokenizer.byte_lengths[tokens].sum() == len(data)
    # every token is exactly the next byte_lengths[token] bytes, also inside a character
    ends = np.cumsum(tokenizer.byte_lengths[tokens])
    for token, end in zip(tokens, ends, strict=True):
        assert tokenizer.decode_bytes([token]) == data[end - tokenizer.byte_lengths[token] : end]
    assert len(tokenizer.byte_lengths) == tokenizer.n_vocab - 1 == tokenizer.separator
    assert not (tokens == tokenizer.separator).any()


@given(st.text())
def test_bytes_are_lossless(text: str) -> None:
    """Any text comes back from its bytes."""
    check_lossless(Bytes(), text)


@given(st.text() | st.text(alphabet="the cat\n'ßé東🙂 \t\u00a0\u2028"))
def test_trained_bpe_is_lossless(text: str) -> None:
    """Any text comes back from BPE, and its tokens' byte lengths are those of the text."""
    check_lossless(TRAINED, text)


@given(text=st.text() | st.text(alphabet="the cat's\n' 12ßé東🙂\t\u00a0<|endoftext|>"))
def test_gpt2_is_lossless(gpt2: Bpe, text: str) -> None:
    """Any text comes back from GPT-2's tokens, the name of its special token included."""
    check_lossless(gpt2, text)


def test_bytes_are_the_utf8_bytes() -> None:
    tokens = Bytes().encode("aé\n")
    assert tokens.tolist() == [97, 0xC3, 0xA9, 10]
    assert tokens.dtype == np.uint16
    assert (Bytes().n_vocab, Bytes().separator) == (257, 256)


def test_decode_leaves_out_separators_and_marks_half_characters() -> None:
    assert Bytes().decode([104, 256, 105]) == "hi"
    assert Bytes().decode([0xC3]) == "\ufffd"
    assert TRAINED.decode([TRAINED.separator]) == ""


def test_gpt2_known_ids(gpt2: Bpe) -> None:
    """Ids that OpenAI's encoder gives; the special token is never produced from its name."""
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode("Hello, I'm a language model,").tolist() == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (gpt2.n_vocab, gpt2.separator) == (50257, 50256)
    assert gpt2.encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]


def test_gpt2_bytes_are_those_of_tiktoken(gpt2: Bpe, real_data: Path) -> None:
    """Each token's bytes and id against the independent file of `tiktoken`'s form."""
    lines = gzip.decompress((real_data / "gpt2-tokenizer" / "gpt2.tiktoken.gz").read_bytes()).decode().splitlines()
    assert len(lines) == 50256
    for line in lines:
        token, rank = line.split()
        assert gpt2.decode_bytes([int(rank)]) == base64.b64decode(token)


def test_gpt2_agrees_with_transformers(gpt2: Bpe, real_data: Path, tmp_path: Path) -> None:
    """The same ids as transformers' GPT-2 tokeniser on accents, blanks, numbers and contractions."""
    transformers = pytest.importorskip("transformers")
    for ours, theirs in (("encoder.json.gz", "vocab.json"), ("vocab.bpe.gz", "merges.txt")):
        (tmp_path / theirs).write_bytes(gzip.decompress((real_data / "gpt2-tokenizer" / ours).read_bytes()))
    oracle = transformers.GPT2TokenizerFast.from_pretrained(str(tmp_path))
    for text in (
        ENGLISH,
        "  two  blanks\n\n\ttab",
        "naïve façade — 東京 🙂",
        "we'll they're 1999's\r\n",
        "a\u00a0b\u2028c",
    ):
        assert gpt2.encode(text).tolist() == oracle.encode(text)
    # the same files under their other names are the same tokeniser
    assert read_gpt2(tmp_path).digest == gpt2.digest


def test_wikitext_has_the_published_number_of_gpt2_tokens(gpt2: Bpe, real_data: Path) -> None:
    text = lzma.decompress((real_data / "wikitext" / "wiki.test.raw.xz").read_bytes()).decode()
    assert len(gpt2.encode(text)) == 286221


def test_long_text_in_pieces_has_the_tokens_of_the_whole(gpt2: Bpe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut at line ends every few characters: the tokens are those of the text encoded at once."""
    text = "Alpha beta\ngamma\n\ndelta \n  epsilon's\n\n\nzeta é\nß eta\n1 2\n--\nend\u00a0\nx" * 40
    whole = gpt2._encoder.encode(text).ids
    monkeypatch.setattr(tokenizers_module, "_PIECE", 7)
    assert len(list(tokenizers_module._cut_at_line_ends(text))) > 40
    assert gpt2.encode(text).tolist() == whole


def test_trained_bpe_merges_the_most_frequent_pair_first() -> None:
    """ "low lower lowest" by hand: l+o and then lo+w are the most frequent pairs."""
    tokenizer = train_bpe(["low lower lowest low low"], 259)
    assert tokenizer.n_vocab == 259
    assert [tokenizer.decode([token]) for token in (256, 257)] == ["lo", "low"]
    assert tokenizer.byte_lengths[[0, 255, 256, 257]].tolist() == [1, 1, 2, 3]


def test_trained_bpe_is_deterministic_and_can_run_out_of_pairs() -> None:
    """The order of the documents does not matter; with nothing left to merge the vocabulary is smaller."""
    texts = [ENGLISH, ENGLISH.upper(), "other words entirely, other words\n" * 9]
    assert train_bpe(texts, 420).digest == train_bpe(texts[::-1], 420).digest
    assert train_bpe(["ab ab ab"], 4096).n_vocab < 300


def test_type_of_tokens_follows_the_vocabulary() -> None:
    few = Bpe("bpe", TRAINED._vocabulary, TRAINED._merges)
    assert few.dtype == np.dtype("<u2")
    few.n_vocab = 2**16
    assert few.dtype == np.dtype("<u2")  # the last id is 65535
    few.n_vocab = 2**16 + 1
    assert few.dtype == np.dtype("<u4")


@pytest.mark.parametrize("tokenizer", [Bytes(), TRAINED], ids=["bytes", "bpe"])
def test_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a folder" / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path)
    assert loaded.digest == tokenizer.digest
    assert loaded.encode(ENGLISH).tolist() == tokenizer.encode(ENGLISH).tolist()
    assert json.loads(path.read_text(encoding="utf-8"))["name"] == tokenizer.name


def test_digests_tell_tokenizers_apart() -> None:
    assert len({Bytes().digest, TRAINED.digest, train_bpe([ENGLISH], 300).digest}) == 3


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"name": "bpe"}'])
def test_damaged_tokenizer_file_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokeniser"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match=r"missing\.json does not exist"):
        load_tokenizer(tmp_path / "missing.json")


def test_gpt2_folder_without_or_with_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"encoder\.json and vocab\.bpe"):
        read_gpt2(tmp_path)
    (tmp_path / "encoder.json").write_text('{"a": 0}')
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match="are no GPT-2 tokeniser"):
        read_gpt2(tmp_path)
    (tmp_path / "encoder.json").write_text("{")
    with pytest.raises(ValueError, match="are no GPT-2 tokeniser"):
        read_gpt2(tmp_path)
