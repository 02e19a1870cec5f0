# Triton has no types, and annotations in its functions mean other things to it.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="import-untyped,import-not-found"
"""Causal flash attention with a bias by distance for CUDA, in Triton: no (T, T) tensor, forward or backward.

Forward and backward follow Dao et al. 2022 (2205.14135) and Dao 2023 (2307.08691): online softmax in fp32, and scores
computed again in the backward pass from the saved log of each row's sum. The bias is loaded tile by tile from its
(H, T) vector. Entry (r, c) stands at the same distance in every tile of one block diagonal of the scores: the bias
gradient adds these tiles up, then sums the one tile that is left along its diagonals.
Every sum has a fixed order and nothing is added atomically, so equal inputs give equal bits.

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
        """Triton's own. Fused multiply-adds are its default up to 3.9 and are said, so that numbers stay the same."""
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
def _scores(a, b, vector, distance, window, scale):
    """a (M, PADDED), b (N, PADDED), distance (M, N) -> scores with biases in powers of 2, (M, N) fp32; -inf: unseen."""
    seen = (distance >= 0) & (distance < window)
    bias = tl.load(vector + distance, mask=seen, other=float("-inf"))
    return (tl.dot(a, tl.trans(b), input_precision="ieee") * scale + bias) * LOG2E


@triton.jit(do_not_specialize=["vector_stride", "heads", "length", "window"])
def _forward_kernel(
    q, q_strides, k, k_strides, v, v_strides, vector, vector_stride, out, out_strides, lse,
    heads, length, window, scale,
    D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head over the keys that it sees."""
    blocks = tl.cdiv(length, ROWS)
    pair = tl.program_id(0) // blocks
    b, h = pair // heads, pair % heads
    start = (blocks - 1 - tl.program_id(0) % blocks) * ROWS  # blocks with many keys first: none is left for the end
    # rows past the end look at what the last row sees, so that no row sees nothing
    i = tl.minimum(start + tl.arange(0, ROWS), length - 1)
    query = _load(q, q_strides, b, h, start, length, ROWS, D, PADDED)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS, PADDED), tl.float32)
    for first in range(tl.maximum(start - window + 1, 0), tl.minimum(start + ROWS, length), KEYS):
        j = first + tl.arange(0, KEYS)
        key = _load(k, k_strides, b, h, first, length, KEYS, D, PADDED)
        scores = _scores(query, key, vector + h * vector_stride, i[:, None] - j[None, :], window, scale)
        highest = tl.maximum(top, tl.max(scores, 1))
        # a row that has seen no key yet: -inf less -inf would be NaN
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - base[:, None])
        shrunk = tl.exp2(top - base)
        total = total * shrunk + tl.sum(weights, 1)
        value = _load(v, v_strides, b, h, first, length, KEYS, D, PADDED)
        mean = tl.dot(weights.to(value.dtype), value, mean * shrunk[:, None], input_precision="ieee")
        top = highest
    _store(out, out_strides, b, h, start, length, mean / total[:, None], D)
    row = start + tl.arange(0, ROWS)
    tl.store(lse + tl.cast(pair, tl.int64) * length + row, top + tl.log2(total), mask=row < length)


@triton.jit(do_not_specialize=["vector_stride", "heads", "length", "window"])
def _dq_kernel(
    q, q_strides, k, k_strides, v, v_strides, vector, vector_stride, out, out_strides, lse,
    dout, dout_strides, dq, dq_strides, delta, heads, length, window, scale,
    D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries of one head; leaves delta = rowsum(dO O) for the kernels that follow."""
    blocks = tl.cdiv(length, ROWS)
    pair = tl.program_id(0) // blocks
    b, h = pair // heads, pair % heads
    start = (blocks - 1 - tl.program_id(0) % blocks) * ROWS
    i = start + tl.arange(0, ROWS)
    query = _load(q, q_strides, b, h, start, length, ROWS, D, PADDED)
    due = _load(dout, dout_strides, b, h, start, length, ROWS, D, PADDED)
    given = _load(out, out_strides, b, h, start, length, ROWS, D, PADDED)
    of_row = tl.cast(pair, tl.int64) * length + i
    less = tl.sum(due.to(tl.float32) * given.to(tl.float32), 1)
    tl.store(delta + of_row, less, mask=i < length)
    log_sum = tl.load(lse + of_row, mask=i < length, other=float("inf"))  # inf: rows past the end weigh nothing
    gradient = tl.zeros((ROWS, PADDED), tl.float32)
    for first in range(tl.maximum(start - window + 1, 0), tl.minimum(start + ROWS, length), KEYS):
        j = first + tl.arange(0, KEYS)
        key = _load(k, k_strides, b, h, first, length, KEYS, D, PADDED)
        scores = _scores(query, key, vector + h * vector_stride, i[:, None] - j[None, :], window, scale)
        weights = tl.exp2(scores - log_sum[:, None])
        value = _load(v, v_strides, b, h, first, length, KEYS, D, PADDED)
        ds = weights * (tl.dot(due, tl.trans(value), input_precision="ieee") - less[:, None])
        gradient = tl.dot(ds.to(key.dtype), key, gradient, input_precision="ieee")
    _store(dq, dq_strides, b, h, start, length, gradient * scale, D)


@triton.jit(do_not_specialize=["vector_stride", "heads", "length", "window"])
def _dkv_kernel(
    q, q_strides, k, k_strides, v, v_strides, vector, vector_stride, lse,
    dout, dout_strides, dk, dk_strides, dv, dv_strides, delta, heads, length, window, scale,
    D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values of one head, from the queries that see it; tiles (keys, rows)."""
    blocks = tl.cdiv(length, KEYS)
    pair = tl.program_id(0) // blocks
    b, h = pair // heads, pair % heads
    first = tl.program_id(0) % blocks * KEYS
    j = first + tl.arange(0, KEYS)
    key = _load(k, k_strides, b, h, first, length, KEYS, D, PADDED)
    value = _load(v, v_strides, b, h, first, length, KEYS, D, PADDED)
    dkey = tl.zeros((KEYS, PADDED), tl.float32)
    dvalue = tl.zeros((KEYS, PADDED), tl.float32)
    for start in range(first, tl.minimum(first + KEYS - 1 + window, length), ROWS):
        i = start + tl.arange(0, ROWS)
        query = _load(q, q_strides, b, h, start, length, ROWS, D, PADDED)
        due = _load(dout, dout_strides, b, h, start, length, ROWS, D, PADDED)
        of_row = tl.cast(pair, tl.int64) * length + i
        log_sum = tl.load(lse + of_row, mask=i < length, other=float("inf"))
        less = tl.load(delta + of_row, mask=i < length, other=0.0)
        scores = _scores(key, query, vector + h * vector_stride, i[None, :] - j[:, None], window, scale)
        weights = tl.exp2(scores - log_sum[None, :])
        dvalue = tl.dot(weights.to(due.dtype), due, dvalue, input_precision="ieee")
        ds = weights * (tl.dot(value, tl.trans(due), input_precision="ieee") - less[None, :])
        dkey = tl.dot(ds.to(query.dtype), query, dkey, input_precision="ieee")
    _store(dk, dk_strides, b, h, first, length, dkey * scale, D)
    _store(dv, dv_strides, b, h, first, length, dvalue, D)


@triton.jit(do_not_specialize=["vector_stride", "batch", "heads", "length", "window", "together", "diagonals"])
def _bias_kernel(
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
    distance = diagonal * BLOCK + row[:, None] - column[None, :]
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
        weights = tl.exp2(_scores(query, key, vector + h * vector_stride, distance, window, scale) - log_sum[:, None])
        collected += weights * (tl.dot(due, tl.trans(value), input_precision="ieee") - less[:, None])
    tiles += (tl.cast(pair, tl.int64) * diagonals + diagonal) * BLOCK * BLOCK
    tl.store(tiles + row[:, None] * BLOCK + column[None, :], collected)


def attend_by_distance(q: Tensor, k: Tensor, v: Tensor, vector: Tensor, *, window: int | None) -> Tensor:
    """Causal attention with a bias by distance and gradients for all its tensors.

    q, k, v (B, H, T, D) in one dtype, fp32, bf16 or fp16, with any strides; vector (H, T) fp32: [h, i - j] is added to
    the scores. `window`: keys with 0 <= i - j < window are seen. -> (B, H, T, D). Products of fp32 are fp32, not TF32.
    """
    length = q.shape[2]
    out: Tensor = _attend(q, k, v, vector, length if window is None else min(window, length))[0]
    return out


# Operators of torch.library, so that torch.compile neither looks into them nor breaks its graph at them.
@torch.library.custom_op("ropelab::attend_by_distance", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, vector: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """-> out (B, H, T, D) and log2 of each row's sum of 2^score, (B, H, T) fp32."""
    assert q.shape == k.shape == v.shape
    assert q.dtype == k.dtype == v.dtype
    assert vector.shape == q.shape[1:3]
    assert vector.dtype == torch.float32
    batch, heads, length, d_head = q.shape
    out = _like(q)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    padded, launches = _launches(d_head, q.dtype)
    launch = launches.forward
    vector = _rows(vector)
    with torch.cuda.device_of(q):
        _forward_kernel[(triton.cdiv(length, launch.rows) * batch * heads,)](
            q, q.stride(), k, k.stride(), v, v.stride(), vector, vector.stride(0), out, out.stride(), lse,
            heads, length, window, d_head**-0.5,
            D=d_head, PADDED=padded, ROWS=launch.rows, KEYS=launch.keys, **launch.options(),
        )  # fmt: skip
    return out, lse


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, vector: Tensor, window: int) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("ropelab::attend_by_distance_backward", mutates_args=())
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, vector: Tensor, out: Tensor, lse: Tensor, window: int, bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of q, k, v and, where `bias` asks for it, of vector; else an empty tensor in its place."""
    batch, heads, length, d_head = q.shape
    padded, launches = _launches(d_head, q.dtype)
    dq, dk, dv = _like(q), _like(k), _like(v)
    delta = torch.empty_like(lse)
    vector = _rows(vector)
    inputs = (q, q.stride(), k, k.stride(), v, v.stride(), vector, vector.stride(0))
    sizes = (heads, length, window, d_head**-0.5)
    with torch.cuda.device_of(q):
        launch = launches.dq
        _dq_kernel[(triton.cdiv(length, launch.rows) * batch * heads,)](
            *inputs, out, out.stride(), lse, dout, dout.stride(), dq, dq.stride(), delta, *sizes,
            D=d_head, PADDED=padded, ROWS=launch.rows, KEYS=launch.keys, **launch.options(),
        )  # fmt: skip
        launch = launches.dkv
        _dkv_kernel[(triton.cdiv(length, launch.keys) * batch * heads,)](
            *inputs, lse, dout, dout.stride(), dk, dk.stride(), dv, dv.stride(), delta, *sizes,
            D=d_head, PADDED=padded, ROWS=launch.rows, KEYS=launch.keys, **launch.options(),
        )  # fmt: skip
        if not bias:
            return dq, dk, dv, vector.new_empty(0)
        launch = launches.bias
        block = launch.rows
        # block diagonals with a distance within the window
        diagonals = min(triton.cdiv(length, block), triton.cdiv(window - 1, block) + 1)
        together = triton.cdiv(batch, min(batch, triton.cdiv(PROGRAMS, heads * diagonals)))  # sequences of a program
        groups = triton.cdiv(batch, together)
        tiles = torch.empty(groups * heads * diagonals, block, block, dtype=torch.float32, device=q.device)
        _bias_kernel[(groups * heads * diagonals,)](
            *inputs, lse, dout, dout.stride(), tiles, delta, batch, *sizes, together, diagonals,
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
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, vector: Tensor, out: Tensor, lse: Tensor, window: int, bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v), vector.new_empty(vector.shape if bias else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, vector, ctx.window = inputs
    ctx.save_for_backward(q, k, v, vector, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    bias = ctx.needs_input_grad[3]
    dq, dk, dv, dvector = _backward(dout, *ctx.saved_tensors, ctx.window, bias)
    return dq, dk, dv, dvector if bias else None, None


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


def _rows(vector: Tensor) -> Tensor:
    """(H, T) whose neighbouring distances are neighbours in memory; rows may be one and the same."""
    return vector if vector.stride(1) == 1 else vector.contiguous()
