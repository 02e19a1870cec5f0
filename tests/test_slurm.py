"""Sweeps on a real Slurm of two nodes, which `scripts/slurm_lab.sh` starts on this machine, without accounting."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from ropelab import cli, runs, sweeps
from ropelab.errors import SchedulerError
from ropelab.sweeps import Standing, Sweep
from ropelab.sweeps.launchers import slurm
from tests.lab import Process, changed, finished, waited_for
from tests.test_sweeps import SMALL, assert_equal, weights

LAB = Path(__file__).parent.parent / "scripts" / "slurm_lab.sh"
ON_SLURM = (
    "--launcher", "slurm", "launcher.mem_gb=1", "launcher.cpus=1", "launcher.time_min=10",
)  # fmt: skip
pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def lab() -> Iterator[Path]:
    """SLURM_CONF of a running Slurm; CI sets ROPELAB_REQUIRE_SLURM=1, so that these tests cannot go unrun there."""
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        if os.environ.get("ROPELAB_REQUIRE_SLURM") == "1":
            pytest.fail("ROPELAB_REQUIRE_SLURM=1, and slurmctld is not installed")
        pytest.skip("slurmctld is not installed")
    folder = Path(tempfile.mkdtemp(prefix="lab", dir="/tmp"))  # short: a socket's path has a limit
    before = {key: os.environ.get(key) for key in ("SLURM_CONF", "OMP_NUM_THREADS")}
    subprocess.run([LAB, "up", folder, "2"], check=True, stdin=subprocess.DEVNULL, timeout=60)
    os.environ |= {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    try:
        yield folder
    finally:
        subprocess.run([LAB, "down", folder], check=False, stdin=subprocess.DEVNULL, timeout=60)
        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def settings(home: Path) -> tuple[str, ...]:
    return (*SMALL, f"data.path={home / 'corpus'}", f"cache_dir={home / 'cache'}")


def ropelab(*arguments: str, status: int = 0) -> tuple[str, str]:
    said = finished(cli.main, *arguments)
    assert said.status == status, said.err
    assert "Traceback" not in said.err
    return said.out, said.err


def ended(sweep: Sweep) -> list[Standing]:
    """How the runs of a sweep stand when none is waiting or running."""
    found: list[Standing] = []

    def look() -> bool:
        found[:] = sweeps.standings(sweep)
        return not any(one.state in (sweeps.PENDING, sweeps.RUNNING) for one in found)

    waited_for(look)
    return found


def squeue(job: str, field: str) -> str:
    told = subprocess.run(["squeue", "-h", "-r", "-t", "all", "-j", job, "-o", field], capture_output=True, check=True)
    return told.stdout.decode().strip()


def test_eight_points_with_results(lab: Path, settings: tuple[str, ...], tmp_path: Path) -> None:
    """Submitted and left; every run has its evaluation, and giving the command again submits nothing."""
    asked = ("sweep", "pos=rope,alibi,none,learned", "seed=0,1", *ON_SLURM, *settings, f"runs_dir={tmp_path}")
    out, err = ropelab(*asked)
    sweep = sweeps.find_sweep(None, tmp_path)
    assert out == f"ropelab status {sweep.name}\n"
    assert "8 of 8 runs submitted" in err
    assert stat.S_IMODE((sweep.path / "spool").stat().st_mode) == 0o700
    assert [one.state for one in ended(sweep)] == ["DONE"] * 8
    results = [sweep.results(task) for task in range(8)]
    assert [(one.pos, one.seed, len(one.rows)) for (one,) in results] == [
        (pos, seed, 2) for pos in ("rope", "alibi", "none", "learned") for seed in (0, 1)
    ]
    out, _ = ropelab("collect", sweep.name, f"runs_dir={tmp_path}")
    assert "ALiBi" in out
    jobs = sweep.jobs()
    assert {job.partition("_")[0] for job in jobs.values()} == {jobs[0].partition("_")[0]}  # one array
    assert "0 of 8 runs submitted" in ropelab(*asked)[1]
    assert sweep.jobs() == jobs


class Rough(NamedTuple):
    """A sweep to which everything happened."""

    sweep: Sweep
    stands: list[Standing]
    straight: Path  # runs of the same settings that nothing happened to
    parent: int  # exit status of the process that submitted it and waited


NAMES = ("told by USR2", "told by TERM", "cancelled", "diverged")


@pytest.fixture(scope="module")
def rough(lab: Path, settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Rough:
    """Four runs: one told by USR2 and one by TERM to make room, one cancelled, one that diverges; the parent killed."""
    folder = tmp_path_factory.mktemp("rough")
    few = ("train.steps=500", "train.eval_every=500", "train.checkpoint_every=200", "train.batch_size=4")
    long = changed(settings, *few)
    lrs = "train.lr=1e-3,2e-3,3e-3,1e30"
    parent = Process(
        cli.main, "sweep", lrs, "train.warmup_steps=0", *ON_SLURM, *long, f"runs_dir={folder / 'runs'}", "--wait"
    )
    jobs: dict[int, str] = {}

    def submitted() -> bool:
        found = sweeps.all_sweeps(folder / "runs")
        jobs.update(Sweep(found[0]).jobs() if found else {})
        return len(jobs) == 4

    waited_for(submitted)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    sweep = sweeps.find_sweep(None, folder / "runs")
    for task, told in ((0, ["--signal=USR2"]), (1, ["--signal=TERM"]), (2, [])):
        waited_for(lambda task=task: (sweeps.standings(sweep)[task].step or 0) >= 20)  # type: ignore[misc]
        subprocess.run(["scancel", *told, jobs[task]], check=True)
    stands = ended(sweep)
    ropelab(
        "sweep",
        "train.lr=1e-3,2e-3,3e-3",
        "train.warmup_steps=0",
        "launcher.jobs=2",
        *long,
        f"runs_dir={folder / 'straight'}",
    )
    return Rough(sweep, stands, folder / "straight", parent.returncode)


def test_a_killed_parent_does_not_matter(rough: Rough) -> None:
    assert rough.parent == -signal.SIGKILL
    assert [one.state for one in rough.stands] == ["DONE", "DONE", "CANCELLED", "FAILED"]


@pytest.mark.parametrize("task", [0, 1], ids=NAMES[:2])
def test_a_run_that_made_room_comes_back_and_ends_with_the_same_numbers(rough: Rough, task: int) -> None:
    job = rough.sweep.jobs()[task]
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, check=True).stdout.decode()
    assert "Restarts=1" in shown
    log = "".join(path.read_text(encoding="utf-8") for path in rough.sweep.logs.glob(f"{job}_*.err"))
    assert "queued again" in log
    run = rough.sweep.run(task)
    straight = runs.RunDir(rough.straight / run.name)
    assert_equal({run.name: run.load_weights()}, {run.name: straight.load_weights()})
    untimed = [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in run.metrics()]
    assert untimed == [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in straight.metrics()]


def test_a_cancelled_run_is_cancelled_and_can_go_on(rough: Rough) -> None:
    assert rough.stands[2].state == "CANCELLED"
    saved = rough.sweep.run(2).latest_checkpoint()
    assert saved is not None
    where = f"runs_dir={rough.sweep.path.parent.parent}"
    _, err = ropelab("collect", where, status=1)
    assert "CANCELLED: " in err
    assert "FAILED: " in err
    ropelab("retry", where, "--launcher", "local", status=1)  # the diverged one fails again
    stands = sweeps.standings(rough.sweep)
    assert [one.state for one in stands] == ["DONE", "DONE", "DONE", "FAILED"]
    run = rough.sweep.run(2)
    assert_equal({run.name: run.load_weights()}, {run.name: runs.RunDir(rough.straight / run.name).load_weights()})


def test_a_run_that_raised_is_failed_to_slurm_too(rough: Rough) -> None:
    assert "the loss became" in rough.stands[3].note
    states = [
        subprocess.run(["scontrol", "show", "job", "-o"], capture_output=True, check=True).stdout.decode().splitlines()
    ][0]
    array = rough.sweep.path.name
    of_sweep = [line for line in states if f"JobName=ropelab-{array}" in line and "ArrayTaskId=3 " in line]
    assert len(of_sweep) == 1
    assert "JobState=FAILED" in of_sweep[0]


def test_a_job_that_nobody_knows_is_lost(lab: Path, rough: Rough, tmp_path: Path) -> None:
    made = sweeps.create(tmp_path, "sweep", rough.sweep.tasks[:1], settings=["seed=0"], points=["seed=0"])
    sweeps.launched(made, {"name": "slurm"})
    made.add_job(0, "99999_0")
    (one,) = sweeps.standings(made)
    assert one.state == "LOST"
    assert "no longer knows job 99999_0" in one.note


def test_a_scheduler_that_does_not_answer_is_said(
    lab: Path, rough: Rough, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = sweeps.create(tmp_path, "sweep", rough.sweep.tasks[:1], settings=["seed=0"], points=["seed=0"])
    made.add_job(0, "1_0")
    monkeypatch.setattr(slurm, "PATIENCE", 0.001)
    with pytest.raises(SchedulerError, match="gave no answer"):
        sweeps.standings(made)


def test_cancel_reaches_the_cluster(lab: Path, settings: tuple[str, ...], tmp_path: Path) -> None:
    long = changed(settings, "train.steps=100000")
    where = f"runs_dir={tmp_path}"
    ropelab("sweep", "seed=0,1,2", *ON_SLURM, "launcher.array_parallelism=1", *long, where)
    sweep = sweeps.find_sweep(None, tmp_path)
    waited_for(lambda: (sweeps.standings(sweep)[0].step or 0) >= 5)
    assert "3 jobs cancelled" in ropelab("cancel", where)[1]
    waited_for(lambda: "saved at step" in sweeps.standings(sweep)[0].note)
    assert [one.state for one in sweeps.standings(sweep)] == ["CANCELLED"] * 3
    assert {squeue(job, "%T") for job in sweep.jobs().values()} <= {"CANCELLED", "COMPLETING", ""}


def restarts(job: str) -> int:
    shown = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, check=True).stdout.decode()
    (line,) = [line for line in shown.splitlines() if f"ArrayTaskId={job.partition('_')[2]} " in line]
    return int(line.partition(" Restarts=")[2].split()[0])


def test_a_task_that_makes_room_queues_itself_again_and_no_other(
    lab: Path, settings: tuple[str, ...], tmp_path: Path
) -> None:
    """Two told at once, one of them the last, whose id is the array's: finished, cancelled and other ones stay."""
    steps = ("train.steps=8,100000,100001,100002,100003", "train.eval_every=100000", "train.checkpoint_every=100000")
    ropelab("sweep", *ON_SLURM, *changed(settings, *steps), f"runs_dir={tmp_path}")
    sweep = sweeps.find_sweep(None, tmp_path)
    jobs = sweep.jobs()

    def standing(task: int) -> Standing:
        return sweeps.standings(sweep)[task]

    waited_for(lambda: min(standing(task).step or 0 for task in (1, 2, 3, 4)) >= 5)
    subprocess.run(["scancel", jobs[1]], check=True)
    waited_for(lambda: standing(0).state == "DONE" and "saved at step" in standing(1).note)
    waited_for(lambda: squeue(jobs[1], "%T") == "CANCELLED")
    answers = [sweep.answer(task) for task in (0, 1)]
    subprocess.run(["scancel", "--signal=USR2", jobs[3], jobs[4]], check=True)
    seen: list[str] = []

    def back() -> bool:
        seen.extend(standing(task).state for task in (3, 4))
        return all(restarts(jobs[task]) == 1 and squeue(jobs[task], "%T") == "RUNNING" for task in (3, 4))

    waited_for(back)
    assert set(seen) <= {"PENDING", "RUNNING"}
    assert [restarts(jobs[task]) for task in range(5)] == [0, 0, 0, 1, 1]
    assert [sweep.answer(task) for task in (0, 1)] == answers
    assert [one.state for one in sweeps.standings(sweep)[:3]] == ["DONE", "CANCELLED", "RUNNING"]
    ropelab("cancel", sweep.name, f"runs_dir={tmp_path}")
    assert [one.state for one in ended(sweep)] == ["DONE", *["CANCELLED"] * 4]


def test_a_job_of_another_name_is_not_cancelled(lab: Path, settings: tuple[str, ...], tmp_path: Path) -> None:
    """A stranger's folder that names one of this user's own jobs."""
    told = subprocess.run(["sbatch", "--parsable", "-o", "/dev/null", "--wrap", "sleep 60"], capture_output=True)
    mine = told.stdout.decode().strip()
    ropelab("sweep", "seed=0", *ON_SLURM, *settings, f"runs_dir={tmp_path}", "--emit-sbatch")
    made = sweeps.find_sweep(None, tmp_path)
    made.add_job(0, mine)
    _, err = ropelab("cancel", made.name, f"runs_dir={tmp_path}", status=2)
    assert f"job {mine} is named 'wrap'" in err
    assert f"scancel {mine}" in err
    assert squeue(mine, "%T") in ("PENDING", "CONFIGURING", "RUNNING")
    subprocess.run(["scancel", mine], check=True)


def test_the_emitted_script_does_the_same(lab: Path, settings: tuple[str, ...], tmp_path: Path) -> None:
    """Edited and submitted by hand; `status` finds its jobs, since they note themselves."""
    out, _ = ropelab("sweep", "seed=0,1", *ON_SLURM, *settings, f"runs_dir={tmp_path}", "--emit-sbatch")
    sweep = sweeps.find_sweep(None, tmp_path)
    assert [one.note for one in sweeps.standings(sweep)] == ["not launched"] * 2
    subprocess.run(["sbatch"], input=out.encode(), check=True, capture_output=True, cwd=tmp_path)
    waited_for(lambda: len(sweep.jobs()) == 2)
    assert [one.state for one in ended(sweep)] == ["DONE", "DONE"]


def test_two_ranks_on_two_nodes_train_as_one_process(lab: Path, settings: tuple[str, ...], tmp_path: Path) -> None:
    """Data parallel over gloo: losses within 1e-5 of one process's, one run folder, written by the first rank."""
    long = changed(settings, "train.steps=50", "train.batch_size=4", "train.eval_every=25")
    ranks = ("launcher.nodes=2", "launcher.tasks_per_node=1")
    ropelab("sweep", "pos=alibi", *ON_SLURM, *ranks, *long, f"runs_dir={tmp_path / 'two'}")
    sweep = sweeps.find_sweep(None, tmp_path / "two")
    stands = ended(sweep)
    assert stands[0].state == "DONE", stands[0].note
    ropelab("train", "--pos", "alibi", *(item for item in long if not item.startswith("eval.ctx")),
            f"runs_dir={tmp_path / 'one'}")  # fmt: skip
    (one,), (two,) = runs.all_runs(tmp_path / "one"), runs.all_runs(tmp_path / "two")
    assert one.name == two.name
    assert two.manifest()["world_size"] == 2
    losses = torch.tensor([[line["loss"] for line in run.metrics()] for run in (one, two)], dtype=torch.float64)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    assert len(losses[0]) == 50


def test_hydras_own_launcher_still_works(lab: Path, settings: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    process = subprocess.run(
        [
            sys.executable, "-m", "ropelab", "sweep", "pos=rope,alibi", "hydra/launcher=submitit_slurm",
            "hydra.launcher.mem_gb=1", "hydra.launcher.timeout_min=5", "hydra.launcher.cpus_per_task=1",
            *settings, f"runs_dir={tmp_path / 'runs'}",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert {run.manifest()["status"] for run in runs.all_runs(tmp_path / "runs")} == {"done"}
    assert len(weights(tmp_path / "runs")) == 2
