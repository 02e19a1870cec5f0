"""The evaluations that a run folder holds, as reports and diagnoses read them: labelled, and equal questions joined."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ropelab import config as configs
from ropelab import files, runs
from ropelab.config import Method
from ropelab.errors import RunError
from ropelab.evaluation.results import EvalResult
from ropelab.runs import RunDir, config_of

BUDGET = ("tokens", "max_ctx")  # of a protocol: they decide which targets are scored, and the digest says which were


def labels(manifest: Mapping[str, Any], scaling: Method) -> dict[str, Any]:
    """What an evaluation's reader has to know beside the names of encoding and scaling.

    {"pos_changed", "scaling_changed": the parameters that are not those of the YAML (`factor` has its own place),
    "recipe": a digest of all that made the run but its seed: runs with equal ones are repetitions}.
    """
    pos = manifest["config"]["pos"]
    trained = Method(pos["name"], {key: value for key, value in pos.items() if key != "name"})
    return {
        "pos_changed": configs.changed("pos", trained),
        "scaling_changed": configs.changed("scaling", scaling),
        "recipe": runs.recipe(manifest),
    }


LOSSES = "losses_sha256"  # of a stored evaluation: the digest of the file of its losses


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """One evaluation, and the losses it was computed from."""

    result: EvalResult
    losses_path: Path

    def document_means(self, ctx: int) -> dict[str, float]:
        """Mean loss in nats of every document at one ctx, by the digest of its text."""
        tensors = runs.load_tensors(self.losses_path)
        losses = tensors[f"nll.{ctx}"].double().numpy()
        document = tensors[f"document.{ctx}"].numpy()
        sums = np.bincount(document, losses)
        counts = np.bincount(document)
        return dict(zip(self.result.protocol.document_digests or (), (sums / counts).tolist(), strict=True))


def read_evaluation(path: Path) -> tuple[EvalResult, str | None]:
    """A stored evaluation, and the digest of its losses where it says so.

    `RunError`, with the file and the fix, for one that is damaged or not an evaluation.
    """
    fix = "remove it and evaluate again"
    try:
        item = files.load_json(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); {fix}") from None
    try:
        result = EvalResult.from_json(item)
        digest = result.extra.get(LOSSES)
        if not isinstance(digest, str | None):
            raise ValueError(f"{LOSSES} is {type(digest).__name__}")
    except ValueError as error:
        raise RunError(f"{path} is no evaluation ({error}); {fix}") from None
    extra = {key: value for key, value in result.extra.items() if key != LOSSES}
    return dataclasses.replace(result, extra=extra), digest


def write_evaluation(path: Path, result: EvalResult, losses: str | None) -> None:
    """Store an evaluation with the digest of its losses: whether both are still what was computed can be told."""
    files.write_sealed(path, {**result.to_json(), **({} if losses is None else {LOSSES: losses})})


def intact_evaluation(path: Path, losses: Path, weights: str | None) -> EvalResult | None:
    """A stored evaluation with its losses; None where there is none. `RunError` names the file that is damaged.

    `weights`: the digest of the weights that the model has now, which were compared with their record. A result of
    other weights is a `RunError`; one that does not say of which it is, is given theirs, and marked.
    """
    if not os.path.lexists(path):
        return None
    result, digest = read_evaluation(path)
    if not losses.is_file() or losses.is_symlink():
        raise RunError(f"{losses} is missing")
    if digest is not None and files.sha256_of(losses) != digest:
        raise RunError(f"{losses} is truncated or altered")
    if result.weights not in (None, weights) and weights is not None:
        raise RunError(f"{path} was computed from other weights than those that are there now")
    if result.weights is None and weights is not None:
        result = _bound_later(path, result, weights, digest)
    return result


def _bound_later(path: Path, result: EvalResult, weights: str, losses: str | None) -> EvalResult:
    """A stored evaluation of an earlier version with the digest of the weights, which were compared with it."""
    bound = dataclasses.replace(result, weights=weights, weights_bound="later")
    with contextlib.suppress(OSError):  # a run that cannot be written is compared each time
        write_evaluation(path, bound, losses)
    return bound


def evaluations(run: RunDir, only: Container[str] | None = None, *, hashing: bool = True) -> list[EvalResult]:
    """The stored evaluations of a run, all or those of the files named in `only`.

    Rows that answer one question at several ctxs are one object.

    `RunError` for a file that cannot be read, the manifest included, and for one that was computed from other weights
    than the run has. Of files of earlier versions, which do not say of which they are, the weights are compared with
    their checkpoint's record once, if `hashing`, and the files say so from then on.
    """
    paths = sorted(path for path in run.results.glob("*.json") if not path.name.startswith("."))
    paths = [path for path in paths if only is None or path.stem in only]
    if not paths:
        return []
    manifest = run.whole_manifest()
    config_of(manifest, run)  # or `RunError`: what follows goes by it
    weights = manifest["digest"] if "checkpoint" in manifest else run.weights_digest(manifest)
    checked = False
    joined: dict[str, EvalResult] = {}
    for path in paths:
        result, losses = read_evaluation(path)
        if None not in (weights, result.weights) and result.weights != weights:
            raise RunError(
                f"{path} was computed from other weights than {run.name} has now: evaluate again with its settings, "
                "or remove it"
            )
        if result.weights is None and weights is not None and hashing and "checkpoint" not in manifest:
            if not checked and not run.has_weights(manifest):
                raise RunError(f"{run.name}: its weights are truncated, altered or missing; train the run again")
            checked = True
            result = _bound_later(path, result, weights, losses)
        known = labels(manifest, Method(result.scaling, result.scaling_parameters or {}))
        result = dataclasses.replace(result, **{key: x for key, x in known.items() if getattr(result, key) is None})
        key = _question(result)
        joined[key] = _joined(joined[key], result) if key in joined else result
    return list(joined.values())


def _question(result: EvalResult) -> str:
    """What an evaluation answers, its contexts aside."""
    protocol = {key: value for key, value in result.protocol.to_json().items() if key not in BUDGET}
    asked = [result.run, result.pos, result.scaling, result.factor, result.scaling_changed, result.window, result.data]
    return json.dumps([protocol, asked], sort_keys=True)


def _joined(one: EvalResult, other: EvalResult) -> EvalResult:
    """Two answers to one question, each at its ctxs. Where both have one it is the same number."""
    longest, shorter = sorted((one, other), key=lambda item: -max(row.ctx for row in item.rows))
    rows = {row.ctx: row for row in (*shorter.rows, *longest.rows)}
    parameters = longest.scaling_parameters
    if longest.factor is not None and parameters is not None:
        parameters = {**parameters, "factor": longest.factor}  # `auto` was said of each ladder alone
    return dataclasses.replace(longest, rows=[rows[ctx] for ctx in sorted(rows)], scaling_parameters=parameters)
