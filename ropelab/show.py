"""The numbers of one method at one length: what `ropelab show --pos NAME` prints, draws and gives as JSON."""

from __future__ import annotations

import math
from typing import Any

import torch

from ropelab.positions import Geometry, Rotation, build, resolve_factor
from ropelab.positions.rope import Rope
from ropelab.positions.sinusoidal import Sinusoidal, SinusoidalFairseq
from ropelab.schema import Config


def numbers(config: Config, *, ctx: int) -> dict[str, Any]:
    """The `show` object of the JSON contract for an untrained encoding.

    rotation.inv_freq: radians per token of every pair in the spectrum in use at `ctx`; attention_factor multiplies
    cosines and sines, so scores get its square. bias.by_distance: [head][distance 0..ctx-1], added to scores.
    embedding: the bare table, ctx rows of d_model. coverage: wavelength in tokens of the spectrum in use, the turns
    that the pair made within train_ctx as it was trained, and those that it is asked for within ctx.
    `ContextLengthError` where the encoding is undefined at `ctx`.
    """
    geometry = Geometry.of(config.model, config.train.ctx)
    method = resolve_factor(config.scaling, longest=ctx, original_ctx=config.train.ctx)
    encoding = build(config.pos, method, geometry)
    with torch.no_grad():
        record = encoding(torch.arange(ctx), ctx=ctx)
    rotation = coverage = embedding = None
    if isinstance(encoding, Rope):
        inv_freq, attention_factor, _ = encoding.spectrum(ctx)
        trained = encoding.inv_freq()
        rotation = {"inv_freq": inv_freq.tolist(), "attention_factor": attention_factor}
        coverage = [
            {
                "pair": pair,
                "wavelength": 2 * math.pi / now,
                "turns_train": config.train.ctx * before / (2 * math.pi),
                "turns_ctx": ctx * now / (2 * math.pi),
            }
            for pair, (now, before) in enumerate(zip(inv_freq.tolist(), trained.tolist(), strict=True))
        ]
    if isinstance(encoding, Sinusoidal | SinusoidalFairseq):
        embedding = encoding.table(torch.arange(ctx)).tolist()
    assert record.rotation is None or isinstance(record.rotation, Rotation)
    return {
        "pos": config.pos.name,
        "scaling": method.name,
        "factor": method.parameters.get("factor"),
        "ctx": ctx,
        "train_ctx": config.train.ctx,
        "d_head": geometry.d_head,
        "n_head": geometry.n_head,
        "parameters": config.pos.parameters,
        "rotation": rotation,
        "bias": None if record.bias is None else {"by_distance": record.bias.tolist()},
        "embedding": embedding,
        "coverage": coverage,
    }
