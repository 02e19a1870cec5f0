"""Sweeps on a Slurm cluster: one job array through submitit, found again from any process. The only user of submitit.

A job is a task of a sweep. It answers in the sweep's folder, in JSON; what submitit writes beside it is pickle, lies in
a folder that only its owner may enter, and is never read back here. Where the answer is missing, the scheduler is
asked: `squeue`, which knows ended jobs for some minutes, then `sacct` where there is accounting.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ropelab.config import SlurmLauncher
from ropelab.distributed import init_distributed
from ropelab.errors import SchedulerError
from ropelab.progress import Bar, tell
from ropelab.sweeps import worker
from ropelab.sweeps.folder import JOB, Sweep
from ropelab.sweeps.launchers import local

PATIENCE = 30  # seconds for an answer of the scheduler: a daemon that is down never gives one
STOPS = (signal.SIGTERM, signal.SIGUSR2)
WAITS = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING", "COMPLETING")  # of a job that is in the queue again
PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds between two attempts to be queued again


class Stopped(BaseException):
    """A signal came where nothing is lost by stopping at once; no `except Exception` on the way may take it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


# --- asking Slurm ---------------------------------------------------------------------------------------------------


def check_slurm() -> None:
    """`ValueError`, before anything is written, where jobs cannot be submitted from here."""
    configured = os.environ.get("SLURM_CONF")
    if configured and not Path(configured).is_file():
        raise ValueError(f"SLURM_CONF={configured} names no file; unset it, or give the cluster's slurm.conf")
    for program in ("sbatch", "squeue", "scancel", "scontrol", "srun"):
        if shutil.which(program) is None:
            raise ValueError(f"{program} is not on PATH: this is no Slurm machine; use --launcher local")
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise ValueError("--launcher slurm needs submitit: pip install 'ropelab[slurm]'") from None


def _ask(*command: str) -> str:
    """What a Slurm program prints. `SchedulerError` where it fails, or does not answer in time."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise SchedulerError(f"{command[0]} is not on PATH: this is no Slurm machine") from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{command[0]} gave no answer in {PATIENCE} s; is slurmctld running?") from None
    if done.returncode:
        raise SchedulerError(f"{command[0]}: {' '.join(done.stderr.split()) or f'exit {done.returncode}'}")
    return done.stdout


def job_states(jobs: Sequence[str]) -> dict[str, str]:
    """The state of each job that Slurm still knows. `SchedulerError` where `squeue` does not answer."""
    jobs = [job for job in jobs if JOB.fullmatch(job)]
    if not jobs:
        return {}
    states = queued()
    missing = [job for job in jobs if job not in states]
    if missing:
        parents = ",".join(sorted({job.partition("_")[0] for job in missing}))
        with contextlib.suppress(SchedulerError):  # no accounting: what squeue has forgotten is unknown
            told = dict(_rows(_ask("sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", parents)))
            states = {**told, **states}
    return {job: states[job] for job in jobs if job in states}


def queued() -> dict[str, str]:
    """The state of every job of this user that `squeue` knows, ended ones for some minutes."""
    return dict(_rows(_ask("squeue", "-h", "-r", "-t", "all", "-u", str(os.getuid()), "-o", "%i|%T")))


def _rows(text: str) -> list[tuple[str, str]]:
    """`job|STATE` lines; "CANCELLED by 0" is CANCELLED."""
    pairs = [line.partition("|") for line in text.splitlines() if "|" in line]
    return [(job.strip(), state.split()[0].rstrip("+")) for job, _, state in pairs if state.strip()]


def cancel(sweep: Sweep, jobs: Sequence[str]) -> None:
    """Cancel jobs of a sweep. `SchedulerError` where Slurm refuses.

    `ValueError` where a job may be another's: which are the sweep's stands in its folder, which may be a stranger's.
    """
    if not jobs:
        return
    odd = next((job for job in jobs if not JOB.fullmatch(job)), None)
    if odd is not None:
        raise ValueError(f"{sweep.path / 'jobs'} names a job that is none; it was altered")
    names = dict(_rows(_ask("squeue", "-h", "-r", "-t", "all", "-u", str(os.getuid()), "-o", "%i|%j")))
    other = next((job for job in jobs if names.get(job, job_name(sweep)) != job_name(sweep)), None)
    if other is not None:
        raise ValueError(
            f"job {other} is named '{names[other]}' and not '{job_name(sweep)}', so it may be another's; "
            f"if it is this sweep's: scancel {other}"
        )
    _ask("scancel", *jobs)


def largest_array() -> int:
    """Tasks that one array may have: Slurm's MaxArraySize, of which 1001 is the default."""
    for line in _ask("scontrol", "show", "config").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "MaxArraySize" and value.strip().isdecimal():
            return max(1, int(value) - 1)
    return 1000


# --- submitting -----------------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """`ValueError` where a folder's path cannot stand in a batch script: there it is text, with Slurm's own marks."""
    path = str(folder.expanduser().resolve())
    odd = next((letter for letter in path if not letter.isprintable() or letter in "%\\"), None)
    if odd is not None:
        raise ValueError(f"Slurm cannot have its logs below a folder whose path holds {odd!r}; choose another runs_dir")


def job_name(sweep: Sweep) -> str:
    """What the jobs of a sweep are called, in plain letters: the name of its folder becomes text of a batch script."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", f"ropelab-{sweep.name}")[:60]


def submit(sweep: Sweep, indices: Sequence[int], settings: SlurmLauncher) -> dict[int, str]:
    """Submit tasks as job arrays and return at once: the job of each task, noted in the sweep's folder too.

    `SchedulerError` where Slurm refuses, with what was submitted before that, which is noted.
    """
    import submitit

    check_folder(sweep.path)
    executor = submitit.SlurmExecutor(folder=_spool(sweep))
    executor.update_parameters(**_parameters(sweep, settings))
    size = largest_array()
    jobs: dict[int, str] = {}
    for low in range(0, len(indices), size):
        part = indices[low : low + size]
        work = [Job(str(sweep.path.resolve()), index, settings.max_requeues) for index in part]
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what the error says once more
                submitted = executor.map_array(_call, work)
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError, OSError) as error:
            done = f"{len(jobs)} of {len(indices)} runs were submitted" if jobs else "nothing was submitted"
            rest = f"; when there is room, ropelab retry {sweep.name} submits the other {len(indices) - len(jobs)}"
            raise SchedulerError(
                f"sbatch refused: {' '.join(str(error).split())}; {done}{rest if jobs else ''}"
            ) from None
        for index, job in zip(part, submitted, strict=True):
            jobs[index] = str(job.job_id)
            sweep.add_job(index, jobs[index])
    return jobs


def _spool(sweep: Sweep) -> Path:
    """A new folder for what submitit writes. Its pickles are read in the job, so nothing may lie there before them."""
    sweep.logs.mkdir(exist_ok=True)
    spool = sweep.own("spool")
    spool.mkdir(mode=0o700, exist_ok=True)
    spool.chmod(0o700)
    return Path(tempfile.mkdtemp(dir=spool)).resolve()


def _parameters(sweep: Sweep, settings: SlurmLauncher) -> dict[str, Any]:
    """What submitit calls the settings of `configs/launcher/slurm.yaml`."""
    more: dict[str, Any] = {"requeue": True, **_options(settings.sbatch)}
    chosen = {
        "job_name": job_name(sweep), "time": settings.time_min, "mem": f"{round(settings.mem_gb * 1024)}M",
        "cpus_per_task": settings.cpus, "nodes": settings.nodes, "ntasks_per_node": settings.tasks_per_node,
        "array_parallelism": settings.array_parallelism, "signal_delay_s": settings.signal_delay_s,
        "partition": settings.partition, "account": settings.account, "qos": settings.qos,
        "constraint": settings.constraint, "gpus_per_node": settings.gpus or None,
        "setup": list(settings.setup) or None, "additional_parameters": more,
        "srun_args": _srun(sweep, settings),
    }  # fmt: skip
    return {key: value for key, value in chosen.items() if value is not None}


def _srun(sweep: Sweep, settings: SlurmLauncher) -> list[str]:
    """A log for each rank, appended to when the job comes back; and the cores, which srun does not take from sbatch."""
    logs = sweep.logs.resolve()
    return [
        "--open-mode=append", f"--output={logs}/%A_%a_%t.out", f"--error={logs}/%A_%a_%t.err",
        f"--cpus-per-task={settings.cpus}",
    ]  # fmt: skip


def _options(items: Sequence[str]) -> dict[str, Any]:
    """`exclude=n3` and flags such as `exclusive`, as sbatch options."""
    pairs = [item.lstrip("-").partition("=") for item in items]
    return {key: value if equals else True for key, equals, value in pairs}


def sbatch_script(sweep: Sweep, indices: Sequence[int], settings: SlurmLauncher) -> str:
    """A batch script that does what `submit` would, for sites where it has to be changed by hand."""
    check_folder(sweep.path)
    logs = sweep.logs.resolve()
    array = ",".join(map(str, indices))
    options: dict[str, Any] = {
        "job-name": job_name(sweep), "array": f"{array}%{settings.array_parallelism}",
        "time": settings.time_min, "mem": f"{round(settings.mem_gb * 1024)}M", "cpus-per-task": settings.cpus,
        "nodes": settings.nodes, "ntasks-per-node": settings.tasks_per_node, "partition": settings.partition,
        "account": settings.account, "qos": settings.qos, "constraint": settings.constraint,
        "gpus-per-node": settings.gpus or None, "signal": f"USR2@{settings.signal_delay_s}", "requeue": True,
        "open-mode": "append", "output": f"{logs}/%A_%a_0.out", "error": f"{logs}/%A_%a_0.err",
        **_options(settings.sbatch),
    }  # fmt: skip
    lines = [
        f"#SBATCH --{key}" if value is True else f"#SBATCH --{key}={shlex.quote(str(value))}"
        for key, value in options.items()
        if value is not None
    ]
    command = shlex.join(
        [
            "srun", "--unbuffered", *_srun(sweep, settings), sys.executable, "-m", "ropelab", "task",
            str(sweep.path.resolve()),
        ]
    )  # fmt: skip
    last = f'{command} "$SLURM_ARRAY_TASK_ID" --max-requeues {settings.max_requeues}'
    return "\n".join(["#!/bin/bash", *lines, "", *settings.setup, last, ""])


# --- in the job -----------------------------------------------------------------------------------------------------


class Job:
    """One task of a sweep as a job of the cluster; called by submitit, found by its name in a pickle of our own."""

    def __init__(self, folder: str, index: int, max_requeues: int) -> None:
        self.folder, self.index, self.max_requeues = folder, index, max_requeues

    def __call__(self) -> None:
        run_task(Sweep(Path(self.folder)), self.index, max_requeues=self.max_requeues)


def _call(job: Job) -> None:
    job()


def run_task(sweep: Sweep, index: int, *, max_requeues: int) -> None:
    """Do a task and say in the sweep's folder what became of it; saved and queued again when told to stop.

    USR2 comes before the time limit, TERM with preemption and with a cancellation, which alone ends the task. Several
    ranks do it together, and the first one speaks.
    """
    before = {signum: signal.signal(signum, _stop) for signum in STOPS}
    threads = int(os.environ.get("SLURM_CPUS_PER_TASK") or local.cores())
    _meet()
    first = True
    try:
        with init_distributed(lambda error: 1) as ranks, Bar() as bar:
            first = ranks.is_first
            if first:
                sweep.begun(index, own_job())
            answer = worker.work({**sweep.tasks[index], "threads": threads}, bar, ranks)
            if first:
                sweep.say(index, answer)
    except (Exception, Stopped) as error:
        for one in STOPS:  # a second signal must not stop us before the job is in the queue again
            signal.signal(one, signal.SIG_IGN)
        signum = getattr(error, "signum", None)
        if not first and signum is not None:
            return  # stopped together; the first rank says so
        if not first:
            raise
        if signum is None:
            sweep.say(index, {"error": f"{type(error).__name__}: {error}" if str(error) else type(error).__name__})
            raise
        _stopped(sweep, index, signum, str(error), max_requeues)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _meet() -> None:
    """Say where the ranks of this job meet: the address of its first node, which need not be the node's name."""
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1 or "MASTER_ADDR" in os.environ:
        return
    with contextlib.suppress(SchedulerError, IndexError, StopIteration):  # then by its name
        first = _ask("scontrol", "show", "hostnames", nodes).split()[0]
        facts = _ask("scontrol", "show", "node", "-o", first).split()
        os.environ["MASTER_ADDR"] = next(fact.partition("=")[2] for fact in facts if fact.startswith("NodeAddr="))


def _stop(signum: int, frame: FrameType | None) -> None:
    raise Stopped(signum)


def _stopped(sweep: Sweep, index: int, signum: int, saved: str, max_requeues: int) -> None:
    """Queue the job again, unless it was cancelled or has come back too often."""
    job = own_job()
    if signum == signal.SIGTERM and _state_of(job) != "RUNNING":
        sweep.say(index, {"cancelled": saved})
        return
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= max_requeues:
        sweep.say(index, {"error": f"queued again {max_requeues} times already (launcher.max_requeues); {saved}"})
        return
    tell(f"{saved}; queued again")
    try:
        _queue_again(job)
    except SchedulerError as error:
        sweep.say(index, {"error": f"could not be queued again: {error}; {saved}"})
        raise
    sys.stdout.flush()
    os._exit(0)  # the job is in the queue again: what this process would still say is of no use


def _queue_again(job: str) -> None:
    """Put a running job back into the queue. `SchedulerError` where Slurm keeps refusing, or does not answer."""
    for pause in (*PAUSES, None):
        try:
            _ask("scontrol", "requeue", job)
            return
        except SchedulerError:
            if _state_of(job) in WAITS:  # by Slurm itself, which preempts so, or by who told us to stop
                return
            if pause is None:
                raise
            time.sleep(pause)


def _state_of(job: str) -> str:
    """The state of this very job: RUNNING if a signal was all that came."""
    try:
        return dict(_rows(_ask("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i|%T"))).get(job, "unknown")
    except SchedulerError:
        return "unknown"


def own_job() -> str:
    """This job as `squeue` names it: 12_3 in an array."""
    array, place = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{place}" if array and place else os.environ.get("SLURM_JOB_ID", "0")


__all__ = ["Job", "SchedulerError", "cancel", "check_slurm", "job_states", "run_task", "sbatch_script", "submit"]
