"""The composition root: from a configuration to a trained run, and from a run to perplexities."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import ropelab
from ropelab import config as configs
from ropelab import data, runs, stats
from ropelab.evaluation import (
    ladder,
    lay_out,
    position_curve,
    score,
    target_documents,
    target_tokens,
)
from ropelab.model import GPT
from ropelab.positions import SCALINGS, Geometry, PositionEncoding, build, resolve_factor
from ropelab.runs import RunDir, RunError
from ropelab.schema import Config, ContextLengthError, DataConfig, EvalConfig, Method
from ropelab.tracking import Tracker
from ropelab.training import (
    NonFiniteLossError,
    build_optimizer,
    load_optimizer_tensors,
    lr_at,
    optimizer_tensors,
    resolve_dtype,
    steps,
    validation_nll,
)

Progress = Callable[..., None]
"""progress(description, done, total, **facts): told of work as it goes; draws nothing itself."""

VALIDATION_TOKENS = 16384  # scored at every train.eval_every
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
NO_SCALING = Method("none", {})


class Interrupted(Exception):
    """SIGINT or SIGTERM came, and the run was saved; `signum` says which."""

    def __init__(self, signum: int, run: str, step: int) -> None:
        super().__init__(f"{run} saved at step {step}; the same command goes on from there")
        self.signum = signum


def _silent(description: str, done: int, total: int, **facts: Any) -> None:
    """The progress of whoever does not want any."""


# --- devices --------------------------------------------------------------------------------------------------------


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU. `ValueError` for a device that this machine does not have."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}: this machine has no CUDA device; use device=cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={name}: this machine has no MPS device; use device=cpu")
    if index and (not index.isdigit() or (kind == "cuda" and int(index) >= torch.cuda.device_count())):
        raise ValueError(
            f"device={name}: there is no such device; this machine has {torch.cuda.device_count()} on CUDA"
        )
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """What the device is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        except (OSError, StopIteration):
            return platform.processor() or platform.machine()
    return device.type


def environment() -> dict[str, Any]:
    """Versions and code state for a manifest."""
    package = Path(ropelab.__file__).parent.parent
    commit = None
    if (package / ".git").exists():
        found = subprocess.run(
            ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
        commit = found.stdout.strip() or None
    return {
        "ropelab": ropelab.__version__,
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


# --- training -------------------------------------------------------------------------------------------------------


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


def train(config: Config, *, progress: Progress = _silent) -> dict[str, Any]:
    """Train the run that `config` describes: from its last checkpoint, or not at all when it is finished.

    Returns the `train` object of the JSON contract. Raises `ValueError` for a configuration that cannot be trained
    (before anything is written), `NonFiniteLossError`, and `Interrupted` after saving.
    """
    device = resolve_device(config.device)
    scaling = training_scaling(config)
    geometry = Geometry(config.model.d_model, config.model.n_head, config.train.ctx)
    build(config.pos, scaling, geometry)  # refused here rather than after the corpus was read
    runs_dir = runs.open_runs_dir(config.runs_dir)
    corpus = data.prepare(config.data, cache_dir=Path(config.cache_dir).expanduser(), progress=progress)
    batches = data.Batches(corpus.train, ctx=config.train.ctx, separator=corpus.tokenizer.separator)
    validation = data.Batches(corpus.validation, ctx=config.train.ctx, separator=corpus.tokenizer.separator).fixed(
        max(4, VALIDATION_TOKENS // config.train.ctx)
    )

    resolved = dataclasses.replace(config, scaling=scaling)
    identity = runs.identity(resolved, corpus_digest=corpus.digest, tokenizer_digest=corpus.tokenizer.digest)
    digest = runs.digest_of(identity)
    run = RunDir(runs_dir / runs.run_name(config, digest))
    if run.manifest_path.exists() and run.manifest().get("status") == "done":
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
            error=None, train_ctx=config.train.ctx, original_ctx=config.train.ctx,
            corpus={"name": corpus.name, "digest": corpus.digest, "joined_share": batches.joined_share, **corpus.details},
            tokenizer={"name": corpus.tokenizer.name, "digest": corpus.tokenizer.digest, "n_vocab": corpus.tokenizer.n_vocab},
            params=model.n_parameters(), dtype=DTYPE_NAMES[dtype], device=device_name(device), device_type=device.type,
            attention_backend=model.train().prepare(config.train.ctx).attend.kernel, environment=environment(),
            started=begun.get("started", time.time()),
        )  # fmt: skip
        run.truncate_metrics(start)
        if config.train.compile:
            for block in model.blocks:
                block.compile()  # in place: names of the parameters stay, identical blocks share one compilation
        tracker = Tracker(
            config.track, name=run.name, run_id=digest[:16], folder=run.path, facts=configs.to_dict(resolved)
        )
        keep = {round(fraction * config.train.steps): fraction for fraction in config.train.keep}

        def save(step: int) -> None:
            tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer)}
            state = {"step": step, "best_val_nll": best if math.isfinite(best) else None}
            run.save_checkpoint(f"step-{step:08d}", tensors, state, prune=True)

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
                    run.save_checkpoint(
                        f"keep-{keep[step]:.4f}", {"model": model.state_dict()}, {"step": step}, prune=False
                    )
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
            run.update_manifest(status="failed", error=f"{type(error).__name__}: {error}")
            tracker.finish(failed=True)
            raise
        bytes_per_token = _bytes_per_target(validation, corpus.tokenizer)
        run.update_manifest(status="done", finished=time.time(), **_summary(run, config, best, bytes_per_token))
        tracker.finish()
    return _train_result(run, skipped=False)


def _restore(checkpoint: Path, model: GPT, optimizer: torch.optim.AdamW) -> tuple[int, float]:
    import json

    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    model.load_state_dict(runs.load_tensors(checkpoint / "model.safetensors"), strict=True)
    load_optimizer_tensors(model, optimizer, runs.load_tensors(checkpoint / "optimizer.safetensors"))
    best = state["best_val_nll"]
    return state["step"], math.inf if best is None else best


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


# --- evaluation -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """One evaluation: the `eval` object of the JSON contract, and the losses it was computed from."""

    result: dict[str, Any]
    losses_path: Path

    def document_means(self, ctx: int) -> dict[str, float]:
        """Mean loss in nats of every document at one ctx, by the digest of its text."""
        tensors = runs.load_tensors(self.losses_path)
        losses = tensors[f"nll.{ctx}"].double().numpy()
        document = tensors[f"document.{ctx}"].numpy()
        sums = np.bincount(document, losses)
        counts = np.bincount(document)
        return dict(zip(self.result["protocol"]["document_digests"], (sums / counts).tolist(), strict=True))


def evaluate(
    run: RunDir,
    config: EvalConfig,
    *,
    scaling: Method | None = None,
    other_text: DataConfig | None = None,
    device: str = "auto",
    cache_dir: str,
    progress: Progress = _silent,
) -> Evaluated:
    """Perplexity of a finished run over a ladder of contexts, under one protocol and one scaling.

    `scaling` replaces the trained one (`none` removes it; None keeps it); `other_text` is scored instead of the run's
    own test split, with the run's tokeniser. An evaluation that the run folder holds already is read, not repeated.
    `ValueError` for what cannot be evaluated; a length at which the encoding is undefined is a row that says so.
    """
    weights = run.load_weights()
    manifest = run.manifest()
    trained = configs.from_dict(manifest["config"])
    kept = scaling is None
    scaling = trained.scaling if scaling is None else scaling
    contexts = ladder(config.ctx, trained.train.ctx)
    target = resolve_device(device)
    geometry = Geometry(trained.model.d_model, trained.model.n_head, trained.train.ctx)
    per_row = scaling.parameters.get("factor") == "auto-row"
    methods = {
        ctx: resolve_factor(scaling, longest=ctx if per_row else max(contexts), train_ctx=trained.train.ctx)
        for ctx in contexts
    }
    encodings = {ctx: build(trained.pos, method, geometry) for ctx, method in methods.items()}

    tokenizer = data.load_tokenizer(run.tokenizer_path)
    split, corpus_digest, corpus_name = _evaluation_split(
        manifest, trained, other_text, config.split, tokenizer, cache_dir, progress
    )
    lengths = [len(split.document(i)) for i in range(len(split))]
    layout = lay_out(lengths, contexts, config)
    documents = [split.document(i) for i in layout.documents]
    dtype = resolve_dtype(config.dtype, target)
    question = {
        "numerics": runs.NUMERICS_VERSION,
        "scaling": {str(ctx): {"name": m.name, **m.parameters} for ctx, m in methods.items()},
        "window": config.window,
        "protocol": [layout.protocol, layout.contexts, layout.span, layout.scored, layout.documents, layout.units],
        "text": [corpus_digest, config.split],
        "tokenizer": tokenizer.digest,
        "dtype": DTYPE_NAMES[dtype],
    }
    name = runs.digest_of(question)[:16]
    result_path, losses_path = run.results / f"{name}.json", run.results / f"{name}.safetensors"
    if result_path.exists() and losses_path.exists():
        import json

        return Evaluated(json.loads(result_path.read_text(encoding="utf-8")), losses_path)

    model = build_model(trained, tokenizer.n_vocab, scaling=NO_SCALING)
    model.load_state_dict(weights, strict=True)
    model.to(target).eval()
    digests = [split.digests[i] for i in layout.documents]
    authors = [split.authors[i] for i in layout.documents]
    rows: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    curve = None
    total = sum(len(layout.windows(ctx).start) * ctx for ctx in contexts)
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress("evaluate", done, total, run=run.name)

    shared: NDArray[np.float32] | None = None
    for ctx in reversed(contexts):
        factor = methods[ctx].parameters.get("factor")
        windows = layout.windows(ctx)
        if encodings[ctx].rotary:
            model.encoding = encodings[ctx]  # parameter-free: the weights stay as they were loaded
        try:
            spectrum = _spectrum_digest(model.encoding, ctx)
        except ContextLengthError as error:
            rows.append(_undefined(ctx, factor, str(error)))
            continue
        _check_applied(methods[ctx], trained, geometry, ctx, spectrum)
        if layout.protocol == "prefix" and shared is not None and not model.encoding.length_dependent and not per_row:
            # scores at a position do not depend on what follows, so the longest pass holds every shorter one
            losses = shared.reshape(len(windows.start), -1)[:, :ctx].reshape(-1)
            advance(len(windows.start) * ctx)
        else:
            scorer = _scorer(model, window=config.window, dtype=dtype)
            losses = score(windows, documents, scorer, batch_tokens=_batch_tokens(target), progress=advance)
            shared = losses if shared is None else shared
        tokens = target_tokens(windows, documents)
        owner = target_documents(windows)
        rows.append(
            {
                "ctx": ctx,
                "factor": factor,
                **_figures(losses, tokenizer.byte_lengths[tokens], owner, authors, max(contexts)),
                "documents": len(documents),
                "context_min": ctx - windows.scored + 1,
                "context_mean": ctx - (windows.scored - 1) / 2,
                "spectrum_digest": spectrum[:16],
                "targets_digest": layout.targets_digest(split.digests, ctx)[:16],
            }
        )
        tensors[f"nll.{ctx}"] = torch.from_numpy(losses)
        tensors[f"document.{ctx}"] = torch.from_numpy(owner)
        curve = {"ctx": ctx, **position_curve(losses, windows)} if curve is None else curve
    rows.reverse()
    if layout.protocol == "last":
        at_train = next((row for row in rows if row["ctx"] == trained.train.ctx and row["status"] == "ok"), None)
        for row in rows:
            if at_train is not None and row["status"] == "ok":
                row["context_gain"] = at_train["nll"] - row["nll"]
    result = {
        "run": run.name,
        "pos": trained.pos.name,
        "scaling": scaling.name,
        "factor": None if per_row else methods[max(contexts)].parameters.get("factor"),
        "kept_scaling": kept and scaling.name != "none",
        "train_ctx": trained.train.ctx,
        "seed": trained.seed,
        "data": corpus_name,
        "window": config.window,
        "device": manifest_device(target),
        "protocol": {
            "name": layout.protocol,
            "stride": config.stride if layout.protocol == "sliding" else None,
            "last": config.last if layout.protocol == "last" else None,
            "span": layout.span,
            "tokens": config.tokens,
            "max_ctx": config.max_ctx,
            "split": config.split,
            "documents": len(documents),
            "left_out": layout.left_out,
            "unused": layout.unused,
            "bos": None,
            "targets_digest": next((row["targets_digest"] for row in reversed(rows) if row["status"] == "ok"), None)
            if layout.protocol != "prefix"
            else None,
            "document_digests": digests,
            "authors": authors,
            "data_digest": corpus_digest[:16],
            "tokenizer": tokenizer.name,
            "dtype": DTYPE_NAMES[dtype],
        },
        "rows": rows,
        "position_curve": curve,
    }
    run.results.mkdir(exist_ok=True)
    if tensors:
        from safetensors.torch import save

        runs.write_atomically(losses_path, save({key: value.contiguous() for key, value in tensors.items()}))
        runs.write_json(result_path, result)
    return Evaluated(result, losses_path)


def manifest_device(device: torch.device) -> str:
    return f"{device.type}: {device_name(device)}"


def _evaluation_split(
    manifest: dict[str, Any],
    trained: Config,
    other_text: DataConfig | None,
    which: str,
    tokenizer: data.Tokenizer,
    cache_dir: str,
    progress: Progress,
) -> tuple[data.Split, str, str]:
    """The documents to score, the digest of their corpus and its name. `RunError` when the run's own text changed."""
    cache = Path(cache_dir).expanduser()
    own = data.prepare(trained.data, cache_dir=cache, tokenizer=tokenizer, progress=progress)
    if own.digest != manifest["corpus"]["digest"]:
        raise RunError(
            f"the text of data={trained.data.name} is not the one that {manifest['run']} was trained on; restore it"
        )
    if other_text is None:
        return (own.test if which == "test" else own.validation), own.digest, own.name
    if which != "test":
        raise ValueError(f"eval.split={which} belongs to the run's own text; other text is all test")
    other = data.prepare(other_text, cache_dir=cache, evaluate_only=True, tokenizer=tokenizer, progress=progress)
    data.check_overlap(own, other)
    return other.test, other.digest, other.name


def _batch_tokens(device: torch.device) -> int:
    """Tokens of one forward pass: enough to fill the device, little enough to stay in cache on a CPU."""
    return 4096 if device.type == "cpu" else 131072


def _scorer(model: GPT, *, window: int | None, dtype: torch.dtype) -> Callable[..., NDArray[np.float32]]:
    device = model.tokens.weight.device
    rows = max(1, 2**24 // model.tokens.num_embeddings)  # targets whose logits are held at once

    @torch.no_grad()
    def scorer(inputs: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = model(torch.from_numpy(inputs).to(device), window=window)  # (B, ctx, C)
            scored = hidden[:, -targets.shape[1] :].flatten(0, 1)  # (B x scored, C)
            wanted = torch.from_numpy(targets).to(device).flatten()  # (B x scored,)
            parts = [model.nll(h, t) for h, t in zip(scored.split(rows), wanted.split(rows), strict=True)]
        losses: NDArray[np.float32] = torch.cat(parts).float().cpu().numpy()
        return losses.reshape(targets.shape)

    return scorer


def _figures(
    losses: NDArray[np.float32],
    byte_lengths: NDArray[np.int64],
    owner: NDArray[np.int64],
    authors: list[str | None],
    ctx: int,
) -> dict[str, Any]:
    """Perplexity and its kin from the losses of one row: sums in fp64, one division."""
    exact = losses.astype(np.float64)
    nll = float(exact.sum() / len(exact))
    by_document = np.split(exact, np.flatnonzero(np.diff(owner)) + 1)
    interval = stats.row_interval(by_document, max_ctx=ctx, authors=authors)
    finite = math.isfinite(nll)
    return {
        "ppl": math.exp(nll) if finite and nll < 700 else None,
        "nll": nll if finite else None,
        "bits_per_byte": float(exact.sum() / (math.log(2) * byte_lengths.sum())) if finite else None,
        "tokens": len(exact),
        "ci95": None if interval is None else [x if math.isfinite(x) else None for x in (interval.lo, interval.hi)],
        "unit": None if interval is None else interval.unit,
        "status": "ok" if finite else "non-finite",
    }


def _undefined(ctx: int, factor: float | None, reason: str) -> dict[str, Any]:
    empty = dict.fromkeys(("ppl", "nll", "bits_per_byte", "ci95", "unit"))
    return {"ctx": ctx, "factor": factor, **empty, "tokens": 0, "documents": 0, "status": "undefined", "reason": reason}


def _spectrum_digest(encoding: PositionEncoding, ctx: int) -> str:
    """sha256 of all that an encoding says at a length: two evaluations with equal digests had equal positions."""
    with torch.no_grad():
        record = encoding(torch.arange(ctx, device=next((p.device for p in encoding.parameters()), None)), ctx=ctx)
    hasher = hashlib.sha256()
    for part in (record.embedding, record.bias, *(record.rotation or ())):
        if isinstance(part, Tensor):
            hasher.update(part.cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def _check_applied(method: Method, trained: Config, geometry: Geometry, ctx: int, digest: str) -> None:
    """A scaling that was asked for must have changed the spectrum, where it is not the identity by definition."""
    if method.name == "none":
        return
    original_ctx = method.parameters["original_ctx"] or geometry.ctx
    identical = ctx <= original_ctx if SCALINGS[method.name].length_dependent else method.parameters["factor"] == 1
    plain = _spectrum_digest(build(trained.pos, NO_SCALING, geometry), ctx)
    if (digest == plain) != identical:
        raise RuntimeError(
            f"scaling={method.name} left the spectrum {'unchanged' if not identical else 'changed'} at {ctx}"
        )


__all__ = ["Evaluated", "Interrupted", "build_model", "evaluate", "lr_at", "resolve_device", "train"]
