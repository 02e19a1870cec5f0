"""A second rotation for distant keys: ReRoPE and Self-Extend."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ropelab.positions import Far, PositionEncoding, Positions, Rope, Rotation
from ropelab.scalings.base import Scaling


@dataclass(frozen=True, kw_only=True)
class _SecondRotation(Scaling):
    """From a distance on, scores are those of queries and keys turned to other positions."""

    evaluation_only = True
    of_scores = True

    window: int | None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"scaling.window must be >= 1 token or null, not {self.window}")

    @property
    def from_distance(self) -> int:
        """The distance from which the second score holds: as given, else L/4."""
        return self.window or max(1, self.original_ctx // 4)

    def far(self, encoding: PositionEncoding, query_at: Tensor, key_at: Tensor, ctx: int) -> Far:
        """Queries and keys turned to the positions (N,) int64."""
        assert isinstance(encoding, Rope)
        used = encoding.spectrum(ctx)
        query, key = (encoding.rotation(at, used) for at in (query_at, key_at))
        rotation = Rotation(query.cos_q, query.sin_q, key.cos_k, key.sin_k, query.interleaved)
        return Far(rotation, self.from_distance, query_at, key_at)


@dataclass(frozen=True, kw_only=True)
class ReRope(_SecondRotation):
    """The distance that a score sees never exceeds w, min(i - j, w).

    Su 2023, bojone/rerope `rerope_patch.py`: from distance w on the query is turned to position w and the key not at
    all. With `log_scaling`, as in his code, queries are multiplied by max(1, ln(i + 1) / ln L). His code sets w = 512
    for L = 4096, his published table w = 1024; `window=null` is the table's L/4.
    """

    name = "rerope"

    log_scaling: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.log_scaling and self.original_ctx < 2:
            raise ValueError("scaling.log_scaling divides by ln scaling.original_ctx; give scaling.original_ctx >= 2")

    def is_identity(self, ctx: int) -> bool:
        return ctx <= self.from_distance and (ctx <= self.original_ctx or not self.log_scaling)

    def record(self, encoding: PositionEncoding, positions: Tensor, *, ctx: int) -> Positions:
        record = encoding.record(positions, ctx=ctx)
        if self.from_distance < ctx:
            query_at, key_at = torch.full_like(positions, self.from_distance), torch.zeros_like(positions)
            record = record._replace(far=self.far(encoding, query_at, key_at, ctx))
        if self.log_scaling and ctx > self.original_ctx:
            scale = ((positions.cpu().double() + 1).log() / math.log(self.original_ctx)).clamp(min=1).float()  # (T,)
            record = record._replace(logit_scale=scale.to(positions.device))
        return record


@dataclass(frozen=True, kw_only=True)
class SelfExtend(_SecondRotation):
    """From distance W on, positions are counted in groups of G tokens.

    Jin et al. 2024 (2401.01325), section 3: the distance there is floor(i/G) + W - floor(W/G) - floor(j/G), which lets
    L positions reach (L - W) G + W tokens. Their code (datamllab/LongLM `self_extend_patch/Llama.py`) floors W/G when
    it decodes and not when it reads a prompt; the two agree where G divides W, and the paper floors. Their defaults
    for Llama-2 (L = 4096) are G = 8 and W = 1024 = L/4, which is `window=null`.
    """

    name = "self_extend"

    group: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 1:
            raise ValueError(f"scaling.group must be >= 1 token, not {self.group}")

    def is_identity(self, ctx: int) -> bool:
        return ctx <= self.from_distance or self.group == 1  # groups of one token are the tokens

    def record(self, encoding: PositionEncoding, positions: Tensor, *, ctx: int) -> Positions:
        record = encoding.record(positions, ctx=ctx)
        if self.is_identity(ctx):
            return record
        w, grouped = self.from_distance, positions // self.group  # (N,)
        return record._replace(far=self.far(encoding, grouped + (w - w // self.group), grouped, ctx))
