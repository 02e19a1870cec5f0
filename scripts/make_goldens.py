"""Write tests/goldens/*.json: numbers of other people's code, with the versions that they came from.

    python scripts/make_goldens.py

Needs transformers and x-transformers. transformers computes frequencies in fp32; here its functions run in fp64, so
that a comparison shows a difference of formulas and not its rounding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent.parent / "tests" / "goldens"
# (L, base); the last is beyond L = 2 pi base, where the end of yarn's index ramp lies past the last pair
LENGTHS = (64, 100.0), (2048, 1e4), (131072, 5e5), (131072, 1e4)
RESCALE = [1 + 0.5 * i for i in range(16)]  # of longrope: one factor for each pair of a head dimension of 32
SHORT = [1 + 0.01 * i for i in range(16)]
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "linear": [{"factor": 4.0}],
    "dynamic": [{"factor": 1.0}, {"factor": 2.0}],
    "yarn": [
        {"factor": 8.0},
        {"factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        {"factor": 8.0, "attention_factor": 1.5},
    ],
    "llama3": [{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}],
    "longrope": [{"factor": 8.0, "long_factor": RESCALE, "short_factor": SHORT}],
    "proportional": [{"factor": 1.0, "partial_rotary_factor": 0.25}, {"factor": 2.0, "partial_rotary_factor": 0.75}],
}
DISTANCES = (*range(301), 500, 1000, 4096, 131071)


class _Wide(Tensor):
    def float(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.double()


class _TorchInDouble:
    """The torch module with `float` meaning fp64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def arange(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.arange(*args, **kwargs).as_subclass(_Wide)


def in_double(function: Callable[..., tuple[Tensor, float]], *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
    """(inv_freq fp64, attention factor) of one of transformers' functions, with its fp32 tensors in fp64."""
    module = function.__globals__
    module["torch"] = _TorchInDouble()
    try:
        inv_freq, attention_factor = function(*args, **kwargs)
    finally:
        module["torch"] = torch
    return inv_freq.as_subclass(Tensor), attention_factor


def llama(kind: str, d_head: int, base: float, original_ctx: int, **parameters: Any) -> Any:
    """A configuration of transformers with one rotary type."""
    from transformers import LlamaConfig
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns of a maximum that is not above the original; dynamic reads it as that
    config = LlamaConfig(
        hidden_size=2 * d_head,
        num_attention_heads=2,
        head_dim=d_head,
        max_position_embeddings=original_ctx,
        rope_parameters={"rope_type": kind, "rope_theta": base, **parameters},
    )
    config.standardize_rope_params()
    return config


def scalings() -> list[dict[str, Any]]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    d_head, rows = 32, []
    for kind in ROPE_INIT_FUNCTIONS:
        for parameters in SETTINGS[kind]:
            for original_ctx, base in LENGTHS:
                for ctx in (original_ctx, 3 * original_ctx) if kind in ("dynamic", "longrope") else (original_ctx,):
                    config = llama(
                        kind, d_head, base, original_ctx, original_max_position_embeddings=original_ctx, **parameters
                    )
                    inv_freq, attention = in_double(ROPE_INIT_FUNCTIONS[kind], config, torch.device("cpu"), seq_len=ctx)
                    rows.append(
                        {
                            "type": kind,
                            "parameters": parameters,
                            "d_head": d_head,
                            "base": base,
                            "original_ctx": original_ctx,
                            "ctx": ctx,
                            "inv_freq": rounded(inv_freq.tolist()),
                            "attention_factor": attention,
                        }
                    )
    return rows


def t5_buckets() -> list[int]:
    from transformers.models.t5.modeling_t5 import T5Attention

    back = -torch.tensor(DISTANCES)
    found: list[int] = T5Attention._relative_position_bucket(
        back, bidirectional=False, num_buckets=32, max_distance=128
    ).tolist()
    return found


def alibi_slopes() -> dict[str, list[float]]:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    # slope x key index: what stands at key 1
    return {
        str(heads): rounded(build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1].tolist())
        for heads in range(1, 17)
    }


def xpos() -> dict[str, Any]:
    """For pairs of positions (m, n): what multiplies q and k of a pair of dimensions with q = k, zeta^(m-n) cos."""
    from x_transformers import x_transformers

    d_head, length, at = 16, 2048, [(5, 5), (9, 2), (700, 100), (2047, 0)]
    x_transformers.arange = _TorchInDouble().arange  # its tables in fp64 too
    torch.set_default_dtype(torch.float64)
    try:
        rotary = x_transformers.RotaryEmbedding(d_head, use_xpos=True, scale_base=512)
        angles, scale = rotary(torch.arange(length, dtype=torch.float64))  # (1, T, D) each, pairs side by side
    finally:
        torch.set_default_dtype(torch.float32)
        x_transformers.arange = torch.arange
    angles, scale = angles.as_subclass(Tensor), scale.as_subclass(Tensor)
    assert angles.dtype == scale.dtype == torch.float64
    angles, scale = angles[0, :, ::2], scale[0, :, ::2]  # (T, D/2)
    return {
        "d_head": d_head,
        "base": 10000.0,
        "scale_base": 512,
        "positions": at,
        "products": [rounded(((angles[m] - angles[n]).cos() * scale[m] / scale[n]).tolist()) for m, n in at],
    }


def rounded(numbers: Sequence[float]) -> list[float]:
    """Ten digits: more than fp32 holds."""
    return [0.0 if x == 0 else round(x, 9 - math.floor(math.log10(abs(x)))) for x in numbers]


def main() -> None:
    transformers = {"package": "transformers", "version": version("transformers")}
    x_transformers = {"package": "x-transformers", "version": version("x-transformers")}
    goldens = {
        "scalings": {**transformers, "rows": scalings()},
        "t5_buckets": {**transformers, "distances": list(DISTANCES), "buckets": t5_buckets()},
        "alibi_slopes": {**transformers, "slopes": alibi_slopes()},
        "xpos": {**x_transformers, **xpos()},
    }
    FOLDER.mkdir(exist_ok=True)
    for name, content in goldens.items():
        path = FOLDER / f"{name}.json"
        path.write_text(json.dumps(content, separators=(",", ":")).replace('{"type"', '\n{"type"') + "\n", "utf-8")
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
