"""Changes of a trained encoding that are not changes of its spectrum.

Each is called once with the encoding, `original_ctx` (the length L that it was trained for) and the parameters of its
YAML, and sets what the encoding says from then on. None of them adds, removes or renames a parameter, so trained
weights load strictly. `ValueError` names the key of a value that is out of range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ropelab.errors import ContextLengthError
from ropelab.positions import Far, Learned, PositionEncoding, Positions, Rope, Rotation

# --- a second rotation for distant keys -----------------------------------------------------------------------------


def _window(window: int | None, original_ctx: int) -> int:
    """The distance from which the second score holds: as given, else L/4."""
    if window is not None and window < 1:
        raise ValueError(f"scaling.window must be >= 1 token or null, not {window}")
    return window or max(1, original_ctx // 4)


def _far(encoding: Rope, window: int, query_at: Tensor, key_at: Tensor, ctx: int) -> Far:
    """Queries and keys turned to other positions (N,) int64, for keys `window` or more tokens back."""
    factor = encoding.spectrum(ctx).attention_factor
    query, key = (encoding.rotation(encoding.angles(at, ctx), factor, at.device) for at in (query_at, key_at))
    rotation = Rotation(query.cos_q, query.sin_q, key.cos_k, key.sin_k, query.interleaved)
    return Far(rotation, window, query_at, key_at)


def rerope(encoding: PositionEncoding, *, original_ctx: int, window: int | None, log_scaling: bool) -> None:
    """ReRoPE: the distance that a score sees never exceeds w, min(i - j, w).

    Su 2023, bojone/rerope `rerope_patch.py`: from distance w on the query is turned to position w and the key not at
    all. With `log_scaling`, as in his code, queries are multiplied by max(1, ln(i + 1) / ln L). His code sets w = 512
    for L = 4096, his published table w = 1024; `window=null` is the table's L/4.
    """
    assert isinstance(encoding, Rope)
    w = _window(window, original_ctx)
    if log_scaling and original_ctx < 2:
        raise ValueError("scaling.log_scaling divides by ln scaling.original_ctx; give scaling.original_ctx >= 2")

    def change(said: Positions, positions: Tensor, ctx: int) -> Positions:
        if w < ctx:
            query_at, key_at = torch.full_like(positions, w), torch.zeros_like(positions)
            said = said._replace(far=_far(encoding, w, query_at, key_at, ctx))
        if log_scaling and ctx > original_ctx:
            scale = ((positions.cpu().double() + 1).log() / math.log(original_ctx)).clamp(min=1).float()  # (T,)
            said = said._replace(logit_scale=scale.to(positions.device))
        return said

    encoding.change = change


def rerope_idle(parameters: Mapping[str, Any], ctx: int) -> bool:
    """Where ReRoPE changes nothing: no key is beyond the window, and no query beyond L is scaled."""
    near = ctx <= _window(parameters["window"], parameters["original_ctx"])
    return near and (ctx <= parameters["original_ctx"] or not parameters["log_scaling"])


def self_extend(encoding: PositionEncoding, *, original_ctx: int, window: int | None, group: int) -> None:
    """Self-Extend: from distance W on, positions are counted in groups of G tokens.

    Jin et al. 2024 (2401.01325), section 3: the distance there is floor(i/G) + W - floor(W/G) - floor(j/G), which lets
    L positions reach (L - W) G + W tokens. Their code (datamllab/LongLM `self_extend_patch/Llama.py`) floors W/G when
    it decodes and not when it reads a prompt; the two agree where G divides W, and the paper floors. Their defaults
    for Llama-2 (L = 4096) are G = 8 and W = 1024 = L/4, which is `window=null`.
    """
    assert isinstance(encoding, Rope)
    w = _window(window, original_ctx)
    if group < 1:
        raise ValueError(f"scaling.group must be >= 1 token, not {group}")

    def change(said: Positions, positions: Tensor, ctx: int) -> Positions:
        if w >= ctx or group == 1:  # groups of one token are the tokens
            return said
        grouped = positions // group  # (N,)
        return said._replace(far=_far(encoding, w, grouped + (w - w // group), grouped, ctx))

    encoding.change = change


def self_extend_idle(parameters: Mapping[str, Any], ctx: int) -> bool:
    """Where Self-Extend changes nothing: no key is beyond the window, or groups are of one token."""
    return ctx <= _window(parameters["window"], parameters["original_ctx"]) or bool(parameters["group"] == 1)


# --- scores and masks -----------------------------------------------------------------------------------------------


def temperature(encoding: PositionEncoding, *, original_ctx: int, factor: float, a: float) -> None:
    """Scores of a model without positions multiplied by 1 + a ln s, so that attention stays as sharp over more keys.

    Gelberg et al. 2025 (2512.12167) fit a = 0.412 to a model trained from scratch and 0.103 to SmolLM; Wang et al. 2024
    (2404.12224) tune one such scale for NoPE.
    """
    if not 0 <= a < math.inf:
        raise ValueError(f"scaling.a must be >= 0, not {a}")
    scale = 1 + a * math.log(factor)

    def change(said: Positions, positions: Tensor, ctx: int) -> Positions:
        if scale == 1:
            return said
        return said._replace(logit_scale=torch.full((ctx,), scale, dtype=torch.float32, device=positions.device))

    encoding.change = change


def temperature_idle(parameters: Mapping[str, Any], ctx: int) -> bool:
    """Where the temperature is 1: at factor 1, or with a = 0."""
    return bool(parameters["factor"] == 1 or parameters["a"] == 0)


def interpolated_slopes(encoding: PositionEncoding, *, original_ctx: int, factor: float) -> None:
    """ALiBi's slopes divided by s, which is its bias at positions divided by s: Al-Khateeb et al. 2023 (2310.13017)."""

    def change(said: Positions, positions: Tensor, ctx: int) -> Positions:
        assert said.bias is not None
        assert said.slopes is not None
        return said._replace(bias=said.bias / factor, slopes=said.slopes / factor)

    encoding.change = change


def _block(block: int | None, original_ctx: int) -> int:
    if block is not None and block < 1:
        raise ValueError(f"scaling.block must be >= 1 token or null, not {block}")
    return block or max(1, original_ctx // 2)


def block_causal(encoding: PositionEncoding, *, original_ctx: int, block: int | None) -> None:
    """Blockwise causal attention: a query sees its own block of tokens and the one before.

    Sun et al. 2022 (2212.10554), section 3.2, blocks of L/2 (`block=null`), so that no distance is longer than in
    training.
    """
    size = _block(block, original_ctx)

    def change(said: Positions, positions: Tensor, ctx: int) -> Positions:
        return said if ctx <= 2 * size else said._replace(block=size)

    encoding.change = change


def block_causal_idle(parameters: Mapping[str, Any], ctx: int) -> bool:
    """Where blocks hide nothing: up to two of them."""
    return ctx <= 2 * _block(parameters["block"], parameters["original_ctx"])


# --- a learned table past its end -----------------------------------------------------------------------------------


def clamp(encoding: PositionEncoding, *, original_ctx: int) -> None:
    """All positions past the end of a learned table read its last row."""
    assert isinstance(encoding, Learned)

    def read(table: Tensor, positions: Tensor, ctx: int) -> Tensor:
        return table[positions.clamp(max=table.shape[0] - 1)]  # (N, C)

    encoding.read = read


def interpolate(encoding: PositionEncoding, *, original_ctx: int, factor: float) -> None:
    """A learned table stretched s times: position p reads the point p/s between its two nearest rows.

    The linear resampling that vision transformers use when they change resolution (Dosovitskiy et al. 2021,
    2010.11929, section 3.2). The last s - 1 positions lie past the last row and read it as it is. Beyond s L positions
    a `ContextLengthError`.
    """
    assert isinstance(encoding, Learned)

    def read(table: Tensor, positions: Tensor, ctx: int) -> Tensor:
        last = table.shape[0] - 1
        if ctx > factor * (last + 1):
            raise ContextLengthError(
                f"learned positions end at {last + 1}, interpolated by {factor:g} at {math.floor(factor * (last + 1))}"
            )
        if factor == 1:
            return table[positions]
        at = positions.double() / factor  # (N,), below L
        below = at.floor().long()
        weight = (at - below).to(table.dtype)[:, None]  # (N, 1), of the row above
        return table[below] * (1 - weight) + table[(below + 1).clamp(max=last)] * weight  # (N, C)

    encoding.read = read
