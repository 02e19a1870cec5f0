"""What the commands share: the application, its options, and how results and mistakes are reported."""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ropelab.distributed import detect_launch
from ropelab.errors import Interrupted, NonFiniteLossError, RemoteRankError
from ropelab.progress import plain

if TYPE_CHECKING:
    from rich.console import RenderableType

app = typer.Typer(
    name="ropelab",
    help="The referee of position encodings: train small GPTs that differ only in position, evaluate them far past "
    "the training length, get a verdict.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from ropelab import __version__

        print_text(f"ropelab {__version__}")
        raise typer.Exit


@app.callback()
def _ropelab(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """What stands before the command."""


MOST = 2**40  # that an option which counts something takes
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as model=small.")]
RunsAndOverrides = Annotated[
    list[str] | None, typer.Argument(metavar="[RUN | KEY=VALUE]...", help="Runs, and settings such as eval.last=128.")
]


def names_of(group: str) -> Callable[[str], list[str]]:
    """For the shell's completion: the names of a group that begin as what was typed."""

    def complete(incomplete: str) -> list[str]:
        from ropelab import config

        return [name for name in config.choices(group) if name.startswith(incomplete)]

    return complete


Pos = Annotated[
    list[str] | None,
    typer.Option("--pos", metavar="NAME", help="Position encoding: pos=NAME.", autocompletion=names_of("pos")),
]
Scaling = Annotated[
    list[str] | None,
    typer.Option("--scaling", metavar="NAME", help="scaling=NAME.", autocompletion=names_of("scaling")),
]
Factor = Annotated[
    list[str] | None, typer.Option("--factor", metavar="S", help="scaling.factor=S: auto, auto-row or a number.")
]
Ctx = Annotated[
    list[str] | None, typer.Option("--ctx", metavar="N", help="8192: the ladder up to it; 512,8192: exactly these.")
]
Protocol = Annotated[list[str] | None, typer.Option("--protocol", metavar="NAME", help="eval.protocol=NAME.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


PAGE = "`ropelab report -o FOLDER` writes a page, which a browser prints as PDF, with its pictures and results.csv"
RESUMED = "the same `ropelab train` resumes what was stopped; --from RUN goes on from a finished run"
INSTEAD = {  # of commands and options that others have
    **dict.fromkeys(("--pdf", "--html", "--svg", "--png", "--csv", "plot", "compare"), PAGE),
    **dict.fromkeys(("--gpu", "--cuda", "--cpu"), "write device=cuda or device=cpu"),
    **dict.fromkeys(("--resume", "--finetune", "resume", "finetune"), RESUMED),
    **dict.fromkeys(("diagnose", "explain"), "`ropelab show RUN` says why its curve bends"),
    **dict.fromkeys(("list", "ls"), "`ropelab runs` lists runs, `ropelab show` methods, `ropelab status` sweeps"),
}


class Log(io.FileIO):
    """A place for what is said beside the work: when it is full or nobody reads it, the work goes on."""

    def write(self, said: Any) -> int:
        try:
            return super().write(said) or 0
        except OSError:
            return len(said)


def open_streams() -> None:
    """Have an output for what is said, whatever the program was started with.

    A closed stdout or stderr becomes /dev/null: what is said is lost, the work is not, and no file that is opened later
    gets its number. Letters that a terminal's encoding lacks are spelled out, as \\u2013, instead of ending the work.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    if sys.stderr is sys.__stderr__:
        encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
        log = io.BufferedWriter(Log(2, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(log, encoding=encoding, errors="backslashreplace", line_buffering=True)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def reported(*, over_ranks: bool = False) -> Iterator[None]:
    """The user's mistakes in one line and exit 2; failed runs exit 1; our own bugs keep their traceback.

    over_ranks: does the command know what to do where torchrun or Slurm started several processes of it?
    """
    try:
        if not over_ranks and (launch := detect_launch()) is not None:
            if launch.rank:
                raise typer.Exit(2)
            raise ValueError(
                f"{launch.world} processes of this command were started, which is made for one; only train and eval "
                "share their work: leave out torchrun, or use srun -n1"
            )
        yield
        sys.stdout.flush()
    except ValueError as error:
        fail(status_of(error), str(error))
    except BrokenPipeError:  # whoever read it has seen enough, as in `ropelab show | head`
        drop_output()
        raise typer.Exit(128 + signal.SIGPIPE) from None
    except OSError as error:
        fail(status_of(error), str(error))
    except KeyboardInterrupt as error:
        fail(status_of(error), "interrupted")
    except RemoteRankError as error:  # the rank that failed has said why
        raise typer.Exit(error.status) from None
    except (Interrupted, NonFiniteLossError) as error:
        fail(status_of(error), str(error))
    except Exception as error:
        if out_of_memory(error):
            reason = " ".join(str(error).split())[:200] or "no more is given"
            fail(
                1,
                f"out of memory ({reason}); make train.micro_batch_size, a length or the model smaller, or use a "
                "machine with more",
            )
        if str(error) == "Could not determine home directory.":  # of a path such as ~nobody/runs
            fail(2, "a path begins with ~ and the name of no user of this machine; write it in full")
        raise


def out_of_memory(error: Exception) -> bool:
    """Is it that there is no more memory, as Python, NumPy and torch say it?"""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    words = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed", "out of memory")
    return named or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def drop_output() -> None:
    """Nothing more can be printed: the flush at the end must not fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def status_of(error: BaseException) -> int:
    """The exit status that an exception leads to: 2 the user's mistake, 128 + signal, else 1."""
    if isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG):
        return 2
    if isinstance(error, KeyboardInterrupt):
        return 130
    signum: int | None = getattr(error, "signum", None)
    return 1 if signum is None else 128 + signum


def fail(status: int, message: str) -> NoReturn:
    typer.echo(one_line(message), err=True)
    raise typer.Exit(status)


def one_line(message: str) -> str:
    return f"ropelab: {plain(' '.join(message.split()))}"


def counted(number: int, what: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def say(message: str) -> None:
    """A line on stderr: of several processes that share a command, the first one's."""
    with contextlib.suppress(ValueError):
        if (launch := detect_launch()) is not None and launch.rank:
            return
    typer.echo(plain(message), err=True)


def option(overrides: list[str], option: str, key: str, values: list[str] | None) -> None:
    """Add an option's value as an override. `ValueError` when it is given twice or beside its override."""
    for value in values or []:
        other = next((item for item in overrides if item.partition("=")[0] == key), None)
        if other is not None:
            raise ValueError(f"{option} {value} and {other}: give {key} once")
        overrides.append(f"{key}={value}")


def with_fix(error: Any) -> str:
    """What a mistake in commands and options is, and what can be typed instead."""
    said: str = error.format_message()
    if said.startswith("No such command"):
        name = said.partition("'")[2].partition("'")[0]
        if "Did you mean" in said and name not in INSTEAD:
            return said
        return f"No such command '{name}'; {INSTEAD.get(name, '`ropelab --help` lists them')}"
    if type(error).__name__ != "NoSuchOption":
        return said
    from ropelab import config

    name = error.option_name
    said = f"No such option: {name}"
    if name in INSTEAD:
        return f"{said}; {INSTEAD[name]}"
    parameters = error.ctx.command.params
    options = [written for each in parameters for written in each.opts if written.startswith("-")]
    if close := difflib.get_close_matches(name, options, n=1, cutoff=0.8):
        return f"{said}; did you mean {close[0]}?"
    takes = any("KEY=VALUE" in (each.metavar or "") for each in parameters)
    if takes and (found := config.keys_called(name.strip("-").replace("-", "_"))):
        return f"{said}; settings have no dashes: write {' or '.join(f'{key}=VALUE' for key in found)}"
    return f"{said}; `{error.ctx.info_name}` takes {', '.join([*options, '--help'])}"


def check_output(path: Path, *, picture: bool) -> None:
    """`ValueError`, before hours of work, for an -o that cannot be written; missing folders are made later."""
    if not picture and path.suffix.lower() in (".html", ".htm", ".pdf", ".png", ".svg", ".csv") and not path.is_dir():
        raise ValueError(
            f"-o {path} is the name of a file, and a report is a folder with report.html, pictures and results.csv: "
            f"give -o {path.with_suffix('')} (a browser prints the page as PDF)"
        )
    if picture and path.suffix.lower() != ".png":
        raise ValueError(f"-o {path} is drawn as PNG; give it a name that ends in .png")
    if picture and path.is_dir():
        raise ValueError(f"-o {path} is a folder; give the name of a file in it, such as {path / 'curves.png'}")
    check_writable(f"-o {path}", path.absolute().parent if picture else path.absolute())


def check_writable(what: str, folder: Path) -> None:
    """`ValueError` when files could not be made in a folder, or the folder itself; nothing is left behind."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"{what} cannot be written ({error.strerror}); choose another place") from None


def print_json(data: Any) -> None:
    print(json.dumps(data, allow_nan=False))


def print_text(text: object = "") -> None:
    """Lines on stdout, `plain`."""
    print("\n".join(plain(line) for line in str(text).split("\n")))


def print_table(table: RenderableType) -> None:
    """What rich draws, on stdout, its text `plain`."""
    from rich.console import Console
    from rich.segment import Segment, Segments

    console = Console()
    drawn = [
        part if part.control or part.text == "\n" else Segment(plain(part.text), part.style)
        for line in console.render_lines(table, pad=False, new_lines=True)
        for part in line
    ]
    console.print(Segments(drawn), end="")


def separate(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(runs, overrides): a path that exists is a run even when its name holds '='."""
    from ropelab.runs import is_run

    named = [item for item in arguments if "=" not in item or is_run(Path(item))]
    return named, [item for item in arguments if item not in named]


def print_tree(tree: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(tree)
        return
    import yaml

    print_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).rstrip("\n"))
