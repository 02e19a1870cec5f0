"""Training steps of other libraries at the same shape: what a rival of ours is timed against."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from ropelab.bench.timing import VOCAB
from ropelab.schema import Config

PEERS = {"transformers GPT-2": "transformers", "x-transformers": "x_transformers"}  # by the module that they need


def missing() -> list[str]:
    """The packages of peers that are not installed."""
    return [module for module in PEERS.values() if importlib.util.find_spec(module) is None]


def peer_step(name: str, config: Config, windows: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """A training step: windows (B, ctx + 1), products in `dtype` by autocast, AdamW, clipping; else the peer's default.

    Both use torch's fused attention. GPT-2 has learned positions and dropout 0.1, x-transformers rotary positions.
    """
    build = _gpt2 if name == "transformers GPT-2" else _x_transformers
    model, loss_of = build(config, windows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    kind = windows.device.type

    def step() -> None:
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_of()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _gpt2(config: Config, windows: Tensor) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    import transformers

    transformers.logging.set_verbosity_error()
    shape = config.model
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB, n_positions=config.train.ctx, n_embd=shape.d_model, n_layer=shape.n_layer,
            n_head=shape.n_head, bos_token_id=None, eos_token_id=None,
        )
    ).to(windows.device).train()  # fmt: skip
    inputs = windows[:, :-1]
    return model, lambda: model(inputs, labels=inputs).loss


def _x_transformers(config: Config, windows: Tensor) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    shape = config.model
    decoder = Decoder(
        dim=shape.d_model, depth=shape.n_layer, heads=shape.n_head, attn_dim_head=shape.d_head, rotary_pos_emb=True,
        attn_flash=True,
    )  # fmt: skip
    inner = TransformerWrapper(num_tokens=VOCAB, max_seq_len=config.train.ctx, attn_layers=decoder, tie_embedding=True)
    model = AutoregressiveWrapper(inner).to(windows.device).train()
    return model, lambda: model(windows)
