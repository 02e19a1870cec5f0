"""`ropelab bench eval`: time and memory of a pass over a long text, and of a whole curve."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ropelab import config as configs
from ropelab import experiment
from ropelab.bench.timing import VOCAB, best, machine, peak_mb, synchroniser
from ropelab.model import GPT
from ropelab.schema import Config
from ropelab.training import matmul_precision, resolve_dtype


def evaluation(config: Config, *, contexts: Sequence[int], methods: Sequence[str], rounds: int) -> dict[str, Any]:
    """Time and extra peak memory of one forward pass with losses, each method and ctx in a fresh process.

    `prefix`: the losses at every doubling from 512 to the longest ctx, by one pass and by a pass for each.
    """
    rows: list[dict[str, Any]] = []
    for ctx in contexts:
        for name in methods:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, extra = pool.apply(_cost, (config, name, ctx, rounds))
            rows.append({"pos": name, "ctx": ctx, "seconds": seconds, "extra_mb": extra})
    first = {row["ctx"]: row for row in rows if row["pos"] == methods[0]}
    for row in rows:
        row["seconds_ratio"] = row["seconds"] / first[row["ctx"]]["seconds"]
        row["memory_ratio"] = row["extra_mb"] / first[row["ctx"]]["extra_mb"]
    device = experiment.resolve_device(config.device)
    dtype = resolve_dtype(config.eval.dtype, device)
    return {
        **machine(device),
        "dtype": experiment.DTYPE_NAMES[dtype],
        "rows": rows,
        "prefix": _prefix(config, methods[0], max(contexts), rounds) if max(contexts) >= 1024 else None,
    }


def _scorer(config: Config, name: str) -> tuple[GPT, Callable[..., Any]]:
    device = experiment.resolve_device(config.device)
    torch.set_float32_matmul_precision(matmul_precision(device, config.model.d_model))
    other = dataclasses.replace(config, pos=configs.load([f"pos={name}"]).pos)
    model = experiment.build_model(other, VOCAB, scaling=experiment.NO_SCALING, original_ctx=config.train.ctx)
    model.to(device).eval()
    model.progress(1.0)
    return model, experiment.scorer_of(model, window=None, dtype=resolve_dtype(config.eval.dtype, device))


def _cost(config: Config, name: str, ctx: int, rounds: int) -> tuple[float, float]:
    """(least seconds, MB above the model at rest) of a forward pass at ctx."""
    device = experiment.resolve_device(config.device)
    _, scorer = _scorer(config, name)
    tokens = np.random.default_rng(0).integers(0, 256, (1, ctx + 1))
    scorer(tokens[:, :65], tokens[:, 2:66])  # libraries load their kernels on the first call
    before = peak_mb(device)
    seconds, extra = [], 0.0
    for _ in range(rounds):
        began = time.perf_counter()
        scorer(tokens[:, :-1], tokens[:, 1:])  # its losses come to the host: the device has done its work
        seconds.append(time.perf_counter() - began)
        extra = extra or peak_mb(device) - before  # of the first pass: later ones find a heap in pieces
    return min(seconds), extra


def _prefix(config: Config, name: str, longest: int, rounds: int) -> dict[str, Any]:
    """The prefix curve of a length-independent method: from one pass, against a pass for each ctx."""
    model, scorer = _scorer(config, name)
    assert not model.encoding.length_dependent
    contexts = [512 * 2**k for k in range(64) if 512 * 2**k <= longest]
    tokens = np.random.default_rng(0).integers(0, 256, (1, contexts[-1] + 1))
    found: dict[str, dict[int, float]] = {"one": {}, "each": {}}

    def one() -> None:
        losses = scorer(tokens[:, :-1], tokens[:, 1:]).astype(np.float64)[0]
        found["one"] = {ctx: float(losses[:ctx].mean()) for ctx in contexts}

    def each() -> None:
        for ctx in contexts:
            losses = scorer(tokens[:, :ctx], tokens[:, 1 : ctx + 1]).astype(np.float64)[0]
            found["each"][ctx] = float(losses.mean())

    device = experiment.resolve_device(config.device)
    seconds = best({"one": one, "each": each}, rounds=rounds, synchronise=synchroniser(device))
    return {
        "pos": name,
        "contexts": contexts,
        "one_pass_s": seconds["one"],
        "pass_per_ctx_s": seconds["each"],
        "ratio": seconds["each"] / seconds["one"],
        "largest_difference_nats": max(abs(found["one"][ctx] - found["each"][ctx]) for ctx in contexts),
    }
