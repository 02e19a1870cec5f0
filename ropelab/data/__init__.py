"""Text to batches: corpora, tokenisers, a cache of tokens, and windows addressed by (seed, step)."""

from ropelab.data.batches import Batches
from ropelab.data.corpora import CorpusInfo, describe
from ropelab.data.documents import Progress
from ropelab.data.fast import apart, from_json, keeps_bytes, load_tokenizer, prefix, to_json, token_id
from ropelab.data.overlap import Shingles
from ropelab.data.prepare import check_overlap, prepare
from ropelab.data.tokenizers import Bpe, Bytes, Tokenizer
from ropelab.data.tokens import Corpus, Split
from ropelab.data.window_positions import Draw, drawn_positions

__all__ = [
    "Batches",
    "Bpe",
    "Bytes",
    "Corpus",
    "CorpusInfo",
    "Draw",
    "Progress",
    "Shingles",
    "Split",
    "Tokenizer",
    "apart",
    "check_overlap",
    "describe",
    "drawn_positions",
    "from_json",
    "keeps_bytes",
    "load_tokenizer",
    "prefix",
    "prepare",
    "to_json",
    "token_id",
]
