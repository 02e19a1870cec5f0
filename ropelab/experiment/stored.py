"""The evaluations that a run folder holds, as reports and diagnoses read them: labelled, and equal questions joined."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from ropelab import config as configs
from ropelab import files, runs
from ropelab.experiment.finished import trained_config
from ropelab.runs import RunDir, RunError
from ropelab.schema import PROTOCOLS, Method

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
# what a stored evaluation says, by type
_TEXT, _LENGTH, _NUMBER = (str,), (int,), (int, float)
_NOTHING = (type(None),)
TOP: dict[str, tuple[type, ...]] = {
    "run": _TEXT, "pos": _TEXT, "scaling": _TEXT, "data": _TEXT, "train_ctx": _LENGTH, "seed": _LENGTH,
    "factor": _NUMBER + _NOTHING, "window": _LENGTH + _NOTHING, "protocol": (dict,), "rows": (list,),
    "position_curve": (dict, *_NOTHING),
}  # fmt: skip
OPTIONAL: dict[str, tuple[type, ...]] = {
    "baseline": _TEXT + _NOTHING, "kept_scaling": (bool,), "scaling_parameters": (dict,), "scaling_changed": (dict,),
    "pos_changed": (dict,), "recipe": _TEXT, "warnings": (list,),
}  # fmt: skip
ROW: dict[str, tuple[type, ...]] = {
    "ctx": _LENGTH, "status": _TEXT, "factor": _NUMBER + _NOTHING, "ppl": _NUMBER + _NOTHING,
    "nll": _NUMBER + _NOTHING, "bits_per_byte": _NUMBER + _NOTHING, "tokens": _LENGTH, "documents": _LENGTH,
    "ci95": (list, *_NOTHING),
}  # fmt: skip
ROW_OPTIONAL: dict[str, tuple[type, ...]] = {
    "targets_digest": _TEXT + _NOTHING, "reason": _TEXT + _NOTHING, "unit": _TEXT + _NOTHING, "idle": (bool,),
    "context_gain": _NUMBER + _NOTHING, "layers": _TEXT + _NOTHING,
}  # fmt: skip
PROTOCOL: dict[str, tuple[type, ...]] = {"name": _TEXT}
PROTOCOL_OPTIONAL: dict[str, tuple[type, ...]] = {
    "stride": _LENGTH + _NOTHING, "last": _LENGTH + _NOTHING, "span": _LENGTH + _NOTHING, "tokens": _LENGTH + _NOTHING,
    "max_ctx": _LENGTH + _NOTHING, "split": _TEXT, "documents": _LENGTH, "left_out": _LENGTH, "unused": _LENGTH,
    "targets_digest": _TEXT + _NOTHING, "document_digests": (list,), "authors": (list,), "dtype": _TEXT,
    "bos": _LENGTH + _NOTHING,
}  # fmt: skip


def read_evaluation(path: Path) -> dict[str, Any]:
    """A stored `eval` object. `RunError`, with the file and the fix, for one that is damaged or is none."""
    fix = "remove it and evaluate again"
    try:
        item = files.load_json(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); {fix}") from None
    if (wrong := _wrong(item)) is not None:
        raise RunError(f"{path} is no evaluation ({wrong}); {fix}")
    return dict(item)


def write_evaluation(path: Path, result: Mapping[str, Any], losses: Path) -> None:
    """Store an `eval` object, with what tells whether it and its losses are still those that were computed."""
    files.write_sealed(path, {**result, LOSSES: files.sha256_of(losses)})


def intact_evaluation(path: Path, losses: Path) -> dict[str, Any] | None:
    """A stored `eval` object with its losses; None where there is none. `RunError` names the file that is damaged."""
    if not path.exists():
        return None
    item = read_evaluation(path)
    digest = item.pop(LOSSES, None)
    if not losses.is_file():
        raise RunError(f"{losses} is missing")
    if digest is not None and files.sha256_of(losses) != digest:
        raise RunError(f"{losses} is truncated or altered")
    return item


def _wrong(item: Any) -> str | None:
    """What of a value is not as an `eval` object has it."""
    if not isinstance(item, dict):
        return "it is no JSON object"
    if wrong := _mistyped(item, TOP, OPTIONAL, "") or _mistyped(
        item["protocol"], PROTOCOL, PROTOCOL_OPTIONAL, "protocol."
    ):
        return wrong
    if item["protocol"]["name"] not in PROTOCOLS:
        return f"protocol.name is {item['protocol']['name']!r}"
    if not item["rows"]:
        return "it has no rows"
    for number, row in enumerate(item["rows"]):
        if not isinstance(row, dict):
            return f"rows[{number}] is no object"
        if wrong := _mistyped(row, ROW, ROW_OPTIONAL, f"rows[{number}]."):
            return wrong
        ends = row["ci95"] or [None, None]
        if row["ctx"] < 1 or len(ends) != 2 or not all(end is None or _is(end, _NUMBER) for end in ends):
            return f"rows[{number}] has no ctx, or no interval"
    curve = item["position_curve"]
    if curve is not None:
        edges, nll = curve.get("edges"), curve.get("nll")
        numbers = isinstance(edges, list) and isinstance(nll, list) and _is(curve.get("ctx"), _LENGTH)
        if not numbers or len(edges) != len(nll) + 1 or not all(_is(edge, _NUMBER) for edge in edges):
            return "position_curve is none"
        if not all(value is None or _is(value, _NUMBER) for value in nll):
            return "position_curve.nll holds no numbers"
    return None


def _mistyped(
    item: Mapping[str, Any], needed: Mapping[str, tuple[type, ...]], other: Mapping[str, tuple[type, ...]], where: str
) -> str | None:
    if missing := next((key for key in needed if key not in item), None):
        return f"{where}{missing} is missing"
    for key, kinds in {**needed, **other}.items():
        if key in item and not _is(item[key], kinds):
            return f"{where}{key} is {type(item[key]).__name__}"
    return None


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    """Is a value of these types? True and False are no numbers, and neither is what is not finite."""
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) and (not isinstance(value, float) or math.isfinite(value))


def evaluations(run: RunDir, only: Container[str] | None = None) -> list[dict[str, Any]]:
    """The stored `eval` objects of a run, all or those of the files named in `only`.

    Rows that answer one question at several ctxs are one object.

    `RunError` for a file that cannot be read, its manifest included.
    """
    paths = sorted(path for path in run.results.glob("*.json") if not path.name.startswith("."))
    paths = [path for path in paths if only is None or path.stem in only]
    if not paths:
        return []
    manifest = run.whole_manifest()
    trained_config(run)  # or `RunError`: what follows goes by it
    joined: dict[str, dict[str, Any]] = {}
    for path in paths:
        item = read_evaluation(path)
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
