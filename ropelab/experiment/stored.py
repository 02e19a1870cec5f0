"""The evaluations that a run folder holds, as reports and diagnoses read them: labelled, and equal questions joined."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ropelab import config as configs
from ropelab import runs
from ropelab.runs import RunDir, RunError
from ropelab.schema import Method

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


def evaluations(run: RunDir) -> list[dict[str, Any]]:
    """All stored `eval` objects of a run; rows that answer one question at several ctxs are one object.

    `RunError` for a file that cannot be read.
    """
    manifest = run.manifest()
    joined: dict[str, dict[str, Any]] = {}
    for path in sorted(run.results.glob("*.json")):
        try:
            item: dict[str, Any] = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read ({error}); remove it and evaluate again") from None
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
