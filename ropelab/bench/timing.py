"""How things are timed: interleaved rounds, the best of each; peak memory; and the facts about the machine."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ropelab import devices

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16, NVIDIA's data sheets
MB = 2**20


def best(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int, synchronise: Callable[[], None], warm: bool = False
) -> dict[str, float]:
    """Least seconds of one call of each over interleaved rounds; unless they are `warm`, a first one does not count."""
    least = dict.fromkeys(contestants, math.inf)
    for turn in range(0 if not warm else 1, rounds + 1):
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


def square_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A large matrix product and its FLOPs: no training step does its products faster."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return functools.partial(torch.matmul, a, b), 2.0 * size**3


def peak_of(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device by its data sheet, where it is known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in devices.device_name(device)), None)


def reset_peak(device: torch.device) -> float:
    """Forget the peak so far; what is in use now, in MB: the device's memory on CUDA, else that of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # elsewhere than on Linux the peak so far is what is left to start from
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_mb(device)


def peak_mb(device: torch.device) -> float:
    """Largest memory in use since `reset_peak`, in MB (2**20 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MB
    try:  # of this process alone: ru_maxrss starts at what the parent held when it forked
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 2**10
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (MB if sys.platform == "darwin" else 2**10)


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    facts: dict[str, Any] = {
        "device": devices.device_name(device),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        with contextlib.suppress(ImportError):
            facts["triton"] = importlib.import_module("triton").__version__
    return facts
