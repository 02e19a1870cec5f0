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
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ropelab import config as configs
from ropelab import data, files, runs
from ropelab.experiment.devices import DTYPE_NAMES, device_name, environment, resolve_device
from ropelab.experiment.models import build_model
from ropelab.model import GPT
from ropelab.positions import (
    ENCODINGS,
    SCALINGS,
    Geometry,
    PositionEncoding,
    applied_parameters,
    build,
    resolve_factor,
)
from ropelab.positions.indices import Draw, drawn_positions
from ropelab.runs import RunDir
from ropelab.schema import Config, DataConfig, Method, TrainConfig
from ropelab.tracking import Tracker
from ropelab.training import (
    NonFiniteLossError,
    build_optimizer,
    load_optimizer_tensors,
    matmul_precision,
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


class Parent(NamedTuple):
    """The finished run that a training starts from."""

    run: RunDir
    original_ctx: int  # of its root
    steps: int  # of it and all its ancestors: the child's batches come after theirs
    tokenizer: data.Tokenizer


def find_parent(config: Config) -> Parent | None:
    """The run that `config.parent` names; None without one.

    `ValueError` when it is not finished, or when its model or tokeniser is not the configuration's.
    """
    if config.parent is None:
        return None
    run = runs.find_run(config.parent, Path(config.runs_dir).expanduser())
    run.load_weights()
    manifest = run.manifest()
    theirs = configs.from_dict(manifest["config"])
    for key in ("n_layer", "d_model", "n_head", "qk_norm"):
        mine, its = getattr(config.model, key), getattr(theirs.model, key)
        if mine != its:
            raise ValueError(f"model.{key}={mine} differs from that of the parent {run.name}, {its}; leave it out")
    for key in ("tokenizer", "vocab_size"):
        mine, its = getattr(config.data, key), getattr(theirs.data, key)
        if mine != its and (key == "tokenizer" or theirs.data.tokenizer == "bpe"):
            raise ValueError(f"data.{key}={mine} differs from that of the parent {run.name}, {its}; leave it out")
    if theirs.pos.name == config.pos.name == "drope" and config.pos.parameters["drop_after"] != 0:
        raise ValueError(f"the rotation of {run.name} is dropped already; add pos.drop_after=0")
    steps = manifest.get("first_step", 0) + theirs.train.steps
    return Parent(run, manifest["original_ctx"], steps, data.load_tokenizer(run.tokenizer_path))


def _check_weights(encoding: PositionEncoding, parent: RunDir) -> None:
    """`ValueError` where an encoding has other weights than a parent's, so that these cannot be gone on from."""
    its = {
        name.removeprefix("encoding."): w for name, w in parent.load_weights().items() if name.startswith("encoding.")
    }
    mine = encoding.state_dict()
    odd = [n for n in sorted({*mine, *its}) if n not in mine or n not in its or mine[n].shape != its[n].shape]
    if odd:
        raise ValueError(
            f"{parent.name} cannot be gone on from: its position weights are others ({', '.join(odd[:3])})"
        )


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


@contextmanager
def interrupts() -> Iterator[list[int]]:
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
    parent = find_parent(config)
    original_ctx = config.train.ctx if parent is None else parent.original_ctx
    # what cannot be built, or is undefined at train.ctx, is refused here rather than after the corpus was read
    applied = resolve_factor(config.scaling, longest=config.train.ctx, original_ctx=original_ctx)
    encoding = build(config.pos, applied, Geometry.of(config.model, original_ctx))
    with torch.no_grad():
        encoding(torch.arange(config.train.ctx), ctx=config.train.ctx)
    if parent is not None:
        _check_weights(encoding, parent.run)
    scaling = training_scaling(config, original_ctx)
    draw = _training_positions(config, original_ctx, scaling)
    runs_dir = runs.open_runs_dir(config.runs_dir)
    corpus = data.prepare(
        config.data, cache_dir=Path(config.cache_dir).expanduser(),
        tokenizer=None if parent is None else parent.tokenizer, progress=progress,
    )  # fmt: skip
    batches = data.Batches(corpus.train, ctx=config.train.ctx, separator=corpus.tokenizer.separator)
    validation = data.Batches(corpus.validation, ctx=config.train.ctx, separator=corpus.tokenizer.separator).fixed(
        max(4, VALIDATION_TOKENS // config.train.ctx)
    )

    resolved = dataclasses.replace(
        config, scaling=scaling, data=_found_from_anywhere(config.data),
        parent=None if parent is None else parent.run.name,
    )  # fmt: skip
    identity = runs.identity(
        resolved, corpus_digest=corpus.digest, tokenizer_digest=corpus.tokenizer.digest,
        parent_digest=None if parent is None else parent.run.manifest()["digest"],
    )  # fmt: skip
    digest = files.digest_of(identity)
    run = RunDir(runs_dir / runs.run_name(config, digest))
    if run.is_done():
        return _train_result(run, skipped=True)
    run.path.mkdir(exist_ok=True)
    with run.locked(), interrupts() as caught:
        begun = run.manifest() if run.manifest_path.exists() else {}
        dtype = resolve_dtype(begun.get("dtype", config.train.dtype), device)
        precision = begun.get("matmul_precision") or matmul_precision(device, config.model.d_model)
        torch.set_float32_matmul_precision(precision)
        model = build_model(config, corpus.tokenizer.n_vocab, scaling=scaling, original_ctx=original_ctx)
        if parent is not None:
            model.load_state_dict(parent.run.load_weights(), strict=True)
        model.to(device)
        first = 0 if parent is None else parent.steps
        optimizer = build_optimizer(model, config.train)
        start, best = 0, math.inf
        checkpoint = run.latest_checkpoint() if begun else None
        if checkpoint is not None:
            start, best = _restore(checkpoint, model, optimizer)
        corpus.tokenizer.save(run.tokenizer_path)
        run.update_manifest(
            run=run.name, digest=digest, identity=identity, config=configs.to_dict(resolved), status="running",
            error=None, failed_step=None, train_ctx=config.train.ctx, original_ctx=original_ctx, first_step=first,
            parent=None if parent is None else {
                "run": parent.run.name, "digest": parent.run.manifest()["digest"],
                "recipe": runs.recipe(parent.run.manifest()),
            },
            corpus={
                "name": corpus.name, "digest": corpus.digest, "joined_share": batches.joined_share, **corpus.details,
            },
            tokenizer={
                "name": corpus.tokenizer.name, "digest": corpus.tokenizer.digest, "n_vocab": corpus.tokenizer.n_vocab,
            },
            params=model.n_parameters(), dtype=DTYPE_NAMES[dtype], device=device_name(device), device_type=device.type,
            matmul_precision=precision, attention_backend=training_kernel(model, config.train.ctx, dtype),
            compiled=compiles(config.train, device), environment=environment(),
            started=begun.get("started", time.time()),
        )  # fmt: skip
        run.rewind(start)
        if compiles(config.train, device):
            compile_blocks(model, cache_dir=config.cache_dir)
        tracker = Tracker(
            config.track, name=run.name, run_id=digest[:16], folder=run.path, facts=configs.to_dict(resolved)
        )

        def stops(step: int) -> bool:
            """Is the model wanted as this step leaves it?"""
            return step in keep or 0 in (step % config.train.eval_every, step % config.train.checkpoint_every)

        def save(step: int) -> None:
            tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer)}
            state = {"best_val_nll": best if math.isfinite(best) else None}
            run.save_step(step, tensors, state, last=step == config.train.steps)

        began, seen, step = time.perf_counter(), 0, start
        try:
            for done in steps(
                model,
                optimizer,
                lambda step: batches.at(first + step, seed=config.seed, batch_size=config.train.batch_size),
                config.train,
                start=start,
                dtype=dtype,
                positions_at=None
                if draw is None
                else lambda step: draw(config.seed, first + step, config.train.batch_size),
                settle_at=stops,
            ):
                step = done.step
                seen += config.train.batch_size * config.train.ctx
                speed = seen / (time.perf_counter() - began)
                line: dict[str, Any] = {
                    "step": step, "loss": done.loss, "lr": done.lr, "grad_norm": done.grad_norm,
                    "tokens_per_s": round(speed, 1),
                }  # fmt: skip
                last = step == config.train.steps
                if done.settled and (last or step % config.train.eval_every == 0):
                    model.eval()
                    model.progress(step / config.train.steps)
                    line["val_nll"] = validation_nll(model, validation, dtype=dtype, batch=config.train.micro)
                    best = min(best, line["val_nll"])
                    model.train()
                run.append_metrics(line)
                tracker.log(line)
                progress("train", step, config.train.steps, loss=done.loss, tokens_per_s=speed, run=run.name)
                if step in keep:
                    run.save_kept(keep[step], step, model.state_dict())
                if done.settled and (last or caught or step % config.train.checkpoint_every == 0):
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


def _train_result(run: RunDir, *, skipped: bool) -> dict[str, Any]:
    manifest = run.manifest()
    fields = ("status", "step", "train_loss", "val_nll", "params", "tokens_per_s", "device", "dtype")
    return {"run": run.name, "run_dir": str(run.path), "skipped": skipped, **{key: manifest[key] for key in fields}}
