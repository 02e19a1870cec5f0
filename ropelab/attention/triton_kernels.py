# Triton has no types, and annotations in its functions mean other things to it.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="import-untyped,import-not-found"
"""Causal flash attention with a bias for CUDA, in Triton: no scores are kept, forward or backward.

Forward and backward follow Dao et al. 2022 (2205.14135) and Dao 2023 (2307.08691): online softmax in fp32, and scores
computed again in the backward pass from the saved log of each row's sum. What is added to the scores, in fp32:

| bias        | BAND | tensor       | read                  | its gradient                                             |
|-------------|------|--------------|-----------------------|----------------------------------------------------------|
| by distance | 0    | (H, T)       | tile by tile          | tiles of a block diagonal, where entry (r, c) is always  |
|             |      |              |                       | at one distance, added up; then sums along diagonals     |
| by query    | > 0  | (H, N) bands | tile by tile          | each tile once, summed over the sequences                |
| decays      | -1   | (3, B, H, T) | rows and columns of a | sums over rows of dS with the queries' gradient, over    |
|             |      |              | tile                  | columns with the keys'                                   |

Decays are the running total of a text as the sum of two fp32 numbers, and the gain. Every sum has a fixed order and
nothing is added atomically, so equal inputs give equal bits.

The kernels are tested in Triton's interpreter and compiled for sm_80 and sm_90. Their numbers and speed on a GPU are
unmeasured.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from ropelab.attention import row_bands
from ropelab.attention.by_distance import anti_diagonals

LOG2E = tl.constexpr(1.4426950408889634)  # log2(e): GPUs have an instruction for 2^x
# Programs for the bias gradient: a few for each multiprocessor of a large GPU. A constant, for it decides the order of
# the sums, which must not depend on the GPU.
PROGRAMS = 1024


class Launch(NamedTuple):
    """How one kernel is launched: queries and keys of a tile, and what Triton makes of a program."""

    rows: int
    keys: int
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        """Triton's own. Fused multiply-adds are its default up to 3.9; given here, so that numbers stay the same."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


class Launches(NamedTuple):
    forward: Launch
    dq: Launch
    dkv: Launch
    bias: Launch  # square tiles


# (largest head dimension, bytes of a number) -> launches: a fixed choice, for the blocks decide the order of the sums.
# Of the tiles tried, large ones that the compiler keeps in the 255 registers of a thread (a few bytes spill; in fp32 up
# to 1 KB in some kernels): compiled for sm_80 within the 99 KB of shared memory that sm_86 and sm_89 have, for sm_90
# within 128 of its 227 KB. Eight warps where four would spill: the bias takes registers for its addresses.
LAUNCHES = {
    (64, 2): Launches(Launch(128, 64, 8, 2), Launch(128, 64, 8, 2), Launch(32, 128, 8, 3), Launch(64, 64, 4, 2)),
    (128, 2): Launches(Launch(128, 32, 8, 3), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2)),
    (256, 2): Launches(Launch(64, 32, 8, 2), Launch(32, 32, 4, 2), Launch(32, 32, 8, 1), Launch(32, 32, 4, 2)),
    (64, 4): Launches(Launch(64, 32, 8, 2), Launch(64, 32, 8, 2), Launch(32, 64, 8, 2), Launch(32, 32, 4, 2)),
    (128, 4): Launches(Launch(32, 32, 8, 2), Launch(32, 32, 8, 2), Launch(32, 32, 8, 2), Launch(32, 32, 8, 1)),
    (256, 4): Launches(Launch(32, 16, 8, 1), Launch(16, 16, 8, 1), Launch(16, 16, 8, 1), Launch(16, 16, 8, 1)),
}


@triton.jit
def _load(x, strides, b, h, start, length, ROWS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr):
    """Rows start .. start + ROWS - 1 of x[b, h] (T, D), (ROWS, PADDED): zeros past T and past D."""
    # in int64: B x H x T x D may be past 2^31
    x += tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1] + tl.cast(start, tl.int64) * strides[2]
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    inside = start + row < length
    if D < PADDED:
        inside = inside & (column < D)
    return tl.load(x + row * strides[2] + column * strides[3], mask=inside, other=0.0)


@triton.jit
def _store(x, strides, b, h, start, length, tile, D: tl.constexpr):
    """The inverse of `_load`."""
    x += tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1] + tl.cast(start, tl.int64) * strides[2]
    row = tl.arange(0, tile.shape[0])[:, None]
    column = tl.arange(0, tile.shape[1])[None, :]
    inside = (start + row < length) & (column < D)
    tl.store(x + row * strides[2] + column * strides[3], tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _scores(a, b, bias, stride, of_query, i, j, keys, window, scale, BAND: tl.constexpr):
    """Scores with biases in powers of 2, (M, N) fp32, -inf where query i does not see key j; and total_i - total_j.

    a (M, PADDED) and b (N, PADDED), their products (M, N); i, j and `of_query` broadcast to that. Totals are those of
    decays, else 0.
    """
    distance = i - j
    seen = (distance >= 0) & (distance < window)
    if BAND < 0:
        key = bias + tl.minimum(j, keys - 1)
        fallen = (tl.load(bias + i) - tl.load(key)) + (tl.load(bias + stride + i) - tl.load(stride + key))
        added = tl.where(seen, -tl.load(bias + 2 * stride + i) * fallen, float("-inf"))
    else:
        fallen = 0.0
        added = tl.load(bias + (of_query - j if BAND == 0 else of_query + j), mask=seen, other=float("-inf"))
    return (tl.dot(a, tl.trans(b), input_precision="ieee") * scale + added) * LOG2E, fallen


@triton.jit
def _of_head(bias, stride, pair, heads, keys, BAND: tl.constexpr):
    """The bias of head pair % heads, or the decays of sequence pair // heads and that head."""
    if BAND < 0:
        start = bias + tl.cast(pair, tl.int64) * keys
    elif BAND == 0:
        start = bias + pair % heads * stride
    else:
        start = bias + tl.cast(pair % heads, tl.int64) * tl.multiple_of(stride, 16)
    return start


@triton.jit
def _of_query(row, offset, length, BAND: tl.constexpr):
    """Positions of queries that are `row` rows past the first, at `offset`, of `length`; where their bias begins.

    By distance (BAND 0) that is the position, from where keys go backwards; in bands see `row_bands`; decays (BAND < 0)
    have a number of each query and key. Rows past the end are taken for the last, so that no row sees nothing and none
    reads past the bias.
    """
    row = tl.minimum(row, length - 1)
    start = row + offset
    if BAND > 0:
        band = row // BAND
        before = tl.cast(band, tl.int64) * BAND * (offset + (band + 1) * BAND // 2)
        start = tl.multiple_of(before + (row - band * BAND) * _width(band, offset, length, BAND), 16)
    return row + offset, start


@triton.jit
def _width(band, offset, length, BAND: tl.constexpr):
    """Numbers in a row of a band."""
    return tl.minimum(offset + (band + 1) * BAND, tl.cdiv(offset + length, 16) * 16)


@triton.jit(do_not_specialize=["bias_stride", "heads", "length", "offset", "window"])
def _forward_kernel(
    q, q_strides, k, k_strides, v, v_strides, bias, bias_stride, out, out_strides, lse,
    heads, length, offset, window, scale,
    BAND: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head over the keys that it sees."""
    blocks = tl.cdiv(length, ROWS)
    pair = tl.program_id(0) // blocks
    b, h = pair // heads, pair % heads
    start = (blocks - 1 - tl.program_id(0) % blocks) * ROWS  # blocks with many keys first: none is left for the end
    row = start + tl.arange(0, ROWS)
    i, of_query = _of_query(row, offset, length, BAND)
    bias = _of_head(bias, bias_stride, pair, heads, offset + length, BAND)
    query = _load(q, q_strides, b, h, start, length, ROWS, D, PADDED)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS, PADDED), tl.float32)
    oldest, end = tl.maximum(offset + start - window + 1, 0), offset + tl.minimum(start + ROWS, length)
    for first in range(oldest, end, KEYS):
        j = first + tl.arange(0, KEYS)
        key = _load(k, k_strides, b, h, first, offset + length, KEYS, D, PADDED)
        scores, _ = _scores(
            query,
            key,
            bias,
            bias_stride,
            of_query[:, None],
            i[:, None],
            j[None, :],
            offset + length,
            window,
            scale,
            BAND,
        )
        highest = tl.maximum(top, tl.max(scores, 1))
        # a row that has seen no key yet: -inf less -inf would be NaN
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - base[:, None])
        shrunk = tl.exp2(top - base)
        total = total * shrunk + tl.sum(weights, 1)
        value = _load(v, v_strides, b, h, first, offset + length, KEYS, D, PADDED)
        mean = tl.dot(weights.to(value.dtype), value, mean * shrunk[:, None], input_precision="ieee")
        top = highest
    _store(out, out_strides, b, h, start, length, mean / total[:, None], D)
    tl.store(lse + tl.cast(pair, tl.int64) * length + row, top + tl.log2(total), mask=row < length)


@triton.jit(do_not_specialize=["bias_stride", "heads", "length", "offset", "window"])
def _dq_kernel(
    q, q_strides, k, k_strides, v, v_strides, bias, bias_stride, out, out_strides, lse,
    dout, dout_strides, dq, dq_strides, delta, dbias, heads, length, offset, window, scale,
    BAND: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries of one head; leaves delta = rowsum(dO O) for the kernels that follow.

    Of decays: -gain_i rowsum(dS) and that of the gain, the first and the third of the gradient's three parts.
    """
    blocks = tl.cdiv(length, ROWS)
    pair = tl.program_id(0) // blocks
    b, h = pair // heads, pair % heads
    start = (blocks - 1 - tl.program_id(0) % blocks) * ROWS
    row = start + tl.arange(0, ROWS)
    i, of_query = _of_query(row, offset, length, BAND)
    bias = _of_head(bias, bias_stride, pair, heads, offset + length, BAND)
    query = _load(q, q_strides, b, h, start, length, ROWS, D, PADDED)
    due = _load(dout, dout_strides, b, h, start, length, ROWS, D, PADDED)
    given = _load(out, out_strides, b, h, start, length, ROWS, D, PADDED)
    of_row = tl.cast(pair, tl.int64) * length + row
    less = tl.sum(due.to(tl.float32) * given.to(tl.float32), 1)
    tl.store(delta + of_row, less, mask=row < length)
    log_sum = tl.load(lse + of_row, mask=row < length, other=float("inf"))  # inf: rows past the end weigh nothing
    gradient = tl.zeros((ROWS, PADDED), tl.float32)
    over, faded = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    oldest, end = tl.maximum(offset + start - window + 1, 0), offset + tl.minimum(start + ROWS, length)
    for first in range(oldest, end, KEYS):
        j = first + tl.arange(0, KEYS)
        key = _load(k, k_strides, b, h, first, offset + length, KEYS, D, PADDED)
        scores, fallen = _scores(
            query,
            key,
            bias,
            bias_stride,
            of_query[:, None],
            i[:, None],
            j[None, :],
            offset + length,
            window,
            scale,
            BAND,
        )
        weights = tl.exp2(scores - log_sum[:, None])
        value = _load(v, v_strides, b, h, first, offset + length, KEYS, D, PADDED)
        ds = weights * (tl.dot(due, tl.trans(value), input_precision="ieee") - less[:, None])
        gradient = tl.dot(ds.to(key.dtype), key, gradient, input_precision="ieee")
        if BAND < 0:
            over += tl.sum(ds, 1)
            faded -= tl.sum(ds * fallen, 1)
    if BAND < 0:
        gain = tl.load(bias + 2 * bias_stride + i)
        at = dbias + tl.cast(pair, tl.int64) * length + row
        tl.store(at, -gain * over, mask=row < length)
        tl.store(at + 2 * bias_stride, faded, mask=row < length)
    _store(dq, dq_strides, b, h, start, length, gradient * scale, D)


@triton.jit(do_not_specialize=["bias_stride", "heads", "length", "offset", "window"])
def _dkv_kernel(
    q, q_strides, k, k_strides, v, v_strides, bias, bias_stride, lse,
    dout, dout_strides, dk, dk_strides, dv, dv_strides, delta, dbias, heads, length, offset, window, scale,
    BAND: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values of one head, from the queries that see it; tiles (keys, rows).

    Of decays: colsum(gain dS), the second of the gradient's three parts.
    """
    blocks = tl.cdiv(offset + length, KEYS)
    pair = tl.program_id(0) // blocks
    b, h = pair // heads, pair % heads
    first = tl.program_id(0) % blocks * KEYS
    j = first + tl.arange(0, KEYS)
    bias = _of_head(bias, bias_stride, pair, heads, offset + length, BAND)
    key = _load(k, k_strides, b, h, first, offset + length, KEYS, D, PADDED)
    value = _load(v, v_strides, b, h, first, offset + length, KEYS, D, PADDED)
    dkey = tl.zeros((KEYS, PADDED), tl.float32)
    gained = tl.zeros((KEYS,), tl.float32)
    dvalue = tl.zeros((KEYS, PADDED), tl.float32)
    oldest, end = tl.maximum(first - offset, 0), tl.minimum(first + KEYS - 1 + window - offset, length)
    for start in range(oldest, end, ROWS):
        row = start + tl.arange(0, ROWS)
        i, of_query = _of_query(row, offset, length, BAND)
        query = _load(q, q_strides, b, h, start, length, ROWS, D, PADDED)
        due = _load(dout, dout_strides, b, h, start, length, ROWS, D, PADDED)
        of_row = tl.cast(pair, tl.int64) * length + row
        log_sum = tl.load(lse + of_row, mask=row < length, other=float("inf"))
        less = tl.load(delta + of_row, mask=row < length, other=0.0)
        scores, _ = _scores(
            key,
            query,
            bias,
            bias_stride,
            of_query[None, :],
            i[None, :],
            j[:, None],
            offset + length,
            window,
            scale,
            BAND,
        )
        weights = tl.exp2(scores - log_sum[None, :])
        dvalue = tl.dot(weights.to(due.dtype), due, dvalue, input_precision="ieee")
        ds = weights * (tl.dot(value, tl.trans(due), input_precision="ieee") - less[None, :])
        dkey = tl.dot(ds.to(query.dtype), query, dkey, input_precision="ieee")
        if BAND < 0:
            gained += tl.sum(ds * tl.load(bias + 2 * bias_stride + i)[None, :], 1)
    if BAND < 0:
        at = dbias + bias_stride + tl.cast(pair, tl.int64) * length + j
        tl.store(at, gained, mask=j < length)
    _store(dk, dk_strides, b, h, first, offset + length, dkey * scale, D)
    _store(dv, dv_strides, b, h, first, offset + length, dvalue, D)


@triton.jit(do_not_specialize=["vector_stride", "batch", "heads", "length", "window", "together", "diagonals"])
def _diagonals_kernel(
    q, q_strides, k, k_strides, v, v_strides, vector, vector_stride, lse,
    dout, dout_strides, tiles, delta, batch, heads, length, window, scale, together, diagonals,
    D: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dS summed over the tiles of one block diagonal of one head in `together` sequences, (BLOCK, BLOCK) fp32."""
    # the long diagonals first
    pairs = tl.num_programs(0) // diagonals
    diagonal, pair = tl.program_id(0) // pairs, tl.program_id(0) % pairs
    group, h = pair // heads, pair % heads
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    along = tl.cdiv(length, BLOCK) - diagonal  # tiles of the diagonal in one sequence
    collected = tl.zeros((BLOCK, BLOCK), tl.float32)
    for n in range(along * (tl.minimum(group * together + together, batch) - group * together)):
        b = group * together + n // along
        first = n % along * BLOCK
        start = first + diagonal * BLOCK
        query = _load(q, q_strides, b, h, start, length, BLOCK, D, PADDED)
        key = _load(k, k_strides, b, h, first, length, BLOCK, D, PADDED)
        value = _load(v, v_strides, b, h, first, length, BLOCK, D, PADDED)
        due = _load(dout, dout_strides, b, h, start, length, BLOCK, D, PADDED)
        of_row = (tl.cast(b, tl.int64) * heads + h) * length + start + row
        log_sum = tl.load(lse + of_row, mask=start + row < length, other=float("inf"))
        less = tl.load(delta + of_row, mask=start + row < length, other=0.0)
        i = diagonal * BLOCK + row[:, None]
        scores, _ = _scores(
            query, key, vector + h * vector_stride, vector_stride, i, i, column[None, :], length, window, scale, 0
        )
        weights = tl.exp2(scores - log_sum[:, None])
        collected += weights * (tl.dot(due, tl.trans(value), input_precision="ieee") - less[:, None])
    tiles += (tl.cast(pair, tl.int64) * diagonals + diagonal) * BLOCK * BLOCK
    tl.store(tiles + row[:, None] * BLOCK + column[None, :], collected)


@triton.jit(do_not_specialize=["bias_stride", "batch", "heads", "length", "offset", "window"])
def _bands_kernel(
    q, q_strides, k, k_strides, v, v_strides, bias, bias_stride, lse,
    dout, dout_strides, dbias, delta, batch, heads, length, offset, window, scale,
    BAND: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dS of one tile of one head, summed over the sequences, where the tile's bias stands in its band."""
    columns = tl.cdiv(offset + length, BLOCK)
    tile = tl.program_id(0) // columns
    blocks = tl.cdiv(length, BLOCK)
    h, start = tile // blocks, (blocks - 1 - tile % blocks) * BLOCK
    first = tl.program_id(0) % columns * BLOCK
    row, j = start + tl.arange(0, BLOCK), first + tl.arange(0, BLOCK)
    i, of_query = _of_query(row, offset, length, BAND)
    bias = _of_head(bias, bias_stride, h, heads, offset + length, BAND)
    newest = offset + tl.minimum(start + BLOCK, length) - 1  # query
    seen = (first <= newest) & (offset + start - window < first + BLOCK - 1)
    collected = tl.zeros((BLOCK, BLOCK), tl.float32)
    for b in range(tl.where(seen, batch, 0)):
        query = _load(q, q_strides, b, h, start, length, BLOCK, D, PADDED)
        key = _load(k, k_strides, b, h, first, offset + length, BLOCK, D, PADDED)
        value = _load(v, v_strides, b, h, first, offset + length, BLOCK, D, PADDED)
        due = _load(dout, dout_strides, b, h, start, length, BLOCK, D, PADDED)
        of_row = (tl.cast(b, tl.int64) * heads + h) * length + row
        log_sum = tl.load(lse + of_row, mask=row < length, other=float("inf"))
        less = tl.load(delta + of_row, mask=row < length, other=0.0)
        scores, _ = _scores(
            query,
            key,
            bias,
            bias_stride,
            of_query[:, None],
            i[:, None],
            j[None, :],
            offset + length,
            window,
            scale,
            BAND,
        )
        weights = tl.exp2(scores - log_sum[:, None])
        collected += weights * (tl.dot(due, tl.trans(value), input_precision="ieee") - less[:, None])
    # zeros for what is not seen; tiles past the end of the band's rows have no place
    wide = _width(row // BAND, offset, length, BAND)
    held = (row < length)[:, None] & (j[None, :] < wide[:, None])
    place = of_query[:, None] + j[None, :]
    tl.store(_of_head(dbias, bias_stride, h, heads, offset + length, BAND) + place, collected, mask=held)


def attend_by_distance(q: Tensor, k: Tensor, v: Tensor, vector: Tensor, *, window: int | None) -> Tensor:
    """Causal attention with a bias by distance and gradients for all its tensors.

    q, k, v (B, H, T, D) in one dtype, fp32, bf16 or fp16, with any strides; vector (H, T) fp32: [h, i - j] is added to
    the scores. `window`: keys with 0 <= i - j < window are seen. -> (B, H, T, D). Products of fp32 are fp32, not TF32.
    """
    length = q.shape[2]
    assert q.shape == k.shape
    assert vector.shape == q.shape[1:3]
    out: Tensor = _attend(q, k, v, vector, length if window is None else min(window, length), 0)[0]
    return out


def attend_by_query(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, window: int | None) -> Tensor:
    """The same with a bias in bands, (H, N) fp32 as `row_bands.make` lays it out, for queries that may begin late.

    k, v (B, H, T, D); q (B, H, Q, D) are the last Q of the T positions, those that the bias was made for.
    -> (B, H, Q, D).
    """
    length = k.shape[2]
    assert bias.shape == (q.shape[1], row_bands.numel(length - q.shape[2], length))
    out: Tensor = _attend(q, k, v, bias, length if window is None else min(window, length), row_bands.BAND)[0]
    return out


def attend_with_decays(
    q: Tensor, k: Tensor, v: Tensor, cumsum: Tensor, gate: Tensor | None, *, window: int | None
) -> Tensor:
    """The same with gate_i (cumsum_i - cumsum_j) taken from the scores of each sequence, as in `kernels.decay`.

    cumsum (B, H, T) fp64, gate (B, H, T) fp32 or None for 1. -> (B, H, T, D).
    """
    length = q.shape[2]
    assert q.shape == k.shape
    assert cumsum.shape == q.shape[:3]
    # a sum over the text as that of two fp32 numbers, of which the small one carries the gradient
    large = cumsum.detach().float()
    small = (cumsum - large).float()
    parts = torch.stack((large, small, torch.ones_like(large) if gate is None else gate.float()))  # (3, B, H, T)
    out: Tensor = _attend(q, k, v, parts, length if window is None else min(window, length), -1)[0]
    return out


# Operators of torch.library, so that torch.compile neither looks into them nor breaks its graph at them.
@torch.library.custom_op("ropelab::attend_with_bias", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: int, band: int) -> tuple[Tensor, Tensor]:
    """-> out (B, H, Q, D) and log2 of each row's sum of 2^score, (B, H, Q) fp32.

    `band`: rows of a band, and `bias` (H, N); 0: by distance, (H, T); -1: decays, (3, B, H, T).
    """
    assert k.shape == v.shape
    assert q.dtype == k.dtype == v.dtype
    assert bias.dtype == torch.float32
    batch, heads, length, d_head = q.shape
    out = _like(q)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    padded, launches = _launches(d_head, q.dtype)
    launch = launches.forward
    bias = _rows(bias, band)
    with torch.cuda.device_of(q):
        _forward_kernel[(triton.cdiv(length, launch.rows) * batch * heads,)](
            q, q.stride(), k, k.stride(), v, v.stride(), bias, bias.stride(0), out, out.stride(), lse,
            heads, length, k.shape[2] - length, window, d_head**-0.5,
            BAND=band, D=d_head, PADDED=padded, ROWS=launch.rows, KEYS=launch.keys, **launch.options(),
        )  # fmt: skip
    return out, lse


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: int, band: int) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("ropelab::attend_with_bias_backward", mutates_args=())
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor, lse: Tensor,
    window: int, band: int, learned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradients of q, k, v and, where the bias is `learned`, of it; else an empty tensor in its place."""
    batch, heads, length, d_head = q.shape
    padded, launches = _launches(d_head, q.dtype)
    dq, dk, dv = _like(q), _like(k), _like(v)
    delta = torch.empty_like(lse)
    bias = _rows(bias, band)
    inputs = (q, q.stride(), k, k.stride(), v, v.stride(), bias, bias.stride(0))
    dbias = torch.empty_like(bias) if band else bias.new_empty(0)
    sizes = (heads, length, k.shape[2] - length, window, d_head**-0.5)
    with torch.cuda.device_of(q):
        launch = launches.dq
        _dq_kernel[(triton.cdiv(length, launch.rows) * batch * heads,)](
            *inputs, out, out.stride(), lse, dout, dout.stride(), dq, dq.stride(), delta, dbias, *sizes,
            BAND=band, D=d_head, PADDED=padded, ROWS=launch.rows, KEYS=launch.keys, **launch.options(),
        )  # fmt: skip
        launch = launches.dkv
        _dkv_kernel[(triton.cdiv(k.shape[2], launch.keys) * batch * heads,)](
            *inputs, lse, dout, dout.stride(), dk, dk.stride(), dv, dv.stride(), delta, dbias, *sizes,
            BAND=band, D=d_head, PADDED=padded, ROWS=launch.rows, KEYS=launch.keys, **launch.options(),
        )  # fmt: skip
        if not learned:
            return dq, dk, dv, bias.new_empty(0)
        launch = launches.bias
        block = launch.rows
        if band < 0:
            dbias[1] += dbias[0]
            dbias[0] = 0  # the large part of the totals
            return dq, dk, dv, dbias
        if band:
            _bands_kernel[(triton.cdiv(length, block) * triton.cdiv(k.shape[2], block) * heads,)](
                *inputs, lse, dout, dout.stride(), dbias, delta, batch, *sizes,
                BAND=band, D=d_head, PADDED=padded, BLOCK=block, **launch.options(),
            )  # fmt: skip
            return dq, dk, dv, dbias
        # block diagonals with a distance within the window
        diagonals = min(triton.cdiv(length, block), triton.cdiv(window - 1, block) + 1)
        together = triton.cdiv(batch, min(batch, triton.cdiv(PROGRAMS, heads * diagonals)))  # sequences of a program
        groups = triton.cdiv(batch, together)
        tiles = torch.empty(groups * heads * diagonals, block, block, dtype=torch.float32, device=q.device)
        _diagonals_kernel[(groups * heads * diagonals,)](
            *inputs, lse, dout, dout.stride(), tiles, delta,
            batch, heads, length, window, d_head**-0.5, together, diagonals,
            D=d_head, PADDED=padded, BLOCK=block, **launch.options(),
        )  # fmt: skip
    # (G x H x K, block, block) -> (G x H x K, 2 block - 1) -> (H, K, 2 block - 1): [h, k, n] is the sum over distance
    # (k - 1) block + 1 + n, since the tiles' columns now run backwards
    sums = anti_diagonals(tiles.flip(2)).view(groups, heads, diagonals, 2 * block - 1).sum(0)
    # a distance is on two neighbouring block diagonals: (H, K, block) -> (H, K block) each, the second a block further
    both = pad(sums[..., :block].flatten(1), (0, block)) + pad(pad(sums[..., block:], (0, 1)).flatten(1), (block, 0))
    by_distance = both[:, block - 1 :][:, :length]  # entry 0 is distance -(block - 1)
    return dq, dk, dv, pad(by_distance, (0, length - by_distance.shape[1]))


@_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor, lse: Tensor,
    window: int, band: int, learned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _like(q), _like(k), _like(v), bias.new_empty(bias.shape if learned else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, ctx.window, ctx.band = inputs
    ctx.save_for_backward(q, k, v, bias, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    learned = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = _backward(dout, *ctx.saved_tensors, ctx.window, ctx.band, learned)
    return dq, dk, dv, dbias if learned else None, None, None


_attend.register_autograd(_gradients, setup_context=_save)


def _launches(d_head: int, dtype: torch.dtype) -> tuple[int, Launches]:
    """The head dimension as a power of two, which Triton's tiles need, of at least 16 for its products; launches."""
    padded = max(16, triton.next_power_of_2(d_head))
    if padded > 256:
        raise ValueError(f"Triton attention serves head dimensions up to 256, not {d_head}")
    return padded, LAUNCHES[max(64, padded), dtype.itemsize]


def _like(x: Tensor) -> Tensor:
    """Empty (B, H, T, D), in memory (B, T, H, D): joining the heads needs no copy."""
    batch, heads, length, d_head = x.shape
    return x.new_empty(batch, length, heads, d_head).transpose(1, 2)


def _rows(bias: Tensor, band: int) -> Tensor:
    """A bias whose neighbours in a row are neighbours in memory. By distance, rows may be one and the same."""
    return bias if bias.stride(1) == 1 and not band else bias.contiguous()
