"""`ropelab bench eval`: time and memory of a pass over a long text, and of a whole curve."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ropelab import devices, runs
from ropelab.bench.ours import VOCAB, model_of, with_encodings
from ropelab.bench.timing import best, machine, peak_mb, reset_peak, synchroniser
from ropelab.config import Config
from ropelab.devices import matmul_precision, resolve_dtype
from ropelab.evaluation import scorer_of
from ropelab.model import GPT
from ropelab.positions import Geometry
from ropelab.scalings import build

SHORTEST = 512  # the first length of the prefix curve


def undefined(config: Config, names: Sequence[str], ctx: int) -> dict[str, str]:
    """Why encodings are undefined at `ctx` tokens, by name; those that are defined are not in it."""
    found = {}
    for other in with_encodings(config, names):
        try:
            encoding = build(other.pos, runs.NO_SCALING, Geometry.of(config.model, config.train.ctx))
            with torch.no_grad():
                encoding(torch.arange(ctx), ctx=ctx)
        except ValueError as error:
            found[other.pos.name] = str(error)
    return found


def evaluation(config: Config, *, contexts: Sequence[int], methods: Sequence[str], rounds: int) -> dict[str, Any]:
    """Time and extra peak memory of one forward pass with losses, each in a fresh process for each method and ctx.

    Ratios are to the first method. `prefix`: the losses at every doubling from 512 on, by one pass and by a pass for
    each; None where the longest ctx is below 1024. `ValueError` for an encoding that is undefined at a ctx.
    """
    for reason in undefined(config, methods, max(contexts)).values():
        raise ValueError(f"{reason}; leave it out of --methods")
    device = devices.resolve_device(config.device)
    rows: list[dict[str, Any]] = []
    for ctx in contexts:
        of_ctx: list[dict[str, Any]] = []
        for other in with_encodings(config, methods):
            seconds = _in_fresh_process(_seconds, other, ctx, rounds)
            with _heap_without_holes():
                extra = _in_fresh_process(_extra_mb, other, ctx)
            of_ctx.append({"pos": other.pos.name, "ctx": ctx, "seconds": seconds, "extra_mb": extra})
        for row in of_ctx:
            row["seconds_ratio"] = row["seconds"] / of_ctx[0]["seconds"]
            row["memory_ratio"] = row["extra_mb"] / of_ctx[0]["extra_mb"] if of_ctx[0]["extra_mb"] > 0 else None
        rows += of_ctx
    return {
        **machine(device),
        "dtype": devices.DTYPE_NAMES[resolve_dtype(config.eval.dtype, device)],
        "params": model_of(with_encodings(config, methods)[0]).n_parameters(),
        "peak_of": "the device's" if device.type == "cuda" else "this process's",
        "rows": rows,
        "prefix": _prefix(with_encodings(config, methods), max(contexts), rounds),
    }


def _scorer(config: Config) -> tuple[GPT, Callable[..., NDArray[np.float32]]]:
    """A model and what scores with it: (inputs (B, ctx), targets (B, ctx)) -> losses (B, ctx)."""
    device = devices.resolve_device(config.device)
    torch.set_float32_matmul_precision(matmul_precision(device, config.model.d_model))
    model = model_of(config).eval()
    model.set_training_fraction(1.0)
    return model, scorer_of(model, window=None, dtype=resolve_dtype(config.eval.dtype, device))


def _text(ctx: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, VOCAB - 1, (1, ctx + 1))


def _in_fresh_process(cost: Callable[..., float], *arguments: Any) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(cost, (*arguments, torch.get_num_threads()))


@contextlib.contextmanager
def _heap_without_holes() -> Iterator[None]:
    """Processes that are started here give every tensor back to the system at once (glibc's malloc).

    Otherwise a process keeps what it freed, by chance more or less of it: a pass of 100 MB looked like 160 to 210.
    """
    name = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(name)
    os.environ[name] = str(2**18)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _warmed(config: Config, threads: int) -> Callable[..., NDArray[np.float32]]:
    torch.set_num_threads(threads)
    _, scorer = _scorer(config)
    tokens = _text(64)
    scorer(tokens[:, :-1], tokens[:, 1:])  # libraries load their kernels on the first call
    return scorer


def _seconds(config: Config, ctx: int, rounds: int, threads: int) -> float:
    """Least seconds of a forward pass at ctx."""
    scorer, tokens = _warmed(config, threads), _text(ctx)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        scorer(tokens[:, :-1], tokens[:, 1:])  # its losses come to the host: the device has done its work
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _extra_mb(config: Config, ctx: int, threads: int) -> float:
    """MB above the model at rest that a forward pass at ctx takes."""
    scorer, tokens = _warmed(config, threads), _text(ctx)
    device = devices.resolve_device(config.device)
    at_rest = reset_peak(device)
    scorer(tokens[:, :-1], tokens[:, 1:])
    return peak_mb(device) - at_rest


def _prefix(configs: Sequence[Config], longest: int, rounds: int) -> dict[str, Any] | None:
    """The prefix curve of the first method whose scores do not depend on the length: one pass, and one for each ctx."""
    contexts = [SHORTEST * 2**k for k in range(64) if SHORTEST * 2**k <= longest]
    if len(contexts) < 2:
        return None
    for config in configs:
        model, scorer = _scorer(config)
        if not model.encoding.length_dependent:
            break
    else:
        return None
    with torch.no_grad():  # freshly drawn, a model says nearly the same of every token, and no difference would show
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    tokens = _text(contexts[-1])
    one: dict[int, float] = {}
    each: dict[int, float] = {}

    def one_pass() -> None:
        losses = scorer(tokens[:, :-1], tokens[:, 1:])[0].astype(np.float64)  # (longest,)
        one.update({ctx: float(losses[:ctx].mean()) for ctx in contexts})

    def pass_for_each() -> None:
        for ctx in contexts:
            each[ctx] = float(scorer(tokens[:, :ctx], tokens[:, 1 : ctx + 1])[0].astype(np.float64).mean())

    device = devices.resolve_device(config.device)
    scorer(tokens[:, :SHORTEST], tokens[:, 1 : SHORTEST + 1])
    contestants = {"one": one_pass, "each": pass_for_each}
    # on a CPU a first round would cost as much as one that counts, and change little
    seconds = best(contestants, rounds=rounds, synchronise=synchroniser(device), warm=device.type == "cpu")
    return {
        "pos": config.pos.name,
        "contexts": contexts,
        "one_pass_s": seconds["one"],
        "pass_per_ctx_s": seconds["each"],
        "ratio": seconds["each"] / seconds["one"],
        "largest_difference_nats": max(abs(one[ctx] - each[ctx]) for ctx in contexts),
        "spread_nats": max(one.values()) - min(one.values()),
    }
