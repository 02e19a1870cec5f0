"""A process that trains one run and evaluates it, or a stack of them: one JSON task on stdin, JSON lines on stdout.

Lines `{"progress": {...}}` come as the work goes, then one `{"train": ..., "evaluations": [...]}`, `{"error": message}`
or `{"cancelled": message}`; of a stack, {"stack": [one of these for each run]}. Started by `launcher`, whose end of
stdin stays open: when that closes, whoever wanted the work is gone, and what was trained is saved.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ropelab.distributed import SINGLE, Ranks
from ropelab.errors import Interrupted, NonFiniteLossError, RunBusyError
from ropelab.progress import tell

Progress = Callable[..., None]
BUSY = 5.0  # seconds between two looks at a run that another process writes
PROGRESS_EVERY = 0.25  # seconds between progress lines


class _Reporter:
    """Progress as JSON lines; a parent that is gone is no reason to stop working."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, description: str, done: int, total: int, **facts: Any) -> None:
        now = time.monotonic()
        if done < total and now - self._last < PROGRESS_EVERY:
            return
        self._last = now
        emit({"progress": {"description": description, "done": done, "total": total, **facts}})


def emit(line: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def work(task: dict[str, Any], progress: Progress, ranks: Ranks = SINGLE) -> dict[str, Any]:
    """Train `task["config"]`, then run `task["evaluations"]` on it: {"eval": {...}, "scaling": name or null} each.

    With `ranks` all of them do it together.
    """
    import torch

    torch.set_num_threads(task["threads"])
    if "stack" in task:
        return {"stack": _stacked(task["stack"], progress)}
    if ranks.world > 1:
        return _done_with(task, progress, ranks)
    while True:  # a run that two sweeps have in common is trained by one, and then there for the other
        try:
            return _done_with(task, progress, ranks)
        except RunBusyError as busy:
            tell(f"{busy}; waiting for it")
            time.sleep(BUSY)


def _done_with(task: dict[str, Any], progress: Progress, ranks: Ranks) -> dict[str, Any]:
    from ropelab import training

    return _evaluated(task, training.train(_configuration(task), progress=progress, ranks=ranks), progress, ranks)


def work_for_hydra(point: list[str]) -> dict[str, Any]:
    """Train and evaluate a point of Hydra's multirun, where its launcher runs it: the `train` object."""
    from ropelab import config
    from ropelab.progress import Bar
    from ropelab.sweeps.launchers import local
    from ropelab.sweeps.plan import questions

    resolved = config.load(point)
    task = {"config": config.to_dict(resolved), "evaluations": questions(resolved), "threads": local.cores()}
    with Bar() as bar:
        trained: dict[str, Any] = work(task, bar)["train"]
    return trained


def _stacked(tasks: list[dict[str, Any]], progress: Progress) -> list[dict[str, Any]]:
    """The tasks' runs trained in one stack, or one after another where that cannot be; then each evaluated."""
    from ropelab import training

    try:
        trained = training.train_together([_configuration(task) for task in tasks], progress=progress)
    except ValueError:  # other shapes than each other's, or an encoding that reads the text
        trained = [_trained_alone(task, progress) for task in tasks]
    return [
        {"error": str(one)} if isinstance(one, Exception) else _evaluated(task, one, progress)
        for task, one in zip(tasks, trained, strict=True)
    ]


def _trained_alone(task: dict[str, Any], progress: Progress) -> Any:
    from ropelab import training

    try:
        return training.train(_configuration(task), progress=progress)
    except (ValueError, OSError, NonFiniteLossError) as error:
        return error


def _configuration(task: dict[str, Any]) -> Any:
    from ropelab import config

    return config.from_dict(task["config"])


def _evaluated(
    task: dict[str, Any], trained: dict[str, Any], progress: Progress, ranks: Ranks = SINGLE
) -> dict[str, Any]:
    from ropelab import config, evaluation, runs

    resolved = _configuration(task)
    run = runs.open_run(Path(trained["run_dir"]))
    evaluations = []
    for question in task["evaluations"]:
        tree = {**task["config"], "eval": question["eval"]}
        scaling = question["scaling"]
        done = evaluation.evaluate(
            run,
            config.from_dict(tree).eval,
            scaling=None if scaling is None else config.parse_scaling(scaling),
            device=resolved.device,
            cache_dir=resolved.cache_dir,
            progress=progress,
            ranks=ranks,
        )
        evaluations.append({"result": done.result.to_json(), "losses": str(done.losses_path)})
    return {"train": trained, "evaluations": evaluations, "manifest": run.manifest}


def _save_when_left_alone() -> None:
    """Be told to stop when stdin closes."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1 << 16):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _lock(path: Path) -> None:
    """Lock the file of a task until this process ends, however it ends: it is what says that somebody works on it.

    The process that worked on it before, left alone and saving itself, is waited for.
    """
    path.parent.mkdir(exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    fcntl.flock(handle, fcntl.LOCK_EX)


def main() -> None:
    task = json.loads(sys.stdin.buffer.raw.readline())  # type: ignore[union-attr]
    _save_when_left_alone()
    try:
        for one in task.get("stack", [task]):
            if "lock" in one:
                _lock(Path(one["lock"]))
        emit(work(task, _Reporter()))
    except KeyboardInterrupt:  # outside the training, which saves and says where
        emit({"cancelled": "interrupted"})
    except Exception as error:
        stopped = isinstance(error, Interrupted)
        emit({"cancelled" if stopped else "error": str(error) or type(error).__name__})
        expected = stopped or isinstance(error, ValueError | OSError)
        if not expected and not isinstance(error, NonFiniteLossError):
            raise  # our own bug: with its traceback


if __name__ == "__main__":
    main()
