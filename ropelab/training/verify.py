"""Is resuming bit-exact here? A straight training against one that a SIGKILL ended and a second process finished.

Every training is a process of its own, as it is in use: `python -m ropelab.training.verify TASK.json`. The killed
one sends SIGKILL to itself, a few steps after its checkpoint: at that instant and nowhere else, on a machine of any
speed. What is compared is what the run folders hold at the end: every tensor of weights and optimizer by its bytes,
the metrics line by line, the best validation loss, the summary in the manifest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ropelab import config as configs
from ropelab import files, runs
from ropelab.config import Config
from ropelab.distributed import init_distributed
from ropelab.progress import Progress, silent
from ropelab.runs import RunDir
from ropelab.training.compiling import compiles
from ropelab.training.plan import plan_training, rank_micro
from ropelab.training.trainer import train

BEYOND = 2  # steps that are made after the checkpoint and lost with the kill
SUMMARY = ("step", "train_loss", "val_nll", "val_bits_per_byte", "best_val_nll", "dtype", "digest")  # of a manifest
SPEED = "tokens_per_s"  # of a metrics line: the one figure that no two trainings share
NAMED = 8  # tensors that are named where they differ
# torch's warning of an operation with no deterministic kernel begins with its name
_WARNING = re.compile(r"^(\S+?)(\(.*?\))? does not have a deterministic implementation")


def verify_resume(
    config: Config,
    *,
    steps: int,
    at: int | None,
    world: int = 1,
    deterministic: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train `steps` steps straight, and again with a kill after the checkpoint of step `at`, and compare.

    All in a temporary folder that is removed; only the tokenised text stays in the cache. `world`: so many ranks train
    together, by torchrun. `deterministic` has torch use its deterministic kernels.

    Returns {"equal", "cause": null | "kernels" | "resuming", "operations", "compared", "differences", ...}. Where the
    two differ, the straight training is made a second time: does that one differ too, it is the kernels, and
    `operations` are those that torch says have no deterministic kernel.
    `ValueError` for settings that cannot be trained; `RuntimeError` when a training breaks.
    """
    if steps < 2:
        raise ValueError(f"--steps must be at least 2, not {steps}")
    at = steps // 2 if at is None else at
    if world < 1:
        raise ValueError(f"--ranks must be at least 1, not {world}")
    if not 1 <= at < steps:
        raise ValueError(f"--at must be a step before the last, 1 to {steps - 1} with --steps {steps}, not {at}")
    killed_at = min(at + BEYOND, 2 * at, steps)  # 2 x at is saved only after its progress line: the kill comes before
    with _terminable(), tempfile.TemporaryDirectory(prefix="ropelab-verify-") as folder:
        place = Path(folder)
        short = _shortened(config, steps=steps, at=at)
        plan = plan_training(dataclasses.replace(short, runs_dir=str(place / "straight")), progress)
        _check_compiler(short, plan.device)
        rank_micro(short.train, world)  # or `ValueError`: the ranks cannot share the batch

        def trained(where: str, *, kill_at: int | None = None, determined: bool = deterministic) -> dict[str, Any]:
            task = {
                "config": configs.to_dict(dataclasses.replace(short, runs_dir=str(place / where))),
                "kill_at": kill_at, "deterministic": determined, "world": world,
            }  # fmt: skip
            return _in_a_process(task, place / f"{where}.task.json", f"{where} training", progress)

        name = plan.run.name
        del plan  # its memory maps
        straight_run, resumed_run = (RunDir(place / where / name) for where in ("straight", "resumed"))
        operations = trained("straight")["operations"]
        trained("resumed", kill_at=killed_at)
        lost = len(resumed_run.metrics()) - at
        resumed = trained("resumed")
        if resumed["first"] != at + 1:
            raise RuntimeError(f"the killed training went on at step {resumed['first']}, not at step {at + 1}")
        compared, differences = _compare(straight_run, resumed_run)
        cause, determined_equal = None, None
        if differences:
            trained("again")
            cause = "kernels" if _compare(straight_run, RunDir(place / "again" / name))[1] else "resuming"
        if cause == "kernels" and not deterministic:
            operations = trained("first", determined=True)["operations"]
            trained("second", determined=True)
            determined_equal = not _compare(*(RunDir(place / where / name) for where in ("first", "second")))[1]
        manifest = straight_run.manifest()
    return {
        "equal": not differences,
        "cause": cause,
        "operations": operations,
        "equal_when_deterministic": determined_equal,
        "steps": steps,
        "at": at,
        "killed_at": killed_at,
        "steps_lost": lost,
        "deterministic": deterministic,
        "world_size": world,
        "parallel": manifest.get("parallel"),
        **{key: manifest[key] for key in ("device", "dtype", "compiled", "attention_backend")},
        "torch": manifest["environment"]["torch"],
        "threads": manifest["environment"]["threads"],
        "compared": compared,
        "differences": differences,
    }


def _shortened(config: Config, *, steps: int, at: int) -> Config:
    """The same training with `steps` steps, a checkpoint at step `at`, a validation before it and one after."""
    train = config.train
    shorter = dataclasses.replace(
        train, steps=steps, checkpoint_every=at, eval_every=min(train.eval_every, max(1, at // 2)),
        warmup_steps=None if train.warmup_steps is None else min(train.warmup_steps, steps),
        keep=tuple(fraction for fraction in train.keep if round(fraction * steps) >= 1),
    )  # fmt: skip
    parent = config.parent
    if parent is not None:  # named by its place: the runs of the comparison lie elsewhere
        parent = str(runs.find_run(parent, Path(config.runs_dir).expanduser()).path.resolve())
    track = dataclasses.replace(config.track, wandb="disabled")
    return dataclasses.replace(config, train=shorter, parent=parent, track=track)


def _check_compiler(config: Config, device: torch.device) -> None:
    """`ValueError` where blocks are to be compiled and there is nothing to compile with."""
    names = [os.environ.get("CXX", "g++")] if device.type == "cpu" else [os.environ.get("CC", "gcc"), "clang"]
    if compiles(config.train, device) and not any(map(shutil.which, names)):
        raise ValueError(
            f"train.compile=true needs a C compiler, and there is no {names[0]} here: install it (Debian: apt-get "
            "install g++), or verify with train.compile=false"
        )


# --- comparing ------------------------------------------------------------------------------------------------------


def _compare(one: RunDir, other: RunDir) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was compared of two finished runs of one configuration, and where they differ, the first first."""
    compared: dict[str, Any] = {}
    differences: list[dict[str, Any]] = []
    mine, its = _metrics(one), _metrics(other)
    odd = next((n for n, pair in enumerate(zip(mine, its, strict=False)) if pair[0] != pair[1]), None)
    if odd is None and len(mine) != len(its):
        odd = min(len(mine), len(its))
    compared["metrics"] = {"lines": len(mine), "equal": odd is None, "digest": files.digest_of(mine)}
    if odd is not None:
        shown = [lines[odd] if odd < len(lines) else None for lines in (mine, its)]
        differences.append({"what": "metrics", "line": odd + 1, "straight": shown[0], "resumed": shown[1]})
    for part in ("model", "optimizer"):
        left, right = _tensors(one, part), _tensors(other, part)
        names = [name for name in {**left, **right} if not _same(left.get(name), right.get(name))]
        compared["weights" if part == "model" else part] = {
            "tensors": len(left), "numbers": sum(tensor.numel() for tensor in left.values()), "equal": not names,
            "digest": _digest(left),
        }  # fmt: skip
        differences += [{"what": part, "tensor": name, **_apart(left.get(name), right.get(name))} for name in names]
    manifests = [one.manifest(), other.manifest()]
    sums = [{key: manifest[key] for key in SUMMARY} for manifest in manifests]
    compared["best"] = {
        "best_val_nll": sums[0]["best_val_nll"], "equal": sums[0]["best_val_nll"] == sums[1]["best_val_nll"]
    }  # fmt: skip
    compared["summary"] = {"values": len(SUMMARY), "equal": sums[0] == sums[1], "digest": files.digest_of(sums[0])}
    for key in SUMMARY:
        if sums[0][key] != sums[1][key]:
            differences.append({"what": key, "straight": sums[0][key], "resumed": sums[1][key]})
    return compared, differences


def _metrics(run: RunDir) -> list[dict[str, Any]]:
    """Every line as it stands in the file, without the speed: a torn or doubled one is a difference."""
    lines = run.metrics_path.read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != SPEED} for line in lines]


def _tensors(run: RunDir, part: str) -> dict[str, Tensor]:
    last = run.latest_checkpoint()
    assert last is not None, "a finished run has a checkpoint"
    return runs.load_tensors(last / f"{part}.safetensors")


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, (n,) uint8: -0.0 is not 0.0 here, and one NaN is itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(_bits(one), _bits(other))


def _apart(one: Tensor | None, other: Tensor | None) -> dict[str, Any]:
    """How far two tensors are apart: {"numbers", "of", "largest"}; `largest` is null where that is no number."""
    if one is None or other is None or one.shape != other.shape:
        return {"numbers": None, "of": None, "largest": None}
    gap = (one.double() - other.double()).abs()
    largest = float(gap.max())
    return {
        "numbers": int((one != other).sum()), "of": one.numel(), "largest": largest if largest < float("inf") else None,
    }  # fmt: skip


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, types, shapes and bytes: of the content, as two files of it may be laid out differently."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(_bits(tensor).numpy().tobytes())
    return hasher.hexdigest()


# --- the trainings, each a process ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that the temporary folder goes and no training is left behind."""

    def handle(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _in_a_process(task: dict[str, Any], path: Path, what: str, progress: Progress) -> dict[str, Any]:
    """Train in a process of its own; its report. `RuntimeError` with its own message when it broke."""
    files.write_json(path, task)
    environment = dict(os.environ)
    if task["deterministic"]:
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses cuBLAS without it
    errors = path.with_suffix(".err")
    together = ["torch.distributed.run", "--standalone", f"--nproc-per-node={task['world']}", "-m"]
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", *(together if task["world"] > 1 else ()), "ropelab.training.verify", str(path)],
            stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            report = _forward(process, what, progress)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    expected = 0 if task["kill_at"] is None else -signal.SIGKILL
    if process.returncode != expected:
        last = report.get("error") or next(iter(errors.read_text(errors="replace").strip().splitlines()[-1:]), "")
        raise RuntimeError(f"the {what} ended with status {process.returncode}, not {expected}: {last}")
    return report


def _forward(process: subprocess.Popen[str], what: str, progress: Progress) -> dict[str, Any]:
    """Forward the progress of a process until it ends; its other lines, as one report."""
    assert process.stdout is not None
    report: dict[str, Any] = {}
    with process.stdout:
        for text in process.stdout:
            line = json.loads(text)
            if "done" in line:
                progress(what, line["done"], line["total"])
            else:
                report.update(line)
    process.wait()
    return report


def _work(task: dict[str, Any]) -> None:
    """One training, reported as JSON lines; it kills itself after step `kill_at`."""
    first = None

    def report_progress(description: str, done: int, total: int, **facts: Any) -> None:
        nonlocal first
        if description != "train":
            return
        if first is None:
            first = done
            _emit({"first": first})
        _emit({"done": done, "total": total})
        if done == task["kill_at"]:
            for pid in _launched_with_us() if task["world"] > 1 else ():
                os.kill(pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # the signal may take a moment: no step is made meanwhile

    if task["deterministic"]:
        torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings(record=True) as caught, init_distributed(lambda error: 1) as ranks:
        warnings.simplefilter("always")
        train(configs.from_dict(task["config"]), progress=report_progress, ranks=ranks)
    if ranks.is_first:
        _emit({"operations": _operations(str(warning.message) for warning in caught)})


def _launched_with_us() -> list[int]:
    """torchrun, and the other ranks that it started: they are gone at once, as when a machine is."""
    agent = os.getppid()
    others = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == agent:
                    others.append(int(folder.name))
    return [*others, agent]


def _operations(messages: Sequence[str] | Iterator[str]) -> list[str]:
    """The operations that torch's warnings say have no deterministic kernel."""
    return sorted({match[1] for message in messages if (match := _WARNING.match(message))})


def _emit(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Do the task in the file that is named."""
    try:
        _work(json.loads(Path(sys.argv[1]).read_bytes()))
    except Exception as error:
        _emit({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
