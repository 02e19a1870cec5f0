"""Training steps of other libraries at the same shape, each as its own documentation trains."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ropelab.bench.ours import turn_of
from ropelab.config import Config

PEERS = {  # name -> the module that it needs
    "transformers GPT-2": "transformers",  # learned positions, dropout 0.1, SDPA
    "x-transformers": "x_transformers",  # rotary positions, scores in full
    "x-transformers, flash": "x_transformers",  # the same with attn_flash=True, which is SDPA
}


class Peer(NamedTuple):
    model: nn.Module
    turn: Callable[[], None]


def missing() -> list[str]:
    """The packages of peers that are not installed."""
    return [module for module in dict.fromkeys(PEERS.values()) if importlib.util.find_spec(module) is None]


def peer(name: str, config: Config, windows: Tensor, vocab: int, dtype: torch.dtype) -> Peer:
    """A turn of training steps on windows (B, ctx + 1): torch's fused AdamW, clipping; products in `dtype` by autocast.

    Weights are fp32, nothing is compiled, and the head is tied to the tokens, as in ropelab.
    """
    if name == "transformers GPT-2":
        model, loss_of = _gpt2(config, windows, vocab)
    else:
        model, loss_of = _x_transformers(config, windows, vocab, flash=name.endswith("flash"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=windows.device.type in ("cpu", "cuda"))
    kind = windows.device.type

    def turn() -> None:
        for _ in range(turn_of(windows.device)):
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return Peer(model, turn)


def _gpt2(config: Config, windows: Tensor, vocab: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    import transformers

    transformers.logging.set_verbosity_error()  # its remarks about its own defaults are not for whoever times it
    shape = config.model
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocab, n_positions=config.train.ctx, n_embd=shape.d_model, n_layer=shape.n_layer,
            n_head=shape.n_head, bos_token_id=None, eos_token_id=None,
        )
    ).to(windows.device).train()  # fmt: skip
    inputs = windows[:, :-1]
    return model, lambda: model(inputs, labels=inputs).loss


def _x_transformers(
    config: Config, windows: Tensor, vocab: int, *, flash: bool
) -> tuple[nn.Module, Callable[[], Tensor]]:
    from loguru import logger
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    logger.disable("x_transformers")  # advice about the shape, which is given
    shape = config.model
    layers = Decoder(
        dim=shape.d_model, depth=shape.n_layer, heads=shape.n_head, attn_dim_head=shape.d_head, rotary_pos_emb=True,
        attn_flash=flash,
    )  # fmt: skip
    inner = TransformerWrapper(num_tokens=vocab, max_seq_len=config.train.ctx, attn_layers=layers, tie_embedding=True)
    model = AutoregressiveWrapper(inner).to(windows.device).train()
    return model, lambda: model(windows)
