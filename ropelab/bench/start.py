"""`ropelab bench start`: seconds from the start of a process to the end of its first training step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

from ropelab import config as configs
from ropelab import devices, training
from ropelab.bench.ours import VOCAB, model_of, training_steps
from ropelab.bench.timing import machine
from ropelab.config import Config
from ropelab.devices import matmul_precision, resolve_dtype

CODE = "from ropelab.bench.start import first_step; first_step()"


def start(config: Config, *, vocab: int = VOCAB) -> dict[str, Any]:
    """`cold`: with empty caches of compiled code; `warm`: with what the first process left there.

    Each: `seconds` in all, of which `import_s` until ropelab and torch are loaded, `build_s` until there is a model on
    the device, and `step_s` for the step, compiling included. Reading a corpus is not in it.
    """
    model_of(config, vocab)  # what cannot be built is refused here
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        for cache in ("cold", "warm"):
            task = {"config": configs.to_dict(config), "vocab": vocab, "began": time.time()}
            done = subprocess.run(
                [sys.executable, "-c", CODE],
                input=json.dumps(task), env={**os.environ, **caches}, stdout=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise OSError(f"the process with a {cache} cache ended with status {done.returncode}")
            rows.append({"cache": cache, **json.loads(done.stdout.splitlines()[-1])})
    device = devices.resolve_device(config.device)
    return {
        **machine(device),
        "dtype": devices.DTYPE_NAMES[resolve_dtype(config.train.dtype, device)],
        "compiled": training.compiles(config.train, device),
        "pos": config.pos.name,
        "cold_s": rows[0]["seconds"],
        "warm_s": rows[1]["seconds"],
        "rows": rows,
    }


def first_step() -> None:
    """Take the first training step of the task on stdin, and print the seconds until each part was done."""
    loaded = time.time()
    task = json.load(sys.stdin)
    config = configs.from_dict(task["config"])
    device = devices.resolve_device(config.device)
    torch.set_float32_matmul_precision(matmul_precision(device, config.model.d_model))
    ours = training_steps(config, resolve_dtype(config.train.dtype, device), task["vocab"], max_in_flight=1)
    built = time.time()
    next(ours.going)
    ended = time.time()
    print(
        json.dumps({
            "seconds": ended - task["began"], "import_s": loaded - task["began"], "build_s": built - loaded,
            "step_s": ended - built,
        })
    )  # fmt: skip
