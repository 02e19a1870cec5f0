"""`ropelab bench start`: seconds from nothing to the first training step, in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from ropelab import config as configs
from ropelab import experiment
from ropelab.bench.timing import VOCAB, machine
from ropelab.schema import Config
from ropelab.training import build_optimizer, resolve_dtype, steps


def start(config: Config) -> dict[str, Any]:
    """`cold`: with an empty folder of compiled code; `warm`: with what the first process left there."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", "from ropelab.bench.start import first_step; first_step()"],
                check=True,
                text=True,
                input=json.dumps(configs.to_dict(config)),
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder},
            )
            seconds[name] = time.perf_counter() - began
    device = experiment.resolve_device(config.device)
    return {
        **machine(device), "compiled": experiment.compiles(config.train, device), "pos": config.pos.name,
        "cold_s": seconds["cold"], "warm_s": seconds["warm"],
    }  # fmt: skip


def first_step() -> None:
    """One training step of the configuration on stdin, and nothing more."""
    config = configs.from_dict(json.load(sys.stdin))
    device = experiment.resolve_device(config.device)
    scaling = experiment.training_scaling(config, config.train.ctx)
    model = experiment.build_model(config, VOCAB, scaling=scaling, original_ctx=config.train.ctx).to(device)
    if experiment.compiles(config.train, device):
        experiment.compile_blocks(model, cache_dir=config.cache_dir)
    windows = np.random.default_rng(0).integers(0, 256, (config.train.batch_size, config.train.ctx + 1))
    dtype = resolve_dtype(config.train.dtype, device)
    optimizer = build_optimizer(model, config.train)
    next(steps(model, optimizer, lambda step: windows, config.train, start=0, dtype=dtype, unread=1))
