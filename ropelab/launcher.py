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
from collections.abc import Callable, Sequence
from typing import Any

Progress = Callable[..., None]
Lines = queue.SimpleQueue[tuple[int, dict[str, Any] | None] | None]
"""(task, line) as a worker writes it; (task, None) when it has ended; None when a signal came."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_threads(n_tasks: int, slots: int) -> list[int]:
    """Threads of each task: those that do not fill a wave of `slots` come first and share all cores between them."""
    odd = n_tasks % slots
    return [slots // odd if index < odd else 1 for index in range(n_tasks)]


def run_side_by_side(
    tasks: Sequence[dict[str, Any]], *, slots: int, progress: Progress
) -> tuple[list[dict[str, Any]], int | None]:
    """Run the tasks of `worker`, at most `slots` threads of them at a time.

    Returns the workers' last lines in the order of the tasks (an `error` entry for one that failed; the others go on)
    and the signal that interrupted the work, if one did: the workers were told, have saved and ended.
    """
    threads = share_threads(len(tasks), slots)
    results: list[dict[str, Any]] = [{"error": "not started"}] * len(tasks)
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
                if threads[waiting[0]] > free:
                    break
                index = waiting.pop(0)
                running[index] = _start({**tasks[index], "threads": threads[index]}, index, lines)
            for signum in caught[forwarded:]:
                forwarded += 1
                for process in running.values():
                    process.send_signal(signum)  # nothing to one that has ended
            item = lines.get()
            if item is None:
                continue
            index, line = item
            if line is None:
                running.pop(index).wait()
            elif "progress" in line:
                progress(**line["progress"])
            else:
                results[index] = line
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for process in running.values():
            process.terminate()
            process.wait()
    return results, caught[0] if caught else None


def _start(task: dict[str, Any], index: int, lines: Lines) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(task["threads"])}
    process = subprocess.Popen(
        [sys.executable, "-m", "ropelab.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,  # a Ctrl-C reaches the workers through us only, once
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:  # it died already: its missing last line will say so
        json.dump(task, process.stdin)

    def read() -> None:
        assert process.stdout is not None
        last = None
        with process.stdout:
            for text in process.stdout:
                with contextlib.suppress(ValueError):
                    last = json.loads(text)
                    lines.put((index, last))
        if last is None or "progress" in last:
            lines.put((index, {"error": f"the worker died with status {process.wait()}"}))
        lines.put((index, None))

    threading.Thread(target=read, daemon=True).start()
    return process
