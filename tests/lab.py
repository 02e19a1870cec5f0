"""The tiny run of the tests: one shape, one text, one way to give a command; trained once a session, then copied.

A process of its own (`Process`) is forked from a server that has imported the program: it is a real process, with a
pid, pipes and signals of its own, and it starts in milliseconds, where `python -m ropelab` takes seconds of a core.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import IO, Any, Literal, NamedTuple, TextIO

import pytest
from typer.testing import CliRunner, Result

from ropelab import cli, progress
from ropelab import config as configs
from ropelab.config import Config
from ropelab.runs import RunDir
from ropelab.sweeps import worker
from ropelab.sweeps.launchers import local

progress.LINE_EVERY = math.inf  # what a command prints does not depend on how long it takes
ROOT = Path(__file__).parent.parent
PATIENCE = 600.0  # seconds that anything may take: a limit for what hangs, not a measure of what is slow
# a validation of the tiny run is 512 windows: with 32 of them in a pass it is no longer most of the training
TINY = (
    "data=text", "model.n_layer=1", "model.d_model=16", "model.n_head=2", "train.ctx=32", "train.batch_size=32",
    "train.steps=8", "train.eval_every=5", "train.dtype=fp32", "device=cpu",
)  # fmt: skip


# --- settings -------------------------------------------------------------------------------------------------------


def changed(settings: Sequence[str], *changes: str) -> tuple[str, ...]:
    """Settings with some of their keys, or more of them, set otherwise."""
    keys = {item.partition("=")[0] for item in changes}
    return (*(item for item in settings if item.partition("=")[0] not in keys), *changes)


def settings(home: Path, runs_dir: Path, *changes: str) -> list[str]:
    """The command line of a tiny run on the text of a folder."""
    places = (f"data.path={home / 'corpus'}", f"cache_dir={home / 'cache'}", f"runs_dir={runs_dir}")
    return list(changed((*TINY, *places), *changes))


@functools.cache
def load(*overrides: str) -> Config:
    """`configs.load`, once for each command line: composing takes a while."""
    return configs.load(overrides)


def tiny(home: Path, runs_dir: Path, *changes: str) -> Config:
    return load(*settings(home, runs_dir, *changes))


def train(home: Path, runs_dir: Path, *changes: str) -> RunDir:
    from ropelab import training

    return RunDir(Path(training.train(tiny(home, runs_dir, *changes))["run_dir"]))


# --- texts ----------------------------------------------------------------------------------------------------------


def words(seed: int, lines: int = 20) -> str:
    """Random words, nine a line: no two texts share a passage, as real documents do not."""
    draw = random.Random(seed)
    letters = string.ascii_lowercase
    return "".join(
        " ".join("".join(draw.choices(letters, k=draw.randint(2, 8))) for _ in range(9)) + "\n" for _ in range(lines)
    )


def write_corpus(folder: Path, *, seed: int = 0, files: int = 14) -> Path:
    folder.mkdir(parents=True)
    for number in range(files):
        (folder / f"{number}.txt").write_text(words(1000 * seed + number), encoding="utf-8")
    return folder


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder that is made by the first process that asks for it, while the others wait. It is not to be changed."""
    made = folder.with_name(f"{folder.name}.made")
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            made.touch()
    return folder


# --- commands in this process ---------------------------------------------------------------------------------------


class Said(NamedTuple):
    status: int
    out: str
    err: str


def ropelab(*arguments: str) -> Said:
    """A command line in this process, from the entry point on; an exception that leaves it is a traceback."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["ropelab", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    status = ended.value.code or 0
    assert isinstance(status, int)
    return Said(status, out.getvalue(), err.getvalue())


def one_line(said: Said, *parts: str) -> None:
    """A mistake as it is to be said: one line, with these parts in it."""
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("ropelab: ")
    for part in parts:
        assert part in said.err


def invoke(*arguments: object, **options: Any) -> Result:
    """A command line in this process, with stdin and the exception that ended it."""
    return CliRunner().invoke(cli.app, [str(item) for item in arguments], **options)


def good(*arguments: object) -> Result:
    done = invoke(*arguments)
    assert done.exit_code == 0, f"{arguments}: {done.stderr} {done.exception!r}"
    return done


def as_json(*arguments: object) -> Any:
    """The one JSON value on stdout; `json.loads` refuses anything beside it, `parse_constant` NaN and Infinity."""
    return json.loads(good(*arguments, "--json").stdout, parse_constant=lambda name: pytest.fail(f"JSON has no {name}"))


def refused(*arguments: object) -> str:
    """The one line that a mistake is told; exit 2, nothing on stdout and no traceback."""
    done = invoke(*arguments)
    assert isinstance(done.exception, SystemExit), f"a traceback: {done.exception!r}"
    assert done.exit_code == 2, f"{arguments}: {done.exit_code} {done.output}"
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("ropelab: ")
    return str(line)


def listing(*folders: Path) -> list[str]:
    """Every path of some folders with the time of its last change."""
    return sorted(f"{path} {path.stat().st_mtime_ns}" for folder in folders for path in [folder, *folder.rglob("*")])


# --- a folder with a run in it --------------------------------------------------------------------------------------

BPE = ("data=text", "data.tokenizer=bpe", "data.vocab_size=300")
SIX = changed(TINY, *BPE, "train.steps=6", "train.eval_every=3", "train.checkpoint_every=2")
ASKED = ("--ctx", "64", "--protocol", "last", "eval.last=8", "eval.tokens=2000", "--json")


class Lab(NamedTuple):
    """A folder with runs and a cache of its own, and a text that is shared."""

    root: Path
    text: Path

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def run(self) -> RunDir:
        (run,) = (path for path in self.runs.iterdir() if not path.name.startswith("."))
        return RunDir(run)

    def places(self) -> tuple[str, ...]:
        return f"runs_dir={self.runs}", f"cache_dir={self.cache}"

    def train(self, *more: str) -> Said:
        return ropelab("train", "--pos", "rope", *SIX, f"data.path={self.text}", *self.places(), *more)

    def evaluate(self, *more: str, name: str = "rope") -> Said:
        return ropelab("eval", name, *ASKED, *self.places(), "device=cpu", *more)

    def report(self, *more: str) -> Said:
        return ropelab("report", "-o", str(self.root / "report"), f"runs_dir={self.runs}", *more)

    def copy(self, to: Path) -> Lab:
        shutil.copytree(self.root, to, symlinks=True)
        return Lab(to, self.text)


def made_lab(shared: Path) -> Lab:
    """One with a run of six steps that was trained and evaluated: made once a session, to be copied."""

    def make(folder: Path) -> None:
        made = Lab(folder / "lab", write_corpus(folder / "text"))
        for said in (made.train(), made.evaluate()):
            assert said.status == 0, said.err

    folder = once(shared / "six", make)
    return Lab(folder / "lab", folder / "text")


# --- processes ------------------------------------------------------------------------------------------------------


def waited_for(condition: Callable[[], bool], process: Process | subprocess.Popen[str] | None = None) -> None:
    """Until a condition holds; a process that ends before is a failure, with its words."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if process is not None and process.poll() is not None and not condition():
            pytest.fail(f"it ended with {process.returncode}: {process.communicate()}")
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


@functools.cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    with contextlib.chdir(ROOT):  # from where it finds that
        forkserver.ensure_running()
    return context


def _serve(main: Callable[[], object], arguments: list[str], environment: dict[str, str], cwd: str, session: bool,
           ends: Sequence[Connection | None]) -> None:  # fmt: skip
    """In the forked process: the pipes, the environment and the command line of one that was started."""
    if session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for handle, end in enumerate(ends):
        if end is not None:
            os.dup2(end.fileno(), handle)
            end.close()
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    sys.argv = [sys.argv[0], *arguments]
    main()


class Process:
    """A program in a process of its own, as `subprocess.Popen` has it, with pipes of text; forked, not started anew.

    main: a function of a module, such as `cli.main`; stderr: a pipe, or an open file's number; session: one of its own.
    """

    def __init__(
        self, main: Callable[[], object], *arguments: object, env: Mapping[str, str] | None = None, cwd: Path = ROOT,
        stdin: bool = False, stderr: int = subprocess.PIPE, session: bool = False,
    ) -> None:  # fmt: skip
        given, self.stdin = _pipe("w") if stdin else (None, None)
        out, self.stdout = _pipe("r")
        pipe = stderr == subprocess.PIPE
        err, self.stderr = _pipe("r") if pipe else (Connection(os.dup(stderr), readable=False), None)
        ends = (given, out, err)
        self._process = _server().Process(
            target=_serve, daemon=True,
            args=(main, [str(item) for item in arguments], dict(env or os.environ), str(cwd), session, ends),
        )  # fmt: skip
        self._process.start()
        for end in ends:
            if end is not None:
                end.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return int(self._process.pid)

    @property
    def returncode(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        self._process.join(timeout)
        assert self.returncode is not None, "it does not end"
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        """All that it says on stdout and stderr, to its end."""
        if self.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.close()
        pipes, told = (self.stdout, self.stderr), ["", ""]

        def read(number: int, pipe: TextIO) -> None:
            with pipe:
                told[number] = pipe.read()

        readers = [threading.Thread(target=read, args=(n, pipe)) for n, pipe in enumerate(pipes) if pipe is not None]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return told[0], told[1]


def _pipe(mine: Literal["r", "w"]) -> tuple[Connection, TextIO]:
    """(the end of the other process, which is told through `Connection`, since that can be sent; our own end)."""
    read, write = os.pipe()
    if mine == "r":
        return Connection(write, readable=False), os.fdopen(read, encoding="utf-8")
    return Connection(read, writable=False), os.fdopen(write, "w", encoding="utf-8")


def finished(main: Callable[[], object], *arguments: object, **options: Any) -> Said:
    """A program in a process of its own, run to its end."""
    process = Process(main, *arguments, **options)
    out, err = process.communicate()
    assert process.returncode is not None
    return Said(process.returncode, out, err)


@contextlib.contextmanager
def forked(module: ModuleType, main: Callable[[], object]) -> Iterator[None]:
    """What a module starts as `python -m ... ARGUMENTS` is forked, where it is not the start that is tested."""

    def popen(command: list[str], *, env: dict[str, str], stderr: IO[bytes] | None = None, stdin: int | None = None,
              **_: object) -> Process:  # fmt: skip
        assert command[:3] == [sys.executable, "-m", main.__module__]
        handle = 2 if stderr is None else stderr.fileno()
        return Process(main, *command[3:], env=env, stdin=stdin is not None, stderr=handle, session=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "subprocess", SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE))
        yield


def forked_workers() -> contextlib.AbstractContextManager[None]:
    return forked(local, worker.main)
