"""`ropelab bench train`: whole training steps, of every encoding and of other libraries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ropelab import config as configs
from ropelab import experiment
from ropelab.bench import peers as others
from ropelab.bench.timing import PEAK_FLOPS, VOCAB, best, machine, matmul_flops, peak_mb, synchroniser
from ropelab.schema import Config, TrainConfig
from ropelab.training import build_optimizer, matmul_precision, resolve_dtype, steps

# the shape that is compared with peers unless the command line says otherwise
SHAPE = ("model.n_layer=4", "model.d_model=256", "model.n_head=4", "train.ctx=256", "train.batch_size=8")


def flops_per_token(config: Config, params: int) -> int:
    """Training FLOPs of a token as PaLM and nanoGPT count them: 6 N + 12 L C T, all pairs of tokens (2204.02311, B)."""
    return 6 * params + 12 * config.model.n_layer * config.model.d_model * config.train.ctx


def causal_flops_per_token(config: Config, params: int) -> int:
    """The same with the causal half of the pairs: 6 N + 6 L C T."""
    return 6 * params + 6 * config.model.n_layer * config.model.d_model * config.train.ctx


def train(config: Config, *, methods: Sequence[str], peers: bool, rounds: int, vocab: int = VOCAB) -> dict[str, Any]:
    """Whole training steps of each encoding of `methods`, interleaved, and with `peers` of other libraries.

    The first method carries the figures of the contract. Peers are timed at their default, which is fp32, and in the
    dtype of ropelab. `ValueError` where a method does not exist.
    """
    device = experiment.resolve_device(config.device)
    dtype = resolve_dtype(config.train.dtype, device)
    torch.set_float32_matmul_precision(matmul_precision(device, config.model.d_model))
    batch, ctx = config.train.batch_size, config.train.ctx
    windows = np.random.default_rng(0).integers(0, 256, (batch, ctx + 1))
    contestants: dict[str, Callable[[], None]] = {}
    kernels: dict[str, str] = {}
    params = 0
    for name in methods:
        model, step = _ours(dataclasses.replace(config, pos=configs.load([f"pos={name}"]).pos), windows, dtype, vocab)
        contestants[name] = step
        kernels[name] = experiment.training_kernel(model, ctx, dtype)
        params = params or model.n_parameters()
    if dtype != torch.float32:
        contestants["fp32"] = _ours(config, windows, torch.float32, vocab)[1]
    names = [name for name, module in others.PEERS.items() if peers and module not in others.missing()]
    on_device = torch.from_numpy(windows).to(device)
    for name in names:
        contestants[name] = others.peer_step(name, config, on_device, torch.float32)
        if dtype != torch.float32:
            contestants[f"{name} in {experiment.DTYPE_NAMES[dtype]}"] = others.peer_step(name, config, on_device, dtype)
    synchronise = synchroniser(device)
    seconds = best(contestants, rounds=rounds, synchronise=synchronise)
    speed = {name: batch * ctx / value for name, value in seconds.items()}
    first = speed[methods[0]]
    flops, causal = flops_per_token(config, params), causal_flops_per_token(config, params)
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in experiment.device_name(device)), None)
    floor = matmul_flops(device, dtype, synchronise)
    return {
        "tokens_per_s": first,
        "params": params,
        "flops_per_token": flops,
        "flops_convention": "6 N + 12 L C T",
        "causal_flops_per_token": causal,
        "mfu": None if peak is None else first * flops / peak,
        "matmul_flops_per_s": floor,
        "share_of_matmul": first * causal / floor,
        "peak_mb": peak_mb(device),
        **machine(device),
        "dtype": experiment.DTYPE_NAMES[dtype],
        "compiled": experiment.compiles(config.train, device),
        "attention_backend": kernels[methods[0]],
        "pos": methods[0],
        "shape": {
            "n_layer": config.model.n_layer, "d_model": config.model.d_model, "n_head": config.model.n_head,
            "ctx": ctx, "batch_size": batch, "vocab": vocab,
        },
        "fp32_tokens_per_s": speed.get("fp32", first),
        "peers": {
            name: {
                "tokens_per_s": speed[name],
                "ratio": first / speed[name],
                "equal_dtype_ratio": first / speed.get(f"{name} in {experiment.DTYPE_NAMES[dtype]}", speed[name]),
            }
            for name in names
        },
        "methods": [
            {"pos": name, "kernel": kernels[name], "tokens_per_s": speed[name], "ratio": speed[name] / first}
            for name in methods
        ],
    }  # fmt: skip


def _ours(config: Config, windows: Any, dtype: torch.dtype, vocab: int) -> tuple[Any, Callable[[], None]]:
    device = experiment.resolve_device(config.device)
    scaling = experiment.training_scaling(config, config.train.ctx)
    model = experiment.build_model(config, vocab, scaling=scaling, original_ctx=config.train.ctx).to(device)
    if experiment.compiles(config.train, device):
        experiment.compile_blocks(model, cache_dir=config.cache_dir)
    going = steps(
        model, build_optimizer(model, config.train), lambda step: windows, endless(config), start=0, dtype=dtype,
        unread=1,
    )  # fmt: skip
    return model, lambda: (next(going), None)[1]


def endless(config: Config) -> TrainConfig:
    """The recipe with more steps than anyone times, at one rate from the start."""
    return dataclasses.replace(config.train, steps=10**6, warmup_steps=0)
