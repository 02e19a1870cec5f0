"""The folder that holds all runs: made, listed, and searched by name."""

from __future__ import annotations

import contextlib
import difflib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ropelab.errors import RunError
from ropelab.runs.folder import RunDir
from ropelab.runs.open import OpenRun

SWEEPS = "sweeps"  # the folder among the runs that holds sweeps


def check_runs_dir(path: str) -> Path:
    """The folder of runs, which is made with the first of them. `ValueError` when it could not be written."""
    folder = Path(path).expanduser()
    try:
        with tempfile.TemporaryFile(
            dir=next(place for place in (folder, *folder.absolute().parents) if place.exists())
        ):
            pass
    except OSError as error:
        raise ValueError(
            f"runs_dir={path} cannot be written ({error.strerror}); choose another with runs_dir=FOLDER"
        ) from None
    return folder


def is_run(path: Path) -> bool:
    """Is it a folder with a manifest? What can be the name of no file is none."""
    try:
        return (path / "manifest.json").is_file()
    except (OSError, ValueError):
        return False


def all_runs(runs_dir: Path) -> list[RunDir]:
    """Every run folder, oldest first."""
    if not runs_dir.is_dir():
        return []
    found = [RunDir(path) for path in runs_dir.iterdir() if is_run(path)]
    return sorted(found, key=RunDir.written)


def find_run(name: str, runs_dir: Path, also: Mapping[str, str] | None = None) -> RunDir:
    """The run that a path, a folder name, or an unambiguous beginning of one names. `RunError` otherwise.

    also: names of what else can be meant, and what it is in words, for the suggestion.
    """
    if not name.strip():
        raise RunError("a run has a name, or a beginning of one; `ropelab runs` lists them")
    given = Path(name).expanduser()
    if is_run(runs_dir / SWEEPS / given.name) and given.parent.name in ("", SWEEPS):
        raise RunError(
            f"'{name}' is a sweep of several runs: `ropelab status {name}` lists them, `ropelab report {name}` shows "
            "their evaluations"
        )
    for candidate in (given, runs_dir / name):
        if is_run(candidate):
            return RunDir(candidate)
    if (given / "config.json").is_file():
        raise RunError(
            f"{name} is a checkpoint, not a run: `ropelab eval --hf {name}`, or `ropelab import {name}` first"
        )
    known = all_runs(runs_dir)
    # `sinusoidal` is sinusoidal-stdlib-s0-..., not sinusoidal_qk-...
    matches = [run for run in known if run.name.startswith(f"{name}-") or run.name.rpartition("-")[2] == name]
    matches = matches or [run for run in known if run.name.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        more = f" and {len(matches) - 8} more" if len(matches) > 8 else ""
        listed = ", ".join(run.name for run in matches[:8])
        raise RunError(f"'{name}' names {len(matches)} runs: {listed}{more}; give more of the name of one")
    other = also or {}
    close = difflib.get_close_matches(name, [*(run.name for run in known), *other], n=1, cutoff=0.4)
    hint = f"did you mean {other.get(close[0], close[0])}?" if close else f"`ropelab runs` lists those in {runs_dir}"
    raise RunError(f"there is no run '{name}'; {hint}")


def latest_finished(runs_dir: Path) -> OpenRun:
    """The run that was finished last, opened. `RunError` when there is none, or it cannot be used."""
    for run in reversed(all_runs(runs_dir)):
        manifest: dict[str, Any] = {}
        with contextlib.suppress(RunError):
            manifest = run.manifest()
        if manifest.get("status") == "done":
            return OpenRun(run, run.checked(manifest))
    raise RunError(f"there is no finished run in {runs_dir}; train one first: ropelab train --pos rope")
