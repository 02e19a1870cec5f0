"""What will be trained, decided and checked before a model exists or anything of the run is written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ropelab import data, files, runs
from ropelab.config import Config, DataConfig, Method, TrainConfig
from ropelab.data import Draw, drawn_positions
from ropelab.devices import device_of_rank
from ropelab.distributed import SINGLE, Ranks
from ropelab.evaluation import check_training
from ropelab.positions import ENCODINGS, Geometry, PositionEncoding
from ropelab.progress import Progress, silent
from ropelab.runs import OpenRun, RunDir
from ropelab.scalings import SCALINGS, build, make_scaling, resolve_factor
from ropelab.training.compiling import compiles
from ropelab.training.parent import check_weights, open_parent, steps_behind

PROBED = 2**20  # tokens up to which an encoding is tried here for a training on another machine
VALIDATION_TOKENS = 16384  # scored at every train.eval_every


@dataclasses.dataclass(frozen=True)
class TrainingWindows:
    """The windows of text that a training reads, addressed by its step."""

    batches: data.Batches
    draw: Draw | None  # how positions are drawn; None: they are 0 .. ctx - 1
    validation: NDArray[np.int64]  # (N, ctx + 1)
    seed: int
    batch_size: int
    first_step: int  # the steps of all ancestors: the batches come after theirs

    def batch_at(self, step: int) -> NDArray[np.int64]:
        """The windows of a step, (batch_size, ctx + 1)."""
        return self.batches.at(self.first_step + step, seed=self.seed, batch_size=self.batch_size)

    @property
    def positions_at(self) -> Callable[[int], NDArray[np.int64]] | None:
        """step -> the positions of its inputs, (batch_size, ctx); None: 0 .. ctx - 1 at every step."""
        draw = self.draw
        return None if draw is None else lambda step: draw(self.seed, self.first_step + step, self.batch_size)


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """A training that can be done: made by `plan_training`, the same on all ranks.

    It holds no model. The encoding was checked at train.ctx; the one model that is made of a plan takes it.
    """

    config: Config  # resolved: scaling with its factor, absolute paths of the text, the parent's name
    device: torch.device
    original_ctx: int
    parent: OpenRun | None
    encoding: PositionEncoding
    corpus: data.Corpus
    windows: TrainingWindows
    micro: int  # sequences in one forward pass of a rank
    identity: dict[str, Any]  # what changes the run's numbers
    run: RunDir

    @functools.cached_property
    def digest(self) -> str:
        """Of the identity."""
        return files.digest_of(self.identity)

    @functools.cached_property
    def keep(self) -> dict[int, float]:
        """The steps after which weights are kept, with their fraction of the training."""
        return steps_to_keep(self.config.train)

    @property
    def compiles(self) -> bool:
        """Are the blocks of the model compiled?"""
        return compiles(self.config.train, self.device)

    def sync_at(self, step: int) -> bool:
        """Is the model needed as this step leaves it?"""
        train = self.config.train
        return step in self.keep or 0 in (step % train.eval_every, step % train.checkpoint_every)

    def is_last(self, step: int) -> bool:
        return step == self.config.train.steps


def plan_training(
    config: Config, progress: Progress = silent, ranks: Ranks = SINGLE, *, elsewhere: bool = False
) -> TrainPlan:
    """On all ranks: the plan of a configuration. `ValueError` for one that cannot be trained; no run is written.

    The text is read and tokenised, once for all ranks. `elsewhere`: another machine will train, whose memory is not
    known here.
    """
    train = config.train
    device, micro = device_of_rank(config.device, ranks), rank_micro(train, ranks.world)
    steps_to_keep(train)
    parent = open_parent(config)
    original_ctx = train.ctx if parent is None else parent.original_ctx
    if ranks.world == 1:  # of a model in shards each rank holds a part
        check_training(config, device, original_ctx=original_ctx, elsewhere=elsewhere)
    # what cannot be built, or is undefined at train.ctx, is refused here rather than after the corpus was read
    geometry = Geometry.of(config.model, original_ctx)
    covering = resolve_factor(config.scaling, longest=train.ctx, original_ctx=original_ctx)
    encoding = build(config.pos, covering, geometry)
    if not elsewhere or train.ctx <= PROBED:
        with torch.no_grad():
            encoding(torch.arange(train.ctx), ctx=train.ctx)
    if parent is not None:
        check_weights(encoding, parent)
    scaling = training_scaling(config, original_ctx)
    if scaling != covering:  # by a factor between the powers of two
        encoding = build(config.pos, scaling, geometry)
    draw = training_positions(config, original_ctx, scaling)
    runs_dir = runs.check_runs_dir(config.runs_dir) if ranks.is_first else Path(config.runs_dir).expanduser()
    with ranks.first_then_others():
        corpus = data.prepare(
            config.data, cache_dir=Path(config.cache_dir).expanduser(),
            tokenizer=None if parent is None else parent.tokenizer, progress=progress,
        )  # fmt: skip
    separator = corpus.tokenizer.separator
    windows = TrainingWindows(
        batches=data.Batches(corpus.train, ctx=train.ctx, separator=separator), draw=draw,
        validation=data.Batches(corpus.validation, ctx=train.ctx, separator=separator).fixed(
            max(4, VALIDATION_TOKENS // train.ctx)
        ),
        seed=config.seed, batch_size=train.batch_size, first_step=0 if parent is None else steps_behind(parent),
    )  # fmt: skip
    resolved = dataclasses.replace(
        config, scaling=scaling, data=with_absolute_paths(config.data),
        parent=None if parent is None else parent.name,
    )  # fmt: skip
    identity = runs.identity_of(
        resolved, corpus_digest=corpus.digest, tokenizer_digest=corpus.tokenizer.digest,
        parent_digest=None if parent is None else parent.manifest["digest"],
    )  # fmt: skip
    run = RunDir(runs_dir / runs.run_name(resolved, files.digest_of(identity)))
    return TrainPlan(
        resolved, device, original_ctx, parent, encoding, corpus, windows, micro, identity, run
    )  # fmt: skip


def training_scaling(config: Config, original_ctx: int) -> Method:
    """The configuration's scaling with the factor that training uses: `auto` is train.ctx / original_ctx.

    `ValueError` for a scaling that would change nothing, or that belongs to evaluation.
    """
    scaling = config.scaling
    if scaling.name == "none":
        return scaling
    if SCALINGS[scaling.name].evaluation_only:
        raise ValueError(f"scaling={scaling.name} is for evaluation: train without it, then ropelab eval --scaling")
    if "factor" not in scaling.parameters:
        return scaling
    factor = scaling.parameters["factor"]
    dynamic = SCALINGS[scaling.name].dynamic
    if factor == "auto-row":
        raise ValueError("scaling.factor=auto-row belongs to evaluation; give scaling.factor a number")
    if factor == "auto":
        original_ctx = scaling.parameters.get("original_ctx") or original_ctx
        factor = 1.0 if dynamic else max(1.0, config.train.ctx / original_ctx)
    resolved = Method(scaling.name, {**scaling.parameters, "factor": float(factor)})
    if not dynamic and make_scaling(resolved, original_ctx).is_identity(config.train.ctx):
        raise ValueError(f"scaling={scaling.name} with factor {factor:g} changes nothing; give scaling.factor=4, say")
    return resolved


def rank_micro(config: TrainConfig, world: int) -> int:
    """Sequences in one forward pass of a rank: train.micro_batch_size, or all of its share of the batch.

    `ValueError` for a batch that the ranks do not divide, and a share that its passes do not.
    """
    size = config.batch_size
    if size % world:
        near = [n for n in (size - size % world, size + world - size % world) if n]
        raise ValueError(
            f"train.batch_size={size} cannot be shared by {world} ranks; use {' or '.join(str(n) for n in near)}"
        )
    share = size // world
    if share > config.micro and share % config.micro:
        raise ValueError(
            f"train.micro_batch_size must divide a rank's share, {share} of train.batch_size={size}, not {config.micro}"
        )
    return min(config.micro, share)


def steps_to_keep(config: TrainConfig) -> dict[int, float]:
    """The steps after which weights are kept, with their fraction of the training.

    `ValueError` for a fraction that comes before the first step.
    """
    for fraction in config.keep:
        if round(fraction * config.steps) < 1:
            raise ValueError(
                f"train.keep={fraction:g} comes before the first of train.steps={config.steps} steps; "
                f"use at least {1 / config.steps:.4g}"
            )
    return {round(fraction * config.steps): fraction for fraction in config.keep}


def training_positions(config: Config, original_ctx: int, scaling: Method) -> Draw | None:
    """How the positions of training windows are drawn; `ValueError` where the encoding cannot have them."""
    if config.positions.name != "contiguous" and not ENCODINGS[config.pos.name].any_positions:
        able = ", ".join(f"pos={name}" for name, kind in ENCODINGS.items() if kind.any_positions)
        raise ValueError(
            f"positions={config.positions.name} needs an encoding whose positions may skip, one of {able}, "
            f"not pos={config.pos.name}"
        )
    return drawn_positions(
        config.positions, ctx=config.train.ctx, original_ctx=original_ctx, factor=scaling.parameters.get("factor")
    )


def with_absolute_paths(text: DataConfig) -> DataConfig:
    """The same text by an absolute path, so that an evaluation from another folder finds it; hub names stay."""

    def place(path: str | None) -> str | None:
        if path is None or not Path(path).expanduser().exists():
            return path
        return str(Path(path).expanduser().resolve())

    return dataclasses.replace(text, path=place(text.path), test_path=place(text.test_path))
