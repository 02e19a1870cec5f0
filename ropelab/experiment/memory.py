"""How much memory an evaluation takes, known before it starts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ropelab.model import pass_bytes
from ropelab.positions import PositionEncoding
from ropelab.schema import ContextLengthError, ModelConfig

GB = 10**9
CGROUP = Path("/sys/fs/cgroup")  # of version 2, as seen from inside a container or a job


class Plan(NamedTuple):
    """How an evaluation goes through its windows."""

    windows: dict[int, int]  # ctx -> windows of one pass; nothing for a ctx at which the encoding is undefined
    longest: int  # tokens of the largest pass
    needed: int  # bytes that it takes beside the weights, an upper bound
    free: int | None  # bytes that it may take; None: unknown

    def __str__(self) -> str:
        free = "free memory unknown" if self.free is None else f"{self.free / GB:.3g} GB may be taken"
        return f"memory: up to {self.needed / GB:.2g} GB beside the weights, {self.longest} tokens at a time; {free}"


def plan(
    config: ModelConfig,
    n_vocab: int,
    encodings: Mapping[int, PositionEncoding],
    device: torch.device,
    *,
    limit_gb: float | None,
) -> Plan:
    """The passes of an evaluation of a GPT at the lengths of `encodings`; `ValueError` as `fit`."""
    known: dict[int, Callable[[int], int]] = {}
    for ctx, encoding in encodings.items():
        try:
            with torch.no_grad():
                far = encoding(torch.arange(ctx), ctx=ctx).far is not None
        except ContextLengthError:
            continue

        def needed(tokens: int, far: bool = far) -> int:
            return pass_bytes(config, n_vocab, tokens, device, far=far)

        known[ctx] = needed
    return fit(known, device, limit_gb=limit_gb)


def fit(
    known: Mapping[int, Callable[[int], int]], device: torch.device, *, limit_gb: float | None, weights: int = 0
) -> Plan:
    """Passes within what is free and within `limit_gb`; `known`: by ctx, the bytes that a pass over n tokens takes.

    `weights`: bytes of those that are not on the device yet. `ValueError` where one window does not fit, with the
    length that would: a shorter average is never taken instead.
    """
    free = free_bytes(device)
    if free is not None and weights > free:
        raise ValueError(
            f"the weights take {weights / GB:.3g} GB and {free / GB:.3g} GB are free on {device.type}; use "
            "eval.dtype=bf16, or a machine with more memory"
        )
    free = None if free is None else free - weights
    if limit_gb is not None:
        free = int(limit_gb * GB) if free is None else min(free, int(limit_gb * GB))
    windows: dict[int, int] = {}
    longest, most = 0, 0
    for ctx, needed in known.items():
        rows = max(1, pass_tokens(device) // ctx)
        if free is not None:
            while rows > 1 and needed(rows * ctx) > free:
                rows //= 2
            if needed(rows * ctx) > free:
                fits = next((n for n in (2**k for k in range(ctx.bit_length(), 0, -1)) if needed(n) <= free), None)
                raise ValueError(
                    f"a pass over {ctx} tokens takes {needed(ctx) / GB:.3g} GB beside the weights, and "
                    f"{free / GB:.3g} GB may be taken; use "
                    + (f"--ctx {fits} or less, or " if fits else "")
                    + ("more eval.memory_gb" if limit_gb is not None else "a machine with more memory")
                )
        windows[ctx] = rows
        longest, most = max(longest, rows * ctx), max(most, needed(rows * ctx))
    return Plan(windows, longest, most, free)


def pass_tokens(device: torch.device) -> int:
    """Tokens of one forward pass: enough to fill the device, little enough to stay in cache on a CPU."""
    return 4096 if device.type == "cpu" else 131072


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process can still take on the device; None where nobody says."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    if device.type != "cpu":
        return None
    known: list[int] = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        known.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))))
    with contextlib.suppress(OSError, ValueError, KeyError):  # `max` where there is no limit
        limit = int((CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        # files that were read are kept in memory for as long as nobody wants it
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        known.append(limit - used + int(stat["inactive_file"]) + int(stat["active_file"]))
    return max(0, min(known)) if known else None
