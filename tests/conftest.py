"""What all tests share: one thread, no deadlines, a command tree that is built once, and the folders of `tests.lab`."""

from __future__ import annotations

import functools
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# before torch is imported: processes that share a core, and bits that do not depend on how many cores there are
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # where a sweep takes two threads for a run, they do not spin for a busy core

import hypothesis
import pytest
import typer.main
import typer.testing

from tests import lab

# a machine that is busy is not a fault of the program
hypothesis.settings.register_profile("ropelab", deadline=None)
hypothesis.settings.load_profile("ropelab")

# building it takes twenty times as long as refusing a command; it is the same tree for every command of a process
typer.main.get_command = functools.cache(typer.main.get_command)
typer.testing._get_command = typer.main.get_command  # type: ignore[attr-defined]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


RUNS = {"shared", "home", "folder"}  # fixtures of runs, and of the texts that they are trained on


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever asks for a run, or for a text to train one on, goes through more than a unit."""
    for item in items:
        if RUNS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.integration)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A test that changes the number of threads changes it for itself."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this session of tests share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve texts of random words, no two alike."""
    folder = tmp_path_factory.mktemp("experiment")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(400)]
    (folder / "text").mkdir()
    for i in range(12):
        text = " ".join(rng.choices(words, k=160)) + " é\n"
        (folder / "text" / f"{i}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def home(shared: Path) -> Path:
    """A folder with a small corpus; its token cache is shared, also with the other processes of these tests."""
    return lab.once(shared / "home", lambda folder: lab.write_corpus(folder / "corpus"))


@pytest.fixture
def forked_workers() -> Iterator[None]:
    with lab.forked_workers():
        yield
