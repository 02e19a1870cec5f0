"""Runs side by side, on real worker processes: order, failures, kills, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ropelab import config as configs
from ropelab import runs
from ropelab.sweeps.launchers import local
from tests.lab import Process, tiny

FOREVER = ("train.steps=1000000", "train.eval_every=1000000", "train.checkpoint_every=1000000")


def task(home: Path, runs_dir: Path, *overrides: str) -> dict[str, Any]:
    return {"config": configs.to_dict(tiny(home, runs_dir, *overrides)), "evaluations": []}


def silent(description: str, done: int, total: int, **facts: Any) -> None:
    pass


@pytest.fixture
def started(forked_workers: None, monkeypatch: pytest.MonkeyPatch) -> dict[int, Process]:
    """The worker processes that were started, by the number of their task."""
    found: dict[int, Process] = {}
    start = local._start

    def remembering(task: dict[str, Any], index: int, lines: local.Lines, gpu: str | None = None) -> Any:
        found[index] = start(task, index, lines, gpu)  # type: ignore[assignment]
        return found[index]

    monkeypatch.setattr(local, "_start", remembering)
    return found


@pytest.mark.parametrize(
    ("n_tasks", "slots", "expected"),
    [
        (0, 2, []),
        (1, 1, [1]),
        (1, 8, [8]),
        (2, 2, [1, 1]),  # fills a wave
        (3, 2, [2, 1, 1]),
        (4, 2, [1, 1, 1, 1]),
        (3, 8, [2, 2, 2]),
        (5, 4, [4, 1, 1, 1, 1]),
        (7, 4, [1, 1, 1, 1, 1, 1, 1]),
        (6, 4, [2, 2, 1, 1, 1, 1]),
    ],
)
def test_threads_are_shared_out(n_tasks: int, slots: int, expected: list[int]) -> None:
    assert local.share_threads(n_tasks, slots) == expected


@pytest.mark.parametrize("slots", range(1, 10))
def test_the_first_wave_never_takes_more_than_there_is(slots: int) -> None:
    for n_tasks in range(1, 30):
        threads = local.share_threads(n_tasks, slots)
        assert len(threads) == n_tasks
        assert min(threads) >= 1
        assert sum(threads[: n_tasks % slots]) <= slots


def test_nothing_to_do() -> None:
    assert local.run_side_by_side([], slots=2, progress=silent) == ([], None)


def test_a_failing_and_a_killed_worker_leave_the_others_alone(
    home: Path,
    tmp_path: Path,
    started: dict[int, Process],
) -> None:
    """Four tasks, two at a time: one is killed while it trains, one is refused, two are finished; in order."""
    tasks = [
        task(home, tmp_path / "0", *FOREVER),
        task(home, tmp_path / "1", "pos=alibi"),
        task(home, tmp_path / "2", "scaling=linear"),
        task(home, tmp_path / "3", "pos=learned"),
    ]
    told: list[tuple[str, int]] = []

    def progress(description: str, done: int, total: int, **facts: Any) -> None:
        told.append((description, total))
        if (description, total) == ("train", 1_000_000):
            started[0].kill()

    results, signum = local.run_side_by_side(tasks, slots=2, progress=progress)
    assert signum is None
    assert results[0] == {"error": "the worker died with status -9"}
    assert results[2] == {"error": "scaling=linear with factor 1 changes nothing; give scaling.factor=4, say"}
    for index, pos in ((1, "alibi"), (3, "learned")):
        trained = results[index]["train"]
        assert (trained["status"], trained["step"]) == ("done", 8)
        assert trained["run"].startswith(f"{pos}-text-s0-")
        assert results[index]["manifest"]["environment"]["threads"] == 1
        assert runs.RunDir(Path(trained["run_dir"])).load_weights()
    assert ("train", 8) in told
    (killed,) = runs.all_runs(tmp_path / "0")
    assert killed.status() == "interrupted"


def test_a_signal_to_the_parent_has_the_workers_save(
    home: Path,
    tmp_path: Path,
    started: dict[int, Process],
) -> None:
    """SIGTERM while two of three train: both save and say so, the third is never started."""
    training: set[str] = set()
    groups: list[int] = []

    def progress(description: str, done: int, total: int, **facts: Any) -> None:
        if description == "train" and facts["run"] not in training:
            training.add(facts["run"])
            if len(training) == 2:
                groups.extend(os.getpgid(process.pid) for process in started.values())
                os.kill(os.getpid(), signal.SIGTERM)

    tasks = [task(home, tmp_path, *FOREVER, f"seed={seed}") for seed in range(3)]
    # three tasks on two cores would begin with one on two threads: four do not
    results, signum = local.run_side_by_side([*tasks, tasks[2]], slots=2, progress=progress)
    assert signum == signal.SIGTERM
    assert len({os.getpgrp(), *groups}) == 3  # a Ctrl-C in the terminal does not reach the workers a second time
    assert sorted(started) == [0, 1]
    assert [process.returncode for process in started.values()] == [0, 0]
    assert results[2:] == [{"cancelled": "not started"}] * 2
    for index in (0, 1):
        (run,) = (run for run in runs.all_runs(tmp_path) if f"-s{index}-" in run.name)
        step = run.metrics()[-1]["step"]
        assert results[index] == {"cancelled": f"{run.name} saved at step {step}; the same command goes on from there"}
        assert run.status() == "interrupted"
        latest = run.latest_checkpoint()
        assert latest is not None
        assert latest.name == f"step-{step:08}"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_worker_is_started_reaches_it(
    home: Path,
    forked_workers: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signum: int,
) -> None:
    """It is not among the running ones yet when the signal comes; it would train, and this test last, for hours."""
    start: Callable[..., subprocess.Popen[str]] = local._start

    def interrupted_start(*arguments: Any) -> subprocess.Popen[str]:
        process = start(*arguments)
        os.kill(os.getpid(), signum)
        return process

    monkeypatch.setattr(local, "_start", interrupted_start)
    before = signal.getsignal(signum)
    results, caught = local.run_side_by_side([task(home, tmp_path, *FOREVER)], slots=1, progress=silent)
    assert caught == signum
    assert "cancelled" in results[0]
    assert signal.getsignal(signum) is before


def test_a_signal_is_forwarded_while_the_workers_are_silent(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silent_worker = tmp_path / "worker"
    silent_worker.write_text("#!/bin/sh\nexec sleep 300\n", encoding="utf-8")
    silent_worker.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(silent_worker))
    later = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    later.start()
    results, signum = local.run_side_by_side([task(home, tmp_path)], slots=1, progress=silent)
    later.join()
    assert (results, signum) == ([{"cancelled": "stopped by signal 15"}], signal.SIGTERM)


def test_a_worker_that_cannot_start_is_reported(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    results, _ = local.run_side_by_side([task(home, tmp_path)] * 2, slots=2, progress=silent)
    assert results == [{"error": "the worker died with status 1"}] * 2
