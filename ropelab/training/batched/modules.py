"""What the encodings of M models say, joined so that one pass serves them all; letters as the package explains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ropelab.attention import Attend
from ropelab.model import GPT, bias_of
from ropelab.positions import Positions, QueryBias, Rotation


class Joined(NamedTuple):
    """What M encodings say about one forward pass; what only some of them use changes nothing for the others."""

    embedding: Tensor | None  # (M, B or 1, T, C) fp32
    qk_embedding: Tensor | None  # (M, B or 1, T, C) fp32
    rotation: Rotation | None  # every tensor (M, B or 1, 1, T, R/2) fp32
    scale: Tensor | None  # (M, 1, 1, T, 1) fp32, of the scores of each query
    attend: Attend
    by_heads: bool  # are there biases? Then the models stand beside each other as heads, else as sequences


JOINED = ("embedding", "qk_embedding", "bias", "query_bias", "logit_scale", "rotation", "block", "slopes")
UNJOINED = {"far": "other scores for distant keys"}  # every other field of the record is refused by its name


def join(records: Sequence[Positions], model: GPT, length: int, dtype: torch.dtype) -> Joined:
    """What M models of the shape of `model` say about `length` tokens. `ValueError` where it cannot be said at once."""
    for name in Positions._fields:
        if name not in JOINED and any(getattr(record, name) is not None for record in records):
            raise ValueError(f"models with {UNJOINED.get(name, name)} cannot be stacked")
    blocks = {record.block for record in records}
    if len(blocks) > 1:
        raise ValueError("models that see blocks of different lengths cannot be stacked")
    n_head, table = model.config.n_head, (length, model.config.d_model)
    bias = _stacked([record.bias for record in records], (length,), 0.0)  # (M, H, T)
    slopes = None  # a kernel computes them all, or none
    if all(record.bias is None or record.slopes is not None for record in records):
        slopes = _stacked([record.slopes for record in records], (n_head,), 0.0)  # (M, 1, H)
    # the biases of M models are those of M x H heads
    of_heads = Positions(
        bias=None if bias is None else bias.flatten(0, 1),  # (M, H, T) -> (M x H, T)
        slopes=None if slopes is None else slopes.flatten(),  # (M, 1, H) -> (M x H,)
        query_bias=_stacked_by_query([record.query_bias for record in records], n_head),
        block=blocks.pop(),
    )
    attend = Attend(
        length, bias=bias_of(of_heads, decays=False), device=model.tokens.weight.device, training=True, dtype=dtype
    )
    return Joined(
        embedding=_stacked([record.embedding for record in records], table, 0.0),
        qk_embedding=_stacked([record.qk_embedding for record in records], table, 0.0),
        rotation=_stacked_rotations([record.rotation for record in records], length),
        scale=_stacked([record.logit_scale for record in records], (1, length, 1), 1.0),
        attend=attend,
        by_heads=of_heads.bias is not None or of_heads.query_bias is not None,
    )


def _stacked(parts: Sequence[Tensor | None], shape: tuple[int, ...], filler: float) -> Tensor | None:
    """(M, N, *shape): N is 1 for what is the same in all sequences, B for what is not, H for biases.

    A part that is missing becomes `filler`; None where all are missing.
    """
    given = [None if part is None else part.reshape(-1, *shape) for part in parts]
    missing = next((torch.full_like(part, filler) for part in given if part is not None), None)
    return None if missing is None else torch.stack([missing if part is None else part for part in given])


def _stacked_rotations(parts: Sequence[Rotation | None], length: int) -> Rotation | None:
    """The rotations of M models, their tables (M, B or 1, 1, T, R/2); a model that has none is turned by angle 0."""
    given = [part for part in parts if part is not None]
    layouts = {(part.cos_q.shape[-1], part.interleaved) for part in given}
    if len(layouts) > 1:
        raise ValueError("models that pair the dimensions of a head differently cannot be stacked")
    if not given:
        return None
    ((half, interleaved),) = layouts
    one, zero = torch.ones_like(given[0].cos_q), torch.zeros_like(given[0].sin_q)
    tables = [(one, zero, one, zero) if part is None else part[:4] for part in parts]
    cos_q, sin_q, cos_k, sin_k = (
        torch.stack([x.reshape(-1, 1, length, half) for x in same]) for same in zip(*tables, strict=True)
    )
    return Rotation(cos_q, sin_q, cos_k, sin_k, interleaved)


def _stacked_by_query(parts: Sequence[QueryBias | None], heads: int) -> QueryBias | None:
    """The biases of M models as those of M x H heads; zeros for a model that has none; None where none has."""
    if all(part is None for part in parts):
        return None

    def bias(query: Tensor, distance: Tensor) -> Tensor:
        zeros = distance.new_zeros(heads, *distance.shape)  # (H, Q, K)
        return torch.cat([zeros if part is None else part(query, distance) for part in parts])

    return bias
