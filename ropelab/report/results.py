"""Results for programs: JSON without NaN, and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ropelab.evaluation import EvalResult

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


def csv_text(evals: Iterable[EvalResult]) -> str:
    """One line a row of every evaluation; an empty field is a number that does not exist, and no text is a formula."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for item in evals:
        protocol = item.protocol
        changed = {key: json.dumps(value, sort_keys=True) for key, value in item.changed.items() if value}
        of_protocol = {"protocol": protocol.name, "stride": protocol.stride, "last": protocol.last,
                       "targets_digest": protocol.targets_digest}  # fmt: skip
        for row in item.rows:
            low, high = row.ci95 or (None, None)
            line = {**item.to_json(), **changed, **of_protocol, "ci95_low": low, "ci95_high": high, **row.to_json()}
            writer.writerow({key: inert(line.get(key)) for key in CSV_COLUMNS})
    return out.getvalue()
