"""The files of a report: one self-contained HTML page, its PNG, CSV and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ropelab import files
from ropelab.evaluation import EvalResult
from ropelab.report.figures import curves, png
from ropelab.report.page import html_page
from ropelab.report.results import csv_text, finite


def write_report(
    folder: Path,
    *,
    evals: Sequence[EvalResult],
    verdicts: list[dict[str, Any]],
    title: str,
    notes: list[str],
    manifest: dict[str, Any],
    diagnoses: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write report.html, curves.png, results.json and results.csv into a folder (made if missing), each at once.

    `verdicts` are the JSON objects of the claims; `notes` are sentences for the reader;
    `manifest` holds versions and settings of any depth, shown as a table. A list `commands` in it is shown as the way
    to reproduce; without one, the commands follow from the runs and claims. `diagnoses` are the JSON objects of where
    the curves of each run bend. Returns the path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    picture = png(curves(evals, title=title))
    results = finite(
        {
            "evals": [item.to_json() for item in evals],
            "verdicts": verdicts,
            **({"diagnoses": list(diagnoses)} if diagnoses else {}),
        }
    )
    page = html_page(evals, verdicts, title, notes, manifest, picture, diagnoses)
    files.write(folder / "curves.png", picture)
    files.write(folder / "results.json", (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
    files.write(folder / "results.csv", csv_text(evals).encode())
    files.write(folder / "report.html", page.encode())
    return folder / "report.html"
