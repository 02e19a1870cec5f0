"""A finished run of ours as what an evaluation measures: its weights, its text, its passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ropelab import data
from ropelab.config import DataConfig, Method, SplitNames
from ropelab.devices import matmul_precision
from ropelab.evaluation.memory import Plan, plan
from ropelab.evaluation.model import EvaluatedModel, LoadedModel, ModelAtCtx, Text
from ropelab.model import GPT
from ropelab.positions import PositionEncoding, encoding_digest
from ropelab.progress import Progress
from ropelab.runs import OpenRun, check_applied, set_encoding


class RunModel(EvaluatedModel):
    """A finished run of ours. `RunError` where its weights are damaged."""

    def __init__(self, run: OpenRun) -> None:
        run.weights  # noqa: B018 - refused before any text is read
        self.run, self.weights = run, run.weights_digest
        self.name, self.results = run.name, run.folder.results
        self.manifest, self.trained = run.manifest, run.config
        self.original_ctx, self.tokenizer = run.original_ctx, run.tokenizer

    def close(self) -> None:
        self.run.close()

    def text(self, other: DataConfig | None, which: str, cache_dir: str, progress: Progress) -> Text:
        own = self.run.corpus(cache_dir, progress)
        if other is None or same_text(other, self.trained.data):
            return Text(own.test if which == "test" else own.validation, own.digest, own.name, own.train, config=other)
        if which != "test":
            raise ValueError(f"eval.split={which} belongs to the run's own text; other text is all test")
        cache = Path(cache_dir).expanduser()
        found = data.prepare(other, cache_dir=cache, evaluate_only=True, tokenizer=self.tokenizer, progress=progress)
        found = data.check_overlap(own, found, other.overlap)
        return Text(found.test, found.digest, found.name, own.train, config=other)

    def plan(
        self,
        encodings: Mapping[int, PositionEncoding],
        device: torch.device,
        dtype: torch.dtype,
        *,
        limit_gb: float | None,
    ) -> Plan:
        return plan(self.trained.model, self.tokenizer.n_vocab, encodings, device, limit_gb=limit_gb)

    def load(self, device: torch.device, dtype: torch.dtype, *, window: int | None, kept: bool) -> LoadedModel:
        return _LoadedRun(self.run, device, dtype, window)


class _LoadedRun(LoadedModel):
    def __init__(self, run: OpenRun, device: torch.device, dtype: torch.dtype, window: int | None) -> None:
        self._model, self._original_ctx = run.model(device), run.original_ctx
        self._plain = self._model.encoding
        self._scorer = scorer_of(self._model, window=window, dtype=dtype)
        self.precision = matmul_precision(device, run.config.model.d_model)

    def at(self, ctx: int, method: Method, encoding: PositionEncoding) -> ModelAtCtx:
        set_encoding(self._model, encoding)
        spectrum = encoding_digest(encoding, ctx)
        idle = check_applied(method, self._plain, self._original_ctx, ctx, spectrum)
        return ModelAtCtx(spectrum, idle, encoding.length_dependent, self._scorer)


def same_text(one: DataConfig, other: DataConfig) -> bool:
    """Whether `one` names the text that `other` does; a path counts as the place that it leads to.

    What `one` leaves open of splits and test files is as in the other.
    """

    def place(path: str | None) -> Path | None:
        return None if path is None else Path(path).expanduser().resolve()

    return (
        (one.name, one.subset, one.text_field, place(one.path))
        == (other.name, other.subset, other.text_field, place(other.path))
        and one.test_path in (None, other.test_path)
        and one.splits in (SplitNames(), other.splits)
    )


def scorer_of(model: GPT, *, window: int | None, dtype: torch.dtype) -> Callable[..., NDArray[np.float32]]:
    """A model as (inputs (B, ctx) int64, targets (B, scored) int64) -> losses of the targets in nats, (B, scored)."""
    device = model.tokens.weight.device

    @torch.no_grad()
    def scorer(inputs: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = model(torch.from_numpy(inputs).to(device), window=window)  # (B, ctx, C)
            scored = model.nll(hidden[:, -targets.shape[1] :], torch.from_numpy(targets).to(device))  # (B, scored)
        losses: NDArray[np.float32] = scored.float().cpu().numpy()
        return losses

    return scorer
