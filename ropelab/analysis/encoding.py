"""The numbers of one method at one length: what `ropelab show` prints, draws and gives as JSON."""

from __future__ import annotations

import math
from typing import Any

import torch

from ropelab.analysis import breakdown
from ropelab.analysis.breakdown import Trained
from ropelab.config import Config, Method
from ropelab.positions import (
    Drope,
    FixedTable,
    Geometry,
    Learned,
    PositionEncoding,
    Positions,
    Rope,
    Sinusoidal,
    Xpos,
)
from ropelab.scalings import build, resolve_factor


def start(config: Config, method: Method, original_ctx: int) -> PositionEncoding:
    """An encoding before its training; the tensors that are drawn, drawn by the configuration's seed."""
    encoding = build(config.pos, method, Geometry.of(config.model, original_ctx))
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for name, parameter in encoding.named_parameters():
            if (drawn := encoding.init_parameter(name, parameter.shape, generator)) is not None:
                parameter.copy_(drawn)
    return encoding


def describe(
    config: Config,
    *,
    ctx: int,
    method: Method | None = None,
    encoding: PositionEncoding | None = None,
    original_ctx: int | None = None,
) -> dict[str, Any]:
    """The `show` object of the JSON contract: for a configuration, or for a run with its trained `encoding`.

    Of a run, `config` is its own, `original_ctx` its root's train.ctx, and `method` the scaling in `encoding`, its
    factor a number.

    rotation.inv_freq: radians per token of every pair in the spectrum in use at `ctx`; attention_factor multiplies
    cosines and sines, so scores get its square. rotation.far: {"window"}: from that distance on scores are those of
    another rotation. rotation.decay: of xPos, {"zeta": by pair, what is left of its part of a score after scale_base
    tokens, "half_life": by pair, tokens until half is left}. bias.by_distance: [head][distance 0..ctx-1], added to
    scores; bias.query: the query it holds for, where it depends on that. embedding: the bare table, ctx rows of
    d_model; embedding_scale: what a trained scalar multiplies it by. coverage: `diagnose.coverage`. block: tokens of a
    block of block-causal attention. logit_scale: factor on the scores of each query. notes: sentences about what
    numbers do not say. Whatever does not apply is None. `ContextLengthError` where the encoding is undefined at `ctx`.
    """
    run = encoding is not None
    original_ctx = original_ctx or config.train.ctx  # of the root of a fine-tuned run
    if method is None:
        method = resolve_factor(config.scaling, longest=ctx, original_ctx=original_ctx)
    if encoding is None:
        encoding = start(config, method, original_ctx)
    with torch.no_grad():
        record = encoding(torch.arange(ctx), ctx=ctx)
    rotation = coverage = length = None
    if isinstance(encoding, Rope) and record.rotation is not None:
        inv_freq, attention_factor, start_tokens = encoding.spectrum(ctx)
        rotation = {
            "inv_freq": inv_freq.tolist(),
            "attention_factor": attention_factor,
            "start_tokens": start_tokens,
            "far": None if record.far is None else {"window": record.far.window},
            "decay": _decay(encoding) if isinstance(encoding, Xpos) else None,
        }
        trained = breakdown.trained_range(config, original_ctx) if run else None
        if trained is None:  # no run: as trained without the scaling
            plain = encoding.inv_freq()
            trained = Trained(config.train.ctx, plain, config.train.ctx * plain)
        coverage = breakdown.coverage(encoding, method, trained, ctx)
        length = trained.length
    return {
        "pos": config.pos.name,
        "scaling": method.name,
        "factor": method.parameters.get("factor"),
        "scaling_parameters": dict(method.parameters),
        "ctx": ctx,
        "train_ctx": config.train.ctx,
        "trained_length": length or config.train.ctx,
        "d_head": config.model.d_head,
        "n_head": config.model.n_head,
        "parameters": config.pos.parameters,
        "rotation": rotation,
        "bias": _bias(record, ctx),
        **_embedding(encoding, record, ctx, run=run),
        "coverage": coverage,
        "block": record.block,
        "logit_scale": None if record.logit_scale is None else record.logit_scale.tolist(),
        "notes": _notes(encoding, method, record, ctx, run=run),
    }


def _decay(encoding: Xpos) -> dict[str, list[float]]:
    zeta = encoding.zeta().tolist()
    return {"zeta": zeta, "half_life": [encoding.scale_base * math.log(0.5) / math.log(z) for z in zeta]}


def _bias(record: Positions, ctx: int) -> dict[str, Any] | None:
    if record.bias is not None:
        return {"by_distance": record.bias.tolist()}
    if record.query_bias is None:
        return None
    with torch.no_grad():  # (1, 1), (1, T) -> (H, 1, T)
        last = record.query_bias(torch.tensor([[ctx - 1.0]]), torch.arange(ctx, dtype=torch.float32)[None])
    return {"by_distance": last[:, 0].tolist(), "query": ctx - 1}


def _embedding(encoding: PositionEncoding, record: Positions, ctx: int, *, run: bool) -> dict[str, Any]:
    table: list[list[float]] | None = None
    scale = None
    if isinstance(encoding, FixedTable):
        table = encoding.table(torch.arange(ctx)).tolist()
        scale = float(encoding.scale.detach()) if isinstance(encoding, Sinusoidal) else None
    elif isinstance(encoding, Learned) and run and record.embedding is not None:
        table = record.embedding.tolist()
    return {"embedding": table, "embedding_scale": scale}


def _notes(encoding: PositionEncoding, method: Method, record: Positions, ctx: int, *, run: bool) -> list[str]:
    """What a reader of the numbers must know."""
    notes = []
    if isinstance(encoding, Drope):
        notes.append(
            "the rotation is dropped: there are no positions in evaluation"
            if record.rotation is None
            else f"this is the rotation of the first {encoding.drop_after:g} of the training; after that, and in "
            "evaluation, there are no positions"
        )
    elif encoding.content_dependent:
        notes.append("position is read off the text itself, layer by layer: there is nothing to show without a text")
    elif all(part is None for part in record._replace(logit_scale=None, block=None)):  # these are no positions
        notes.append("nothing is said of position: the causal mask is the only order signal")
    if record.query_bias is not None:
        notes.append(f"the bias depends on the query too: it is that of the last one, at position {ctx - 1}")
    if record.qk_embedding is not None:
        notes.append("the table is added to what queries and keys are made of, in every layer, not to the tokens")
    if next(encoding.parameters(), None) is not None and not run:
        if isinstance(encoding, Learned):
            notes.append("the table starts as noise, and training gives it its meaning: show a RUN to see it")
        elif not encoding.content_dependent and not isinstance(encoding, Sinusoidal):
            notes.append("this is how training starts, before anything is learned: show a RUN to see what became of it")
    if record.far is not None:
        group = method.parameters.get("group")
        counted = "at that distance, however far they are" if group is None else f"at distances in groups of {group}"
        notes.append(f"keys {record.far.window} or more tokens back are scored by a second rotation, {counted}")
    if record.block is not None:
        notes.append(f"a query sees its own block of {record.block} tokens and the block before it, nothing older")
    if record.logit_scale is not None:
        low, high = float(record.logit_scale.min()), float(record.logit_scale.max())
        notes.append(
            f"scores are multiplied by {low:.4g}"
            + ("" if low == high else f" for the first queries, growing to {high:.4g} for the last")
        )
    return notes
