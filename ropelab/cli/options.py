"""What the commands share: the application, its options, and how results and mistakes are reported."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    name="ropelab",
    help="The referee of position encodings: train small GPTs that differ only in position, evaluate them far past "
    "the training length, get a verdict.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as model=small.")]
RunsAndOverrides = Annotated[
    list[str] | None, typer.Argument(metavar="[RUN | KEY=VALUE]...", help="Runs, and settings such as eval.last=128.")
]
Pos = Annotated[list[str] | None, typer.Option("--pos", metavar="NAME", help="Position encoding: pos=NAME.")]
Scaling = Annotated[list[str] | None, typer.Option("--scaling", metavar="NAME", help="scaling=NAME.")]
Factor = Annotated[
    list[str] | None, typer.Option("--factor", metavar="S", help="scaling.factor=S: auto, auto-row or a number.")
]
Ctx = Annotated[
    list[str] | None, typer.Option("--ctx", metavar="N", help="8192: the ladder up to it; 512,8192: exactly these.")
]
Protocol = Annotated[list[str] | None, typer.Option("--protocol", metavar="NAME", help="eval.protocol=NAME.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """The user's mistakes in one line and exit 2; failed runs exit 1; our own bugs keep their traceback."""
    try:
        yield
        sys.stdout.flush()
    except ValueError as error:
        fail(2, str(error))
    except BrokenPipeError:  # whoever read it has seen enough, as in `ropelab show | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at the end must not fail again
        raise typer.Exit(128 + signal.SIGPIPE) from None
    except OSError as error:
        fail(1, str(error))
    except KeyboardInterrupt:
        fail(130, "interrupted")
    except Exception as error:
        kind = type(error).__name__
        if kind == "Interrupted":
            signum = error.signum  # type: ignore[attr-defined]
            fail(130 if signum == signal.SIGINT else 143, str(error))
        if kind == "NonFiniteLossError":
            fail(1, str(error))
        raise


def fail(status: int, message: str) -> NoReturn:
    say(one_line(message))
    raise typer.Exit(status)


def one_line(message: str) -> str:
    return f"ropelab: {' '.join(message.split())}"


def say(message: str) -> None:
    typer.echo(message, err=True)


def option(overrides: list[str], option: str, key: str, values: list[str] | None) -> None:
    """Add an option's value as an override. `ValueError` when it is given twice or beside its override."""
    for value in values or []:
        other = next((item for item in overrides if item.partition("=")[0] == key), None)
        if other is not None:
            raise ValueError(f"{option} {value} and {other}: give {key} once")
        overrides.append(f"{key}={value}")


def check_output(path: Path, *, picture: bool) -> None:
    """`ValueError`, before hours of work, for an -o that cannot be written; missing folders are made later."""
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


def separate(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(runs, overrides): a path that exists is a run even when its name holds '='."""
    named = [item for item in arguments if "=" not in item or (Path(item) / "manifest.json").exists()]
    return named, [item for item in arguments if item not in named]


def print_tree(tree: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(tree)
        return
    import yaml

    print(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), end="")
