"""How things are timed: interleaved rounds, the best of each, and the machine's own limits beside them."""

from __future__ import annotations

import functools
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ropelab import experiment

VOCAB = 257  # bytes and the separator
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16, NVIDIA data sheets


def best(
    contestants: dict[str, Callable[[], None]], *, rounds: int, synchronise: Callable[[], None]
) -> dict[str, float]:
    """Least seconds of one call of each, over interleaved rounds; the first round warms up and is thrown away."""
    least = dict.fromkeys(contestants, math.inf)
    for turn in range(rounds + 1):
        for name, call in contestants.items():
            synchronise()
            began = time.perf_counter()
            call()
            synchronise()
            if turn:
                least[name] = min(least[name], time.perf_counter() - began)
    return least


def synchroniser(device: torch.device) -> Callable[[], None]:
    """What waits until the device has done all that it was asked."""
    return functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def matmul_flops(device: torch.device, dtype: torch.dtype, synchronise: Callable[[], None]) -> float:
    """FLOP/s of a large matrix product in `dtype`: the floor of what a training step can take."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = best({"product": lambda: (torch.matmul(a, b), None)[1]}, rounds=10, synchronise=synchronise)["product"]
    return 2 * size**3 / seconds


def peak_mb(device: torch.device) -> float:
    """Peak memory so far in MB: the device's on CUDA, elsewhere this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:  # of this process alone: ru_maxrss starts at what the parent held when it forked
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 2**10
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def machine(device: torch.device) -> dict[str, Any]:
    """What a number was measured on."""
    versions: dict[str, Any] = {"torch": str(torch.__version__)}
    if device.type == "cuda":
        versions["cuda"] = torch.version.cuda
        versions["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {"device": experiment.device_name(device), "threads": torch.get_num_threads(), **versions}
