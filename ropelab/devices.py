"""Which device a run uses, what it is, and the state of the code: facts for a manifest."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import ropelab
from ropelab.distributed import Ranks

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


def device_of_rank(name: str, ranks: Ranks) -> torch.device:
    """`resolve_device`, with several ranks a device for each: cuda:LOCAL_RANK, or the CPU for all. `ValueError`."""
    if ranks.world == 1:
        return resolve_device(name)
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name} is one device for {ranks.world} ranks; use device=cuda or device=cpu")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    resolve_device("cuda")
    count = torch.cuda.device_count()
    if ranks.local_rank >= count > 1 or (count == 1 < ranks.local_world and "SLURM_PROCID" not in os.environ):
        raise ValueError(
            f"{ranks.local_world} ranks on a machine with {count} CUDA devices; start one for each, or use device=cpu"
        )
    return torch.device("cuda", ranks.local_rank if count > 1 else 0)  # Slurm may show each task its own device alone


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


def side_by_side(name: str) -> dict[str, Any]:
    """How several runs on `device=name` share this machine: {"gpus": CUDA devices, one run on each; "jobs": at once}.

    jobs is 1 where the device is one that cannot be shared: a CUDA device by its number, or MPS. None: as many as fit.
    """
    if resolve_device(name).type == "cpu":
        return {"gpus": [], "jobs": None}
    if name not in ("auto", "cuda") or not torch.cuda.is_available():
        return {"gpus": [], "jobs": 1}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    return {"gpus": found, "jobs": None}


WIDE = 192  # width from which oneDNN's fp32 products are the faster ones on a CPU with AVX-512


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` by what the device can do, never by a timing: bf16 where it multiplies bf16 natively, else fp32.

    CUDA from compute capability 8.0; a CPU with AVX512-BF16 or AMX; MPS stays fp32.
    """
    if dtype != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def matmul_precision(device: torch.device, width: int) -> str:
    """What torch.set_float32_matmul_precision gets for fp32 products of a model `width` wide: a fixed rule.

    `medium` lets a CPU multiply by oneDNN instead of MKL, which is still fp32 where the CPU has no AMX (with AMX it
    would be bf16), faster with AVX-512 and slower on narrow models. Everywhere else `highest`.
    """
    if device.type != "cpu" or torch.cpu._is_amx_tile_supported():
        return "highest"
    return "medium" if torch.backends.cpu.get_cpu_capability() == "AVX512" and width >= WIDE else "highest"
