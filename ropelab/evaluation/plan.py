"""An evaluation resolved: lengths, scaling, encodings, text and targets, made once before anything is scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ropelab import files, runs
from ropelab.config import Config, DataConfig, EvalConfig, Method
from ropelab.devices import DTYPE_NAMES, device_of_rank, resolve_dtype
from ropelab.distributed import SINGLE, Ranks
from ropelab.errors import RunError
from ropelab.evaluation.memory import GB, Plan, free_bytes
from ropelab.evaluation.model import EvaluatedModel, Text
from ropelab.evaluation.results import EvalResult
from ropelab.evaluation.stored import intact_evaluation, labels
from ropelab.evaluation.targets import TargetPlan, context_lengths, plan_targets
from ropelab.positions import PositionEncoding
from ropelab.progress import Progress, silent, tell
from ropelab.runs import encoding_of
from ropelab.scalings import resolve_factor


@dataclass(frozen=True)
class Resources:
    """Where work is done and who hears of it: nothing of it changes what comes out.

    device: as in the configuration. notice: called with lines that are said before work starts.
    """

    cache_dir: str
    device: str = "auto"
    progress: Progress = silent
    notice: Callable[[str], None] = lambda line: None
    ranks: Ranks = SINGLE


class MethodsByCtx(NamedTuple):
    """The contexts of an evaluation, and what positions are at each; known before any text is read."""

    scaling: Method  # its factor as it was given
    methods: dict[int, Method]  # the scaling with its factor as a number, by ctx, shortest first
    encodings: dict[int, PositionEncoding]  # equal methods share one


def resolve_methods(trained: Config, original_ctx: int, config: EvalConfig, *, scaling: Method | None) -> MethodsByCtx:
    """The contexts of an evaluation, and scaling and encoding at each; None keeps the trained scaling.

    `ValueError` if a length is invalid, or the trained encoding cannot have the scaling.
    """
    scaling = trained.scaling if scaling is None else scaling
    contexts = context_lengths(config.ctx, trained.train.ctx)
    per_row = scaling.parameters.get("factor") == "auto-row"
    methods = {
        ctx: resolve_factor(scaling, longest=ctx if per_row else max(contexts), original_ctx=original_ctx)
        for ctx in contexts
    }
    built: list[tuple[Method, PositionEncoding]] = []
    for method in methods.values():
        if all(method != known for known, _ in built):
            built.append((method, encoding_of(trained, method, original_ctx)))
    encodings = {ctx: next(one for known, one in built if known == method) for ctx, method in methods.items()}
    return MethodsByCtx(scaling, methods, encodings)


@dataclass(frozen=True)
class EvalPlan:
    """One evaluation of one model under one scaling: everything about it but the losses.

    kept: is the scaling the one that the model was trained with? bos: the token that begins every window. name: the
    digest of the question, which its files are called by in `folder`.
    """

    model: EvaluatedModel
    config: EvalConfig
    positions: MethodsByCtx
    kept: bool
    bos: int | None
    text: Text
    targets: TargetPlan
    device: torch.device
    dtype: torch.dtype
    name: str
    folder: Path

    @property
    def contexts(self) -> tuple[int, ...]:
        return tuple(self.positions.methods)

    @property
    def per_row(self) -> bool:
        """Has every ctx a factor of its own?"""
        return self.positions.scaling.parameters.get("factor") == "auto-row"

    @property
    def documents(self) -> list[NDArray[np.unsignedinteger]]:
        """The tokens of the documents that are scored."""
        return [self.text.split.document(i) for i in self.targets.documents]

    @property
    def authors(self) -> list[str | None]:
        """Who wrote each of them, where the text says so."""
        return [self.text.split.authors[i] for i in self.targets.documents]

    @property
    def result_path(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def losses_path(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    @property
    def labels(self) -> dict[str, Any]:
        """The fields that say what encoding and scaling are, beside their names."""
        scaling = self.positions.scaling
        return {"scaling_parameters": dict(scaling.parameters), **labels(self.model.manifest, scaling)}

    def stored(self) -> EvalResult | None:
        """The result, where it is kept already; a damaged one is said on stderr and evaluated again."""
        try:
            return intact_evaluation(self.result_path, self.losses_path, self.model.weights)
        except RunError as error:
            tell(f"{str(error).partition('; ')[0]}; it is evaluated again")
            return None

    def passes(self, ranks: Ranks) -> Plan | None:
        """The windows of each forward pass; None for a baseline. `ValueError` where a window does not fit."""
        if self.config.baseline is not None:
            return None
        limit = _limit_gb(self.config.memory_gb, self.device, ranks)
        return self.model.plan(self.positions.encodings, self.device, self.dtype, limit_gb=limit)


def resolve(
    model: EvaluatedModel,
    config: EvalConfig,
    resources: Resources,
    *,
    scaling: Method | None = None,
    other_text: DataConfig | None = None,
    folder: Path | None = None,
) -> EvalPlan:
    """Work out an evaluation; nothing is scored and nothing written but the cache of tokens.

    scaling: replaces the trained one (`none` removes it; None keeps it). other_text: is scored instead of the run's
    own test split, with the run's tokeniser. folder: where results go instead of the model's own place.
    `ValueError` for what cannot be evaluated.
    """
    ranks = resources.ranks
    kept = scaling is None
    bos = model.bos_token(config.bos)
    found = resolve_methods(model.trained, model.original_ctx, config, scaling=scaling)
    if kept and model.own_scaling is not None:
        found = found._replace(scaling=model.own_scaling, methods=dict.fromkeys(found.methods, model.own_scaling))
    progress = resources.progress if ranks.is_first else silent
    with ranks.first_then_others():
        text = model.text(other_text, config.split, resources.cache_dir, progress)
    if config.baseline is not None and (found.scaling.name != "none" or config.window is not None):
        raise ValueError("eval.baseline=unigram knows no positions: leave out --scaling and eval.window")
    if config.baseline is not None and text.training is None:
        raise ValueError("eval.baseline=unigram counts a run's training text; that of a checkpoint is not known")
    split = text.split
    targets = plan_targets([len(split.document(i)) for i in range(len(split))], tuple(found.methods), config)
    device = device_of_rank(resources.device, ranks)
    dtype = resolve_dtype(config.dtype, device)
    name = files.digest_of(_question(model, config, found.methods, text, targets, dtype, bos))[:16]
    return EvalPlan(
        model, config, found, kept, bos, text, targets, device, dtype, name, folder or model.results
    )  # fmt: skip


def _question(
    model: EvaluatedModel,
    config: EvalConfig,
    methods: Mapping[int, Method],
    text: Text,
    targets: TargetPlan,
    dtype: torch.dtype,
    bos: int | None,
) -> dict[str, Any]:
    """All that decides the numbers of an evaluation of a model; what is new and not used is absent."""
    return {
        "numerics": runs.NUMERICS_VERSION,
        "scaling": {str(ctx): {"name": m.name, **m.parameters} for ctx, m in methods.items()},
        "window": config.window,
        "protocol": [
            targets.protocol, targets.contexts, targets.span, targets.scored, targets.documents, targets.units
        ],
        "text": [text.digest, config.split],
        "tokenizer": model.tokenizer.digest,
        "dtype": DTYPE_NAMES[dtype],
        **({} if config.baseline is None else {"baseline": config.baseline}),
        **({} if bos is None else {"bos": bos}),
        **model.identity,
    }  # fmt: skip


def _limit_gb(asked: float | None, device: torch.device, ranks: Ranks) -> float | None:
    """The memory of one rank: those of a machine without a GPU share what is free."""
    free = free_bytes(device) if ranks.local_world > 1 and device.type == "cpu" else None
    shared = [] if free is None else [free / GB / ranks.local_world]
    return min([*shared, *([] if asked is None else [asked])], default=None)


def bytes_of(plan: EvalPlan, tokens: NDArray[np.int64]) -> int | None:
    """Bytes of text that tokens stand for; None where the tokeniser's lengths do not add up to the text's."""
    return int(plan.model.tokenizer.byte_lengths[tokens].sum()) if plan.text.bytes_known else None


def finite(value: float) -> float | None:
    """JSON has no word for infinity and for what is no number."""
    return value if math.isfinite(value) else None
