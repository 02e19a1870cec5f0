"""A finished run of ours as what an evaluation measures: its weights, its text, its passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ropelab import data
from ropelab.config import Config, DataConfig, Method, SplitNames
from ropelab.devices import matmul_precision
from ropelab.errors import RunError
from ropelab.evaluation.memory import Plan, plan
from ropelab.evaluation.model import At, Loaded, Subject, Text
from ropelab.model import GPT
from ropelab.positions import PositionEncoding, encoding_digest
from ropelab.progress import Progress
from ropelab.runs import RunDir, check_applied, load_model, run_tokenizer, set_encoding, trained_config


class TrainedRun(Subject):
    """A finished run of ours. `RunError` where it is not finished, or its weights are damaged."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._weights, self.weights = run.load_weights(), run.weights_digest()
        self.name, self.results = run.name, run.results
        self.manifest = run.finished_manifest()
        self.trained = trained_config(run)
        self.original_ctx = self.manifest["original_ctx"]
        self.tokenizer = run_tokenizer(run)

    def text(self, other: DataConfig | None, which: str, cache_dir: str, progress: Progress) -> Text:
        own, split, digest, name = evaluation_split(
            self.manifest, self.trained, other, which, self.tokenizer, cache_dir, progress
        )
        return Text(split, digest, name, own.train)

    def plan(
        self,
        encodings: Mapping[int, PositionEncoding],
        device: torch.device,
        dtype: torch.dtype,
        *,
        limit_gb: float | None,
    ) -> Plan:
        return plan(self.trained.model, self.tokenizer.n_vocab, encodings, device, limit_gb=limit_gb)

    def load(self, device: torch.device, dtype: torch.dtype, *, window: int | None, kept: bool) -> Loaded:
        precision = matmul_precision(device, self.trained.model.d_model)
        return _LoadedRun(
            load_model(self._run, self._weights, device=device), self.original_ctx, window, dtype, precision
        )


class _LoadedRun(Loaded):
    def __init__(self, model: GPT, original_ctx: int, window: int | None, dtype: torch.dtype, precision: str) -> None:
        self._model, self._plain, self._original_ctx = model, model.encoding, original_ctx
        self._scorer = scorer_of(model, window=window, dtype=dtype)
        self.precision = precision

    def at(self, ctx: int, method: Method, encoding: PositionEncoding) -> At:
        set_encoding(self._model, encoding)
        spectrum = encoding_digest(encoding, ctx)
        idle = check_applied(method, self._plain, self._original_ctx, ctx, spectrum)
        return At(spectrum, idle, encoding.length_dependent, self._scorer)


def evaluation_split(
    manifest: dict[str, Any],
    trained: Config,
    other_text: DataConfig | None,
    which: str,
    tokenizer: data.Tokenizer,
    cache_dir: str,
    progress: Progress,
) -> tuple[data.Corpus, data.Split, str, str]:
    """The run's own text, the documents to score, the digest of their corpus and its name.

    `RunError` when the run's own text changed.
    """
    cache = Path(cache_dir).expanduser()
    own = data.prepare(trained.data, cache_dir=cache, tokenizer=tokenizer, progress=progress)
    if own.digest != manifest["corpus"]["digest"]:
        raise RunError(
            f"the text of data={trained.data.name} is not the one that {manifest['run']} was trained on; restore it"
        )
    if other_text is None or same_text(other_text, trained.data):
        return own, (own.test if which == "test" else own.validation), own.digest, own.name
    if which != "test":
        raise ValueError(f"eval.split={which} belongs to the run's own text; other text is all test")
    other = data.prepare(other_text, cache_dir=cache, evaluate_only=True, tokenizer=tokenizer, progress=progress)
    other = data.check_overlap(own, other, other_text.overlap)
    return own, other.test, other.digest, other.name


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
