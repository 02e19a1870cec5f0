"""Which attention kernel trains, and when and how the blocks are compiled."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from ropelab.config import TrainConfig
from ropelab.model import GPT


def training_kernel(model: GPT, ctx: int, dtype: torch.dtype) -> str:
    """The attention kernel of a training step."""
    device = model.tokens.weight.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model.train().prepare(ctx).attend.kernel


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Are the blocks compiled: as `train.compile` says, else on CUDA."""
    return device.type == "cuda" if config.compile is None else config.compile


def compile_blocks(model: GPT, *, parallel: str | None = None) -> None:
    """Compile each block in place: names of the parameters stay, and identical blocks share one compilation.

    What is compiled is kept for the next run: where TORCHINDUCTOR_CACHE_DIR says, else in a folder that is this user's
    alone, as torch reads pickles there. The cache of corpora may be shared.
    `parallel`: ddp or fsdp, of a model that is spread over ranks already.
    """
    private = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ropelab-compiled"
    with suppress(OSError):  # a home that cannot be written: torch has a place of its own
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
        private.chmod(0o700)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(private))
    if parallel == "ddp":
        # a block is smaller than a bucket of gradients: there is nothing to split a compiled one for
        torch._dynamo.config.optimize_ddp = False
    for block in model.blocks:
        if parallel == "fsdp":  # what gathers the block's weights stays outside of what is compiled
            block.forward = torch.compile(block.forward, dynamic=False)
        else:
            block.compile(dynamic=False)
