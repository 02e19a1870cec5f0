"""`ropelab verify-resume`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ropelab.cli.options import (
    MOST,
    Json,
    Overrides,
    Pos,
    Scaling,
    app,
    fail,
    option,
    print_json,
    print_table,
    print_text,
    reported,
    say,
)
from ropelab.cli.train import composed


@app.command("verify-resume")
def verify_resume(
    overrides: Overrides = None,
    pos: Pos = None,
    scaling: Scaling = None,
    steps: Annotated[int, typer.Option("--steps", max=MOST, metavar="N", help="Steps of each training.")] = 20,
    at: Annotated[
        int | None,
        typer.Option("--at", max=MOST, metavar="K", help="The step whose checkpoint is resumed (default: N / 2)."),
    ] = None,
    ranks: Annotated[int, typer.Option("--ranks", max=MOST, metavar="R", help="Processes that train together.")] = 1,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Have torch use its deterministic kernels.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prove that resuming is bit-exact here: N straight steps against a kill -9 past the checkpoint of step K.

    The killed training is resumed to step N, and every tensor of weights and optimizer, every line of the metrics and
    the best validation loss are compared. It works in a temporary folder. Exit 0 when all is equal, 1 when it is not:
    then it says what differs first, and whether resuming or a kernel of this machine is the reason.
    """
    with reported():
        settings = list(overrides or [])
        option(settings, "--pos", "pos", pos)
        option(settings, "--scaling", "scaling", scaling)
        resolved = composed(settings)
        from ropelab import training
        from ropelab.progress import Bar

        try:
            with Bar() as bar:
                found = training.verify_resume(
                    resolved, steps=steps, at=at, world=ranks, deterministic=deterministic, progress=bar
                )
        except RuntimeError as error:
            fail(1, str(error))
        if as_json:
            print_json(found)
        else:
            _print(found)
        if not found["equal"]:
            say(f"ropelab: {verdict(found)}")
            raise typer.Exit(1)


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    compared = found["compared"]
    table = Table(title=f"{found['steps']} steps straight, and killed and resumed", title_justify="left")
    for heading in ("compared", "what", "sha256", "equal"):
        table.add_column(heading)
    for part in ("weights", "optimizer"):
        facts = compared[part]
        what = f"{facts['tensors']} tensors, {facts['numbers']:,} numbers"
        table.add_row(part, what, facts["digest"][:16], _word(facts))
    table.add_row("metrics", f"{compared['metrics']['lines']} lines", compared["metrics"]["digest"][:16],
                  _word(compared["metrics"]))  # fmt: skip
    table.add_row("best so far", f"{compared['best']['best_val_nll']:.6f} nats", "", _word(compared["best"]))
    table.add_row("summary", f"{compared['summary']['values']} values of the manifest",
                  compared["summary"]["digest"][:16], _word(compared["summary"]))  # fmt: skip
    print_table(table)
    for difference in found["differences"][:8]:
        print_table(Text(_said(difference)))
    if len(found["differences"]) > 8:
        print_text(f"and {len(found['differences']) - 8} more differences; --json lists them")
    print_text(
        f"killed in step {found['killed_at']}, {found['steps_lost']} steps past the checkpoint of step {found['at']}; "
        f"{found['dtype']}, {'compiled' if found['compiled'] else 'eager'}, attention {found['attention_backend']}, "
        f"{found['threads']} threads, {_of_ranks(found)}torch {found['torch']}, {found['device']}"
    )
    if found["equal"]:
        print_text("resuming is bit-exact here")


def _of_ranks(found: dict[str, Any]) -> str:
    return "" if found["world_size"] == 1 else f"{found['world_size']} ranks ({found['parallel']}), "


def _word(facts: dict[str, Any]) -> str:
    return "yes" if facts["equal"] else "NO"


def _said(difference: dict[str, Any]) -> str:
    """A difference in a line."""
    what = difference["what"]
    if what in ("model", "optimizer"):
        name = f"{'weights' if what == 'model' else what} {difference['tensor']}"
        if difference["numbers"] is None:
            return f"{name}: another shape, or missing"
        largest = "" if difference["largest"] is None else f", at most {difference['largest']:.3g} apart"
        return f"{name}: {difference['numbers']} of {difference['of']} numbers differ{largest}"
    if what == "metrics":
        one, other = difference["straight"], difference["resumed"]
        if one is None or other is None:
            return f"metrics: line {difference['line']} is in one of them only"
        keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        values = ", ".join(f"{key} {one.get(key)} straight, {other.get(key)} resumed" for key in keys)
        return f"metrics: first at line {difference['line']}: {values}"
    return f"{what}: {difference['straight']} straight, {difference['resumed']} resumed"


def verdict(found: dict[str, Any]) -> str:
    """Why the two trainings differ, in a line."""
    if found["cause"] == "resuming":
        return (
            "resuming is not bit-exact: the straight training gives the same numbers twice, the resumed one does not; "
            "this is a fault of ropelab, please report it with the output of --json"
        )
    named = ", ".join(found["operations"])
    why = (
        f"torch has no deterministic kernel for {named}"
        if named
        else "torch names no operation that has no deterministic kernel"
    )
    fix = {
        True: "; with --deterministic, torch's deterministic kernels, it gives the same numbers",
        False: "; also with torch's deterministic kernels",
        None: "",
    }[found["equal_when_deterministic"]]
    return f"not bit-exact, but not by resuming: the straight training itself gives other numbers each time; {why}{fix}"
