"""ropelab's own models and training steps on random tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ropelab import config as configs
from ropelab import devices, runs, training
from ropelab.config import Config, TrainConfig
from ropelab.model import GPT
from ropelab.training import Step, build_optimizer, steps

VOCAB = 257  # bytes and the separator
TURN = {"cuda": 8}  # training steps of one turn; elsewhere 1. On a GPU steps are launched while earlier ones run


class Training(NamedTuple):
    """A model that is trained by taking from `going`; always the same batch."""

    model: GPT
    optimizer: torch.optim.AdamW
    going: Iterator[Step]

    def turn(self) -> None:
        """The training steps of one turn."""
        for _ in range(turn_of(self.model.tokens.weight.device)):
            next(self.going)

    def held_bytes(self) -> int:
        """Weights and moments; between two steps there are no gradients."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(x.numel() * x.element_size() for x in (*self.model.parameters(), *moments))


def turn_of(device: torch.device) -> int:
    return TURN.get(device.type, 1)


def with_encodings(config: Config, names: Sequence[str]) -> list[Config]:
    """The configuration with each of these encodings; its own keeps the parameters that it has there."""
    own = config.pos.name
    return [
        config if name == own else dataclasses.replace(config, pos=configs.load([f"pos={name}"]).pos) for name in names
    ]


def model_of(config: Config, vocab: int = VOCAB) -> GPT:
    """A model with freshly drawn weights on the device of the configuration."""
    if config.positions.name != "contiguous":
        raise ValueError(f"bench times contiguous positions; leave out positions={config.positions.name}")
    scaling = training.training_scaling(config, config.train.ctx)
    model = runs.build_model(config, vocab, scaling=scaling, original_ctx=config.train.ctx)
    return model.to(devices.resolve_device(config.device))


def training_steps(
    config: Config, dtype: torch.dtype, vocab: int = VOCAB, *, max_in_flight: int | None = None
) -> Training:
    """Training steps as `ropelab train` takes them, compiled where it compiles.

    The losses of `max_in_flight` steps are read at once, those of a turn by default.
    """
    model = model_of(config, vocab)
    device = model.tokens.weight.device
    if training.compiles(config.train, device):
        compile_many()
        training.compile_blocks(model)
    optimizer = build_optimizer(model, config.train)
    batch = same_batch(config, vocab)
    going = steps(
        model, optimizer, batch, endless(config), start=0, dtype=dtype, max_in_flight=max_in_flight or turn_of(device)
    )
    return Training(model, optimizer, going)


def same_batch(config: Config, vocab: int = VOCAB) -> Callable[[int], NDArray[np.int64]]:
    """step -> windows (batch_size, ctx + 1) of random tokens, the same at every step and without a separator."""
    shape = config.train.batch_size, config.train.ctx + 1
    windows = np.random.default_rng(config.seed).integers(0, vocab - 1, shape)
    return lambda step: windows


def endless(config: Config) -> TrainConfig:
    """The recipe with more steps than anyone times, at one rate from the start."""
    return dataclasses.replace(config.train, steps=10**6, warmup_steps=0)


def compile_many() -> None:
    """Let one process compile the blocks of every encoding: beyond 8 torch would go on without, and say so in a log."""
    torch._dynamo.config.recompile_limit = 64
