"""From a configuration to a trained run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ropelab import config as configs
from ropelab import data, files, runs
from ropelab.experiment.devices import DTYPE_NAMES, device_name, environment, resolve_device
from ropelab.model import GPT
from ropelab.positions import SCALINGS, Geometry, build, resolve_factor
from ropelab.runs import RunDir
from ropelab.schema import Config, DataConfig, Method, TrainConfig
from ropelab.tracking import Tracker
from ropelab.training import (
    NonFiniteLossError,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    resolve_dtype,
    steps,
    validation_nll,
)

Progress = Callable[..., None]
"""progress(description, done, total, **facts): told of work as it goes; draws nothing itself."""

VALIDATION_TOKENS = 16384  # scored at every train.eval_every


class Interrupted(Exception):
    """SIGINT or SIGTERM came, and the run was saved; `signum` says which."""

    def __init__(self, signum: int, run: str, step: int) -> None:
        super().__init__(f"{run} saved at step {step}; the same command goes on from there")
        self.signum = signum


def silent(description: str, done: int, total: int, **facts: Any) -> None:
    """The progress of whoever does not want any."""


def training_scaling(config: Config) -> Method:
    """The configuration's scaling with the factor that training uses: `auto` is train.ctx / original_ctx.

    `ValueError` for a scaling that would change nothing.
    """
    scaling = config.scaling
    if scaling.name == "none":
        return scaling
    factor = scaling.parameters["factor"]
    dynamic = SCALINGS[scaling.name].length_dependent
    if factor == "auto-row":
        raise ValueError("scaling.factor=auto-row belongs to evaluation; give scaling.factor a number")
    if factor == "auto":
        original_ctx = scaling.parameters["original_ctx"] or config.train.ctx
        factor = 1.0 if dynamic else max(1.0, config.train.ctx / original_ctx)
    if factor == 1 and not dynamic:
        raise ValueError(f"scaling={config.scaling.name} with factor 1 changes nothing; give scaling.factor=4, say")
    return Method(scaling.name, {**scaling.parameters, "factor": float(factor)})


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


def build_model(config: Config, n_vocab: int, *, scaling: Method) -> GPT:
    """The GPT of a configuration with freshly drawn weights, on the CPU."""
    geometry = Geometry(config.model.d_model, config.model.n_head, config.train.ctx)
    return GPT(config.model, n_vocab, build(config.pos, scaling, geometry), seed=config.seed)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying of them; a second one is obeyed at once."""
    caught: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        if caught:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        caught.append(signum)

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def train(config: Config, *, progress: Progress = silent) -> dict[str, Any]:
    """Train the run that `config` describes: from its last checkpoint, or not at all when it is finished.

    Returns the `train` object of the JSON contract. Raises `ValueError` for a configuration that cannot be trained
    (before anything is written), `NonFiniteLossError`, and `Interrupted` after saving.
    """
    device = resolve_device(config.device)
    keep = kept_steps(config.train)
    geometry = Geometry(config.model.d_model, config.model.n_head, config.train.ctx)
    applied = resolve_factor(config.scaling, longest=config.train.ctx, train_ctx=config.train.ctx)
    build(config.pos, applied, geometry)  # refused here rather than after the corpus was read
    scaling = training_scaling(config)
    runs_dir = runs.open_runs_dir(config.runs_dir)
    corpus = data.prepare(config.data, cache_dir=Path(config.cache_dir).expanduser(), progress=progress)
    batches = data.Batches(corpus.train, ctx=config.train.ctx, separator=corpus.tokenizer.separator)
    validation = data.Batches(corpus.validation, ctx=config.train.ctx, separator=corpus.tokenizer.separator).fixed(
        max(4, VALIDATION_TOKENS // config.train.ctx)
    )

    resolved = dataclasses.replace(config, scaling=scaling, data=_found_from_anywhere(config.data))
    identity = runs.identity(resolved, corpus_digest=corpus.digest, tokenizer_digest=corpus.tokenizer.digest)
    digest = files.digest_of(identity)
    run = RunDir(runs_dir / runs.run_name(config, digest))
    if run.is_done():
        return _train_result(run, skipped=True)
    run.path.mkdir(exist_ok=True)
    with run.locked(), _interrupts() as caught:
        begun = run.manifest() if run.manifest_path.exists() else {}
        dtype = resolve_dtype(begun.get("dtype", config.train.dtype), device)
        model = build_model(config, corpus.tokenizer.n_vocab, scaling=scaling).to(device)
        optimizer = build_optimizer(model, config.train)
        start, best = 0, math.inf
        checkpoint = run.latest_checkpoint() if begun else None
        if checkpoint is not None:
            start, best = _restore(checkpoint, model, optimizer)
        corpus.tokenizer.save(run.tokenizer_path)
        run.update_manifest(
            run=run.name, digest=digest, identity=identity, config=configs.to_dict(resolved), status="running",
            error=None, failed_step=None, train_ctx=config.train.ctx, original_ctx=config.train.ctx,
            corpus={
                "name": corpus.name, "digest": corpus.digest, "joined_share": batches.joined_share, **corpus.details,
            },
            tokenizer={
                "name": corpus.tokenizer.name, "digest": corpus.tokenizer.digest, "n_vocab": corpus.tokenizer.n_vocab,
            },
            params=model.n_parameters(), dtype=DTYPE_NAMES[dtype], device=device_name(device), device_type=device.type,
            attention_backend=model.train().prepare(config.train.ctx).attend.kernel, environment=environment(),
            started=begun.get("started", time.time()),
        )  # fmt: skip
        run.rewind(start)
        if config.train.compile:
            for block in model.blocks:
                block.compile()  # in place: names of the parameters stay, identical blocks share one compilation
        tracker = Tracker(
            config.track, name=run.name, run_id=digest[:16], folder=run.path, facts=configs.to_dict(resolved)
        )

        def save(step: int) -> None:
            tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer)}
            state = {"best_val_nll": best if math.isfinite(best) else None}
            run.save_step(step, tensors, state, last=step == config.train.steps)

        began, seen, step = time.perf_counter(), 0, start
        try:
            for done in steps(
                model,
                optimizer,
                lambda step: batches.at(step, seed=config.seed, batch_size=config.train.batch_size),
                config.train,
                start=start,
                dtype=dtype,
            ):
                step = done.step
                seen += config.train.batch_size * config.train.ctx
                speed = seen / (time.perf_counter() - began)
                line: dict[str, Any] = {**dataclasses.asdict(done), "tokens_per_s": round(speed, 1)}
                last = step == config.train.steps
                if last or step % config.train.eval_every == 0:
                    model.eval()
                    line["val_nll"] = validation_nll(model, validation, dtype=dtype, batch=config.train.micro)
                    best = min(best, line["val_nll"])
                    model.train()
                run.append_metrics(line)
                tracker.log(line)
                progress("train", step, config.train.steps, loss=done.loss, tokens_per_s=speed, run=run.name)
                if step in keep:
                    run.save_kept(keep[step], step, model.state_dict())
                if last or caught or step % config.train.checkpoint_every == 0:
                    save(step)
                if caught and not last:
                    raise Interrupted(caught[0], run.name, step)
        except NonFiniteLossError as error:
            if step > start:
                save(step)  # the weights before the bad step
            run.update_manifest(status="failed", error=str(error), failed_step=error.step)
            tracker.finish(failed=True)
            raise
        except Interrupted:
            tracker.finish(failed=True)
            raise
        except BaseException as error:
            with suppress(OSError):  # of a full disk: then the run shows as interrupted
                run.update_manifest(status="failed", error=f"{type(error).__name__}: {error}")
            tracker.finish(failed=True)
            raise
        bytes_per_token = _bytes_per_target(validation, corpus.tokenizer)
        run.update_manifest(status="done", finished=time.time(), **_summary(run, config, best, bytes_per_token))
        tracker.finish()
    return _train_result(run, skipped=False)


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


def _train_result(run: RunDir, *, skipped: bool) -> dict[str, Any]:
    manifest = run.manifest()
    fields = ("status", "step", "train_loss", "val_nll", "params", "tokens_per_s", "device", "dtype")
    return {"run": run.name, "run_dir": str(run.path), "skipped": skipped, **{key: manifest[key] for key in fields}}
