"""The record: what one encoding adds to one forward pass, as tensors, and the digest of it.

Letters of the shapes: B sequences, T positions, C model width, H heads, R rotated dimensions of a head. N positions are
T, or B x T where every sequence has positions of its own.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Spectrum(NamedTuple):
    """The frequencies of a rotation, as trained or scaled."""

    inv_freq: Tensor  # (R/2,) fp64, radians per token
    attention_factor: float = 1.0  # multiplies cosines and sines, so scores get its square
    start_tokens: int = 0  # positions below keep the angles of the unscaled spectrum


class Rotation(NamedTuple):
    """Cosines and sines of the rotary angles, an attention factor folded in; every tensor (N, R/2) fp32."""

    cos_q: Tensor
    sin_q: Tensor
    cos_k: Tensor
    sin_k: Tensor
    interleaved: bool = False  # pairs (2i, 2i+1) instead of (i, i + R/2)

    def at(self, rows: slice) -> Rotation:
        """The angles of some positions."""
        return Rotation(self.cos_q[rows], self.sin_q[rows], self.cos_k[rows], self.sin_k[rows], self.interleaved)


class Far(NamedTuple):
    """A second rotation, whose scores replace the first one's where a key is `window` or more tokens back."""

    rotation: Rotation
    window: int
    query_at: Tensor  # (N,) int64, the positions that it turns queries to
    key_at: Tensor  # (N,) int64, and keys

    def at(self, rows: slice) -> Far:
        """The same for some positions."""
        return Far(self.rotation.at(rows), self.window, self.query_at[rows], self.key_at[rows])


class CumulativeDecay(NamedTuple):
    """A bias computed from the text: gate_i (cumsum_i - cumsum_j) is taken from the score of query i and key j."""

    cumsum: Tensor  # (B, H, T) fp64 where the device has it, never falling along T
    gate: Tensor | None = None  # (B, H, T) fp32 >= 0, of the query; None: 1


QueryBias = Callable[[Tensor, Tensor], Tensor]
"""(query index (Q, 1) fp32, distance (Q, K) fp32 >= 0) -> (H, Q, K) fp32, added to the scores."""


class Positions(NamedTuple):
    """What one encoding adds for N positions; a field that it does not use is None.

    The order of the fields is that in which `encoding_digest` reads them: a new one stands at the end.
    """

    embedding: Tensor | None = None  # (N, C) fp32, added to the token embeddings
    qk_embedding: Tensor | None = None  # (N, C) fp32, added before the query and key projections of every layer
    bias: Tensor | None = None  # (H, T) fp32: bias[h, i - j] is added to the score of query i and key j
    query_bias: QueryBias | None = None  # a bias of the query's index and the distance
    logit_scale: Tensor | None = None  # (T,) fp32: scores of query i are multiplied by it, before any bias
    rotation: Rotation | None = None  # applied to the queries and keys of every layer
    far: Far | None = None  # another score for distant keys
    # block-causal: a query sees the keys of its own block of so many tokens and the one before
    block: int | None = None
    slopes: Tensor | None = None  # (H,) fp32 where the bias is -slopes[h] (i - j): a kernel may compute it itself

    def at(self, rows: slice) -> Positions:
        """The fields applied before attention, restricted to `rows`; the others as they are."""
        here = {name: getattr(self, name) for name, reader in READ_BY.items() if Reader.HEADS in reader}
        restricted: dict[str, Any] = {
            name: part[rows] if isinstance(part, Tensor) else part.at(rows)
            for name, part in here.items()
            if part is not None
        }
        return self._replace(**restricted)


class Reader(enum.Flag):
    """What of the model reads a field."""

    TOKENS = enum.auto()  # the token embeddings
    HEADS = enum.auto()  # queries and keys of every layer, token by token
    SCORES = enum.auto()  # attention: `model.bias_of`


READ_BY = {
    "embedding": Reader.TOKENS, "qk_embedding": Reader.HEADS, "bias": Reader.SCORES, "query_bias": Reader.SCORES,
    "logit_scale": Reader.SCORES, "rotation": Reader.HEADS, "far": Reader.HEADS | Reader.SCORES,
    "block": Reader.SCORES, "slopes": Reader.SCORES,
}  # fmt: skip
IMPLIED = ("slopes",)  # fields that another one holds already: not digested
assert tuple(READ_BY) == Positions._fields  # a field that is forgotten here is none


def encoding_digest(encoding: nn.Module, ctx: int) -> str:
    """sha256 of the record of an encoding at a length: two evaluations with equal digests had equal positions.

    Of a bias by query it takes the last query's. `ContextLengthError` where the encoding is undefined.
    """
    device = next((p.device for p in encoding.parameters()), None)
    hasher = hashlib.sha256()
    with torch.no_grad():
        record: Positions = encoding(torch.arange(ctx, device=device), ctx=ctx)
        for name in Positions._fields:
            if name not in IMPLIED:
                for part in _parts(getattr(record, name), ctx, device):
                    hasher.update(part)
    return hasher.hexdigest()


def _parts(value: Any, ctx: int, device: torch.device | None) -> Iterator[bytes]:
    """The bytes of one field. `TypeError` for a kind of value that no digest is defined for."""
    if isinstance(value, Far):  # what the positions of queries and keys say, the angles do
        value = (value.rotation, value.window)
    if value is None:
        return
    if isinstance(value, Tensor):
        yield value.cpu().contiguous().numpy().tobytes()
    elif isinstance(value, int):
        yield f"{value};".encode()
    elif isinstance(value, tuple):
        for part in value:
            yield from _parts(part, ctx, device)
    elif callable(value):
        last = torch.full((1, 1), ctx - 1.0, device=device)
        yield from _parts(value(last, torch.arange(ctx, device=device, dtype=torch.float32)[None]), ctx, device)
    else:
        raise TypeError(f"a record holds a {type(value).__name__}, which has no digest")
