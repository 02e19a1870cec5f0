"""Independent runs side by side on this machine: one process a run, the cores shared out."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Progress = Callable[..., None]
Ended = Callable[[int, dict[str, Any]], None]
DIED = {"error": "the worker died"}
Lines = queue.SimpleQueue[tuple[int, dict[str, Any] | None] | None]
"""(task, line) as a worker writes it; (task, None) when it has ended; None when a signal came."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_threads(n_tasks: int, slots: int) -> list[int]:
    """Threads of each task: those that do not fill a wave of `slots` come first and share all cores between them."""
    odd = n_tasks % slots
    return [slots // odd if index < odd else 1 for index in range(n_tasks)]


def batches(tasks: Sequence[dict[str, Any]], size: int) -> list[list[int]]:
    """The tasks in batches of at most `size` that share model, text and recipe, by their numbers, in their order."""
    alike: dict[str, list[list[int]]] = {}
    for index, task in enumerate(tasks):
        tree = task["config"]
        key = repr([tree[part] for part in ("model", "data", "train", "device", "runs_dir", "cache_dir")])
        found = alike.setdefault(key, [[]])
        if len(found[-1]) == size:
            found.append([])
        found[-1].append(index)
    return sorted(batch for found in alike.values() for batch in found)


def run_in_batches(
    tasks: Sequence[dict[str, Any]], *, stack: int, ended: Ended = lambda index, answer: None, **how: Any
) -> tuple[list[dict[str, Any]], int | None]:
    """`run_side_by_side`, with up to `stack` alike runs trained in one batched step; the answers are those of tasks."""
    together = batches(tasks, stack)
    answers: list[dict[str, Any]] = [{}] * len(tasks)

    def unpack(batch: list[int], answer: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from zip(batch, answer.get("stack", [answer] * len(batch)), strict=True)

    def one_ended(place: int, answer: dict[str, Any]) -> None:
        for index, one in unpack(together[place], answer):
            ended(index, one)

    told, interrupted = run_side_by_side(
        [tasks[batch[0]] if len(batch) == 1 else {"stack": [tasks[index] for index in batch]} for batch in together],
        ended=one_ended, **how,
    )  # fmt: skip
    for batch, answer in zip(together, told, strict=True):
        for index, one in unpack(batch, answer):
            answers[index] = one
    return answers, interrupted


def run_side_by_side(
    tasks: Sequence[dict[str, Any]],
    *,
    slots: int,
    progress: Progress,
    jobs: int | None = None,
    gpus: Sequence[str] = (),
    ended: Ended = lambda index, answer: None,
) -> tuple[list[dict[str, Any]], int | None]:
    """Run the tasks of `worker`, at most `slots` threads and `jobs` processes at a time; with `gpus`, one on each.

    Returns the workers' last lines in the order of the tasks (an `error` entry for one that failed; the others go on)
    and the signal that interrupted the work, if one did: the workers were told, have saved and ended. `ended` gets
    each line as soon as its worker has ended.
    """
    most = min(jobs or len(tasks), len(gpus) or len(tasks))
    if jobs is None and not gpus:
        threads = share_threads(len(tasks), slots)
    else:
        threads = [max(1, slots // max(1, min(most, len(tasks))))] * len(tasks)
        slots = max(slots, sum(threads[:most]))
    free_gpus = list(gpus)
    on_gpu: dict[int, str] = {}
    results: list[dict[str, Any]] = [{"cancelled": "not started"}] * len(tasks)
    lines: Lines = queue.SimpleQueue()
    running: dict[int, subprocess.Popen[str]] = {}
    waiting = list(range(len(tasks)))
    caught: list[int] = []
    forwarded = 0

    def note(signum: int, frame: object) -> None:
        caught.append(signum)
        lines.put(None)  # wakes the loop, which forwards it: here a worker could be half started

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        while running or (waiting and not caught):
            while waiting and not caught:
                free = slots - sum(threads[index] for index in running)
                if threads[waiting[0]] > free or len(running) >= most:
                    break
                index = waiting.pop(0)
                if gpus:
                    on_gpu[index] = free_gpus.pop(0)
                running[index] = _start({**tasks[index], "threads": threads[index]}, index, lines, on_gpu.get(index))
            for signum in caught[forwarded:]:
                forwarded += 1
                for process in running.values():
                    process.send_signal(signum)  # nothing to one that has ended
            item = lines.get()
            if item is None:
                continue
            index, line = item
            if line is None:
                process = running.pop(index)
                status = _wait(process)
                if index in on_gpu:
                    free_gpus.append(on_gpu.pop(index))
                if caught and results[index] == DIED:  # of the signal that was passed on
                    results[index] = {"cancelled": f"stopped by signal {caught[0]}"}
                elif results[index] == DIED:
                    results[index] = {"error": f"the worker died with status {status}"}
                ended(index, results[index])
            elif "progress" in line:
                progress(**line["progress"])
            else:
                results[index] = line
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for process in running.values():
            process.terminate()
            _wait(process)
        for index in waiting:
            ended(index, results[index])
    return results, caught[0] if caught else None


def _wait(process: subprocess.Popen[str]) -> int:
    """The status with which a worker ended."""
    status = process.wait()
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    return status


def _start(task: dict[str, Any], index: int, lines: Lines, gpu: str | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(task["threads"])}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    process = subprocess.Popen(
        [sys.executable, "-m", "ropelab.sweeps.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,  # a Ctrl-C reaches the workers through us only, once
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died already: its missing last line will say so
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()  # and stays open: the worker stops when we are gone

    def read() -> None:
        assert process.stdout is not None
        last = None
        with process.stdout:
            for text in process.stdout:
                with contextlib.suppress(ValueError):
                    last = json.loads(text)
                    lines.put((index, last))
        if last is None or "progress" in last:
            lines.put((index, DIED))
        lines.put((index, None))

    threading.Thread(target=read, daemon=True).start()
    return process
