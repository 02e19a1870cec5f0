"""One run being trained: its folder, model and data, and what is written as it goes."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ropelab import config as configs
from ropelab import data, files, runs
from ropelab.config import Config, DataConfig, Method, TrainConfig
from ropelab.data import Draw, drawn_positions
from ropelab.devices import DTYPE_NAMES, device_name, device_of_rank, environment, matmul_precision, resolve_dtype
from ropelab.distributed import SINGLE, Ranks, full_state_dict, parallel_of, wrap_ddp, wrap_fsdp
from ropelab.errors import NonFiniteLossError, RunError
from ropelab.evaluation import check_training, lacking_for
from ropelab.model import GPT
from ropelab.positions import ENCODINGS, Geometry
from ropelab.progress import Progress, tell
from ropelab.runs import RunDir, build_model, run_tokenizer
from ropelab.scalings import SCALINGS, applied_parameters, build, resolve_factor
from ropelab.training.compiling import compiles, training_kernel
from ropelab.training.loop import Loss, Step, validation_nll
from ropelab.training.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors
from ropelab.training.parent import check_weights, find_parent
from ropelab.training.resume import Checkpoint, latest_checkpoint
from ropelab.training.tracking import Tracker

PROBED = 2**20  # tokens at which an encoding is tried here for a training on another machine
VALIDATION_TOKENS = 16384  # scored at every train.eval_every

_log = logging.getLogger(__name__)


class Session:
    """The training of one run, from its configuration on. `restore` and what follows need the run's lock.

    `ValueError` for a configuration that cannot be trained, before anything is written.

    `elsewhere`: another machine will train it, and its memory is not known here.

    With `ranks` every one of them has the session of the run; only the first writes. What its methods do is done by all
    of them at the same steps.
    """

    def __init__(self, config: Config, progress: Progress, ranks: Ranks = SINGLE, *, elsewhere: bool = False) -> None:
        self.config, self.ranks = config, ranks
        self.device = device_of_rank(config.device, ranks)
        self._micro = rank_micro(config.train, ranks.world)
        self.keep = kept_steps(config.train)
        self.parent = find_parent(config)
        self.original_ctx = config.train.ctx if self.parent is None else self.parent.original_ctx
        if ranks.world == 1:  # of a model in shards each rank has a part
            check_training(config, self.device, original_ctx=self.original_ctx, elsewhere=elsewhere)
        # what cannot be built, or is undefined at train.ctx, is refused here rather than after the corpus was read
        applied = resolve_factor(config.scaling, longest=config.train.ctx, original_ctx=self.original_ctx)
        encoding = build(config.pos, applied, Geometry.of(config.model, self.original_ctx))
        if not elsewhere or config.train.ctx <= PROBED:
            with torch.no_grad():
                encoding(torch.arange(config.train.ctx), ctx=config.train.ctx)
        if self.parent is not None:
            check_weights(encoding, self.parent.run)
        self.scaling = training_scaling(config, self.original_ctx)
        self._draw = _training_positions(config, self.original_ctx, self.scaling)
        runs_dir = runs.check_runs_dir(config.runs_dir) if ranks.is_first else Path(config.runs_dir).expanduser()
        with ranks.first_then_others():
            self.corpus = data.prepare(
                config.data, cache_dir=Path(config.cache_dir).expanduser(),
                tokenizer=None if self.parent is None else self.parent.tokenizer, progress=progress,
            )  # fmt: skip
        separator = self.corpus.tokenizer.separator
        self._batches = data.Batches(self.corpus.train, ctx=config.train.ctx, separator=separator)
        held_out = data.Batches(self.corpus.validation, ctx=config.train.ctx, separator=separator)
        self._validation = held_out.fixed(max(4, VALIDATION_TOKENS // config.train.ctx))
        self._resolved = dataclasses.replace(
            config, scaling=self.scaling, data=found_from_anywhere(config.data),
            parent=None if self.parent is None else self.parent.run.name,
        )  # fmt: skip
        self._identity = runs.identity_of(
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

    def is_done(self) -> bool:
        """Is the run finished? Its tokeniser's file, should that be damaged, is written again.

        Checkpoints before its last, which a kill may have left, are removed where they can be.
        """
        done = self.run.is_done()
        if done:
            self.run.tidy()
            try:
                run_tokenizer(self.run)
            except RunError as error:
                tell(f"{str(error).partition('; ')[0]}; it is written again")
                with self.run.locked():
                    self.corpus.tokenizer.save(self.run.tokenizer_path)
        return done

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder of the run, which is made, for this training alone. `RunError` where another one has it."""
        if not self.ranks.is_first:
            yield
            return
        self.run.make()
        with self.run.locked():
            yield

    def restore(self) -> None:
        """Build the model, or restore it from the last checkpoint that is intact and this run's."""
        config, run, ranks = self.config, self.run, self.ranks
        self.model = model = self.fresh_model()
        found: list[Checkpoint] = []  # on the first rank

        def stored() -> list[dict[str, Any]]:
            begun = run.begun()
            found.extend(filter(None, [latest_checkpoint(run, model, self.digest)]))
            return [begun, found[0].state if found else {}]

        self._begun, state = ranks.broadcast_object(stored)
        known = {**state, **self._begun}  # a damaged manifest is made again from what the checkpoint says
        self.dtype = resolve_dtype(known.get("dtype", config.train.dtype), self.device)
        self._precision = known.get("matmul_precision") or matmul_precision(self.device, config.model.d_model)
        self._summary = state.get("summary")
        threads = state.get("threads") or self._begun.get("environment", {}).get("threads")
        if threads and self.device.type == "cpu":  # sums over other numbers of threads are rounded otherwise
            torch.set_num_threads(threads)
        if self.parent is not None:
            model.load_state_dict(self.parent.run.load_weights(), strict=True)
        if found:
            model.load_state_dict(found[0].model, strict=True)
        self._spread(resumed=bool(state))
        self.optimizer = build_optimizer(model, config.train)
        if state:
            self.start = state["step"]
            self._best = math.inf if state["best_val_nll"] is None else state["best_val_nll"]
            load_optimizer_tensors(model, self.optimizer, self._from_first(found[0].optimizer if found else {}))

    def _spread(self, *, resumed: bool) -> None:
        """Put the model on the device; with ranks, on those of all of them. `loss` is what a step goes through then."""
        ranks, model, train = self.ranks, self.model, self.config.train
        if ranks.world == 1:
            self.parallel = None
            self.loss: nn.Module = Loss(model.to(self.device), self.dtype)
            return
        if resumed:
            for tensor in model.state_dict().values():
                ranks.broadcast(tensor)
        on_gpu = self.device.type == "cuda"
        free = torch.cuda.get_device_properties(self.device).total_memory if on_gpu else None
        self.parallel = ranks.broadcast_object(lambda: parallel_of(train.parallel, model.n_parameters(), free))
        if self.parallel == "ddp":
            self.loss = wrap_ddp(Loss(model.to(self.device), self.dtype))
        else:  # only shards of it come to the device
            self.loss = wrap_fsdp(Loss(model, self.dtype, sharded=True), model.blocks, self.device)

    def _from_first(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The optimizer's tensors, read by the first rank."""
        if self.ranks.world == 1:
            return dict(stored)
        tensors = {}
        for name, parameter in self.model.named_parameters():
            for key, shape in (("step", ()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape)):
                full = stored[f"{name}/{key}"] if self.ranks.is_first else torch.empty(shape)
                self.ranks.broadcast(full)
                tensors[f"{name}/{key}"] = full
        return tensors

    def begin(self, *, stacked: int = 1) -> None:
        """Say in the manifest that the restored model is being trained from now on, `stacked` models a step."""
        config, run, corpus = self.config, self.run, self.corpus
        torch.set_float32_matmul_precision(self._precision)
        self.step, self._began = self.start, time.perf_counter()
        if not self.ranks.is_first:
            return
        if (lacks := lacking_for(config, corpus.test)) is not None:
            _say(lacks)
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
            params=self.model.n_parameters(), dtype=DTYPE_NAMES[self.dtype], device=device_name(self.device),
            device_type=self.device.type, matmul_precision=self._precision, stacked=stacked,
            attention_backend=self._kernel(), compiled=compiles(config.train, self.device), environment=environment(),
            world_size=self.ranks.world, parallel=self.parallel, spread=self._spread_so_far(),
            started=self._begun.get("started", time.time()),
        )  # fmt: skip
        run.rewind(self.start)
        self._tracker = Tracker(
            config.track, name=run.name, run_id=self.digest[:16], folder=run.path, facts=configs.to_dict(self._resolved)
        )
        self._began = time.perf_counter()

    def _kernel(self) -> str:
        """The attention kernel of the training."""
        model, config = self.model, self.config
        if self.parallel == "fsdp":  # shards can only be read in a pass; and one layer's kernel is that of all
            one_layer = dataclasses.replace(config, model=dataclasses.replace(config.model, n_layer=1))
            model = build_model(one_layer, 2, scaling=self.scaling, original_ctx=self.original_ctx).to(self.device)
        return training_kernel(model, config.train.ctx, self.dtype)

    def _spread_so_far(self) -> list[dict[str, Any]]:
        """The ranks that trained the run, and from which step on; with more than one entry resuming was not bit-exact.

        [{"step", "world_size", "parallel"}]: in one process (1, null), which is also what older runs had.
        """
        plain = {"step": 0, "world_size": 1, "parallel": None}
        before = self._begun.get("spread", [plain] if self._begun else [])
        kept = [entry for entry in before if entry["step"] < self.start]
        now = {"step": self.start, "world_size": self.ranks.world, "parallel": self.parallel}
        same = kept and {**kept[-1], "step": self.start} == now
        return kept if same else [*kept, now]

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
            line["val_nll"] = validation_nll(
                model, self._validation, dtype=self.dtype, batch=self._micro, loss=self.loss, ranks=self.ranks
            )
            self._best = min(self._best, line["val_nll"])
            model.train()
        if self.ranks.is_first:
            self.run.append_metrics(line)
            self._tracker.log(line)
        progress("train", step, train.steps, loss=done.loss, tokens_per_s=speed, run=self.run.name)
        if step in self.keep:
            weights = self._whole(model.state_dict())
            if self.ranks.is_first:
                self.run.save_kept(self.keep[step], step, weights)
        due = done.settled and (self.is_last(step) or bool(caught) or step % train.checkpoint_every == 0)
        if due:
            self._save()
        return due

    def _save(self) -> None:
        tensors = {
            "model": self._whole(self.model.state_dict()),
            "optimizer": self._whole(optimizer_tensors(self.model, self.optimizer)),
        }
        if not self.ranks.is_first:
            return
        state: dict[str, Any] = {
            "best_val_nll": self._best if math.isfinite(self._best) else None, "digest": self.digest,
            "dtype": DTYPE_NAMES[self.dtype], "matmul_precision": self._precision, "threads": torch.get_num_threads(),
        }  # fmt: skip
        if self.is_last(self.step):  # a manifest that is lost after this can be made again
            self._summary = state["summary"] = self._summarised()
        self.run.save_step(self.step, tensors, state, last=self.is_last(self.step))

    def _whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Named tensors in full; on another rank than the first, nothing."""
        if self.parallel == "fsdp":
            return full_state_dict(tensors)
        return tensors if self.ranks.is_first else {}

    def broke(self, error: NonFiniteLossError) -> None:
        """The weights before the bad step are kept, and the run has failed."""
        if self.step > self.start:
            self._save()
        if not self.ranks.is_first:
            return
        self.run.update_manifest(status="failed", error=str(error), failed_step=error.step)
        self._tracker.finish(failed=True)

    def stopped(self) -> None:
        """The run was saved and goes on another time."""
        if self.ranks.is_first:
            self._tracker.finish(failed=True)

    def crashed(self, error: BaseException) -> None:
        if not self.ranks.is_first:
            return
        with suppress(OSError):  # of a full disk: then the run shows as interrupted
            self.run.update_manifest(status="failed", error=f"{type(error).__name__}: {error}")
        self._tracker.finish(failed=True)

    def finish(self) -> None:
        """The last step was made."""
        if not self.ranks.is_first:
            return
        self.run.drop_earlier(self.config.train.steps)
        self.run.update_manifest(status="done", finished=time.time(), **(self._summary or self._summarised()))
        self._tracker.finish()

    def _summarised(self) -> dict[str, Any]:
        bytes_per_token = _bytes_per_target(self._validation, self.corpus.tokenizer)
        return _summary(self.run, self.config, self._best, bytes_per_token)

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


@functools.cache
def _say(message: str) -> None:
    """A line on stderr, once a process: the points of a sweep mostly have one text."""
    _log.warning("%s", message)


def found_from_anywhere(text: DataConfig) -> DataConfig:
    """The same text by an absolute path, so that an evaluation from another folder finds it; hub names stay."""

    def place(path: str | None) -> str | None:
        if path is None or not Path(path).expanduser().exists():
            return path
        return str(Path(path).expanduser().resolve())

    return dataclasses.replace(text, path=place(text.path), test_path=place(text.test_path))


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
