"""From a trained run to perplexities."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ropelab import files, runs
from ropelab.config import Config, DataConfig, EvalConfig, Method
from ropelab.devices import DTYPE_NAMES, device_name, device_of_rank, resolve_dtype
from ropelab.distributed import SINGLE, Ranks
from ropelab.errors import ContextLengthError, RunError
from ropelab.evaluation.grounds import lacking
from ropelab.evaluation.intervals import row_interval
from ropelab.evaluation.memory import GB, free_bytes
from ropelab.evaluation.model import Subject
from ropelab.evaluation.protocols import Scorer, Windows, ladder, lay_out
from ropelab.evaluation.results import intact_evaluation, labels, write_evaluation
from ropelab.evaluation.run_model import TrainedRun
from ropelab.evaluation.scoring import position_curve, score, target_documents, target_tokens
from ropelab.positions import PositionEncoding
from ropelab.progress import Progress, silent, tell
from ropelab.runs import RunDir, encoding_of, trained_config
from ropelab.scalings import resolve_factor


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


class Ladder(NamedTuple):
    """What an evaluation comes to, known before any text is read."""

    scaling: Method  # its factor as it was given
    methods: dict[int, Method]  # the scaling with its factor as a number, by ctx, shortest first
    encodings: dict[int, PositionEncoding]


def resolve_ladder(run: RunDir, config: EvalConfig, *, scaling: Method | None) -> Ladder:
    """`ladder_of` a finished run."""
    return ladder_of(trained_config(run), run.finished_manifest()["original_ctx"], config, scaling=scaling)


def ladder_of(trained: Config, original_ctx: int, config: EvalConfig, *, scaling: Method | None) -> Ladder:
    """The contexts of an evaluation, and scaling and encoding at each; None keeps the trained scaling.

    `ValueError` for lengths that are none, and for a scaling that the trained encoding cannot have.
    """
    scaling = trained.scaling if scaling is None else scaling
    contexts = ladder(config.ctx, trained.train.ctx)
    per_row = scaling.parameters.get("factor") == "auto-row"
    methods = {
        ctx: resolve_factor(scaling, longest=ctx if per_row else max(contexts), original_ctx=original_ctx)
        for ctx in contexts
    }
    encodings = {ctx: encoding_of(trained, method, original_ctx) for ctx, method in methods.items()}
    return Ladder(scaling, methods, encodings)


def evaluate(
    run: RunDir,
    config: EvalConfig,
    *,
    scaling: Method | None = None,
    other_text: DataConfig | None = None,
    device: str = "auto",
    cache_dir: str,
    progress: Progress = silent,
    folder: Path | None = None,
    notice: Callable[[str], None] = lambda line: None,
    ranks: Ranks = SINGLE,
) -> Evaluated:
    """Perplexity of a finished run over a ladder of contexts, under one protocol and one scaling.

    `scaling` replaces the trained one (`none` removes it; None keeps it); `other_text` is scored instead of the run's
    own test split, with the run's tokeniser. An evaluation that the run folder holds already is read, not repeated;
    `folder` is another place for it than the run's results, for one that is a step of something else. `notice` is told
    what it will take, before it starts. With `ranks` all of them call it and share the windows; the first writes.
    `ValueError` for what cannot be evaluated; a length at which the encoding is undefined is a row that says so.
    """
    # until its numbers are kept, the run is neither removed nor trained again
    with run.in_use() if ranks.is_first else contextlib.nullcontext():
        return evaluate_subject(
            TrainedRun(run), config, scaling=scaling, other_text=other_text, device=device, cache_dir=cache_dir,
            progress=progress, folder=folder, notice=notice, ranks=ranks,
        )  # fmt: skip


def evaluate_subject(
    subject: Subject,
    config: EvalConfig,
    *,
    scaling: Method | None = None,
    other_text: DataConfig | None = None,
    device: str = "auto",
    cache_dir: str,
    progress: Progress = silent,
    folder: Path | None = None,
    notice: Callable[[str], None] = lambda line: None,
    ranks: Ranks = SINGLE,
) -> Evaluated:
    """`evaluate`, of whatever can be evaluated."""
    target = device_of_rank(device, ranks)
    progress = progress if ranks.is_first else silent
    manifest, trained, tokenizer = subject.manifest, subject.trained, subject.tokenizer
    kept = scaling is None
    bos = subject.beginning(config.bos)
    scaling, methods, encodings = ladder_of(trained, subject.original_ctx, config, scaling=scaling)
    if kept and subject.own_scaling is not None:
        scaling, methods = subject.own_scaling, dict.fromkeys(methods, subject.own_scaling)
    contexts = tuple(methods)
    per_row = scaling.parameters.get("factor") == "auto-row"
    with ranks.first_then_others():
        text = subject.text(other_text, config.split, cache_dir, progress)
    split, corpus_digest, corpus_name = text.split, text.digest, text.name
    if config.baseline is not None and (scaling.name != "none" or config.window is not None):
        raise ValueError("eval.baseline=unigram knows no positions: leave out --scaling and eval.window")
    if config.baseline is not None and text.training is None:
        raise ValueError("eval.baseline=unigram counts a run's training text; that of a checkpoint is not known")
    lengths = [len(split.document(i)) for i in range(len(split))]
    layout = lay_out(lengths, contexts, config)
    documents = [split.document(i) for i in layout.documents]
    authors = [split.authors[i] for i in layout.documents]
    dtype = resolve_dtype(config.dtype, target)
    question = {
        "numerics": runs.NUMERICS_VERSION,
        "scaling": {str(ctx): {"name": m.name, **m.parameters} for ctx, m in methods.items()},
        "window": config.window,
        "protocol": [layout.protocol, layout.contexts, layout.span, layout.scored, layout.documents, layout.units],
        "text": [corpus_digest, config.split],
        "tokenizer": tokenizer.digest,
        "dtype": DTYPE_NAMES[dtype],
        **({} if config.baseline is None else {"baseline": config.baseline}),
        **({} if bos is None else {"bos": bos}),
        **subject.asked,
    }
    name = files.digest_of(question)[:16]
    kept_in = folder or subject.results
    result_path, losses_path = kept_in / f"{name}.json", kept_in / f"{name}.safetensors"
    described = {"scaling_parameters": dict(scaling.parameters), **labels(manifest, scaling)}

    def kept_already() -> dict[str, Any] | None:
        try:
            return intact_evaluation(result_path, losses_path, subject.weights)
        except RunError as error:
            tell(f"{str(error).partition('; ')[0]}; it is evaluated again")
            return None

    stored = ranks.broadcast_object(kept_already)
    if stored is not None:
        # made by an earlier version; the file's name says that they are these
        if "recipe" not in stored and ranks.is_first:
            stored = {**stored, **described}
            write_evaluation(result_path, stored, losses_path)
        return _with_authors(Evaluated(stored, losses_path), authors, split.unit)

    passes = None
    if config.baseline is None:
        passes = subject.plan(encodings, target, dtype, limit_gb=_limit_gb(config.memory_gb, target, ranks))
    if ranks.is_first:
        if kept_in.parent.is_dir():  # a checkpoint gets its folder when there is something to put there
            _make_results_folder(kept_in)
        if passes is not None:
            notice(str(passes))
    lacks = lacking(split, layout.documents, layout.span, other_text or trained.data) if ranks.is_first else None
    model = subject.load(target, dtype, window=config.window, kept=kept)
    ranks.check_alike("text or scaling", name)
    ranks.connect(target)
    torch.set_float32_matmul_precision(model.precision)
    baseline = None  # (V,)
    if config.baseline is not None:
        assert text.training is not None
        baseline = unigram_nll(text.training.tokens, tokenizer.n_vocab)
    digests = [split.digests[i] for i in layout.documents]
    # the same text in other tokens is other targets: perplexities per token of two tokenisers are not comparable
    texts = [f"{digest} {tokenizer.digest}" for digest in split.digests]
    rows: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    warnings: dict[str, None] = {}  # each once
    curve = None
    total = sum(len(layout.windows(ctx).start) * ctx for ctx in contexts)
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress("evaluate", done, total, run=subject.name)

    shared: NDArray[np.float32] | None = None
    for ctx in reversed(contexts):
        factor = methods[ctx].parameters.get("factor")
        windows = layout.windows(ctx)
        try:
            here = model.at(ctx, methods[ctx], encodings[ctx])
        except ContextLengthError as error:
            rows.append(_undefined(ctx, factor, str(error)))
            continue
        warnings |= dict.fromkeys(here.warnings)
        if lacks is not None:  # before anything is scored, and only where nothing is refused
            notice(lacks)
            lacks = None
        tokens = target_tokens(windows, documents)
        if baseline is not None:
            losses = baseline[tokens]
        elif layout.protocol == "prefix" and shared is not None and not here.length_dependent and not per_row:
            # scores at a position do not depend on what follows, so the longest pass holds every shorter one
            losses = shared.reshape(len(windows.start), -1)[:, :ctx].reshape(-1)
            advance(len(windows.start) * ctx)
        else:
            assert passes is not None
            losses = _score(windows, documents, here.scorer, passes.windows[ctx], advance, ranks, bos)
            shared = losses if shared is None else shared
        owner = target_documents(windows)
        n_bytes = int(tokenizer.byte_lengths[tokens].sum()) if text.bytes_known else None
        rows.append(
            {
                "ctx": ctx,
                "factor": factor,
                "idle": here.idle,
                **({} if here.layers is None else {"layers": here.layers}),
                **_figures(losses, n_bytes, owner, authors, split.unit, max(contexts)),
                "documents": len(documents),
                "context_min": ctx - windows.scored + 1,
                "context_mean": ctx - (windows.scored - 1) / 2,
                "spectrum_digest": here.spectrum[:16],
                "targets_digest": layout.targets_digest(texts, ctx)[:16],
            }
        )
        tensors[f"nll.{ctx}"] = torch.from_numpy(losses)
        tensors[f"document.{ctx}"] = torch.from_numpy(owner)
        if curve is None:
            by_position = position_curve(losses, windows)
            curve = {"ctx": ctx, "edges": by_position["edges"], "nll": [_finite(x) for x in by_position["nll"]]}
    rows.reverse()
    if layout.protocol == "last":
        at_train = next((row for row in rows if row["ctx"] == trained.train.ctx and row["status"] == "ok"), None)
        for row in rows:
            if at_train is not None and row["status"] == "ok":
                row["context_gain"] = at_train["nll"] - row["nll"]
    result = {
        "run": subject.name,
        "pos": config.baseline or trained.pos.name,
        "baseline": config.baseline,
        "scaling": scaling.name,
        "factor": None if per_row else methods[max(contexts)].parameters.get("factor"),
        **described,
        "kept_scaling": kept and scaling.name != "none",
        "train_ctx": trained.train.ctx,
        "seed": trained.seed,
        "data": corpus_name,
        "window": config.window,
        "device": device_name(target),
        "matmul_precision": model.precision,
        "memory_planned_mb": None if passes is None else round(passes.needed / 10**6),
        **subject.facts,
        **({} if subject.weights is None else {"weights": subject.weights}),
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
            "bos": bos,
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
        **({"warnings": [*warnings]} if warnings else {}),
    }
    if tensors and ranks.is_first:
        subject.keep()
        _make_results_folder(kept_in)
        from safetensors.torch import save

        files.write(losses_path, save({key: value.contiguous() for key, value in tensors.items()}))
        write_evaluation(result_path, result, losses_path)
    return Evaluated(result, losses_path)


def _limit_gb(asked: float | None, device: torch.device, ranks: Ranks) -> float | None:
    """The memory of one rank: those of a machine without a GPU share what is free."""
    free = free_bytes(device) if ranks.local_world > 1 and device.type == "cpu" else None
    shared = [] if free is None else [free / GB / ranks.local_world]
    return min([*shared, *([] if asked is None else [asked])], default=None)


def _score(
    windows: Windows,
    documents: Sequence[NDArray[np.unsignedinteger]],
    scorer: Scorer,
    rows: int,
    progress: Callable[[int], None],
    ranks: Ranks,
    bos: int | None = None,
) -> NDArray[np.float32]:
    """`score`, its passes shared out; all ranks get all losses, (N x scored,).

    Each rank makes some of the passes that one process would make, in a row: the same numbers. Where there are fewer
    passes than ranks they are made smaller.
    """
    count = len(windows.start)
    if ranks.world == 1:
        return score(windows, documents, scorer, rows=rows, progress=progress, bos=bos)
    # the first rank's: they may have other memory
    rows = ranks.broadcast_object(lambda: min(rows, math.ceil(count / ranks.world)))
    passes = math.ceil(count / rows)
    bounds = [min(count, passes * rank // ranks.world * rows) for rank in range(ranks.world + 1)]
    mine = slice(bounds[ranks.rank], bounds[ranks.rank + 1])
    share = max(1, mine.stop - mine.start)
    part = score(
        windows._replace(document=windows.document[mine], start=windows.start[mine]), documents, scorer, rows=rows,
        progress=lambda tokens: progress(tokens * count // share), bos=bos,
    )  # fmt: skip
    losses = np.empty((count, windows.scored), np.float32)
    losses[mine] = part.reshape(-1, windows.scored)
    for rank, (low, high) in enumerate(itertools.pairwise(bounds)):
        ranks.broadcast(torch.from_numpy(losses[low:high]), source=rank)
    return losses.reshape(-1)


def _make_results_folder(folder: Path) -> None:
    """`RunError` where the numbers could not be kept: known before they are computed."""
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written ({error.strerror}); evaluate a copy of {folder.parent} in another folder"
        ) from None


def unigram_nll(tokens: NDArray[np.unsignedinteger], n_vocab: int) -> NDArray[np.float32]:
    """Loss in nats of each token under the frequencies of `tokens`, one count added: (V,); the separator has infinity.

    What a model can know without any order; Laplace's rule keeps a token that the text lacks finite.
    """
    counts = np.zeros(n_vocab, np.int64)
    for low in range(0, len(tokens), 2**24):  # a memory map is not read at once
        counts += np.bincount(tokens[low : low + 2**24], minlength=n_vocab)
    share = (counts[:-1] + 1) / (counts[:-1] + 1).sum()
    return np.append(-np.log(share), np.inf).astype(np.float32)


def _figures(
    losses: NDArray[np.float32],
    n_bytes: int | None,
    owner: NDArray[np.int64],
    authors: list[str | None],
    unit: str,
    ctx: int,
) -> dict[str, Any]:
    """Perplexity and its kin from the losses of one row: sums in fp64, one division. `n_bytes`: of the targets."""
    exact = losses.astype(np.float64)
    nll = float(exact.sum() / len(exact))
    finite = math.isfinite(nll)
    return {
        "ppl": math.exp(nll) if finite and nll < 700 else None,
        "nll": _finite(nll),
        "bits_per_byte": float(exact.sum() / (math.log(2) * n_bytes)) if finite and n_bytes else None,
        "tokens": len(exact),
        **_interval(exact, owner, authors, unit, ctx),
        "status": "ok" if finite else "non-finite",
    }


def _interval(
    losses: NDArray[np.float64], owner: NDArray[np.int64], authors: list[str | None], unit: str, ctx: int
) -> dict[str, Any]:
    by_document = np.split(losses, np.flatnonzero(np.diff(owner)) + 1)
    interval = row_interval(by_document, max_ctx=ctx, authors=authors, unit=unit)
    if interval is None:
        return {"ci95": None, "unit": None}
    return {"ci95": [_finite(interval.lo), _finite(interval.hi)], "unit": interval.unit}


def _with_authors(evaluated: Evaluated, authors: list[str | None], unit: str) -> Evaluated:
    """A stored evaluation with the authors that are known today, and its intervals over them."""
    result = evaluated.result
    if result["protocol"].get("authors") == authors:
        return evaluated
    tensors = runs.load_tensors(evaluated.losses_path)
    longest = max(row["ctx"] for row in result["rows"])
    rows = [dict(row) for row in result["rows"]]
    for row in rows:
        if row["status"] == "ok":
            losses, owner = tensors[f"nll.{row['ctx']}"].double().numpy(), tensors[f"document.{row['ctx']}"].numpy()
            row |= _interval(losses, owner, authors, unit, longest)
    protocol = {**result["protocol"], "authors": authors}
    return Evaluated({**result, "protocol": protocol, "rows": rows}, evaluated.losses_path)


def _finite(value: float) -> float | None:
    """JSON has no word for infinity and for what is no number."""
    return value if math.isfinite(value) else None


def _undefined(ctx: int, factor: float | None, reason: str) -> dict[str, Any]:
    empty = dict.fromkeys(("ppl", "nll", "bits_per_byte", "ci95", "unit"))
    return {"ctx": ctx, "factor": factor, **empty, "tokens": 0, "documents": 0, "status": "undefined", "reason": reason}
