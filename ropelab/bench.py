"""Speed, measured where it is claimed: training steps, long evaluations, attention kernels.

Rivals are timed in the same process, turn by turn, and the best round of each counts: on a shared machine only ratios
are worth reporting. Text is random bytes; nothing is read or written.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ropelab import experiment
from ropelab.attention import Attend, Bias
from ropelab.schema import Config
from ropelab.training import build_optimizer, resolve_dtype, steps

VOCAB = 257  # bytes and the separator
# the shape that is compared with peers unless the command line says otherwise
TRAIN_SHAPE = ("model.n_layer=4", "model.d_model=256", "model.n_head=4", "train.ctx=256", "train.batch_size=8")
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16, NVIDIA data sheets


def flops_per_token(config: Config, params: int) -> int:
    """Training FLOPs of a token: 6 N + 6 L C T, the causal half of the scores counted (Chowdhery et al. 2022, B)."""
    return 6 * params + 6 * config.model.n_layer * config.model.d_model * config.train.ctx


def _best(
    contestants: dict[str, Callable[[], None]], *, rounds: int, synchronise: Callable[[], None]
) -> dict[str, float]:
    """Least seconds of one call of each, over interleaved rounds; the first round warms up and is thrown away."""
    best = dict.fromkeys(contestants, math.inf)
    for turn in range(rounds + 1):
        for name, call in contestants.items():
            synchronise()
            began = time.perf_counter()
            call()
            synchronise()
            if turn:
                best[name] = min(best[name], time.perf_counter() - began)
    return best


def _synchroniser(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def train(config: Config, *, peers: bool, rounds: int) -> dict[str, Any]:
    """Whole training steps of this configuration and, with `peers`, of GPT-2 as transformers trains it by default."""
    device = experiment.resolve_device(config.device)
    dtype = resolve_dtype(config.train.dtype, device)
    scaling = experiment.training_scaling(config, config.train.ctx)
    model = experiment.build_model(config, VOCAB, scaling=scaling, original_ctx=config.train.ctx).to(device)
    optimizer = build_optimizer(model, config.train)
    batch, ctx = config.train.batch_size, config.train.ctx
    windows = np.random.default_rng(0).integers(0, 256, (batch, ctx + 1))
    if config.train.compile:
        for block in model.blocks:
            block.compile()
    ours = steps(model, optimizer, lambda step: windows, _endless(config), start=0, dtype=dtype)
    contestants: dict[str, Callable[[], None]] = {"ropelab": lambda: (next(ours), None)[1]}
    if peers:
        if importlib.util.find_spec("transformers") is None:
            raise ValueError("peers are compared with transformers, which is not installed; pip install transformers")
        contestants["transformers GPT-2"] = _gpt2(config, torch.from_numpy(windows).to(device))
    seconds = _best(contestants, rounds=rounds, synchronise=_synchroniser(device))
    speed = {name: batch * ctx / value for name, value in seconds.items()}
    params = model.n_parameters()
    flops = flops_per_token(config, params)
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in experiment.device_name(device)), None)
    return {
        "tokens_per_s": speed["ropelab"],
        "params": params,
        "flops_per_token": flops,
        "mfu": None if peak is None else speed["ropelab"] * flops / peak,
        "device": experiment.device_name(device),
        "dtype": experiment.DTYPE_NAMES[dtype],
        "attention_backend": model.train().prepare(ctx).attend.kernel,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "pos": config.pos.name,
        "shape": {
            "n_layer": config.model.n_layer, "d_model": config.model.d_model, "n_head": config.model.n_head,
            "ctx": ctx, "batch_size": batch, "vocab": VOCAB,
        },
        "peers": {
            name: {"tokens_per_s": value, "ratio": speed["ropelab"] / value}
            for name, value in speed.items() if name != "ropelab"
        },
    }  # fmt: skip


def _endless(config: Config) -> Any:
    import dataclasses

    return dataclasses.replace(config.train, steps=10**6, warmup_steps=0)


def _gpt2(config: Config, windows: Tensor) -> Callable[[], None]:
    """A training step of transformers' GPT-2 at the same shape, at its defaults: fp32, SDPA, torch's AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = config.model
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_positions=config.train.ctx, n_embd=shape.d_model, n_layer=shape.n_layer,
            n_head=shape.n_head, bos_token_id=None, eos_token_id=None,
        )
    ).to(windows.device)  # fmt: skip
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs = windows[:, :-1]

    def step() -> None:
        model(inputs, labels=inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def evaluation(config: Config, *, contexts: tuple[int, ...], names: tuple[str, ...]) -> dict[str, Any]:
    """Time and extra peak memory of one forward pass with losses at each ctx, each in a fresh process."""
    rows: list[dict[str, Any]] = []
    for ctx in contexts:
        for name in names:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, extra = pool.apply(_evaluation_cost, (config, name, ctx))
            rows.append({"pos": name, "ctx": ctx, "seconds": seconds, "extra_mb": extra})
    first = {row["ctx"]: row for row in rows if row["pos"] == names[0]}
    for row in rows:
        row["seconds_ratio"] = row["seconds"] / first[row["ctx"]]["seconds"]
        row["memory_ratio"] = row["extra_mb"] / first[row["ctx"]]["extra_mb"]
    device = experiment.resolve_device(config.device)
    return {"device": experiment.device_name(device), "dtype": "fp32", "threads": torch.get_num_threads(), "rows": rows}


def _evaluation_cost(config: Config, name: str, ctx: int) -> tuple[float, float]:
    """(seconds, MB above the model at rest) of a forward pass at ctx."""
    import dataclasses

    from ropelab.config import load

    device = experiment.resolve_device(config.device)
    other = dataclasses.replace(config, pos=load([f"pos={name}"]).pos)
    model = experiment.build_model(other, VOCAB, scaling=experiment.NO_SCALING, original_ctx=config.train.ctx)
    model.to(device).eval()
    model.progress(1.0)
    scorer = experiment.scorer_of(model, window=None, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, 256, (1, ctx + 1))
    scorer(tokens[:, :65], tokens[:, 2:66])  # libraries load their kernels on the first call
    before = _peak_mb(device)
    began = time.perf_counter()
    scorer(tokens[:, :-1], tokens[:, 1:])
    return time.perf_counter() - began, _peak_mb(device) - before


def _peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:  # of this process alone: ru_maxrss starts at what the parent held when it forked
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 2**10
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _discard(call: Callable[..., object], *arguments: object) -> None:
    call(*arguments)


def attention(config: Config, *, contexts: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Forward seconds of each kernel at each length, without and with a bias by distance; batch 1, fp32."""
    device = experiment.resolve_device(config.device)
    heads, d_head = config.model.n_head, config.model.d_head
    rows = []
    for ctx in contexts:
        q, k, v = torch.randn(3, 1, heads, ctx, d_head, device=device).unbind(0)
        bias = -torch.rand(heads, 1, device=device) * torch.arange(ctx, device=device)
        calls: dict[str, Callable[[], None]] = {}
        for label, by_distance, kernels in (("none", None, ("sdpa",)), ("by distance", bias, ("blocks",))):
            for kernel in (*kernels, *(("materialised",) if ctx <= 2048 else ())):
                attend = Attend(ctx, bias=Bias(by_distance), device=device, training=False, kernel=kernel)
                calls[f"{kernel} {label}"] = functools.partial(_discard, attend, q, k, v)
        with torch.no_grad():
            seconds = _best(calls, rounds=rounds, synchronise=_synchroniser(device))
        plain = seconds["sdpa none"]
        for name, value in seconds.items():
            kernel, _, label = name.partition(" ")
            rows.append({"ctx": ctx, "kernel": kernel, "bias": label, "seconds": value, "ratio": value / plain})
    return {"device": experiment.device_name(device), "n_head": heads, "d_head": d_head, "rows": rows}
