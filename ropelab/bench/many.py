"""`ropelab bench many`: many small models on one device, one after another, in one stack, and side by side."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from ropelab import devices, training
from ropelab.bench.ours import compile_many, endless, model_of, same_batch, training_steps, turn_of
from ropelab.bench.timing import best, machine, synchroniser
from ropelab.config import Config
from ropelab.devices import matmul_precision, resolve_dtype
from ropelab.training import build_optimizer
from ropelab.training.batched import stacked_steps

TURNS = {"cuda": 1}  # of each model in a round; on a CPU 4 steps, so that what starts and ends a round counts little


def many(config: Config, *, models: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of `models` runs that differ in their seed, all together.

    `one after another`: all threads for one model at a time. `one stack`: a batched step for all. `side by side`, on a
    CPU: as many processes as threads, one thread each, which share the models; their start is not in it, but in
    `start_s`. `ValueError` for models that cannot be stacked.
    """
    device = devices.resolve_device(config.device)
    dtype = resolve_dtype(config.train.dtype, device)
    torch.set_float32_matmul_precision(matmul_precision(device, config.model.d_model))
    seeded = [dataclasses.replace(config, seed=config.seed + n) for n in range(models)]
    stacked = [model_of(one) for one in seeded]
    compiled = training.compiles(config.train, device)
    if compiled:
        compile_many()
    together = stacked_steps(
        stacked, [build_optimizer(model, config.train) for model in stacked], [same_batch(one) for one in seeded],
        endless(config), start=0, dtype=dtype, max_in_flight=turn_of(device), compiled=compiled,
    )  # fmt: skip
    alone = [training_steps(one, dtype) for one in seeded]
    turns = TURNS.get(device.type, 4)
    taken = turns * turn_of(device)  # steps of each model in a round

    def one_after_another() -> None:
        for one in alone:
            for _ in range(turns):
                one.turn()

    def in_one_stack() -> None:
        for _ in range(taken):
            next(together)

    contestants: dict[str, Callable[[], object]] = {"one after another": one_after_another, "one stack": in_one_stack}
    beside = _SideBySide(seeded, dtype, turns) if device.type == "cpu" else None
    try:
        if beside is not None:
            contestants["side by side"] = beside.turn
        seconds = best(contestants, rounds=rounds, synchronise=synchroniser(device))
    finally:
        if beside is not None:
            beside.close()
    tokens = models * taken * config.train.batch_size * config.train.ctx
    speed = {name: tokens / value for name, value in seconds.items()}
    return {
        **machine(device),
        "dtype": devices.DTYPE_NAMES[dtype],
        "compiled": compiled,
        "models": models,
        "params": stacked[0].n_parameters(),
        "pos": config.pos.name,
        "steps": taken,
        "processes": 0 if beside is None else len(beside.ends),
        "start_s": None if beside is None else beside.start_s,
        "rows": [
            {"how": name, "tokens_per_s": value, "ratio": value / speed["one after another"]}
            for name, value in speed.items()
        ],
    }


class _SideBySide:
    """Processes of one thread that hold the models and wait between rounds: they can take turns with this one."""

    def __init__(self, seeded: Sequence[Config], dtype: torch.dtype, turns: int) -> None:
        context = multiprocessing.get_context("spawn")
        began = time.perf_counter()
        slots = min(len(seeded), torch.get_num_threads())
        self.ends: list[Connection] = []
        for slot in range(slots):
            ours, theirs = context.Pipe()
            task = (theirs, seeded[slot::slots], dtype, turns)
            context.Process(target=_work, args=task, daemon=True).start()
            theirs.close()  # theirs alone holds it now: if they die, we are told
            self.ends.append(ours)
        self._wait()
        self.start_s = time.perf_counter() - began

    def turn(self) -> None:
        for end in self.ends:
            end.send("go")
        self._wait()

    def _wait(self) -> None:
        try:
            for end in self.ends:
                end.recv()
        except EOFError:
            raise RuntimeError("a process side by side died; what it said stands above") from None

    def close(self) -> None:
        for end in self.ends:
            end.close()


def _work(end: Connection, configs: Sequence[Config], dtype: torch.dtype, turns: int) -> None:
    """Hold models, say so, and train each for some turns whenever told to."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(matmul_precision(torch.device("cpu"), configs[0].model.d_model))
    mine = [training_steps(config, dtype) for config in configs]
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            end.send("ready")
            end.recv()
            for one in mine:
                for _ in range(turns):
                    one.turn()
