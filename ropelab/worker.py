"""A process that trains one run and evaluates it, or a stack of them: one JSON task on stdin, JSON lines on stdout.

Lines `{"progress": {...}}` come as the work goes, then one `{"train": ..., "evaluations": [...]}` or
`{"error": message}`; of a stack, {"stack": [one of these for each run]}. Started by `launcher`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

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


def work(task: dict[str, Any]) -> dict[str, Any]:
    """Train `task["config"]`, then run `task["evaluations"]` on it: {"eval": {...}, "scaling": {...} or null} each."""
    import torch

    torch.set_num_threads(task["threads"])
    from ropelab import experiment

    reporter = _Reporter()
    if "stack" in task:
        return {"stack": _stacked(task["stack"], reporter)}
    return _evaluated(task, experiment.train(_configuration(task), progress=reporter), reporter)


def _stacked(tasks: list[dict[str, Any]], reporter: _Reporter) -> list[dict[str, Any]]:
    """The tasks' runs trained in one stack, or one after another where that cannot be; then each evaluated."""
    from ropelab import experiment

    try:
        trained = experiment.train_together([_configuration(task) for task in tasks], progress=reporter)
    except ValueError:  # other shapes than each other's, or an encoding that reads the text
        trained = [_trained_alone(task, reporter) for task in tasks]
    return [
        {"error": str(one)} if isinstance(one, Exception) else _evaluated(task, one, reporter)
        for task, one in zip(tasks, trained, strict=True)
    ]


def _trained_alone(task: dict[str, Any], reporter: _Reporter) -> Any:
    from ropelab import experiment
    from ropelab.training import NonFiniteLossError

    try:
        return experiment.train(_configuration(task), progress=reporter)
    except (ValueError, OSError, NonFiniteLossError) as error:
        return error


def _configuration(task: dict[str, Any]) -> Any:
    from ropelab import config

    return config.from_dict(task["config"])


def _evaluated(task: dict[str, Any], trained: dict[str, Any], reporter: _Reporter) -> dict[str, Any]:
    from ropelab import config, experiment, runs

    resolved = _configuration(task)
    run = runs.RunDir(Path(trained["run_dir"]))
    evaluations = []
    for question in task["evaluations"]:
        tree = {**task["config"], "eval": question["eval"]}
        scaling = question["scaling"]
        done = experiment.evaluate(
            run,
            config.from_dict(tree).eval,
            scaling=None if scaling is None else config.parse_scaling(scaling),
            device=resolved.device,
            cache_dir=resolved.cache_dir,
            progress=reporter,
        )
        evaluations.append({"result": done.result, "losses": str(done.losses_path)})
    return {"train": trained, "evaluations": evaluations, "manifest": run.manifest()}


def main() -> None:
    task = json.load(sys.stdin)
    try:
        emit(work(task))
    except KeyboardInterrupt:  # outside the training, which saves and says where
        emit({"error": "interrupted"})
    except Exception as error:
        emit({"error": str(error) or type(error).__name__})
        expected = isinstance(error, ValueError | OSError)
        if not expected and type(error).__name__ not in ("Interrupted", "NonFiniteLossError"):
            raise  # our own bug: with its traceback


if __name__ == "__main__":
    main()
