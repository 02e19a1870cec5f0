"""`ropelab train`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ropelab.cli.options import (
    Factor,
    Json,
    Overrides,
    Pos,
    Scaling,
    app,
    option,
    print_json,
    print_text,
    reported,
    say,
    status_of,
)
from ropelab.distributed import init_distributed

if TYPE_CHECKING:
    from ropelab.config import Config


@app.command()
def train(
    overrides: Overrides = None,
    pos: Pos = None,
    scaling: Scaling = None,
    factor: Factor = None,
    ctx: Annotated[list[str] | None, typer.Option("--ctx", hidden=True)] = None,
    parent: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="RUN", help="Go on from a finished run: its weights and settings."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train one run; resumes where it stopped, or says that it is finished.

    With --from RUN a finished run is fine-tuned into a run of its own. All settings are the parent's but for those
    given: --scaling yarn scaling.factor=4 train.ctx=2048 train.steps=100 extends its context.
    """
    with reported(over_ranks=True), init_distributed(status_of) as ranks:
        settings = list(overrides or [])
        if ctx:
            raise ValueError(f"train takes no --ctx; use train.ctx={ctx[0]}")
        option(settings, "--pos", "pos", pos)
        option(settings, "--scaling", "scaling", scaling)
        option(settings, "--factor", "scaling.factor", factor)
        option(settings, "--from", "parent", parent)
        resolved = composed(settings)
        from ropelab import training
        from ropelab.progress import Bar, silent

        with Bar() if ranks.is_first else contextlib.nullcontext(silent) as bar:
            result = training.train(resolved, progress=bar, ranks=ranks)
        if not ranks.is_first:
            return
        if as_json:
            print_json(result)
            return
        if result["skipped"]:
            say(f"{result['run']} is finished already (step {result['step']}); nothing was trained")
        print_text(
            f"{result['run']}: {result['step']} steps, train loss {result['train_loss']:.4f}, "
            f"validation {result['val_nll']:.4f} nats per token, {result['params']:,} parameters, "
            f"{result['tokens_per_s']:,.0f} tokens/s on {result['device']} in {result['dtype']}"
        )
        print_text(result["run_dir"])


def composed(settings: list[str]) -> Config:
    """The configuration of a training; what is not given is that of the run it starts from, where it names one."""
    from ropelab import config

    inherited = None
    if any(item.startswith("parent=") for item in settings):
        from ropelab import runs

        folders = config.load([item for item in settings if item.startswith(("runs_dir=", "parent="))])
        if folders.parent is not None:
            found = runs.find_run(folders.parent, Path(folders.runs_dir).expanduser())
            inherited = found.manifest().get("config", {})
    return config.load(settings, parent=inherited)
