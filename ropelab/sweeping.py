"""A sweep from its settings to its results: check every point, work on what is missing, look how it stands."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ropelab import cluster, launcher, sweeps
from ropelab.config import points as grammar
from ropelab.schema import Config, LocalLauncher, SlurmLauncher
from ropelab.sweeps import PENDING, RUNNING, Standing, Sweep

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
    from ropelab.experiment.planning import plan_tasks

    points, composed, invalid = [], [], []
    expanded = grammar.expand(settings)
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
    jobs = [job for index, job in sweep.jobs().items() if not {"train", "error"} & (sweep.answer(index) or {}).keys()]
    return sweep.standings(cluster.job_states(jobs))


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
        from ropelab.experiment.devices import side_by_side

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
        tasks = [sweep.tasks[index] for index in indices]
        _, interrupted = launcher.run_in_batches(
            tasks, stack=settings.stack, slots=launcher.cores(), progress=progress, ended=ended, **sharing
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
            cluster.submit(sweep, indices, settings)
        return indices


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
    cluster.cancel([jobs[index] for index in waiting])
    for index in waiting:
        if sweep.answer(index) is None:  # a job that runs says so itself, with the step it saved
            sweep.say(index, {"cancelled": "cancelled by `ropelab cancel`"})
    if holder is not None:
        os.kill(holder.process, signal.SIGTERM)
    return len(waiting), None if holder is None else holder.process
