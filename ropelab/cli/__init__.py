"""The commands: parse, call one function, print. Results on stdout, progress and logs on stderr.

Exit status: 0 done, 1 a run failed or a verdict is FAIL, 2 the user's mistake (one line, no traceback), 130 and 143
interrupted after saving. Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import signal
import sys

import typer

# each of these adds its commands to the application, in the order of the help page
# isort: off
from ropelab.cli import train, eval, sweep, reproduce, search, show, runs, verify_resume  # noqa: F401
from ropelab.cli import export, bench  # noqa: F401

# isort: on
from ropelab.cli.options import app, drop_output, one_line, open_streams, say, with_fix

__all__ = ["app", "main"]

# a mistake in options and arguments; typer brings its own click, so the class has no one public name
UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def main() -> None:
    """Entry point of the `ropelab` command."""
    open_streams()
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except UsageError as error:
        status = 2
        say(one_line(with_fix(error)))
    except typer.Abort:
        status = 1
        say(one_line("nothing was done; answer y, or add --yes"))
    except BrokenPipeError:
        drop_output()
        status = 128 + signal.SIGPIPE
    except OSError as error:  # of the output itself: what a command does is reported by it
        drop_output()
        status = 1
        say(one_line(f"what it says cannot be written ({error.strerror})"))
    sys.exit(status)
