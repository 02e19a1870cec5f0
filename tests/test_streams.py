"""What is printed, and what becomes of the work when it cannot be: closed, full, narrow outputs; strangers' names."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ropelab import cli
from ropelab.cli.options import print_table, print_text, say
from tests.lab import made_lab, ropelab, settings
from tests.test_faults import SEARCH

pytestmark = pytest.mark.integration


def shell(redirected: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m ropelab` in a shell, with redirections."""
    return subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -m ropelab {redirected}'],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("command", "status", "out", "err"),
    [
        ("show >&-", 0, "", ""),
        ("show 2>&-", 0, "Position encodings", ""),
        ("show >&- 2>&- <&-", 0, "", ""),
        ("runs >/dev/null 2>/dev/full", 0, "", ""),
        ("runs >&-", 0, "", "there are no runs"),
        ("nosuch 2>&-", 2, "", ""),
        ("show --pos rope >/dev/full", 1, "", "ropelab: [Errno 28]"),
        ("--version >/dev/full", 1, "", "ropelab: what it says cannot be written (No space left on device)"),
        ("-h >/dev/full", 1, "", "ropelab: what it says cannot be written"),
    ],
)
def test_an_output_that_cannot_be_written_is_no_traceback(
    tmp_path: Path, command: str, status: int, out: str, err: str
) -> None:
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    done = shell(command, ROPELAB_RUNS=str(tmp_path / "runs"))
    assert done.returncode == status, done.stderr
    assert done.stdout.startswith(out)
    assert bool(done.stdout) == bool(out)
    assert done.stderr.startswith(err)
    assert done.stderr.count("\n") == bool(err), done.stderr


def test_with_a_closed_output_no_file_gets_its_number(home: Path, tmp_path: Path) -> None:
    """What is printed must not end up in a file that was opened as number 1."""
    done = shell(f"train {' '.join(settings(home, tmp_path / 'runs', 'train.steps=2'))} >&- 2>&-")
    assert done.returncode == 0
    (run,) = [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    assert json.loads((run / "manifest.json").read_text(encoding="utf-8"))["status"] == "done"
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


NARROW = ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})


@pytest.mark.parametrize("environment", NARROW)
def test_an_output_that_lacks_letters_spells_them(tmp_path: Path, environment: dict[str, str]) -> None:
    """The name of the folder of runs is printed: in UTF-8 as it is, in ASCII by its numbers."""
    folder = tmp_path / "l\u00e4ufe\u2013"
    encoded = shell(f"show runs_dir={folder}", PYTHONIOENCODING="utf-8")
    assert encoded.returncode == 0
    assert folder.name in encoded.stdout
    done = shell(f"show runs_dir={folder}", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "ufe\\u" in done.stdout.replace("\\\n  ", "").lower() or "\\xe4ufe" in done.stdout  # by yaml, or by us


STEERING = {"\x1b", "\x07", "\x9b", "\u202e"}
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


def test_a_name_cannot_steer_the_terminal_wherever_it_is_printed(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"title {EVIL}")
    table.add_column(f"head {EVIL}")
    table.add_row(Text(f"cell {EVIL}", style="bold"))
    print_table(table)
    print_text(f"one {EVIL}\ntwo")
    say(f"said {EVIL}")
    printed = capsys.readouterr()
    assert not STEERING & set(printed.out + printed.err)
    assert printed.out.splitlines()[-1] == "two"
    assert all(word in printed.out for word in ("title", "head", "cell"))
    assert printed.err.startswith("said ")

    lab = made_lab(shared).copy(tmp_path / "lab")
    evil = lab.run.path.rename(lab.runs / f"rope{EVIL}x")
    for command in (
        ["eval", str(evil), "--ctx", "32,", "--protocol", "last", "eval.last=8"], ["eval", *lab.places()], ["runs"],
        ["show", str(evil)], ["search", "longrope", "--ctx", "64", *SEARCH], ["runs", "rm", str(evil), "--yes"],
    ):  # fmt: skip
        said = ropelab(*command, *(lab.places() if "eval" not in command[:1] else ()))
        assert not STEERING & set(said.out + said.err), (command, said)


def test_commands_print_through_one_door() -> None:
    """`print` and rich's Console stand in `options` alone, which takes control characters out of all text."""
    folder = Path(cli.__file__).parent
    for path in sorted(folder.glob("*.py")):
        if path.name == "options.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not {call.id for call in calls if isinstance(call, ast.Name)} & {"print", "Console"}, path
