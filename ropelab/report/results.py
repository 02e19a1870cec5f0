"""Results for programs: JSON without NaN, and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

CSV_COLUMNS = (
    "run", "pos", "pos_changed", "scaling", "scaling_changed", "recipe", "train_ctx", "window", "seed", "data",
    "protocol", "stride", "last", "targets_digest",
    "ctx", "factor", "ppl", "ci95_low", "ci95_high", "nll", "bits_per_byte", "tokens", "documents", "unit", "status",
    "reason",
)  # fmt: skip


def finite(value: Any) -> Any:
    """The same JSON with null for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value


def inert(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula, behind an apostrophe; a number, spelled or not, as it is.

    A carriage return becomes a new line, which csv quotes: by itself it would begin another row.
    """
    if not isinstance(value, str):
        return value
    text = value.replace("\r", "\n")
    if not value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return text
    try:
        float(value)
    except ValueError:
        return f"'{text}"
    return value.strip()


def csv_text(evals: Iterable[Mapping[str, Any]]) -> str:
    """One line a row of every evaluation; an empty field is a number that does not exist, and no text is a formula."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for item in evals:
        protocol = item["protocol"]
        of_run = {key: item.get(key) for key in ("run", "pos", "scaling", "train_ctx", "window", "seed", "data")}
        changed: dict[str, Any] = {
            key: json.dumps(item[key], sort_keys=True) for key in ("pos_changed", "scaling_changed") if item.get(key)
        }
        changed["recipe"] = item.get("recipe")
        of_protocol = {key: protocol.get(key) for key in ("stride", "last", "targets_digest")}
        for row in item["rows"]:
            low, high = row.get("ci95") or (None, None)
            ends = {"ci95_low": low, "ci95_high": high, "protocol": protocol["name"]}
            line = finite({**of_run, **changed, **of_protocol, **ends, **row})
            writer.writerow({key: inert(value) for key, value in line.items()})
    return out.getvalue()
