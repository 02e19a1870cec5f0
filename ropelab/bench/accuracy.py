"""How far ALiBi's attention in each kernel is from fp64: the table behind `digits`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ropelab import devices
from ropelab.attention import Attend, Bias
from ropelab.positions import slopes

N_HEAD, D_HEAD = 12, 64  # the 124M shape, whose slopes are no powers of two
ROWS = 64  # the last queries, which see the largest positions
LENGTHS = (2048, 32768, 131072)  # the first in any case
HEADS_CPU = (0, 7, 8)  # on a CPU the time of all twelve would be minutes: slopes 2^-1, 2^-8 and 2^-0.5


def accuracy(device: torch.device, longest: int) -> list[dict[str, Any]]:
    """Rows of each length up to `longest`, dtype and kernel: errors of the output of the last 64 queries against fp64.

    Values are +-1, so that the error of an output is at most twice the total variation of a row of weights:
    `tv_at_least` is half of `max_error`. `one number`: the position as one number of the dtype, a product that no
    kernel of ropelab takes. `rounded`: the fp64 result in the dtype, below which no kernel can be.
    """
    heads = HEADS_CPU if device.type == "cpu" else range(N_HEAD)
    return [
        row
        for length in LENGTHS
        if length <= max(longest, LENGTHS[0])
        for dtype in (torch.bfloat16, torch.float32)
        for row in errors(length, dtype, slopes(N_HEAD)[list(heads)], device)
    ]


def errors(length: int, dtype: torch.dtype, slope: Tensor, device: torch.device) -> list[dict[str, Any]]:
    """The rows of one length and dtype, for heads with these slopes (H,)."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, len(slope), length, D_HEAD)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    v = v.sign()
    rows = min(ROWS, length)
    exact = [expected(q[0, h], k[0, h], v[0, h], float(m) * _positions(length), rows) for h, m in enumerate(slope)]
    wanted = torch.stack(exact)  # (H, rows, D)
    outputs = {"one number": _one_number(q, k, v, slope, rows), "rounded": wanted.to(dtype).double()}
    bias = Bias((-slope[:, None] * torch.arange(length)).to(device), slopes=slope.to(device))
    q, k, v = (x.to(device) for x in (q, k, v))
    for kernel in ("blocks", "digits", *(["triton"] if device.type == "cuda" else [])):
        attend = Attend(length, bias=bias, device=device, training=False, dtype=dtype, kernel=kernel)
        with torch.no_grad():
            outputs[kernel] = attend(q, k, v)[0, :, -rows:].cpu().double()
    found = []
    for kernel, out in outputs.items():
        error = float((out - wanted).abs().max())
        name = devices.DTYPE_NAMES[dtype]
        found.append({"ctx": length, "dtype": name, "kernel": kernel, "max_error": error, "tv_at_least": error / 2})
    return found


def expected(q: Tensor, k: Tensor, v: Tensor, added: Tensor, rows: int) -> Tensor:
    """Causal attention of the last `rows` queries of one head in fp64, `added` (T,) to the score of every key.

    q, k, v (T, D) -> (rows, D). ALiBi is added = slope x position: a softmax does not see what all keys of a query
    have in common.
    """
    length = len(k)
    scores = q[-rows:].double() @ k.double().T / math.sqrt(q.shape[-1]) + added.double()  # (rows, T)
    future = torch.arange(length) > torch.arange(length - rows, length)[:, None]
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v.double()


def _positions(length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float64)


def _one_number(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, rows: int) -> Tensor:
    """ALiBi as one more dimension, slope x sqrt(D) in the query and the position in the key, each in the dtype of q.

    q, k, v (1, H, T, D) -> (H, rows, D) fp64.
    """
    position = torch.arange(q.shape[2]).to(q.dtype).double()  # (T,)
    of_query = (slope.double() * math.sqrt(D_HEAD)).to(q.dtype).double() / math.sqrt(D_HEAD)  # (H,)
    return torch.stack([expected(q[0, h], k[0, h], v[0, h], m * position, rows) for h, m in enumerate(of_query)])
