"""`ropelab bench many`: several small models on one device, one after another, side by side, and in one stack."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ropelab import experiment
from ropelab.bench.timing import VOCAB, best, machine, synchroniser
from ropelab.bench.train import endless
from ropelab.model import GPT
from ropelab.schema import Config
from ropelab.stacking import stacked_steps
from ropelab.training import build_optimizer, resolve_dtype, steps

STEPS = 4  # of each model in one round


def many(config: Config, *, models: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of all models together: `models` runs of one method that differ in their seed.

    one after another: all threads for one model at a time. one stack: a batched step for all. side by side: processes
    of one thread each, as many as there are threads, their start not counted; on a CPU only.
    """
    device = experiment.resolve_device(config.device)
    dtype = resolve_dtype(config.train.dtype, device)
    compiled = experiment.compiles(config.train, device)
    batches = [_windows(config, seed) for seed in range(models)]
    alone = []
    for seed in range(models):
        model = _model(config, seed, device)
        if compiled:
            experiment.compile_blocks(model, cache_dir=config.cache_dir)
        optimizer = build_optimizer(model, config.train)
        at = batches[seed]
        alone.append(steps(model, optimizer, _always(at), endless(config), start=0, dtype=dtype))
    stacked = [_model(config, seed, device) for seed in range(models)]
    stack = stacked_steps(
        stacked, [build_optimizer(model, config.train) for model in stacked],
        [_always(batch) for batch in batches], endless(config), start=0, dtype=dtype, compiled=compiled,
    )  # fmt: skip

    def one_after_another() -> None:
        for training in alone:
            for _ in range(STEPS):
                next(training)

    def in_one_stack() -> None:
        for _ in range(STEPS):
            next(stack)

    contestants: dict[str, Callable[[], None]] = {"one after another": one_after_another, "one stack": in_one_stack}
    seconds = best(contestants, rounds=rounds, synchronise=synchroniser(device))
    tokens = models * STEPS * config.train.batch_size * config.train.ctx
    speed = {name: tokens / value for name, value in seconds.items()}
    if device.type == "cpu":
        speed["side by side"] = _side_by_side(config, models, dtype, rounds)
    return {
        **machine(device),
        "dtype": experiment.DTYPE_NAMES[dtype],
        "compiled": compiled,
        "models": models,
        "params": stacked[0].n_parameters(),
        "pos": config.pos.name,
        "rows": [
            {"how": name, "tokens_per_s": value, "ratio": value / speed["one after another"]}
            for name, value in speed.items()
        ],
    }


def _model(config: Config, seed: int, device: torch.device) -> GPT:
    model = experiment.build_model(
        config, VOCAB, scaling=experiment.training_scaling(config, config.train.ctx), original_ctx=config.train.ctx
    )
    model.init_weights(seed)
    return model.to(device)


def _always(batch: NDArray[np.int64]) -> Callable[[int], NDArray[np.int64]]:
    return lambda step: batch


def _windows(config: Config, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 256, (config.train.batch_size, config.train.ctx + 1))


def _side_by_side(config: Config, models: int, dtype: torch.dtype, rounds: int) -> float:
    """Tokens per second of all processes together, from the steps of those that run at one time."""
    slots = min(models, torch.get_num_threads())
    with multiprocessing.get_context("spawn").Pool(slots, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        rates = pool.map(_rate, [(config, seed, dtype, rounds) for seed in range(slots)], chunksize=1)
    return sum(rates)


def _rate(task: tuple[Config, int, torch.dtype, int]) -> float:
    """Tokens per second of one model for a while, after a first round."""
    config, seed, dtype, rounds = task
    device = torch.device("cpu")
    model, windows = _model(config, seed, device), _windows(config, seed)
    training = steps(
        model, build_optimizer(model, config.train), lambda step: windows, endless(config), start=0, dtype=dtype
    )
    for _ in range(STEPS):
        next(training)
    time.sleep(1)  # until the others have started too
    began = time.perf_counter()
    for _ in range(rounds * STEPS):
        next(training)
    return rounds * STEPS * config.train.batch_size * config.train.ctx / (time.perf_counter() - began)
