"""From a trained run to perplexities."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ropelab import files, runs
from ropelab.config import DataConfig, EvalConfig, Method
from ropelab.devices import DTYPE_NAMES, device_name
from ropelab.distributed import SINGLE, Ranks
from ropelab.errors import ContextLengthError, RunError
from ropelab.evaluation.enough import lacking
from ropelab.evaluation.intervals import row_interval
from ropelab.evaluation.memory import Plan
from ropelab.evaluation.model import LoadedModel, ModelAtCtx
from ropelab.evaluation.plan import EvalPlan, Resources, bytes_of, finite, resolve
from ropelab.evaluation.results import EvalResult, PositionCurve, ProtocolRecord, Row
from ropelab.evaluation.run_model import RunModel
from ropelab.evaluation.scoring import position_curve, score, target_documents, target_tokens
from ropelab.evaluation.stored import Evaluated, write_evaluation
from ropelab.evaluation.targets import Scorer, Windows
from ropelab.progress import Progress, silent
from ropelab.protocols import PROTOCOLS
from ropelab.runs import OpenRun, RunDir, open_run


def evaluate(
    run: OpenRun | RunDir | Path,
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
    resources = Resources(cache_dir, device, progress, notice, ranks)
    opened = open_run(run)
    # until its numbers are kept, the run is neither removed nor trained again
    with opened.folder.in_use() if ranks.is_first else contextlib.nullcontext():
        plan = resolve(RunModel(opened), config, resources, scaling=scaling, other_text=other_text, folder=folder)
        return execute(plan, resources)


def execute(plan: EvalPlan, resources: Resources, *, last: bool = False) -> Evaluated:
    """Score what a plan says, or read it where it is kept already; results are kept in the plan's folder.

    last: nothing else is evaluated of the model, whose weights are let go of then.
    """
    try:
        return _execute(plan, resources)
    finally:
        if last:
            plan.model.close()


def _execute(plan: EvalPlan, resources: Resources) -> Evaluated:
    ranks = resources.ranks
    stored = ranks.broadcast_object(plan.stored)
    if stored is not None:
        # made by an earlier version; the file's name says that they are these
        if stored.recipe is None and ranks.is_first:
            stored = dataclasses.replace(stored, **plan.labels)
            write_evaluation(plan.result_path, stored, files.sha256_of(plan.losses_path))
        return _with_authors(Evaluated(stored, plan.losses_path), plan.authors, plan.text.split.unit)
    passes = plan.passes(ranks)
    if ranks.is_first:
        if plan.folder.parent.is_dir():  # a checkpoint gets its folder when there is something to put there
            _make_results_folder(plan.folder)
        if passes is not None:
            resources.notice(str(passes))
    model = plan.model.load(plan.device, plan.dtype, window=plan.config.window, kept=plan.kept)
    ranks.check_alike("text or scaling", plan.name)
    ranks.connect(plan.device)
    torch.set_float32_matmul_precision(model.precision)
    scored = _Scored(plan, model, passes, resources)
    scored.score_all()
    result = _result(plan, scored, passes, model.precision)
    if scored.tensors and ranks.is_first:
        plan.model.make_folder()
        _make_results_folder(plan.folder)
        from safetensors.torch import save

        files.write(plan.losses_path, save({key: value.contiguous() for key, value in scored.tensors.items()}))
        write_evaluation(plan.result_path, result, files.sha256_of(plan.losses_path))
    return Evaluated(result, plan.losses_path)


class _Scored:
    """The rows of an evaluation while they are made: longest ctx first, since it refuses what memory cannot hold.

    rows: shortest first when all are there. tensors: what is stored beside them. curve: loss by position in a window
    of the longest ctx. warnings: what a reader has to know, each once, in their order.
    """

    def __init__(self, plan: EvalPlan, model: LoadedModel, passes: Plan | None, resources: Resources) -> None:
        self.plan, self.model, self.passes, self.resources = plan, model, passes, resources
        self.rows: list[Row] = []
        self.tensors: dict[str, Tensor] = {}
        self.curve: PositionCurve | None = None
        self.warnings: dict[str, None] = {}
        self._longest: NDArray[np.float32] | None = None  # losses of the first pass
        self._baseline: NDArray[np.float32] | None = None  # (V,)
        self._done = 0  # tokens

    def score_all(self) -> None:
        plan = self.plan
        if plan.config.baseline is not None:
            assert plan.text.training is not None
            self._baseline = unigram_nll(plan.text.training.tokens, plan.model.tokenizer.n_vocab)
        lacks = None
        if self.resources.ranks.is_first:
            text = plan.text.config or plan.model.trained.data
            lacks = lacking(plan.text.split, plan.targets.documents, plan.targets.span, text)
        for ctx in reversed(plan.contexts):
            method = plan.positions.methods[ctx]
            try:
                here = self.model.at(ctx, method, plan.positions.encodings[ctx])
            except ContextLengthError as error:
                self.rows.append(_undefined(ctx, method.parameters.get("factor"), str(error)))
                continue
            if lacks is not None:  # before anything is scored, and only where nothing is refused
                self.resources.notice(lacks)
                lacks = None
            self._score_ctx(ctx, here)
        self.rows.reverse()
        if PROTOCOLS[plan.targets.protocol].only_context_grows:
            at_train = next((row.nll for row in self.rows if row.ctx == plan.model.trained.train.ctx), None)
            if at_train is not None:
                self.rows = [
                    row if row.nll is None else dataclasses.replace(row, context_gain=at_train - row.nll)
                    for row in self.rows
                ]

    def _score_ctx(self, ctx: int, here: ModelAtCtx) -> None:
        plan, documents = self.plan, self.plan.documents
        windows = plan.targets.windows(ctx)
        self.warnings |= dict.fromkeys(here.warnings)
        tokens = target_tokens(windows, documents)
        losses = self._losses(windows, tokens, here)
        owner = target_documents(windows)
        # the same text in other tokens is other targets: perplexities per token of two tokenisers are not comparable
        texts = [f"{digest} {plan.model.tokenizer.digest}" for digest in plan.text.split.digests]
        self.rows.append(
            Row(
                ctx=ctx,
                factor=plan.positions.methods[ctx].parameters.get("factor"),
                idle=here.idle,
                layers=here.layers,
                **_figures(
                    losses, bytes_of(plan, tokens), owner, plan.authors, plan.text.split.unit, max(plan.contexts)
                ),
                documents=len(documents),
                context_min=ctx - windows.scored + 1,
                context_mean=ctx - (windows.scored - 1) / 2,
                spectrum_digest=here.spectrum[:16],
                targets_digest=plan.targets.targets_digest(texts, ctx)[:16],
            )
        )
        self.tensors[f"nll.{ctx}"] = torch.from_numpy(losses)
        self.tensors[f"document.{ctx}"] = torch.from_numpy(owner)
        if self.curve is None:
            by_position = position_curve(losses, windows)
            self.curve = PositionCurve(ctx=ctx, edges=by_position["edges"], nll=[finite(x) for x in by_position["nll"]])

    def _losses(self, windows: Windows, tokens: NDArray[np.int64], here: ModelAtCtx) -> NDArray[np.float32]:
        """Losses of the targets of one ctx, nats, in their order."""
        plan = self.plan
        if self._baseline is not None:
            return self._baseline[tokens]
        one_pass = PROTOCOLS[plan.targets.protocol].one_pass
        shares = one_pass and not here.length_dependent and not plan.per_row
        if shares and self._longest is not None:
            # scores at a position do not depend on what follows, so the longest pass holds every shorter one
            self._advance(len(windows.start) * windows.ctx)
            return self._longest.reshape(len(windows.start), -1)[:, : windows.ctx].reshape(-1)
        assert self.passes is not None
        rows = self.passes.windows[windows.ctx]
        losses = _score(windows, plan.documents, here.scorer, rows, self._advance, self.resources.ranks, plan.bos)
        self._longest = losses if self._longest is None else self._longest
        return losses

    def _advance(self, tokens: int) -> None:
        self._done += tokens
        if self.resources.ranks.is_first:
            plan = self.plan
            total = sum(len(plan.targets.windows(ctx).start) * ctx for ctx in plan.contexts)
            self.resources.progress("evaluate", self._done, total, run=plan.model.name)


def _result(plan: EvalPlan, scored: _Scored, passes: Plan | None, precision: str) -> EvalResult:
    config, model, targets = plan.config, plan.model, plan.targets
    scaling, methods = plan.positions.scaling, plan.positions.methods
    digests = [row.targets_digest for row in reversed(scored.rows) if row.ok]
    kind = PROTOCOLS[targets.protocol]
    own = {} if kind.parameter is None else {kind.parameter: targets.scored}
    protocol = ProtocolRecord(
        name=targets.protocol,
        stride=own.pop("stride", None),
        last=own.pop("last", None),
        extra=own,
        span=targets.span,
        tokens=config.tokens,
        max_ctx=config.max_ctx,
        split=config.split,
        documents=len(targets.documents),
        left_out=targets.left_out,
        unused=targets.unused,
        bos=plan.bos,
        targets_digest=next(iter(digests), None) if kind.same_targets else None,
        document_digests=[plan.text.split.digests[i] for i in targets.documents],
        authors=plan.authors,
        data_digest=plan.text.digest[:16],
        tokenizer=model.tokenizer.name,
        dtype=DTYPE_NAMES[plan.dtype],
    )
    return EvalResult(
        run=model.name,
        pos=config.baseline or model.trained.pos.name,
        baseline=config.baseline,
        scaling=scaling.name,
        factor=None if plan.per_row else methods[max(plan.contexts)].parameters.get("factor"),
        **plan.labels,
        kept_scaling=plan.kept and scaling.name != "none",
        train_ctx=model.trained.train.ctx,
        seed=model.trained.seed,
        data=plan.text.name,
        window=config.window,
        device=device_name(plan.device),
        matmul_precision=precision,
        memory_planned_mb=None if passes is None else round(passes.needed / 10**6),
        weights=model.weights,
        protocol=protocol,
        rows=scored.rows,
        position_curve=scored.curve,
        warnings=[*scored.warnings],
        extra=dict(model.facts),
    )


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
    is_finite = math.isfinite(nll)
    return {
        "ppl": math.exp(nll) if is_finite and nll < 700 else None,
        "nll": finite(nll),
        "bits_per_byte": float(exact.sum() / (math.log(2) * n_bytes)) if is_finite and n_bytes else None,
        "tokens": len(exact),
        **_interval(exact, owner, authors, unit, ctx),
        "status": "ok" if is_finite else "non-finite",
    }


def _interval(
    losses: NDArray[np.float64], owner: NDArray[np.int64], authors: list[str | None], unit: str, ctx: int
) -> dict[str, Any]:
    by_document = np.split(losses, np.flatnonzero(np.diff(owner)) + 1)
    interval = row_interval(by_document, max_ctx=ctx, authors=authors, unit=unit)
    if interval is None:
        return {"ci95": None, "unit": None}
    return {"ci95": (finite(interval.lo), finite(interval.hi)), "unit": interval.unit}


def _with_authors(evaluated: Evaluated, authors: list[str | None], unit: str) -> Evaluated:
    """A stored evaluation with the authors that are known today, and its intervals over them."""
    result = evaluated.result
    if result.protocol.authors == authors:
        return evaluated
    tensors = runs.load_tensors(evaluated.losses_path)
    longest = max(row.ctx for row in result.rows)
    rows = list(result.rows)
    for number, row in enumerate(rows):
        if row.ok:
            losses, owner = tensors[f"nll.{row.ctx}"].double().numpy(), tensors[f"document.{row.ctx}"].numpy()
            rows[number] = dataclasses.replace(row, **_interval(losses, owner, authors, unit, longest))
    protocol = dataclasses.replace(result.protocol, authors=authors)
    return Evaluated(dataclasses.replace(result, protocol=protocol, rows=rows), evaluated.losses_path)


def _undefined(ctx: int, factor: float | None, reason: str) -> Row:
    return Row(
        ctx=ctx, factor=factor, ppl=None, nll=None, bits_per_byte=None, tokens=0, ci95=None, documents=0,
        status="undefined", reason=reason,
    )  # fmt: skip
