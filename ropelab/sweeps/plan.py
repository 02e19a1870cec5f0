"""The points of a sweep, checked before anything starts, and the runs and evaluations that they come to."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ropelab import config as configs
from ropelab.config import Config, EvalConfig
from ropelab.errors import CacheError
from ropelab.evaluation import MIN_DOCUMENTS, check_no_bos, plan_targets, resolve_methods
from ropelab.progress import Progress
from ropelab.training import plan_training, with_absolute_paths

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Tasks:
    """What a sweep comes to. `invalid`: points that cannot be, and why; their training is left out.

    tasks: {"run": folder name, "points": the points that asked for it, "config", "evaluations": [{"eval", "scaling"}]}.
    """

    tasks: list[dict[str, Any]]
    invalid: list[tuple[str, str]]


def plan_tasks(points: Sequence[tuple[str, Config]], progress: Progress) -> Tasks:
    """Each run once, with every evaluation that a point asks of it: `eval.scalings` each, or as it was trained.

    The text is read and tokenised here, once. The device is not looked for: another machine may do the work.
    """
    tasks: dict[str, dict[str, Any]] = {}
    invalid: list[tuple[str, str]] = []
    for done, (label, config) in enumerate(points):
        progress("check", done, len(points))
        try:
            plan = plan_training(dataclasses.replace(config, device="cpu"), progress, elsewhere=True)
            resolved = dataclasses.replace(config, scaling=plan.config.scaling)
        except CacheError:
            raise
        except ValueError as error:
            invalid.append((label, str(error)))
            continue
        asked = []
        for question in questions(config):
            item = question["scaling"]
            scaling = None if item is None else configs.parse_scaling(item)
            scored = plan.corpus.test if config.eval.split == "test" else plan.corpus.validation
            lengths = [len(scored.document(i)) for i in range(len(scored))]
            asks = _within(config, lengths)
            question["eval"] = {**question["eval"], "ctx": asks.ctx}
            try:
                check_no_bos(config.eval.bos)
                ladder = resolve_methods(resolved, plan.original_ctx, asks, scaling=scaling)
                plan_targets(lengths, tuple(ladder.methods), asks)
            except ValueError as error:
                invalid.append((label if item is None else f"{label}, evaluated with {item}", str(error)))
                continue
            asked.append(question)
        # whoever works on it may stand in another folder
        placed = dataclasses.replace(
            config, data=with_absolute_paths(config.data), runs_dir=str(plan.run.path.parent.resolve()),
            cache_dir=str(Path(config.cache_dir).expanduser().resolve()),
        )  # fmt: skip
        task = tasks.setdefault(
            plan.run.name,
            {"run": plan.run.name, "points": [], "config": configs.to_dict(placed), "evaluations": []},
        )
        task["points"].append(label)
        task["evaluations"] += [question for question in asked if question not in task["evaluations"]]
    progress("check", len(points), len(points))
    return Tasks(list(tasks.values()), invalid)


def _within(config: Config, lengths: Sequence[int]) -> EvalConfig:
    """The evaluation that a point asks for; where it names no ctx, to as long a one as the documents hold.

    The default of 8 x train.ctx is halved until as many documents hold it as a verdict needs, or one where there are
    fewer; train.ctx itself stays.
    """
    asked = config.eval
    if asked.ctx is not None or asked.max_ctx is not None:
        return asked
    held = sorted((length - 1 for length in lengths), reverse=True)
    enough = held[MIN_DOCUMENTS - 1] if len(held) >= MIN_DOCUMENTS else 0
    reach = enough if enough >= config.train.ctx else max(held, default=0)
    ctx = wanted = 8 * config.train.ctx
    while ctx > max(reach, config.train.ctx):
        ctx //= 2
    if ctx == wanted:
        return asked
    _say(f"the documents are too short for ctx {wanted}: evaluated to {ctx}; eval.ctx says otherwise")
    return dataclasses.replace(asked, ctx=str(ctx))


@functools.cache
def _say(message: str) -> None:
    """A line on stderr, once a process."""
    _log.warning("%s", message)


def questions(config: Config) -> list[dict[str, Any]]:
    """The evaluations that follow a training: under each of `eval.scalings`, or once, as it was trained (None)."""
    tree = {**configs.to_dict(config)["eval"], "scalings": []}
    if tree["bos"] == "false":  # as the sweeps of the first versions, which are found again
        del tree["bos"]
    return [{"eval": tree, "scaling": item} for item in config.eval.scalings or (None,)]
