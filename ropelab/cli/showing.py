"""`ropelab show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ropelab.cli.options import (
    Ctx,
    Factor,
    Json,
    Pos,
    RunsAndOverrides,
    Scaling,
    app,
    check_output,
    option,
    print_json,
    print_tree,
    reported,
    say,
    separate,
)


@app.command()
def show(
    arguments: RunsAndOverrides = None,
    pos: Pos = None,
    scaling: Scaling = None,
    factor: Factor = None,
    ctx: Ctx = None,
    as_json: Json = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE.png", help="Draw it.")] = None,
) -> None:
    """Methods and their papers; the numbers and pictures of one; a run; or what a configuration comes to."""
    with reported():
        named, settings = separate(list(arguments or []))
        method = pos or scaling or any(item.startswith(("pos=", "scaling=")) for item in settings)
        option(settings, "--pos", "pos", pos)
        option(settings, "--scaling", "scaling", scaling)
        option(settings, "--factor", "scaling.factor", factor)
        if len(named) > 1 or (named and method):
            raise ValueError("show takes one RUN, or one method, or settings")
        if ctx and not (method or named):
            raise ValueError("--ctx belongs to a method or a run; add --pos NAME")
        if output is not None and not (method or named):
            raise ValueError("-o draws a method or a run; add --pos NAME")
        if output is not None:
            check_output(output, picture=True)
        if not (named or settings):
            _show_methods(as_json=as_json)
        elif named or method:
            _show_numbers(named, settings, ctx, as_json=as_json, output=output)
        else:
            from ropelab import config

            print_tree(config.to_dict(config.load(settings)), as_json=as_json)


def _show_methods(*, as_json: bool) -> None:
    from ropelab import config

    table = {group: config.summaries(group) for group in config.METHODS}
    if as_json:
        print_json({g: {n: {"summary": s, "paper": p} for n, (s, p) in rows.items()} for g, rows in table.items()})
        return
    titles = {"pos": "Position encodings, --pos NAME", "scaling": "Scalings of a rotary spectrum, --scaling NAME"}
    for group, rows in table.items():
        print(titles[group])
        for name, (summary, paper) in rows.items():
            print(f"  {name:<20} {summary}\n  {'':<20} {paper}")
        print()
    print("The numbers of one: ropelab show --pos rope --scaling yarn --factor 8 --ctx 1024; -o FILE.png draws them.")


def _show_numbers(
    named: list[str], settings: list[str], ctx: list[str] | None, *, as_json: bool, output: Path | None
) -> None:
    from ropelab import config, runs

    resolved = config.load(settings)
    if named:
        run = runs.find_run(named[0], Path(resolved.runs_dir).expanduser())
        trained = config.from_dict(run.manifest().get("config", {}))
        if any(item.partition("=")[0] not in ("runs_dir", "cache_dir") for item in settings):
            raise ValueError(f"{run.name} has its own configuration; show RUN takes no settings")
        resolved = trained
    length = _one_length(ctx) or resolved.train.ctx
    from ropelab import show as shown

    numbers = shown.numbers(resolved, ctx=length)
    if output is not None:
        from ropelab import figures

        figures.save(figures.explain(numbers), output)
        say(f"picture: {output}")
    if as_json:
        print_json({**numbers, "run": run.name} if named else numbers)
        return
    if named:
        manifest = run.manifest()
        keys = ("status", "step", "train_loss", "val_nll", "params", "device", "dtype", "attention_backend", "error")
        print_tree({"run": run.name, **{key: manifest.get(key) for key in keys}}, as_json=False)
    _print_numbers(numbers)


def _one_length(ctx: list[str] | None) -> int | None:
    if not ctx:
        return None
    try:
        length = int(ctx[0].rstrip(","))
    except ValueError:
        raise ValueError(f"--ctx takes one length here, not '{ctx[0]}'") from None
    if len(ctx) > 1 or not 1 <= length <= 2**20:
        raise ValueError(f"--ctx takes one length from 1 to {2**20} here, not '{','.join(ctx)}'")
    return length


def _print_numbers(numbers: dict[str, Any]) -> None:
    """The numbers of a method as text."""
    from ropelab import config

    summary, paper = config.summaries("pos")[numbers["pos"]]
    print(f"pos {numbers['pos']}: {summary}\n  {paper}")
    if numbers["scaling"] != "none":
        summary, paper = config.summaries("scaling")[numbers["scaling"]]
        print(f"scaling {numbers['scaling']}, factor {numbers['factor']:g}: {summary}\n  {paper}")
    print(f"train_ctx {numbers['train_ctx']}, ctx {numbers['ctx']}, {numbers['n_head']} heads of {numbers['d_head']}")
    if numbers["rotation"] is not None:
        print(f"attention factor {numbers['rotation']['attention_factor']:.4f} (scores get its square)")
        print("pair   radians/token   wavelength   turns in train_ctx   turns asked in ctx")
        for row, inv_freq in zip(numbers["coverage"], numbers["rotation"]["inv_freq"], strict=True):
            print(
                f"{row['pair']:>4}   {inv_freq:>13.6g}   {row['wavelength']:>10.1f}   {row['turns_train']:>18.3f}   "
                f"{row['turns_ctx']:>18.3f}"
            )
    if numbers["bias"] is not None:
        distances = [d for d in (0, 1, 2, 4, 16, 64, 256, 1024, 4096) if d < numbers["ctx"]]
        print("bias by distance\nhead" + "".join(f"{d:>12}" for d in distances))
        for head, row in enumerate(numbers["bias"]["by_distance"]):
            print(f"{head:>4}" + "".join(f"{row[d]:>12.5g}" for d in distances))
    if numbers["embedding"] is not None:
        rows, columns = len(numbers["embedding"]), len(numbers["embedding"][0])
        print(f"embedding table of {rows} positions x {columns} dimensions; -o FILE.png draws it, --json prints it")
