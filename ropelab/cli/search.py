"""`ropelab search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ropelab.cli.options import (
    Ctx,
    Json,
    RunsAndOverrides,
    app,
    check_writable,
    option,
    print_json,
    print_table,
    print_text,
    reported,
    say,
    separate,
)

KEYS = ("search.*", "eval.tokens", "eval.dtype", "seed", "device", "runs_dir", "cache_dir")


@app.command()
def search(
    method: Annotated[str, typer.Argument(metavar="longrope", help="What to search.")],
    arguments: RunsAndOverrides = None,
    ctx: Ctx = None,
    factor: Annotated[
        list[str] | None,
        typer.Option("--factor", metavar="S", help="The extension; else the least power of two that covers --ctx."),
    ] = None,
    short: Annotated[
        bool, typer.Option("--short", help="Also factors for texts up to the training length, kept in the same file.")
    ] = False,
    as_json: Json = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Where the factors go besides the run folder.")
    ] = None,
) -> None:
    """Search LongRoPE's factors for a finished run; resumes where it stopped, or says that it is finished.

    Candidates are scored on validation text and compared with the known scalings on test text. Use what was found:

    ropelab eval RUN --ctx 4096 --scaling longrope scaling.factors=FILE

    Progressive extension is to search, to fine-tune, and to search again:

    ropelab search longrope RUN --ctx 1024 -o a.json

    ropelab train --from RUN --scaling longrope scaling.factors=a.json train.ctx=1024

    ropelab search longrope CHILD --ctx 8192 --short -o b.json
    """
    with reported():
        if method != "longrope":
            raise ValueError(f"search takes longrope, not '{method}'")
        named, settings = separate(list(arguments or []))
        if len(named) > 1:
            raise ValueError(f"search takes one RUN, not {len(named)}: {', '.join(named)}")
        mine = [item for item in settings if item.startswith("search.")]
        plain = [item for item in settings if not item.startswith("search.")]
        for item in plain:
            if item.partition("=")[0] not in KEYS:
                raise ValueError(f"search does not take {item}; it takes {', '.join(KEYS)}")
        option(plain, "--ctx", "eval.ctx", ctx)
        length = _one("--ctx", ctx, "give --ctx N, the length to search for, above the training length")
        stretch = _one("--factor", factor, None)
        from ropelab import config, runs

        base = config.load(plain)
        if output is not None and output.is_dir():
            raise ValueError(f"-o {output} is a folder; give the name of a file in it, such as {output / 'a.json'}")
        if output is not None:
            check_writable(f"-o {output}", output.absolute().parent)
        runs_dir = Path(base.runs_dir).expanduser()
        run = runs.open_run(runs.find_run(named[0], runs_dir) if named else runs.latest_finished(runs_dir))
        if not named:
            say(f"searching for the latest finished run, {run.name}")
        from ropelab import files
        from ropelab import search as searching
        from ropelab.progress import Bar

        wanted = searching.settings(mine)
        run.weights  # noqa: B018 - refused before anything is searched
        question = searching.ask(run, ctx=int(length or 0), factor=stretch)
        with Bar() as bar:
            result = searching.search_longrope(run, question, wanted, base, short=short, progress=bar)
        path, scored = result.pop("path"), result.pop("scored")
        if scored == 0:
            say(f"this search of {run.name} is finished already; nothing was searched")
        if output is not None:
            files.write_json(output, result)
        if as_json:
            print_json({**result, "path": str(output or path), "scored": scored})
            return
        _print(result)
        best, drawn = result["search"]["nll"], result["search"]["random"]["nll"]
        if best is not None and drawn is not None and drawn < best:
            say(
                f"random search found better factors on the search set ({drawn:.4f} against {best:.4f} nats): this "
                "search is too small; raise search.population and search.iterations"
            )
        print_text(output or path)


def _one(name: str, values: list[str] | None, missing: str | None) -> float | None:
    """The one number that an option gives."""
    if not values:
        if missing is not None:
            raise ValueError(missing)
        return None
    (text,) = values[:1] if len(values) == 1 else [", ".join(values)]
    try:
        number = float(text) if name == "--factor" else float(int(text))
    except (ValueError, OverflowError):
        raise ValueError(f"{name} takes one number here, not '{text[:80]}'") from None
    return number


def _print(result: dict[str, Any]) -> None:
    """The comparison, and what was found."""
    from rich.table import Table
    from rich.text import Text

    searched, report = result["search"], result["report"]
    tables = [(report, result["ctx"])]
    if "short" in report:
        tables.append((report["short"], result["original_ctx"]))
    for part, length in tables:
        protocol = part["protocol"]
        table = Table(
            title=f"{result['run']} at {length} tokens, factor {result['factor']:g}, the last {protocol['last']} of "
            f"each window",
            title_justify="left",
        )
        for heading in ("scaling", "search set, nats", "test, nats", "test, perplexity"):
            table.add_column(heading, justify="left" if heading == "scaling" else "right")
        for row in part["rows"]:
            numbers = [_cell(row["search_nll"], 4), _cell(row["nll"], 4), _cell(row["ppl"], 3)]
            table.add_row(Text(row["name"]), *numbers)
        print_table(table)
    print_text(
        f"{searched['evaluations']} candidates on {searched['documents']['windows']} validation windows, as many at "
        f"random; the test text is other documents. n-hat {result['start_tokens']}, attention factor "
        f"{result['attention_factor']:.4f}, factors {' '.join(f'{value:.4g}' for value in result['long_factors'])}"
    )
    if result["short_factors"]:
        print_text(f"short factors {' '.join(f'{value:.4g}' for value in result['short_factors'])}")


def _cell(value: float | None, places: int) -> str:
    return "–" if value is None else f"{value:.{places}f}"
