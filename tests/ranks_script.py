"""What two ranks do for tests/test_ranks.py: started by torchrun, once, since loading torch takes longest.

    ranks_script.py OUT HOME

OUT/rank<r>.json gets what each rank saw, OUT/<name>.safetensors the weights of the first one; HOME holds the corpus.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from ropelab import errors, evaluation, training
from ropelab.cli.options import status_of
from ropelab.distributed import Ranks, full_state_dict, init_distributed, wrap_ddp, wrap_fsdp
from ropelab.errors import NonFiniteLossError, RemoteRankError
from ropelab.evaluation.perplexity import _score
from ropelab.runs import all_runs
from ropelab.training import build_optimizer, steps
from ropelab.training.loop import Loss, validation_nll
from ropelab.training.trainer import RunTraining
from tests.lab import tiny
from tests.test_training import Windows, gpt, recipe, windows

STEPS = 4
ENCODINGS = ("rope", "learned", "sinusoidal", "t5", "kerple_log", "fire", "cable", "fox")
SHARDED = ("rope", "sinusoidal", "fire", "cable")  # those whose parameters are shaped otherwise than others'
CHANGES = {"steps": STEPS, "micro_batch_size": 1, "grad_clip": 0.3, "activation_checkpointing": True}
LONG = ("train.steps=60", "train.checkpoint_every=10", "train.eval_every=30")
SCORED = ((10, 3), (9, 2), (1, 4))  # (windows, windows of a pass): of several passes, and of fewer than ranks
OTHER_SEED = 1  # of the rank that was started with another command


def spread(kind: str, pos: str, ranks: Ranks) -> tuple[Any, torch.nn.Module]:
    """(model, its loss over the ranks)."""
    model = gpt(pos)
    loss = Loss(model, torch.float32, sharded=kind == "fsdp")
    if kind == "ddp":
        return model, wrap_ddp(loss)
    return model, wrap_fsdp(loss, model.blocks, torch.device("cpu"))


def trained(kind: str, pos: str, ranks: Ranks, out: Path) -> dict[str, Any]:
    """A few steps on batches whose halves hold different numbers of targets, then the validation loss of 3 windows."""
    model, loss = spread(kind, pos, ranks)
    config = recipe(**CHANGES)
    optimizer = build_optimizer(model, config)
    done = list(steps(model, optimizer, lambda step: windows(seed=step), config, start=0, dtype=torch.float32,
                      loss=loss, ranks=ranks))  # fmt: skip
    nll = validation_nll(model.eval(), windows(3), dtype=torch.float32, batch=1, loss=loss, ranks=ranks)
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
    weights = full_state_dict(model.state_dict())
    assert bool(weights) == ranks.is_first
    if weights:
        save_file(weights, out / f"{kind}-{pos}.safetensors")
    return {
        "steps": [[step.loss, step.grad_norm, step.synced] for step in done], "val_nll": nll,
        "held": held / sum(p.numel() for p in gpt(pos).parameters()),
    }  # fmt: skip


def broken_on_one(kind: str, ranks: Ranks, out: Path) -> dict[str, Any]:
    """The loss of the second rank becomes infinite in the third step."""
    model, loss = spread(kind, "rope", ranks)
    passes = 0

    def spoil(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return output * float("inf") if passes == 3 and ranks.rank == 1 else output

    (loss.module if kind == "ddp" else loss).register_forward_hook(spoil)
    config = recipe(steps=STEPS)
    seen: list[Any] = []
    try:
        for step in steps(model, build_optimizer(model, config), lambda step: windows(seed=step), config, start=0,
                          dtype=torch.float32, loss=loss, ranks=ranks):  # fmt: skip
            seen.append(step.step)
    except NonFiniteLossError as error:
        seen.append(str(error))
    weights = full_state_dict(model.state_dict())
    if weights:
        save_file(weights, out / f"{kind}-broken.safetensors")
    return {"seen": seen}


def scored(ranks: Ranks | None, count: int, rows: int) -> dict[str, Any]:
    """Losses of a stand-in for a model over windows of 4 tokens, `rows` at a time, and the sizes of its passes."""
    passes: list[int] = []

    def scorer(inputs: Windows, targets: Windows) -> NDArray[np.float32]:
        passes.append(len(inputs))
        return (inputs[:, -2:] / 7 + targets + len(inputs) / 8).astype(np.float32)

    laid = evaluation.Windows(4, 2, np.arange(count) % 2, np.arange(count))
    documents = [np.arange(100, 150), np.arange(200, 250)]
    if ranks is None:
        losses = evaluation.score(laid, documents, scorer, rows=rows)
    else:
        losses = _score(laid, documents, scorer, rows, lambda tokens: None, ranks)
    return {"losses": losses.tolist(), "passes": passes}


def at_step(step: int, rank: int, do: Callable[[], None]) -> Callable[[], None]:
    """Have a training do something after a step that one of the ranks took; undone by what is returned."""
    on_step = RunTraining.on_step

    def recording(self: RunTraining, done: Any, *rest: Any) -> bool:
        saved = on_step(self, done, *rest)
        if done.step == step and self.ranks.rank == rank:
            do()
        return saved

    RunTraining.on_step = recording  # type: ignore[method-assign]

    def undo() -> None:
        RunTraining.on_step = on_step  # type: ignore[method-assign]

    return undo


def run(home: Path, runs_dir: Path, ranks: Ranks, *overrides: str) -> dict[str, Any]:
    return training.train(tiny(home, runs_dir, *overrides), ranks=ranks)


def interrupted(home: Path, runs_dir: Path, ranks: Ranks, step: int, rank: int, signum: int, *overrides: str) -> Any:
    """A real signal to one rank: what every rank makes of it."""
    undo = at_step(step, rank, lambda: os.kill(os.getpid(), signum))
    try:
        run(home, runs_dir, ranks, *overrides)
    except errors.Interrupted as error:
        return [error.signum, str(error).partition("saved ")[2]]
    finally:
        undo()
    return None


def pull() -> None:
    raise LookupError("a cable was pulled")


def main() -> None:
    out, home = Path(sys.argv[1]), Path(sys.argv[2])
    said: dict[str, Any] = {}

    def together(name: str, do: Callable[[Ranks], Any]) -> None:
        """A group of its own for each check: one that failed cannot be used again."""
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(len(said))
        try:
            with init_distributed(status_of) as ranks:
                assert ranks.world == 2
                said[name] = do(ranks)
        except (ValueError, LookupError, RemoteRankError) as error:
            said[name] = [type(error).__name__, str(error), getattr(error, "status", None)]

    def numbers(ranks: Ranks) -> dict[str, Any]:
        ranks.connect(torch.device("cpu"))
        found = {f"ddp-{pos}": trained("ddp", pos, ranks, out) for pos in ENCODINGS}
        found |= {f"fsdp-{pos}": trained("fsdp", pos, ranks, out) for pos in SHARDED}
        found |= {f"{count} by {rows}": scored(ranks, count, rows) for count, rows in SCORED}
        return found | {f"{kind}-broken": broken_on_one(kind, ranks, out) for kind in ("ddp", "fsdp")}

    def runs(ranks: Ranks) -> dict[str, Any]:
        found: dict[str, Any] = {
            "straight": run(home, out / "straight", ranks),
            "again": run(home, out / "straight", ranks),
            "fsdp": run(home, out / "fsdp", ranks, "train.parallel=fsdp"),
            "term": interrupted(home, out / "stopped", ranks, 3, 1, signal.SIGTERM),
            "usr2": interrupted(home, out / "stopped", ranks, 5, 0, signal.SIGUSR2),
            "resumed": run(home, out / "stopped", ranks),
            "mixed ddp": interrupted(home, out / "mixed", ranks, 2, 0, signal.SIGTERM),
            "mixed fsdp": interrupted(home, out / "mixed", ranks, 5, 1, signal.SIGTERM, "train.parallel=fsdp"),
            "long": run(home, out / "long", ranks, *LONG),
        }
        (trained_run,) = all_runs(out / "straight")
        config = tiny(home, out / "straight", "eval.ctx='32,64'", "eval.tokens=4096")
        evaluated = evaluation.evaluate(trained_run, config.eval, cache_dir=config.cache_dir, ranks=ranks)
        return found | {"evaluated": evaluated.result.to_json()}

    def cable(ranks: Ranks) -> Any:
        undo = at_step(2, 1, pull)
        try:
            return run(home, out / "pulled", ranks)
        finally:
            undo()

    def other_command(ranks: Ranks) -> Any:
        return run(home, out / "other", ranks, f"seed={OTHER_SEED * ranks.rank}")

    def batch(ranks: Ranks) -> Any:
        return run(home, out / "batch", ranks, "train.batch_size=5")

    together("numbers", numbers)
    together("runs", runs)
    together("pulled", cable)
    together("other", other_command)
    together("batch", batch)
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    main()
