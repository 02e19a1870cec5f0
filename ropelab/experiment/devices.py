"""Which device a run uses, what it is, and the state of the code: facts for a manifest."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import ropelab

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU. `ValueError` for a device that this machine does not have."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}: this machine has no CUDA device; use device=cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={name}: this machine has no MPS device; use device=cpu")
    if kind == "cuda" and ":" in name and (not index.isdecimal() or int(index) >= torch.cuda.device_count()):
        last = torch.cuda.device_count() - 1
        raise ValueError(f"device={name}: there is no such device; use cuda:0{f' to cuda:{last}' if last else ''}")
    if kind != "cuda" and ":" in name:
        raise ValueError(f"device={name}: {kind} takes no number; use device={kind}")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """What the device is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        except (OSError, StopIteration):
            return platform.processor() or platform.machine()
    return device.type


def environment() -> dict[str, Any]:
    """Versions and code state for a manifest."""
    package = Path(ropelab.__file__).parent.parent
    commit = None
    if (package / ".git").exists():
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # no git here, or a slow one: nothing is known
            command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12"]
            found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
            commit = found.stdout.strip() or None
    return {
        "ropelab": ropelab.__version__,
        "commit": commit,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }
