"""`ropelab bench train`: whole training steps, of every encoding and of other libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ropelab import devices, training
from ropelab.bench.ours import VOCAB, Training, same_batch, training_steps, turn_of, with_encodings
from ropelab.bench.peers import PEERS, missing, peer
from ropelab.bench.timing import MB, best, machine, peak_mb, peak_of, reset_peak, square_product, synchroniser
from ropelab.config import Config
from ropelab.devices import matmul_precision, resolve_dtype

# the shape that is compared with peers unless the command line says otherwise
SHAPE = ("model.n_layer=4", "model.d_model=256", "model.n_head=4", "train.ctx=256", "train.batch_size=8")
CONVENTION = "6 N + 12 L d T, all pairs of tokens (PaLM, nanoGPT); N: weights but those of the encoding"
DEFAULT = "highest"  # torch's own precision of fp32 products, which the peers leave alone


def flops_per_token(config: Config, params: int) -> int:
    """Training FLOPs of a token as PaLM (Chowdhery et al. 2022, appendix B) and nanoGPT count them: 6 N + 12 L d T.

    `params` N are the weights that tokens are multiplied with, the tied head once.
    """
    return 6 * params + 12 * config.model.n_layer * config.model.d_model * config.train.ctx


def causal_flops_per_token(config: Config, params: int) -> int:
    """The same with the half of the pairs that a causal model needs: 6 N + 6 L d T."""
    return 6 * params + 6 * config.model.n_layer * config.model.d_model * config.train.ctx


def train(config: Config, *, methods: Sequence[str], peers: bool, rounds: int, vocab: int = VOCAB) -> dict[str, Any]:
    """Whole training steps of each encoding of `methods`, interleaved, and with `peers` of other libraries.

    The figures of the contract are those of the first encoding. Peers are timed as they come (fp32, torch's default
    precision of products) and, where ropelab is not so, in its dtype and precision; ropelab then also in fp32. Peers
    that are not installed are left out. `ValueError` for an encoding that does not exist or cannot be trained so.
    """
    device = devices.resolve_device(config.device)
    dtype = resolve_dtype(config.train.dtype, device)
    precision = matmul_precision(device, config.model.d_model)
    synchronise, at_rest = synchroniser(device), reset_peak(device)
    ours: dict[str, Training] = {}
    contestants: dict[str, Callable[[], object]] = {}
    for other in with_encodings(config, methods):
        name = other.pos.name
        ours[name] = training_steps(other, dtype, vocab)
        contestants[name] = _under(precision, ours[name].turn)
    first = ours[methods[0]]
    if peers and dtype != torch.float32:
        own = with_encodings(config, methods[:1])[0]
        contestants["fp32"] = _under(precision, training_steps(own, torch.float32, vocab).turn)
    windows = torch.from_numpy(same_batch(config, vocab)(1)).to(device)
    names = [name for name, module in PEERS.items() if peers and module not in missing()]
    alike = dtype == torch.float32 and precision == DEFAULT
    sizes: dict[str, int] = {}
    for name in names:
        as_it_comes = peer(name, config, windows, vocab, torch.float32)
        sizes[name] = sum(p.numel() for p in as_it_comes.model.parameters())
        contestants[name] = _under(DEFAULT, as_it_comes.turn)
        if not alike:
            contestants[f"{name} alike"] = _under(precision, peer(name, config, windows, vocab, dtype).turn)
    product, product_flops = square_product(device, dtype)
    contestants["product"] = _under(precision, product)
    seconds = best(contestants, rounds=rounds, synchronise=synchronise)

    tokens = turn_of(device) * config.train.batch_size * config.train.ctx
    speed = {name: tokens / value for name, value in seconds.items()}
    mine, rate = speed[methods[0]], product_flops / seconds["product"]
    params = first.model.n_parameters()
    counted = params - sum(p.numel() for p in first.model.encoding.parameters())
    flops, causal, peak = flops_per_token(config, counted), causal_flops_per_token(config, counted), peak_of(device)
    memory = {name: _memory_mb(one, device) for name, one in ours.items()}
    kernels = {name: training.training_kernel(one.model, config.train.ctx, dtype) for name, one in ours.items()}
    on_cuda = device.type == "cuda"
    return {
        "tokens_per_s": mine,
        "params": params,
        "flops_per_token": flops,
        "flops_convention": CONVENTION,
        "causal_flops_per_token": causal,
        "mfu": None if peak is None else mine * flops / peak,
        "matmul_flops_per_s": rate,
        "share_of_matmul": mine * causal / rate,  # only what a causal model needs counts as done
        "peak_mb": memory[methods[0]] if on_cuda else peak_mb(device) - at_rest,
        "peak_of": "weights, moments and one step" if on_cuda else "growth of this process, all contestants together",
        **machine(device),
        "dtype": devices.DTYPE_NAMES[dtype],
        "matmul_precision": precision,
        "compiled": training.compiles(config.train, device),
        "attention_backend": kernels[methods[0]],
        "pos": methods[0],
        "shape": {
            "n_layer": config.model.n_layer, "d_model": config.model.d_model, "n_head": config.model.n_head,
            "ctx": config.train.ctx, "batch_size": config.train.batch_size, "vocab": vocab,
        },
        "fp32_tokens_per_s": mine if dtype == torch.float32 else speed.get("fp32"),
        "peers": {
            name: {
                "tokens_per_s": speed[name],
                "ratio": mine / speed[name],
                "equal_dtype_tokens_per_s": speed[name if alike else f"{name} alike"],
                "equal_dtype_ratio": mine / speed[name if alike else f"{name} alike"],
                "params": sizes[name],
            }
            for name in names
        },
        "peers_missing": missing() if peers else [],
        "peers_compiled": False,
        "methods": [
            {
                "pos": name, "kernel": kernels[name], "tokens_per_s": speed[name], "ratio": speed[name] / mine,
                "peak_mb": memory[name],
            }
            for name in ours
        ],
    }  # fmt: skip


def _under(precision: str, turn: Callable[[], object]) -> Callable[[], object]:
    """The turn with fp32 products of that precision: the setting is the whole process's, and each sets its own."""

    def call() -> None:
        torch.set_float32_matmul_precision(precision)
        turn()

    return call


def _memory_mb(one: Training, device: torch.device) -> float | None:
    """What a training takes on a GPU: its weights and moments, and the peak of its steps above what lies there."""
    if device.type != "cuda":
        return None
    at_rest = torch.cuda.memory_allocated(device) / MB
    reset_peak(device)
    one.turn()
    return peak_mb(device) - at_rest + one.held_bytes() / MB
