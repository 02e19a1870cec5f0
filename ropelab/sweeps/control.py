"""A sweep from its settings to its results: check every point, work on what is missing, look how it stands."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import socket
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ropelab import sweeps
from ropelab.config import LAUNCHERS, Config, LocalLauncher, SlurmLauncher, expand, own_launcher, spelled_list
from ropelab.errors import SchedulerError
from ropelab.sweeps.folder import PENDING, RUNNING, Standing, Sweep
from ropelab.sweeps.launchers import local, slurm

Progress = Callable[..., None]
PLACES = ("device", "runs_dir", "cache_dir")  # where a run is made; no part of what it is


@dataclasses.dataclass(frozen=True)
class Checked:
    """The points of a sweep, and what they come to; `invalid`: (point, why it cannot be)."""

    points: list[str]
    tasks: list[dict[str, Any]]
    invalid: list[tuple[str, str]]
    runs_dir: Path


def check(settings: Sequence[str], compose: Callable[[list[str]], Config], progress: Progress) -> Checked:
    """Expand, compose and check every point; reads the text, and trains nothing.

    `ValueError` for settings that are no sweep; a point that cannot be is one of `invalid`.
    """
    from ropelab.sweeps.plan import plan_tasks

    points, composed, invalid = [], [], []
    expanded = expand(settings)
    varied = [len({point[place] for point in expanded}) > 1 for place in range(len(settings))]
    for point in expanded:
        told = [item for item, several in zip(point, varied, strict=True) if several]
        label = " ".join(told or [item for item in point if item.partition("=")[0] not in PLACES])
        points.append(label)
        try:
            composed.append((label, compose(point)))
        except ValueError as error:
            invalid.append((label, str(error)))
    for key in PLACES:
        if len({getattr(config, key) for _, config in composed}) > 1:
            raise ValueError(f"{key} takes one value in a sweep: it changes no numbers, and all runs share it")
    planned = plan_tasks(composed, progress)
    runs_dir = Path(composed[0][1].runs_dir).expanduser() if composed else Path()
    return Checked(points, planned.tasks, invalid + planned.invalid, runs_dir)


def standings(sweep: Sweep) -> list[Standing]:
    """How every task stands, by its files and by what the cluster says. `SchedulerError` where that does not answer."""
    jobs = sweep.jobs()
    answers = {index: sweep.answer(index) or {} for index in jobs}
    failed = [index for index in jobs if "error" in answers[index]]
    states = slurm.job_states([jobs[index] for index in jobs if not {"train", "error"} & answers[index].keys()])
    if failed:  # it may have been queued again; where nobody can be asked, its answer is what is known
        with contextlib.suppress(SchedulerError):
            known = slurm.queued()
            states |= {jobs[index]: known[jobs[index]] for index in failed if jobs[index] in known}
    return sweep.standings(states)


def missing(sweep: Sweep) -> list[int]:
    """The tasks that nobody works on and that are not done."""
    at_work = (PENDING, RUNNING)
    jobs = sweep.jobs()
    return [
        one.task
        for one in standings(sweep)
        if one.state != sweeps.DONE and not (one.state in at_work and one.task in jobs)
    ]


def work_here(sweep: Sweep, settings: LocalLauncher, progress: Progress) -> int | None:
    """Work on what is missing with processes of this machine; returns the signal that stopped it, if one did.

    `RunError` when another process works on it.
    """
    with sweep.locked():
        indices = missing(sweep)
        if not indices:
            return None
        from ropelab.devices import side_by_side

        sharing = side_by_side(sweep.tasks[0]["config"]["device"])
        if settings.jobs is not None:
            sharing["jobs"] = settings.jobs if sharing["jobs"] is None else min(settings.jobs, sharing["jobs"])
        _begin(sweep, indices, {"name": "local", **dataclasses.asdict(settings)})
        done = 0

        def ended(place: int, answer: dict[str, Any]) -> None:
            nonlocal done
            done += 1
            sweep.say(indices[place], answer)
            progress("sweep", done, len(indices))

        progress("sweep", 0, len(indices))
        tasks = [{**sweep.tasks[index], "lock": str(sweep.work_path(index))} for index in indices]
        _, interrupted = local.run_in_batches(
            tasks, stack=settings.stack, slots=local.cores(), progress=progress, ended=ended, **sharing
        )
        return interrupted


def submit(sweep: Sweep, settings: SlurmLauncher) -> list[int]:
    """Submit what is missing to Slurm and return at once: the tasks that were submitted.

    `SchedulerError` where Slurm refuses, `RunError` when another process works on the sweep.
    """
    with sweep.locked():
        indices = missing(sweep)
        if indices:
            _begin(sweep, indices, {"name": "slurm", **dataclasses.asdict(settings)})
            slurm.submit(sweep, indices, settings)
        return indices


def place(sweep: Sweep, config: Config) -> list[str]:
    """Have a sweep's runs use this user's cache and tracking, whatever its folder says, which may be a stranger's.

    Returns a line for each setting that was another before.
    """
    mine = {"cache_dir": str(Path(config.cache_dir).expanduser().resolve()), "track": dataclasses.asdict(config.track)}
    before: dict[str, list[Any]] = {key: [] for key in mine}
    for task in sweep.tasks:
        for key, value in mine.items():
            if task["config"].get(key) not in (value, *before[key]):
                before[key].append(task["config"].get(key))
            task["config"][key] = value
    lines = []
    for stored in before["cache_dir"]:
        lines.append(
            f"cache_dir={mine['cache_dir']}, not {stored} as before; {_typable('cache_dir=', stored)} keeps that"
        )
    for stored in before["track"]:
        if isinstance(stored, dict) and stored.get("wandb") != "disabled":
            lines.append(
                f"track.wandb={config.track.wandb}, not {stored.get('wandb')} as before; "
                f"{_typable('track.wandb=', stored.get('wandb'))} {_typable('track.project=', stored.get('project'))} "
                "keeps that"
            )
    return lines


def kept_settings(sweep: Sweep, name: str, given: Collection[str]) -> list[str]:
    """The settings with which a sweep was last launched by this launcher, as overrides: those that are numbers.

    What becomes shell or sbatch text is never taken from a folder, which may be a stranger's: `ValueError`, with what
    to type, where there is such text and neither `given` (the keys typed) nor the user's own file has it.
    """
    stored, own = sweep.manifest.get("launcher"), own_launcher(name)
    if not isinstance(stored, dict) or stored.get("name") != name:
        return []
    kinds = {field.name: str(field.type) for field in dataclasses.fields(LAUNCHERS[name])}
    kept, texts = [], []
    for key, value in stored.items():
        if key == "name" or key in given:
            continue
        if "str" in kinds.get(key, ""):
            if key not in own and value not in (None, [], ""):
                texts.append(_typable(f"launcher.{key}=", value))
        elif value is not None:
            if key in kinds and type(value) not in (int, float):
                raise ValueError(f"{sweep.path / 'manifest.json'}: launcher.{key} is no number; it was altered")
            kept.append(f"launcher.{key}={value}")
    if texts:
        raise ValueError(
            f"{sweep.name} was launched with text for sbatch or the shell, which is never taken from a folder: "
            f"ropelab retry {shlex.quote(sweep.name)} {' '.join(texts)} takes it from you; launcher.KEY=null or [] is "
            "none, and a file of yours that ROPELAB_SLURM names is asked too"
        )
    return kept


def _typable(key: str, value: Any) -> str:
    """A stored text as it would be typed in a shell; letters that steer a terminal are replaced."""
    text = spelled_list(map(str, value)) if isinstance(value, list) else str(value)
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return shlex.quote(key + (text if len(text) <= 300 else f"{text[:300]}..."))


def _begin(sweep: Sweep, indices: Sequence[int], settings: dict[str, Any]) -> None:
    for index in indices:
        sweep.forget(index)
    sweeps.launched(sweep, settings)


def stop(sweep: Sweep) -> tuple[int, int | None]:
    """Cancel what is not done: (jobs of a cluster, the process of this machine that was told to stop).

    `SchedulerError` where Slurm does not answer; `ValueError` where a process of another machine works on it.
    """
    holder = sweep.holder()
    if holder is not None and holder.host != socket.gethostname():
        raise ValueError(f"{sweep.name} is worked on by process {holder.process} of {holder.host}; cancel it there")
    jobs = sweep.jobs()
    waiting = [one.task for one in standings(sweep) if one.state in (PENDING, RUNNING) and one.task in jobs]
    slurm.cancel(sweep, [jobs[index] for index in waiting])
    for index in waiting:
        if sweep.answer(index) is None:  # a job that runs says so itself, with the step it saved
            sweep.say(index, {"cancelled": "cancelled by `ropelab cancel`"})
    if holder is not None:
        os.kill(holder.process, signal.SIGTERM)
    return len(waiting), None if holder is None else holder.process
