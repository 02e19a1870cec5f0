"""kill -9 at random instants of training, evaluation, tokenising, search and sweep; each resumed until it ends.

    python scripts/soak.py --kills 100 [--faults 300] [--hostile 500] [--seed 0] [--jobs train,eval] [--out FILE.json]

Every job is first done without a stop. Then it is done again and again in a fresh copy of the same folder, killed up to
three times on its way, each time at an instant drawn uniformly over the job, and started anew by the same command until
it ends by itself. What the folder then holds is compared with what the job without a stop left: every tensor by its
bytes, every line of the metrics, manifest, results and cache file; a leftover temporary file is a difference. Figures
that no two runs share (speed, times, free memory) are left out.

`--faults N`: instead of a kill a disk that fails (tests/shim.py): a command's n-th write, fsync, rename or creation is
refused, or all from the n-th on. It has to end with one line that names the file, leaving no temporary file and
taking nothing finished; then the same command gives what it gives undisturbed. The N are drawn from all operations of
all jobs, each once in either way; a larger N than there are takes them all.

`--hostile N`: so many run and sweep folders, changed at random as by a stranger (tests/test_strangers.py), put through
the commands that read them.

The processes are real ones and SIGKILL is a real one. They are forked from a server that has imported the program, so
that the kills fall into the work and not into four seconds of imports. Exit status 1 when a trial was not equal.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import string
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for what is shared with the tests

from tests import shim  # noqa: E402

if __name__ == "__main__":  # one thread: bit-equal numbers need equal sums, and the kills many processes
    os.environ["OMP_NUM_THREADS"] = "1"

PRELOADED = [
    "ropelab.cli",
    "ropelab.search.longrope",
    "ropelab.report.figures",
    "ropelab.report",
    "hydra",
    "tokenizers",
]
SHAPE = ("model.n_layer=2", "model.d_model=32", "model.n_head=2", "train.ctx=32", "train.batch_size=4", "device=cpu")
LOOSE = {  # JSON fields that two equal runs do not share
    "started", "finished", "tokens_per_s", "mtime_ns", "memory_planned_mb", "environment", "seal", "sha256", "metrics",
    "losses_sha256",
}  # fmt: skip
LEFT_OUT = ("runs/sweeps/",)  # how a sweep went, with its processes and times; what came of it is in the runs
KILLS_A_TRIAL = 3
PATIENCE = 600.0  # seconds after which a job that does not end has failed


class Job(NamedTuple):
    """A command that is killed, and those that have to be done before it.

    Arguments may hold {work}, the folder that is compared, and {text}, a folder of texts.
    """

    name: str
    command: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()
    share: int = 3  # of the kills


PLACES = ("data.path={text}", "runs_dir={work}/runs", "cache_dir={work}/cache")
OWN = ("runs_dir={work}/runs", "cache_dir={work}/cache", "device=cpu")
SETTINGS = ("data=text", *PLACES, *SHAPE)
TRAINED = ("train", "--pos", "rope", *SETTINGS, "train.steps=20", "train.dtype=fp32")
EVALUATED = ("eval", "rope", *OWN, "--ctx", "512", "--protocol", "last", "eval.last=16",
             "eval.scalings=[none,linear:16,yarn:16,ntk:16]")  # fmt: skip
EVERY = ("train.steps=60", "train.checkpoint_every=6", "train.eval_every=9", "train.keep=[0.5]")
JOBS = (
    Job("train", ("train", "--pos", "rope", *SETTINGS, *EVERY, "train.dtype=fp32")),
    Job("train-bf16", ("train", "--pos", "learned", *SETTINGS, *EVERY, "train.dtype=bf16")),
    Job("eval", EVALUATED, (TRAINED,)),
    Job("tokenise", ("data", "prepare", "data=text", *PLACES, "data.tokenizer=bpe", "data.vocab_size=900")),
    Job(
        "search",
        ("search", "longrope", "rope", *OWN, "--ctx", "256", "search.population=8", "search.iterations=3",
         "search.mutations=4", "search.crossovers=4", "search.parents=3", "search.samples=2"),
        (TRAINED,),
    ),
)  # fmt: skip
# `ropelab sweep` starts processes of its own: every other time they are killed with it, else they work on alone
SWEEP = Job(
    "sweep",
    ("sweep", "pos=rope,alibi", *SETTINGS, "train.steps=40", "train.checkpoint_every=5",
     "train.dtype=fp32", "eval.ctx=64", "eval.tokens=2000", "launcher.jobs=2"),
    share=1,
)  # fmt: skip


# written once, so that no kill can fall between and only faults are of interest
FAULTS_ONLY = (
    Job("report", ("report", "rope", "-o", "{work}/page", "runs_dir={work}/runs"), (TRAINED, EVALUATED), share=1),
    Job("export", ("export", "rope", "-o", "{work}/exported", *OWN), (TRAINED,), share=1),
)


def jobs() -> tuple[Job, ...]:
    """The jobs that this version of the program has."""
    from ropelab.cli.options import app

    commands = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    return (*JOBS, SWEEP) if "sweep" in commands else JOBS


# --- processes ------------------------------------------------------------------------------------------------------


def run(arguments: list[str], log: str, folder: str, fault: tuple[str, int, bool] | None = None) -> None:
    """A `ropelab` command in this process, which is a session of its own; what it says goes to a file.

    fault: the folder, number and length (`lasting`) of what is refused; what was counted goes beside the log. Workers
    of a sweep are processes that count for themselves.
    """
    os.setsid()
    os.chdir(folder)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if arguments[0] == "sweep":  # on one core every run has one thread, however many runs are left to share the cores
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sys.argv = ["ropelab", *arguments]
    from ropelab.cli import main

    if fault is None:
        main()
        return
    within, first, lasting = fault
    site = Path(folder) / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(
        f"from tests.shim import failing\nkept = failing({within!r}, {first}, lasting={lasting})\nkept.__enter__()\n",
        encoding="utf-8",
    )
    os.environ["PYTHONPATH"] = os.pathsep.join((str(site), str(ROOT)))
    with shim.failing(Path(within), first, lasting=lasting) as counted:
        try:
            main()
        finally:
            counted.report(Path(log).with_suffix(".json"))


def wait_for(pid: int) -> None:
    """Until a process that is not ours has ended."""
    end = time.monotonic() + PATIENCE
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.05)


class Server:
    """Starts commands as processes that have imported the program already."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def start(self, arguments: list[str], fault: tuple[str, int, bool] | None = None) -> Any:
        process = self._context.Process(target=run, args=(arguments, str(self.log), str(self._folder), fault))
        process.start()
        return process

    @property
    def log(self) -> Path:
        return self._folder / "log.txt"

    def finish(self, arguments: list[str]) -> float:
        """Run a command to its end; the seconds that it took. `RuntimeError` with its words when it failed."""
        began = time.monotonic()
        process = self.start(arguments)
        process.join(PATIENCE)
        took = time.monotonic() - began
        if process.exitcode != 0:
            stop(process)
            said = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"ropelab {arguments[0]} ended with {process.exitcode}:\n{said}")
        return took


def stop(process: Any, *, others: bool = True) -> list[int]:
    """SIGKILL for a process and, with `others`, for those that it started; those that are left."""
    started = _descendants(process.pid)
    process.kill()
    process.join()
    for pid in started if others else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [] if others else started


def _descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that these started."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


# --- what is compared -----------------------------------------------------------------------------------------------


def digests(work: Path) -> dict[str, str]:
    """Digests of all that a folder holds, by what they are of: tensors and JSON by content, other files by bytes."""
    found = {}
    for path in sorted(work.rglob("*")):
        name = path.relative_to(work).as_posix()
        if name.startswith(LEFT_OUT):
            continue
        if any(part.startswith(".") for part in path.relative_to(work).parts):
            if path.is_file() or not any(path.iterdir()):
                found[f"leftover {name}"] = "left by a killed process"
        elif not path.is_file() or path.name == "lock" or path.suffix == ".png":
            continue
        elif path.suffix == ".safetensors":
            for tensor, digest in _tensors(path).items():
                found[f"{name} {tensor}"] = digest
        elif path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").split("\n")
            for number, line in enumerate(lines):
                found[f"{name} line {number + 1}"] = _json(line)
        elif path.suffix == ".json":
            found[name] = _json(path.read_text(encoding="utf-8"))
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _tensors(path: Path) -> dict[str, str]:
    import torch
    from safetensors.torch import load_file

    return {
        f"{name} {tensor.dtype} {tuple(tensor.shape)}": hashlib.sha256(
            tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in load_file(path).items()
    }


def _json(text: str) -> str:
    def strict(inner: Any) -> Any:
        if isinstance(inner, dict):
            return {key: strict(each) for key, each in inner.items() if key not in LOOSE}
        return [strict(each) for each in inner] if isinstance(inner, list) else inner

    try:
        value = strict(json.loads(text))
    except ValueError:  # what a fault left of it
        value = ["not JSON", text]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def complaints(
    status: int | None, said: str, work: Path, before: dict[str, str], done: list[shim.Operation]
) -> list[str]:
    """What is wrong about how a command ended on a disk that failed.

    before: `digests` of the folder when it began; done: the operations that were not refused.
    """
    found = []
    last = said.splitlines()[-1] if said else ""
    if status not in (1, 2):
        found.append(f"exit status {status}")
    where = said if " runs are not done" in last else last  # each run of a sweep has a line of its own
    if "Traceback" in said or not last.startswith("ropelab: ") or str(work) not in where:
        found.append(f"says: {said[-600:]}")
    after = digests(work)
    found += [name for name in after if ".ropelab-tmp-" in name]
    found += [f"lost or altered: {name}" for name in before if after.get(name) != before[name]]
    steps = [
        operation.name for operation in done if operation.kind == "rename" and "/step-" in operation.name
    ]  # the one before it may go, once it is read back
    if steps and not (work / steps[-1] / "state.json").is_file():
        found.append(f"lost: {steps[-1]}")
    return found


# --- trials ---------------------------------------------------------------------------------------------------------


class Bench:
    """One job: its folder as it is before, what it comes to without a stop, and how long that takes."""

    def __init__(self, job: Job, root: Path, server: Server) -> None:
        self.job, self._server = job, server
        self._work, self._prepared = root / "work", root / f"prepared-{job.name}"
        self._text = root / "text"
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir()
        for command in job.before:
            server.finish(self._filled(command))
        self._work.rename(self._prepared)
        took = []
        wholes = []
        for _ in range(2):  # twice: what two undisturbed runs do not share cannot be asked of a disturbed one
            self._fresh()
            took.append(server.finish(self._filled(job.command)))
            wholes.append(digests(self._work))
        if odd := differences(*wholes):
            raise RuntimeError(f"{job.name} gives other results each time, without any kill: {odd[:5]}")
        self.whole, self.seconds = wholes[0], min(took)
        shutil.rmtree(self._work)

    def _filled(self, command: tuple[str, ...]) -> list[str]:
        return [item.format(work=self._work, text=self._text) for item in command]

    def _fresh(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.copytree(self._prepared, self._work)  # with the times of the files

    def trial(self, draw: random.Random, kills: int) -> dict[str, Any]:
        """The job with up to `kills` kills: {"kills", "instants": seconds after each start, "differences"}."""
        self._fresh()
        instants: list[float] = []
        left: list[int] = []
        for _ in range(kills):
            process = self._server.start(self._filled(self.job.command))
            instant = draw.uniform(0, self.seconds)
            process.join(instant)
            if process.exitcode is not None:
                break  # it was faster
            left += stop(process, others=draw.random() < 0.5)
            if process.exitcode == -signal.SIGKILL:
                instants.append(round(instant, 3))
        try:
            self._server.finish(self._filled(self.job.command))
            for pid in left:
                wait_for(pid)
            odd = differences(self.whole, digests(self._work))
        except RuntimeError as error:
            odd = [str(error)]
        return {"kills": len(instants), "instants": instants, "differences": odd}

    def operations(self) -> list[shim.Operation]:
        """What the job asks of the disk, in order."""
        self._fresh()
        process = self._server.start(self._filled(self.job.command), (str(self._work), 0, False))
        process.join(PATIENCE)
        return self._counted("seen")

    def _counted(self, key: str) -> list[shim.Operation]:
        counted = json.loads(self._server.log.with_suffix(".json").read_text(encoding="utf-8"))
        return [shim.Operation(*item) for item in counted[key]]

    def fault(self, first: int, *, lasting: bool) -> dict[str, Any] | None:
        """The job on a disk that fails at its `first` operation: {"operation", "lasting", "differences"}.

        None where this time it did not ask for so many: a search saves what it has every few seconds.
        """
        self._fresh()
        before = digests(self._work)
        process = self._server.start(self._filled(self.job.command), (str(self._work), first, lasting))
        process.join(PATIENCE)
        if process.exitcode is None:
            stop(process)
            odd = ["it does not end"]
        else:
            said = self._server.log.read_text(encoding="utf-8", errors="replace")
            odd = complaints(process.exitcode, said, self._work, before, self._counted("done"))
        if process.exitcode == 0 and self.job != SWEEP and not self._counted("refused"):
            return None
        refused = " ".join((*self._counted("refused"), ("in", "a worker"))[0])  # which counts for itself
        try:
            self._server.finish(self._filled(self.job.command))
            odd += differences(self.whole, digests(self._work))
        except RuntimeError as error:
            odd.append(str(error))
        return {"operation": f"{first} {refused}", "lasting": lasting, "differences": odd}


def write_texts(folder: Path, draw: random.Random) -> None:
    """Text files of random words: varied, so that none of it counts as overlap between training and test text."""
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(4000)]
    folder.mkdir()
    for index in range(24):
        lines = [" ".join(draw.choices(words, k=12)) for _ in range(40)]
        (folder / f"{index:02}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def soak(
    kills: int, *, seed: int, only: tuple[str, ...] = (), say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """So many kills, shared by the jobs; what came of them, by job and in all."""
    draw = random.Random(seed)
    chosen = [job for job in jobs() if not only or job.name in only]
    if unknown := set(only) - {job.name for job in chosen}:
        raise ValueError(f"there is no job {', '.join(sorted(unknown))}; jobs: {', '.join(job.name for job in jobs())}")
    with tempfile.TemporaryDirectory(prefix="ropelab-soak-") as folder:
        root = Path(folder)
        write_texts(root / "text", draw)
        server = Server(root)
        results: dict[str, list[dict[str, Any]]] = {job.name: [] for job in chosen}
        seconds = {}
        for number, job in enumerate(chosen):
            bench = Bench(job, root, server)
            seconds[job.name] = round(bench.seconds, 2)
            parts = [0, *accumulate(each.share for each in chosen)]
            wanted = kills * parts[number + 1] // parts[-1] - kills * parts[number] // parts[-1]
            done = 0
            while done < wanted:
                trial = bench.trial(draw, min(draw.randint(1, KILLS_A_TRIAL), wanted - done))
                if not trial["kills"]:
                    continue
                done += trial["kills"]
                results[job.name].append(trial)
                verdict = "equal" if not trial["differences"] else f"DIFFERENT: {trial['differences'][:3]}"
                say(f"{job.name}: {done} of {wanted} kills, {len(results[job.name])} trials; the last one {verdict}")
    summary = {
        name: {
            "seconds_without_a_stop": seconds[name],
            "trials": len(trials),
            "equal_trials": sum(not trial["differences"] for trial in trials),
            "kills": sum(trial["kills"] for trial in trials),
            "kills_in_equal_trials": sum(trial["kills"] for trial in trials if not trial["differences"]),
        }
        for name, trials in results.items()
    }
    in_all = {
        key: sum(of_job[key] for of_job in summary.values())
        for key in ("trials", "equal_trials", "kills", "kills_in_equal_trials")
    }
    return {**in_all, "jobs": summary, "trials_of_jobs": results}


def faults(
    wanted: int, *, seed: int, only: tuple[str, ...] = (), say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """So many faults of a disk, drawn from all that the jobs have; what came of them, by job and in all."""
    draw = random.Random(seed)
    chosen = [job for job in (*jobs(), *FAULTS_ONLY) if not only or job.name in only]
    with tempfile.TemporaryDirectory(prefix="ropelab-soak-") as folder:
        root = Path(folder)
        write_texts(root / "text", draw)
        server = Server(root)
        benches = {job.name: Bench(job, root, server) for job in chosen}
        asked = {name: len(bench.operations()) for name, bench in benches.items()}
        all_of_them = [
            (name, n + 1, lasting) for name in asked for n in range(asked[name]) for lasting in (False, True)
        ]
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in benches}
        for name, first, lasting in draw.sample(all_of_them, len(all_of_them)):
            if sum(map(len, results.values())) == wanted:
                break
            trial = benches[name].fault(first, lasting=lasting)
            if trial is None:
                continue
            results[name].append(trial)
            if trial["differences"]:
                say(f"{name}: {trial['operation']}{' and on' if lasting else ''}: {trial['differences'][:3]}")
    return {
        "faults": sum(map(len, results.values())),
        "faults_without_a_loss": sum(not trial["differences"] for trials in results.values() for trial in trials),
        "jobs": {
            name: {
                "operations": asked[name],
                "faults": len(trials),
                "faults_without_a_loss": sum(not trial["differences"] for trial in trials),
            }
            for name, trials in results.items()
        },
        "failed": {name: [trial for trial in trials if trial["differences"]] for name, trials in results.items()},
    }


def hostile(wanted: int, *, seed: int, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """So many folders of a stranger, put through the commands; those that were obeyed or ended in a traceback."""
    from tests import test_strangers

    failed = []
    with tempfile.TemporaryDirectory(prefix="ropelab-soak-") as folder:
        good = test_strangers.sweep_of_two(Path(folder))
        for number in range(wanted):
            what, wrong = test_strangers.tried(good, Path(folder) / "copy", random.Random(f"{seed} {number}"))
            if wrong:
                failed.append({"number": number, "what": what, "wrong": wrong})
                say(f"{number}: {what}: {wrong[-600:]}")
    return {"folders": wanted, "harmless": wanted - len(failed), "failed": failed}


def about() -> dict[str, Any]:
    """Where this was measured."""
    from ropelab.devices import device_name, environment, resolve_device

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(resolve_device("cpu")),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.system(),
        **environment(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="kill -9 at random instants; each resumed until it ends")
    parser.add_argument("--kills", type=int, help="how many in all (default 100, or 0 beside another kind)")
    parser.add_argument("--faults", type=int, default=0, help="operations of the disk that fail (default 0)")
    parser.add_argument("--hostile", type=int, default=0, help="folders of a stranger (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants and of the texts")
    parser.add_argument("--jobs", default="", help="some of train,train-bf16,eval,tokenise,search,sweep,report,export")
    parser.add_argument("--out", type=Path, help="a JSON file for what came of it")
    given = parser.parse_args()
    began = time.monotonic()
    only = tuple(name for name in given.jobs.split(",") if name)
    kills = given.kills if given.kills is not None else 0 if given.faults or given.hostile else 100

    def say(line: str) -> None:
        print(line, flush=True)

    found: dict[str, Any] = {}
    well = True
    command = f"python scripts/soak.py --seed {given.seed}"
    if kills:
        found = soak(kills, seed=given.seed, only=only, say=say)
        for name, of_job in found["jobs"].items():
            say(
                f"{name:<12} {of_job['kills']:>4} kills in {of_job['trials']} trials: "
                f"{of_job['equal_trials']} of {of_job['trials']} equal"
            )
        say(
            f"{found['kills_in_equal_trials']} of {found['kills']} kills ended in what the job gives without a stop "
            f"({found['equal_trials']} of {found['trials']} trials), {time.monotonic() - began:.0f} s"
        )
        well, command = found["equal_trials"] == found["trials"], f"{command} --kills {kills}"
    if given.faults:
        failed = found["faults"] = faults(given.faults, seed=given.seed, only=only, say=say)
        for name, of_job in failed["jobs"].items():
            say(
                f"{name:<12} {of_job['operations']:>4} operations: {of_job['faults_without_a_loss']} of "
                f"{of_job['faults']} faults said and without a loss"
            )
        say(
            f"{failed['faults_without_a_loss']} of {failed['faults']} faults were said and cost nothing, "
            f"{time.monotonic() - began:.0f} s"
        )
        well &= failed["faults_without_a_loss"] == failed["faults"]
        command += f" --faults {given.faults}"
    if given.hostile:
        strange = found["hostile"] = hostile(given.hostile, seed=given.seed, say=say)
        say(
            f"{strange['harmless']} of {strange['folders']} folders of a stranger were refused or harmless, "
            f"{time.monotonic() - began:.0f} s"
        )
        well &= strange["harmless"] == strange["folders"]
        command += f" --hostile {given.hostile}"
    if given.out is not None:
        written = {"command": command, "seconds": round(time.monotonic() - began), **about(), **found}
        given.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
