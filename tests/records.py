"""Evaluations as tests write them: plain dictionaries, what a test does not care for left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ropelab.evaluation import EvalResult

ROW = {"factor": None, "ppl": None, "nll": None, "bits_per_byte": None, "tokens": 0, "documents": 0, "ci95": None}
RESULT = {"seed": 0, "data": "stdlib", "window": None, "factor": None, "position_curve": None}


def result(item: Mapping[str, Any]) -> EvalResult:
    """One evaluation, as it would be read from a file."""
    return EvalResult.from_json({**RESULT, **item, "rows": [{**ROW, **row} for row in item["rows"]]})


def results(items: Iterable[Mapping[str, Any]]) -> list[EvalResult]:
    return [result(item) for item in items]
