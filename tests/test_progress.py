"""The bar: a moving one on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from ropelab import progress
from ropelab.progress import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_loss_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Bar() as bar:
        bar("train", 5, 10, run="rope-x", loss=1.23456, tokens_per_s=12345.6)
        bar("search", 5, 10, run="rope-x", best=1.23456)
    shown = terminal.getvalue()
    for word in ("best 1.2346 nats", "train rope-x", "50%", "loss 1.235", "12,346 tokens/s", ":"):
        assert word in shown


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress, "LINE_EVERY", 20.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Bar() as bar:
        for second in range(60):
            clock[0] = float(second)
            bar("train", second, 100, run="rope-x", loss=2.0)
    assert capsys.readouterr().err.splitlines() == ["train rope-x: 20%  loss 2.000", "train rope-x: 40%  loss 2.000"]


def test_a_name_in_a_log_cannot_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with Bar() as bar:
        bar("search", 1, 2, run="rope\x1b[2J\x9b31m\u202e", best=5.0)
    printed = capsys.readouterr().err
    assert printed.startswith("search rope")
    assert printed.removesuffix("\n").isprintable()


def test_of_a_long_sweep_only_the_runs_at_work_stay_in_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Bar() as bar:
        for number in range(40):
            bar("train", 5, 10, run=f"run-{number}")
            bar("train", 10, 10, run=f"run-{number}")
        bar("train", 5, 10, run="at-work")
        assert len(bar._tasks) <= progress.SHOWN + 1
        assert "train at-work" in bar._tasks
        assert len(bar._progress.tasks) == len(bar._tasks)
