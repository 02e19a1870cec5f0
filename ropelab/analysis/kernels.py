"""Which attention kernel serves an encoding: known without training it, printed by `ropelab show --attention`."""

from __future__ import annotations

from typing import Any

import torch

from ropelab.attention import Request, choose_kernel
from ropelab.config import Config, Method
from ropelab.devices import DTYPE_NAMES, resolve_device, resolve_dtype
from ropelab.errors import ContextLengthError
from ropelab.model import bias_of
from ropelab.positions import ENCODINGS, Geometry
from ropelab.scalings import build, resolve_factor


def training_kernels(config: Config, methods: list[Method], contexts: list[int]) -> list[dict[str, Any]]:
    """The kernel of each encoding in training at train.ctx and in evaluation at every length, on the device configured.

    Rows {"pos", "use": "training" | "evaluation", "ctx", "device", "dtype", "kernel", "what"}; kernel None where the
    encoding is undefined at the length.
    """
    device = resolve_device(config.device)
    rows: list[dict[str, Any]] = []
    for method in methods:
        for ctx in [config.train.ctx, *contexts]:
            use = "evaluation" if rows and rows[-1]["pos"] == method.name else "training"
            dtype = resolve_dtype((config.train if use == "training" else config.eval).dtype, device)
            scaling = resolve_factor(config.scaling, longest=ctx, original_ctx=config.train.ctx)
            encoding = build(method, scaling, Geometry.of(config.model, config.train.ctx)).to(device)
            encoding.set_training_fraction(0.0 if use == "training" else 1.0)
            window = None if use == "training" else config.eval.window
            try:
                record = encoding(torch.arange(ctx, device=device), ctx=ctx)
                bias = bias_of(record, decays=ENCODINGS[method.name].content_dependent, window=window)
                kernel = choose_kernel(Request(ctx, bias.within(ctx), device, use == "training", dtype))
            except ContextLengthError:
                kernel = None  # a learned table past its end
            rows.append(
                {
                    "pos": method.name,
                    "use": use,
                    "ctx": ctx,
                    "device": device.type,
                    "dtype": DTYPE_NAMES[dtype],
                    "kernel": None if kernel is None else kernel.name,
                    "what": "undefined at this length" if kernel is None else kernel.summary,
                }
            )
    return rows
