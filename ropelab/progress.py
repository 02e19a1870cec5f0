"""Progress of long work on stderr: lines, and one bar a description, with loss, tokens per second and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

Progress = Callable[..., None]
"""progress(description, done, total, **facts): told of work as it goes; draws nothing itself."""

SHOWN = 12  # bars that may stand there when they are full
LINE_EVERY = 20.0  # seconds between lines where there is no terminal


def plain(text: str) -> str:
    """Text without control characters: a name in a stranger's run must not steer the terminal."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def tell(message: str) -> None:
    """A line on stderr, `plain`: what somebody who waits for the work has to know."""
    print(plain(f"ropelab: {' '.join(message.split())}"), file=sys.stderr, flush=True)


def silent(description: str, done: int, total: int, **facts: Any) -> None:
    """The progress of whoever does not want any."""


class Bar:
    """Draws what it is told: `bar(description, done, total, loss=..., tokens_per_s=...)`.

    On a terminal a moving bar for each piece of work; elsewhere a plain line now and then, so that logs stay short.
    """

    def __init__(self) -> None:
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._progress.start()
        return self

    def __call__(self, description: str, done: int, total: int, **facts: Any) -> None:
        name = plain(f"{description} {facts['run']}" if "run" in facts else description)  # a run may be a stranger's
        words = []
        if "loss" in facts:
            words.append(f"loss {facts['loss']:.3f}")
        if "best" in facts:
            words.append(f"best {facts['best']:.4f} nats")
        if "tokens_per_s" in facts:
            words.append(f"{facts['tokens_per_s']:,.0f} tokens/s")
        if self._progress is None:
            now = time.monotonic()
            if now - self._last_line >= LINE_EVERY:
                self._last_line = now
                print(
                    f"{name}: {100 * done // max(1, total)}%  {'  '.join(words)}".rstrip(), file=sys.stderr, flush=True
                )
            return
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, facts="")
        self._progress.update(self._tasks[name], completed=done, total=total, facts="  ".join(words))
        if done >= total and len(self._tasks) > SHOWN:  # of a sweep those that are at work stay in view
            self._progress.remove_task(self._tasks.pop(name))

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
