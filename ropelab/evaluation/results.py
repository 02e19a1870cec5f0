"""The evaluations that a run folder holds, as reports and diagnoses read them: labelled, and equal questions joined."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from ropelab import config as configs
from ropelab import files, runs
from ropelab.config import Method
from ropelab.errors import RunError
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
BOUND = "weights_bound"  # "later": of an earlier version; the weights were compared with their checkpoint's record


def read_evaluation(path: Path) -> dict[str, Any]:
    """A stored `eval` object. `RunError`, with the file and the fix, for one that is damaged or is none."""
    fix = "remove it and evaluate again"
    try:
        item = files.load_json(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); {fix}") from None
    if (wrong := runs.wrong_evaluation(item)) is not None:
        raise RunError(f"{path} is no evaluation ({wrong}); {fix}")
    return dict(item)


def write_evaluation(path: Path, result: Mapping[str, Any], losses: Path) -> None:
    """Store an `eval` object, with what tells whether it and its losses are still those that were computed."""
    files.write_sealed(path, {**result, LOSSES: files.sha256_of(losses)})


def intact_evaluation(path: Path, losses: Path, weights: str | None) -> dict[str, Any] | None:
    """A stored `eval` object with its losses; None where there is none. `RunError` names the file that is damaged.

    `weights`: the digest of the weights that the model has now, which were compared with their record. A result of
    other weights is a `RunError`; one that does not say of which it is, is given theirs, and marked.
    """
    if not os.path.lexists(path):
        return None
    item = read_evaluation(path)
    digest = item.pop(LOSSES, None)
    if not losses.is_file() or losses.is_symlink():
        raise RunError(f"{losses} is missing")
    if digest is not None and files.sha256_of(losses) != digest:
        raise RunError(f"{losses} is truncated or altered")
    if item.get("weights", weights) != weights:
        raise RunError(f"{path} was computed from other weights than those that are there now")
    if "weights" not in item and weights is not None:
        item = _bound_later(path, item, weights, digest)
    return item


def _bound_later(path: Path, item: Mapping[str, Any], weights: str, losses: str | None) -> dict[str, Any]:
    """A stored `eval` object of an earlier version with the digest of the weights, which were compared with it."""
    bound = {**item, "weights": weights, BOUND: "later"}
    with contextlib.suppress(OSError):  # a run that cannot be written is compared each time
        files.write_sealed(path, bound if losses is None else {**bound, LOSSES: losses})
    return bound


def evaluations(run: RunDir, only: Container[str] | None = None, *, hashing: bool = True) -> list[dict[str, Any]]:
    """The stored `eval` objects of a run, all or those of the files named in `only`.

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
    joined: dict[str, dict[str, Any]] = {}
    for path in paths:
        item = read_evaluation(path)
        if weights is not None and item.get("weights", weights) != weights:
            raise RunError(
                f"{path} was computed from other weights than {run.name} has now: evaluate again with its settings, "
                "or remove it"
            )
        if "weights" not in item and weights is not None and hashing and "checkpoint" not in manifest:
            if not checked and not run.has_weights(manifest):
                raise RunError(f"{run.name}: its weights are truncated, altered or missing; train the run again")
            checked = True
            item = _bound_later(path, item, weights, item.get(LOSSES))
        item.pop(LOSSES, None)
        item = {**labels(manifest, Method(item["scaling"], item.get("scaling_parameters", {}))), **item}
        protocol = {key: value for key, value in item["protocol"].items() if key not in BUDGET}
        asked = ("run", "pos", "scaling", "factor", "scaling_changed", "window", "data")
        key = json.dumps([protocol, [item.get(name) for name in asked]], sort_keys=True)
        joined[key] = _joined(joined[key], item) if key in joined else item
    return list(joined.values())


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two answers to one question, each at its ctxs. Where both have one it is the same number."""
    longest, shorter = sorted((one, other), key=lambda item: -max(row["ctx"] for row in item["rows"]))
    rows = {row["ctx"]: row for row in (*shorter["rows"], *longest["rows"])}
    joined = {**longest, "rows": [rows[ctx] for ctx in sorted(rows)]}
    if longest["factor"] is not None and "scaling_parameters" in longest:
        # `auto` was said of each ladder alone
        joined["scaling_parameters"] = {**longest["scaling_parameters"], "factor": longest["factor"]}
    return joined
