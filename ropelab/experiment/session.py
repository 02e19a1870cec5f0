"""One run being trained: its folder, model and data, and what is written as it goes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ropelab import config as configs
from ropelab import data, files, runs
from ropelab.experiment.devices import DTYPE_NAMES, device_name, environment, resolve_device
from ropelab.experiment.models import build_model
from ropelab.experiment.parent import check_weights, find_parent
from ropelab.model import GPT
from ropelab.positions import ENCODINGS, SCALINGS, Geometry, applied_parameters, build, resolve_factor
from ropelab.positions.indices import Draw, drawn_positions
from ropelab.progress import Progress
from ropelab.runs import RunDir
from ropelab.schema import Config, DataConfig, Method, TrainConfig
from ropelab.tracking import Tracker
from ropelab.training import (
    NonFiniteLossError,
    Step,
    build_optimizer,
    load_optimizer_tensors,
    matmul_precision,
    optimizer_tensors,
    resolve_dtype,
    validation_nll,
)

VALIDATION_TOKENS = 16384  # scored at every train.eval_every


class Session:
    """The training of one run, from its configuration on. `restore` and what follows need the run's lock.

    `ValueError` for a configuration that cannot be trained, before anything is written.
    """

    def __init__(self, config: Config, progress: Progress) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.keep = kept_steps(config.train)
        self.parent = find_parent(config)
        self.original_ctx = config.train.ctx if self.parent is None else self.parent.original_ctx
        # what cannot be built, or is undefined at train.ctx, is refused here rather than after the corpus was read
        applied = resolve_factor(config.scaling, longest=config.train.ctx, original_ctx=self.original_ctx)
        encoding = build(config.pos, applied, Geometry.of(config.model, self.original_ctx))
        with torch.no_grad():
            encoding(torch.arange(config.train.ctx), ctx=config.train.ctx)
        if self.parent is not None:
            check_weights(encoding, self.parent.run)
        self.scaling = training_scaling(config, self.original_ctx)
        self._draw = _training_positions(config, self.original_ctx, self.scaling)
        runs_dir = runs.open_runs_dir(config.runs_dir)
        self.corpus = data.prepare(
            config.data, cache_dir=Path(config.cache_dir).expanduser(),
            tokenizer=None if self.parent is None else self.parent.tokenizer, progress=progress,
        )  # fmt: skip
        separator = self.corpus.tokenizer.separator
        self._batches = data.Batches(self.corpus.train, ctx=config.train.ctx, separator=separator)
        held_out = data.Batches(self.corpus.validation, ctx=config.train.ctx, separator=separator)
        self._validation = held_out.fixed(max(4, VALIDATION_TOKENS // config.train.ctx))
        self._resolved = dataclasses.replace(
            config, scaling=self.scaling, data=_found_from_anywhere(config.data),
            parent=None if self.parent is None else self.parent.run.name,
        )  # fmt: skip
        self._identity = runs.identity(
            self._resolved, corpus_digest=self.corpus.digest, tokenizer_digest=self.corpus.tokenizer.digest,
            parent_digest=None if self.parent is None else self.parent.run.manifest()["digest"],
        )  # fmt: skip
        self.digest = files.digest_of(self._identity)
        self.run = RunDir(runs_dir / runs.run_name(config, self.digest))
        self._first = 0 if self.parent is None else self.parent.steps  # its batches come after those of its ancestors
        self.positions_at = None if self._draw is None else self._positions_at
        self.start, self._best = 0, math.inf

    def fresh_model(self) -> GPT:
        """The model before any training, on the CPU."""
        n_vocab = self.corpus.tokenizer.n_vocab
        return build_model(self.config, n_vocab, scaling=self.scaling, original_ctx=self.original_ctx)

    def restore(self) -> None:
        """Build the model, or restore it from the last checkpoint that is intact."""
        config, run = self.config, self.run
        self._begun = begun = run.manifest() if run.manifest_path.exists() else {}
        self.dtype = resolve_dtype(begun.get("dtype", config.train.dtype), self.device)
        self._precision = begun.get("matmul_precision") or matmul_precision(self.device, config.model.d_model)
        model = self.fresh_model()
        if self.parent is not None:
            model.load_state_dict(self.parent.run.load_weights(), strict=True)
        self.model = model.to(self.device)
        self.optimizer = build_optimizer(model, config.train)
        checkpoint = run.latest_checkpoint() if begun else None
        if checkpoint is not None:
            self.start, self._best = _restore(checkpoint, model, self.optimizer)

    def begin(self, *, stacked: int = 1) -> None:
        """Say in the manifest that the restored model is being trained from now on, `stacked` models a step."""
        config, run, corpus, model = self.config, self.run, self.corpus, self.model
        torch.set_float32_matmul_precision(self._precision)
        corpus.tokenizer.save(run.tokenizer_path)
        run.update_manifest(
            run=run.name, digest=self.digest, identity=self._identity, config=configs.to_dict(self._resolved),
            status="running", error=None, failed_step=None, train_ctx=config.train.ctx, original_ctx=self.original_ctx,
            first_step=self._first,
            parent=None if self.parent is None else {
                "run": self.parent.run.name, "digest": self.parent.run.manifest()["digest"],
                "recipe": runs.recipe(self.parent.run.manifest()),
            },
            corpus={
                "name": corpus.name, "digest": corpus.digest, "joined_share": self._batches.joined_share,
                **corpus.details,
            },
            tokenizer={
                "name": corpus.tokenizer.name, "digest": corpus.tokenizer.digest, "n_vocab": corpus.tokenizer.n_vocab,
            },
            params=model.n_parameters(), dtype=DTYPE_NAMES[self.dtype], device=device_name(self.device),
            device_type=self.device.type, matmul_precision=self._precision, stacked=stacked,
            attention_backend=training_kernel(model, config.train.ctx, self.dtype),
            compiled=compiles(config.train, self.device), environment=environment(),
            started=self._begun.get("started", time.time()),
        )  # fmt: skip
        run.rewind(self.start)
        self._tracker = Tracker(
            config.track, name=run.name, run_id=self.digest[:16], folder=run.path, facts=configs.to_dict(self._resolved)
        )
        self.step, self._began = self.start, time.perf_counter()

    def batch_at(self, step: int) -> NDArray[np.int64]:
        """The windows of a step, (batch_size, ctx + 1)."""
        return self._batches.at(self._first + step, seed=self.config.seed, batch_size=self.config.train.batch_size)

    def _positions_at(self, step: int) -> NDArray[np.int64]:
        assert self._draw is not None
        return self._draw(self.config.seed, self._first + step, self.config.train.batch_size)

    def settles(self, step: int) -> bool:
        """Is the model wanted as this step leaves it?"""
        train = self.config.train
        return step in self.keep or 0 in (step % train.eval_every, step % train.checkpoint_every)

    def is_last(self, step: int) -> bool:
        return step == self.config.train.steps

    def take(self, done: Step, progress: Progress, caught: Sequence[int]) -> bool:
        """A step that was made: its line in the metrics, and validation loss, kept weights and checkpoint when due.

        A signal in `caught` makes a checkpoint due. Returns whether one was written.
        """
        train, model = self.config.train, self.model
        step = self.step = done.step
        seen = (step - self.start) * train.batch_size * train.ctx
        speed = seen / (time.perf_counter() - self._began)
        line: dict[str, Any] = {
            "step": step, "loss": done.loss, "lr": done.lr, "grad_norm": done.grad_norm,
            "tokens_per_s": round(speed, 1),
        }  # fmt: skip
        if done.settled and (self.is_last(step) or step % train.eval_every == 0):
            model.eval()
            model.progress(step / train.steps)
            line["val_nll"] = validation_nll(model, self._validation, dtype=self.dtype, batch=train.micro)
            self._best = min(self._best, line["val_nll"])
            model.train()
        self.run.append_metrics(line)
        self._tracker.log(line)
        progress("train", step, train.steps, loss=done.loss, tokens_per_s=speed, run=self.run.name)
        if step in self.keep:
            self.run.save_kept(self.keep[step], step, model.state_dict())
        due = done.settled and (self.is_last(step) or bool(caught) or step % train.checkpoint_every == 0)
        if due:
            self._save()
        return due

    def _save(self) -> None:
        tensors = {"model": self.model.state_dict(), "optimizer": optimizer_tensors(self.model, self.optimizer)}
        state = {"best_val_nll": self._best if math.isfinite(self._best) else None}
        self.run.save_step(self.step, tensors, state, last=self.is_last(self.step))

    def broke(self, error: NonFiniteLossError) -> None:
        """The weights before the bad step are kept, and the run has failed."""
        if self.step > self.start:
            self._save()
        self.run.update_manifest(status="failed", error=str(error), failed_step=error.step)
        self._tracker.finish(failed=True)

    def stopped(self) -> None:
        """The run was saved and goes on another time."""
        self._tracker.finish(failed=True)

    def crashed(self, error: BaseException) -> None:
        with suppress(OSError):  # of a full disk: then the run shows as interrupted
            self.run.update_manifest(status="failed", error=f"{type(error).__name__}: {error}")
        self._tracker.finish(failed=True)

    def finish(self) -> None:
        """The last step was made."""
        bytes_per_token = _bytes_per_target(self._validation, self.corpus.tokenizer)
        summary = _summary(self.run, self.config, self._best, bytes_per_token)
        self.run.update_manifest(status="done", finished=time.time(), **summary)
        self._tracker.finish()

    def result(self, *, skipped: bool) -> dict[str, Any]:
        """The `train` object of the JSON contract, of a finished run."""
        manifest = self.run.manifest()
        fields = ("status", "step", "train_loss", "val_nll", "params", "tokens_per_s", "device", "dtype")
        return {
            "run": self.run.name, "run_dir": str(self.run.path), "skipped": skipped,
            **{key: manifest[key] for key in fields},
        }  # fmt: skip


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
    if not dynamic and SCALINGS[scaling.name].idle(applied_parameters(resolved, original_ctx), config.train.ctx):
        raise ValueError(f"scaling={scaling.name} with factor {factor:g} changes nothing; give scaling.factor=4, say")
    return resolved


def kept_steps(config: TrainConfig) -> dict[int, float]:
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


def _training_positions(config: Config, original_ctx: int, scaling: Method) -> Draw | None:
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


def training_kernel(model: GPT, ctx: int, dtype: torch.dtype) -> str:
    """The attention kernel of a training step."""
    device = model.tokens.weight.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model.train().prepare(ctx).attend.kernel


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Are the blocks compiled: as `train.compile` says, else on CUDA."""
    return device.type == "cuda" if config.compile is None else config.compile


def compile_blocks(model: GPT, *, cache_dir: str) -> None:
    """Compile each block in place: names of the parameters stay, and identical blocks share one compilation.

    What is compiled is kept in the cache folder for the next run, unless TORCHINDUCTOR_CACHE_DIR names another place.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(cache_dir).expanduser() / "inductor"))
    for block in model.blocks:
        block.compile(dynamic=False)


def _restore(checkpoint: Path, model: GPT, optimizer: torch.optim.AdamW) -> tuple[int, float]:
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    model.load_state_dict(runs.load_tensors(checkpoint / "model.safetensors"), strict=True)
    load_optimizer_tensors(model, optimizer, runs.load_tensors(checkpoint / "optimizer.safetensors"))
    best = state["best_val_nll"]
    return state["step"], math.inf if best is None else best


def _found_from_anywhere(text: DataConfig) -> DataConfig:
    """The same text by an absolute path, so that an evaluation from another folder finds it; hub names stay."""
    if text.path is None or not Path(text.path).expanduser().exists():
        return text
    return dataclasses.replace(text, path=str(Path(text.path).expanduser().resolve()))


def _bytes_per_target(windows: NDArray[np.int64], tokenizer: data.Tokenizer) -> float:
    """Mean UTF-8 bytes of the scored targets of windows (N, ctx + 1)."""
    targets = windows[:, 1:].reshape(-1)  # (N x ctx,)
    return float(tokenizer.byte_lengths[targets[targets != tokenizer.separator]].mean())


def _summary(run: RunDir, config: Config, best: float, bytes_per_token: float) -> dict[str, Any]:
    """What a manifest says of a finished training; train_loss is the mean over the last 5% of the steps."""
    lines = run.metrics()
    tail = [line["loss"] for line in lines[-max(1, config.train.steps // 20) :]]
    val_nll = next(line["val_nll"] for line in reversed(lines) if "val_nll" in line)
    return {
        "step": config.train.steps,
        "train_loss": float(np.mean(tail)),
        "val_nll": val_nll,
        "val_bits_per_byte": val_nll / math.log(2) / bytes_per_token,
        "best_val_nll": best,
        "tokens_per_s": lines[-1]["tokens_per_s"],
    }
