"""A sweep: many runs from one command; its folder, and how each of its runs stands. Free of torch.

    <runs_dir>/sweeps/<name>/
        manifest.json        the settings, the points, and the tasks they come to: a run and its evaluations each
        answers/0007.json    what became of task 7: its results, or why it ended
        jobs/0007.json       the job of task 7 on a cluster
        work/0007            locked by the process that works on task 7, for as long as it lives
        logs/, spool/        of jobs; the spool is submitit's own, private and never read back
        lock                 held while the sweep is worked on from this machine

A task is done when its run and the evaluations are there: the folder says what was asked and what was said, and the
run folders say what is true.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import os
import re
import socket
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ropelab import files
from ropelab.errors import DamagedFileError, OutsideError, RunError
from ropelab.evaluation import EvalResult
from ropelab.runs import SWEEPS, RunDir

PENDING, RUNNING, DONE, FAILED, CANCELLED, LOST = "PENDING", "RUNNING", "DONE", "FAILED", "CANCELLED", "LOST"
UNFINISHED = (FAILED, CANCELLED, LOST)  # what `retry` starts again
NOT_LAUNCHED = "not launched"
NOT_SUBMITTED = "not launched: Slurm took no job for it; `ropelab retry` submits it"
TAIL = 5  # lines of a log in a failure's note


class Standing(NamedTuple):
    """How one task stands."""

    task: int
    run: str
    state: str
    step: int | None
    steps: int
    note: str


class Holder(NamedTuple):
    """Who works on a sweep: a process of a machine, which need not be this one where folders are shared."""

    process: int
    host: str


# what a sweep's files say, by type: whoever wrote them, what is read from them is of these
MANIFEST: dict[str, files.Types] = {"tasks": (list,)}
MANIFEST_OPTIONAL: dict[str, files.Types] = {
    "sweep": (str,), "digest": (str,), "created": (int, float), "launched": (int, float), "launcher": (dict,),
    "settings": (list,), "points": (list,),
}  # fmt: skip
TASK: dict[str, files.Types] = {"run": (str,), "config": (dict,), "evaluations": (list,)}
QUESTION: dict[str, files.Types] = {"eval": (dict,), "scaling": (str, type(None))}
ANSWER: dict[str, files.Types] = {
    "train": (dict,), "evaluations": (list,), "manifest": (dict,), "error": (str,), "cancelled": (str,),
    "said": (int, float),
}  # fmt: skip
EVALUATION: dict[str, files.Types] = {"result": (dict,), "losses": (str,)}
MANIFEST_LIMIT = 2**28  # bytes: 10000 tasks
ANSWER_LIMIT = 2**26
LOG_TAIL = 2**16  # bytes of a log that are looked at
JOB = re.compile(r"[0-9]{1,19}(_[0-9]{1,9})?")  # 12, or 12_3 in an array
RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")


class Sweep:
    """The folder of one sweep. `RunError` where its manifest is none, or leads out of the folder of runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        where = path / "manifest.json"
        fix = "give the `ropelab sweep` command again"
        try:
            manifest = files.load_json(where, limit=MANIFEST_LIMIT)
        except FileNotFoundError:
            raise RunError(f"{where} is missing; {fix}") from None
        except (OSError, ValueError) as error:
            raise RunError(f"{where} cannot be read: {error}; {fix}") from None
        if (wrong := _wrong_manifest(manifest)) is not None:
            raise RunError(f"{where} is not the manifest of a sweep: {wrong}; {fix}")
        self.manifest: dict[str, Any] = manifest
        self.tasks: list[dict[str, Any]] = manifest["tasks"]
        for task in self.tasks:  # its runs lie beside it, wherever it was made
            task["config"]["runs_dir"] = str(self.runs_dir.resolve())

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def runs_dir(self) -> Path:
        return self.path.parent.parent

    def own(self, *names: str) -> Path:
        """A file or folder of the sweep. `RunError` where it is a link: it may lead out of a stranger's sweep."""
        try:
            return files.own(self.path.joinpath(*names), self.path)
        except OutsideError as error:
            raise RunError(str(error)) from None

    @property
    def logs(self) -> Path:
        return self.own("logs")

    @property
    def launcher(self) -> str:
        """Who works on it, as last launched: local | slurm."""
        return str(self.manifest.get("launcher", {}).get("name", "local"))

    def run(self, index: int) -> RunDir:
        return RunDir(self.runs_dir / self.tasks[index]["run"])

    # --- answers

    def _answer_path(self, index: int) -> Path:
        return self.own("answers", f"{index:04d}.json")

    def answer(self, index: int) -> dict[str, Any] | None:
        """What was said of a task last: results, {"error"}, {"cancelled"}, or None. A damaged one is an error."""
        path = self._answer_path(index)
        try:
            found = files.load_json(path, limit=ANSWER_LIMIT)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            return {"error": f"{path} cannot be read: {error}"}
        wrong = _wrong_answer(found)
        return dict(found) if wrong is None else {"error": f"{path} is no answer: {wrong}"}

    def say(self, index: int, answer: Mapping[str, Any]) -> None:
        files.write_json(self._answer_path(index), {**answer, "said": time.time()})

    def forget(self, index: int) -> None:
        """A task is to be worked on anew: what was said of it before is no longer so."""
        files.remove(self._answer_path(index), within=self.path)
        files.remove(self._job_path(index), within=self.path)

    # --- jobs

    def jobs(self) -> dict[int, str]:
        """The last job of each task on a cluster."""
        found = {}
        for path in self.own("jobs").glob("*.json"):
            known: Any = files.read_json(path) if re.fullmatch("[0-9]{4,9}", path.stem) else None
            if files.mistyped(known, {"job": (str,)}) is None and JOB.fullmatch(known["job"]):
                found[int(path.stem)] = str(known["job"])
        return found

    def add_job(self, index: int, job: str) -> None:
        """Note the job of a task: a file each, since jobs note themselves."""
        files.write_json(self._job_path(index), {"job": job})

    def begun(self, index: int, job: str) -> None:
        """A job has begun with a task: what an earlier start of it said is no longer so."""
        files.remove(self._answer_path(index), within=self.path)
        self.add_job(index, job)

    def _job_path(self, index: int) -> Path:
        return self.own("jobs", f"{index:04d}.json")

    def log_tail(self, index: int) -> str:
        """The last lines of a job's log, in one line."""
        job = self.jobs().get(index)
        if job is None:
            return ""
        for log in sorted(self.logs.glob(f"{job}_*.err"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
            lines = [line for line in _end_of(log).splitlines() if line.strip()]
            if lines:
                return " | ".join(line.strip() for line in lines[-TAIL:])
        return ""

    # --- one worker at a time

    def work_path(self, index: int) -> Path:
        """The file that the process which works on a task keeps locked (`holding`)."""
        return self.own("work", f"{index:04d}")

    def is_at_work(self, index: int) -> bool:
        """Does a process of this machine work on the task: train, evaluate, or save because it was left alone?"""
        return files.is_locked(self.work_path(index))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the sweep for one launch; a dead process does not keep it. `RunError` when another one holds it."""
        lock = self.own("lock")
        handle = files.open_lock(self.path)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"{self.name} is being worked on by another process; `ropelab status {self.name}` shows it"
                ) from None
            files.truncate(lock, 0, within=self.path)
            os.write(handle, f"{os.getpid()} {socket.gethostname()}".encode())
            yield
        finally:
            os.close(handle)

    def holder(self) -> Holder | None:
        """The process that works on the sweep now."""
        if not files.is_locked(lock := self.own("lock")):
            return None
        try:
            process, _, host = files.read(lock, limit=512).decode(errors="replace").partition(" ")
        except (OSError, DamagedFileError):
            return None
        return Holder(int(process), host) if process.isdecimal() else None

    # --- how it stands

    def is_done(self, index: int) -> bool:
        """Are the run and every evaluation there?"""
        answer = self.answer(index)
        if answer is None or "train" not in answer:
            return False
        run = self.run(index)
        try:
            finished = run.manifest().get("status") == "done"
            losses = [run.results / Path(item["losses"]).name for item in answer["evaluations"]]
        except RunError:
            return False
        results = [path.with_suffix(".json") for path in losses]
        weights = {item["result"].get("weights") for item in answer["evaluations"]} - {None}
        fits = not weights or weights == {run.weights_digest()}
        return finished and fits and all(path.is_file() for path in (*losses, *results))

    def evaluated(self) -> dict[str, set[str]]:
        """The evaluations of the runs that are done: names of result files, by the run's name."""
        done = [index for index in range(len(self.tasks)) if self.is_done(index)]
        answers = {self.tasks[index]["run"]: (self.answer(index) or {}).get("evaluations", []) for index in done}
        return {run: {Path(item["losses"]).stem for item in asked} for run, asked in answers.items()}

    def results(self, index: int) -> list[EvalResult]:
        """The evaluations of a task that is done."""
        answer = self.answer(index)
        if answer is None or "train" not in answer:
            return []
        return [EvalResult.from_json(item["result"]) for item in answer["evaluations"]]

    def finished(self) -> list[RunDir]:
        """The runs that are done with their evaluations."""
        return [self.run(index) for index in range(len(self.tasks)) if self.is_done(index)]

    def standings(self, scheduled: Mapping[str, str] | None = None) -> list[Standing]:
        """How every task stands. `scheduled`: the states of jobs as the cluster tells them, by job."""
        working = self.holder() is not None
        jobs = self.jobs()
        return [self._standing(index, working, jobs.get(index), scheduled or {}) for index in range(len(self.tasks))]

    def _standing(self, index: int, working: bool, job: str | None, scheduled: Mapping[str, str]) -> Standing:
        task, run, answer = self.tasks[index], self.run(index), self.answer(index)
        state, note = PENDING, ""
        told = scheduled.get(job) if job is not None else None
        goes_on = told is not None and told != "COMPLETING" and _of_job(told)[0] in (PENDING, RUNNING)
        if self.is_done(index):
            state = DONE  # a result comes before the scheduler knows that its job has ended
        elif answer is not None and "error" in answer and not goes_on:
            state, note = FAILED, str(answer["error"])
        elif answer is not None and "cancelled" in answer and not goes_on:
            state, note = CANCELLED, str(answer["cancelled"])
        elif answer is not None and "train" in answer:
            state, note = LOST, "its run or evaluations are gone; `ropelab retry` makes them again"
        elif told is not None:
            state, note = _of_job(told)
            if state == FAILED:
                note = f"{note}: {self.log_tail(index)}"
        elif self.is_at_work(index) or _is_written(run):
            state = RUNNING  # also of a sweep whose process was killed: its runs save themselves and end
        elif job is not None:
            state, note = LOST, f"the cluster no longer knows job {job}, and there is no result"
        elif working:
            state = PENDING
        elif self.manifest.get("launched"):
            state, note = LOST, "its process is gone, and there is no result"
            if self.launcher == "slurm":
                state, note = PENDING, NOT_SUBMITTED
        else:
            note = NOT_LAUNCHED
        step = None if state in (PENDING, DONE) else _last_step(run)
        return Standing(index, task["run"], state, step, task["config"]["train"]["steps"], note)


def _of_job(told: str) -> tuple[str, str]:
    """What a job's state means for a task without a result."""
    if told in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"):
        return PENDING, told.lower() if told != "PENDING" else ""
    if told in ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"):
        return RUNNING, told.lower() if told != "RUNNING" else ""
    if told.startswith("CANCELLED"):
        return CANCELLED, "cancelled on the cluster"
    if told == "COMPLETED":
        return LOST, "the cluster says COMPLETED, but there is no result"
    return (
        FAILED,
        f"the cluster says {told}",
    )  # FAILED, TIMEOUT, OUT_OF_MEMORY, NODE_FAIL, PREEMPTED, BOOT_FAIL, DEADLINE


def _is_written(run: RunDir) -> bool:
    try:
        return run.status() == "running"
    except RunError:
        return False


def _last_step(run: RunDir) -> int | None:
    """The step of the last whole line of a run's metrics, without reading the whole file."""
    try:
        lines = _end_of(run.metrics_path, 4096).splitlines()
    except RunError:
        return None
    for text in reversed(lines):
        with contextlib.suppress(ValueError):
            line = files.parse_json(text)
            if files.mistyped(line, {"step": (int,)}) is None:
                return int(line["step"])
    return None


def _end_of(path: Path, size: int = LOG_TAIL) -> str:
    """The last `size` bytes of a text file; nothing where it is none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return ""
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        return file.read(size).decode(errors="replace")


def _wrong_manifest(manifest: Any) -> str | None:
    """What of a value is not as the manifest of a sweep has it."""
    if wrong := files.mistyped(manifest, MANIFEST, MANIFEST_OPTIONAL):
        return wrong
    for number, task in enumerate(manifest["tasks"]):
        if wrong := files.mistyped(task, TASK, {"points": (list,)}, where=f"tasks[{number}]."):
            return wrong
        if RUN_NAME.fullmatch(task["run"]) is None:
            return f"tasks[{number}].run is not the name of a run"
        if wrong := files.mistyped(task["config"].get("train"), {"steps": (int,)}, where=f"tasks[{number}].train."):
            return wrong
        for question in task["evaluations"]:
            if wrong := files.mistyped(question, QUESTION, where=f"tasks[{number}].evaluations."):
                return wrong
    return None


def _wrong_answer(answer: Any) -> str | None:
    """What of a value is not as the answer of a task has it."""
    trained = isinstance(answer, dict) and "train" in answer
    needed: dict[str, files.Types] = {"evaluations": (list,)} if trained else {}
    if wrong := files.mistyped(answer, needed, ANSWER):
        return wrong
    for item in answer.get("evaluations", []):
        if wrong := files.mistyped(item, EVALUATION, where="evaluations."):
            return wrong
        try:
            EvalResult.from_json(item["result"], "evaluations.result.")
        except ValueError as error:
            return str(error)
    return None


def create(
    runs_dir: Path, stem: str, tasks: Sequence[Mapping[str, Any]], *, settings: Sequence[str], points: Sequence[Any]
) -> Sweep:
    """The sweep of these tasks: a new folder, or the one that they had before. `OSError` where it cannot be written."""
    digest = files.digest_of([[task["run"], task["evaluations"]] for task in tasks])
    path = runs_dir / SWEEPS / f"{stem}-{digest[:8]}"
    known = files.read_json(path / "manifest.json", limit=MANIFEST_LIMIT)
    fits = _wrong_manifest(known) is None
    kept = {key: known[key] for key in ("created", "launched", "launcher") if key in known} if fits else {}
    files.write_json(
        files.own(path / "manifest.json", runs_dir),
        {
            "sweep": path.name, "digest": digest, "created": time.time(), **kept,
            "settings": list(settings), "points": list(points), "tasks": list(tasks),
        },
    )  # fmt: skip
    return Sweep(path)


def launched(sweep: Sweep, launcher: Mapping[str, Any]) -> None:
    """Note with what the sweep is being worked on."""
    sweep.manifest = {**sweep.manifest, "launched": time.time(), "launcher": dict(launcher)}
    files.write_json(sweep.own("manifest.json"), sweep.manifest)


def all_sweeps(runs_dir: Path) -> list[Path]:
    """Every sweep folder, the latest last."""
    found = [path.parent for path in (runs_dir / SWEEPS).glob("*/manifest.json")]
    return sorted(found, key=lambda path: (path / "manifest.json").lstat().st_mtime_ns)


def matching(name: str, runs_dir: Path) -> list[Path]:
    """The sweeps that a path or a whole name is, else those whose names begin with it or end in it as a digest."""
    if not name.strip():
        return []
    for place in (Path(name).expanduser(), runs_dir / SWEEPS / name):
        if place.resolve().parent.name == SWEEPS and (place / "manifest.json").is_file():
            return [place]
    known = all_sweeps(runs_dir)
    return [path for path in known if path.name.startswith(name) or path.name.rpartition("-")[2] == name]


def find_sweep(name: str | None, runs_dir: Path) -> Sweep:
    """The sweep that a path, a name or an unambiguous beginning of one names; the latest for None. `RunError` else."""
    known = all_sweeps(runs_dir)
    if name is None:
        if not known:
            raise RunError(f"there is no sweep in {runs_dir}; start one: ropelab sweep pos=rope,alibi seed=0,1,2")
        return Sweep(known[-1])
    matches = matching(name, runs_dir)
    if len(matches) == 1:
        return Sweep(matches[0])
    if matches:
        listed = ", ".join(path.name for path in matches[:8])
        raise RunError(f"'{name}' names {len(matches)} sweeps: {listed}; give more of the name of one")
    close = difflib.get_close_matches(name, [path.name for path in known], n=1, cutoff=0.4)
    listed = ", ".join(path.name for path in known[-5:]) or "none"
    hint = f"did you mean {close[0]}?" if close else f"those in {runs_dir}: {listed}"
    raise RunError(f"there is no sweep '{name}'; {hint}")
