"""`ropelab show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ropelab.cli.eval import questions_of
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
    print_table,
    print_text,
    print_tree,
    reported,
    say,
    separate,
)

RUN_KEYS = ("scaling", "device", "runs_dir", "cache_dir")


@app.command()
def show(
    arguments: RunsAndOverrides = None,
    pos: Pos = None,
    scaling: Scaling = None,
    factor: Factor = None,
    ctx: Ctx = None,
    attention: Annotated[
        bool,
        typer.Option(
            "--attention",
            help="Of a RUN: where it looks, measured on its own test text. Else: which kernel serves an encoding.",
        ),
    ] = False,
    as_json: Json = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE.png", help="Draw it.")] = None,
) -> None:
    """Methods and their papers; the numbers and pictures of one; a run, and why its curve bends; or settings."""
    with reported():
        named, settings = separate(list(arguments or []))
        method = pos or scaling or any(item.startswith(("pos=", "scaling=")) for item in settings)
        if len(named) > 1 or (named and pos):
            raise ValueError("show takes one RUN, or one method, or settings")
        option(settings, "--pos", "pos", pos)
        option(settings, "--scaling", "scaling", scaling)
        option(settings, "--factor", "scaling.factor", factor)
        if attention and not named:
            if output is not None:
                raise ValueError("-o draws no table of kernels; leave it out, or name a RUN")
            _show_kernels(settings, ctx, as_json=as_json)
            return
        if ctx and not (method or named):
            raise ValueError("--ctx belongs to a method or a run; add --pos NAME")
        if output is not None and not (method or named):
            raise ValueError("-o draws a method or a run; add --pos NAME")
        if output is not None:
            check_output(output, picture=True)
        if named:
            _show_run(named[0], settings, ctx, attention=attention, as_json=as_json, output=output)
        elif method:
            _show_method(settings, ctx, as_json=as_json, output=output)
        elif settings:
            from ropelab import config

            print_tree(config.to_dict(config.load(settings)), as_json=as_json)
        else:
            _list_methods(as_json=as_json)


# --- the list -------------------------------------------------------------------------------------------------------

TITLES = {
    "pos": "Position encodings, --pos NAME",
    "scaling": "Changes of a trained encoding for longer contexts, --scaling NAME",
    "positions": "Position numbers of training windows, positions=NAME",
}


def _list_methods(*, as_json: bool) -> None:
    from ropelab import config

    table = {group: {name: config.about(group, name) for name in config.choices(group)} for group in config.METHODS}
    if as_json:
        listed: dict[str, Any] = {
            g: {n: {"summary": one.summary, "paper": one.paper} for n, one in rows.items()} for g, rows in table.items()
        }
        for name, one in table["scaling"].items():
            listed["scaling"][name]["applies_to"] = one.applies_to
        print_json(listed)
        return
    for group, rows in table.items():
        print_text(TITLES[group])
        for name, (_, summary, paper, applies_to, *_) in rows.items():
            print_text(f"  {name:<20} {summary}")
            if group == "scaling" and name != "none":
                paper = f"for {', '.join(applies_to or ['any encoding'])}" + ("" if paper == "-" else f"; {paper}")
            if paper != "-":
                print_text(f"  {'':<20} {paper}")
        print_text()
    print_text(
        "The numbers of one: ropelab show --pos rope --scaling yarn --factor 8 --ctx 1024; -o FILE.png draws them."
    )


# --- kernels --------------------------------------------------------------------------------------------------------

EVALUATED = 16384  # tokens at which the kernels of an evaluation are shown unless --ctx says otherwise


def _show_kernels(settings: list[str], ctx: list[str] | None, *, as_json: bool) -> None:
    from ropelab import config

    resolved = config.load(settings)
    named = any(item.startswith("pos=") for item in settings) or resolved.scaling.name != "none"
    from ropelab.analysis import training_kernels
    from ropelab.evaluation import check_shown

    length = _one_length(ctx) or EVALUATED
    check_shown(resolved, length)
    methods = [resolved.pos] if named else [config.load([f"pos={name}"]).pos for name in config.choices("pos")]
    rows = training_kernels(resolved, methods, [length])
    if as_json:
        print_json({"attention": rows})
        return
    trained, evaluated = rows[0::2], rows[1::2]
    columns = [f"{row['use']}, {row['ctx']} tokens, {row['dtype']}" for row in rows[:2]]
    print_text(f"{'on ' + rows[0]['device']:<20} {columns[0]:<30} {columns[1]}")
    for one, other in zip(trained, evaluated, strict=True):
        print_text(f"{one['pos']:<20} {one['kernel'] or 'undefined':<30} {other['kernel'] or 'undefined'}")
    print_text()
    for kernel, what in sorted({(row["kernel"], row["what"]) for row in rows if row["kernel"]}):
        print_text(f"{kernel:<14} {what}")


# --- a method, and a run --------------------------------------------------------------------------------------------


def _show_method(settings: list[str], ctx: list[str] | None, *, as_json: bool, output: Path | None) -> None:
    from ropelab import config

    resolved = config.load(settings)
    length = _one_length(ctx) or resolved.train.ctx
    from ropelab import analysis
    from ropelab.evaluation import check_shown

    check_shown(resolved, length)
    numbers = analysis.describe(resolved, ctx=length)
    numbers |= _changed(resolved.pos, resolved.scaling)
    _draw(numbers, output)
    if as_json:
        print_json(numbers)
    else:
        _print_numbers(numbers)


def _show_run(
    name: str, settings: list[str], ctx: list[str] | None, *, attention: bool, as_json: bool, output: Path | None
) -> None:
    from ropelab import config, runs

    for item in settings:
        if item.partition("=")[0].partition(".")[0] not in RUN_KEYS:
            raise ValueError(f"a run has its own configuration: show RUN takes {', '.join(RUN_KEYS)}, not {item}")
    base = config.load([item for item in settings if not item.startswith("scaling")])
    runs_dir = Path(base.runs_dir).expanduser()
    run = runs.open_run(runs.find_run(name, runs_dir, also=_named(runs_dir)), finished=False)
    manifest, trained = run.manifest, run.config
    ((scaling, _),) = questions_of(config.to_dict(trained), settings, ())
    from ropelab.analysis import diagnose_run, trained_encoding
    from ropelab.evaluation import evaluations

    diagnosed = diagnose_run(manifest, evaluations(run.folder))
    scaling = scaling or trained.scaling
    length = _one_length(ctx) or _evaluated_length(diagnosed, scaling.name)
    method, encoding = trained_encoding(run, scaling, longest=length)
    from ropelab import analysis

    numbers = analysis.describe(
        trained,
        ctx=length,
        method=method,
        encoding=encoding,
        original_ctx=run.original_ctx,
    )
    numbers |= _changed(trained.pos, method)
    numbers |= {"run": run.name, "diagnosis": diagnosed, "attention": None}
    if attention:
        from ropelab.analysis import attention_by_distance as attend
        from ropelab.progress import Bar

        with Bar() as bar:
            numbers["attention"] = attend(
                run, method, ctx=length, device=base.device, cache_dir=base.cache_dir, progress=bar
            )
    _draw(numbers, output)
    if as_json:
        print_json(numbers)
        return
    keys = ("status", "step", "train_loss", "val_nll", "params", "device", "dtype", "attention_backend", "error")
    print_tree({"run": run.name, **{key: manifest.get(key) for key in keys}}, as_json=False)
    _print_numbers(numbers)
    _print_diagnosis(numbers)
    if numbers["attention"] is not None:
        _print_attention(numbers["attention"], manifest["train_ctx"])


def _named(runs_dir: Path) -> dict[str, str]:
    """What has a name but is no run, and how it is shown: sweeps, claims, methods."""
    from ropelab import claims, config, sweeps

    found = {path.name: f"the sweep {path.name} (`ropelab status {path.name}`)" for path in sweeps.all_sweeps(runs_dir)}
    for name in claims.packaged_claims(config.config_dir()):
        found[name] = f"the claim {name} (`ropelab reproduce {name}`)"
    for group in ("scaling", "pos"):
        found |= {name: f"the method {name} (`ropelab show --{group} {name}`)" for name in config.choices(group)}
    return found


def _evaluated_length(diagnosed: dict[str, Any], scaling: str) -> int:
    """The longest ctx with a loss under this scaling; where it was not evaluated, the training length."""
    lengths = [ctx for one in diagnosed["evaluated"] if one["scaling"] == scaling for ctx, _ in one["losses"]]
    return max(lengths, default=int(diagnosed["train_ctx"]))


def _changed(pos: Any, scaling: Any) -> dict[str, Any]:
    """The parameters that are not the defaults, for titles and JSON."""
    from ropelab import config

    return {"pos_changed": config.changed("pos", pos), "scaling_changed": config.changed("scaling", scaling)}


def _draw(numbers: dict[str, Any], output: Path | None) -> None:
    if output is None:
        return
    from ropelab.report import figures

    figures.save(figures.explain(numbers), output)
    say(f"picture: {output}")


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


# --- as text --------------------------------------------------------------------------------------------------------


def _print_numbers(numbers: dict[str, Any]) -> None:
    """The numbers of a method as text."""
    from ropelab import config

    told = config.about("pos", numbers["pos"])
    print_text(f"pos {numbers['pos']}: {told.summary}\n  {told.paper}")
    if numbers["scaling"] != "none":
        told = config.about("scaling", numbers["scaling"])
        factor = "" if numbers["factor"] is None else f", factor {numbers['factor']:g}"
        print_text(f"scaling {numbers['scaling']}{factor}: {told.summary}\n  {told.paper}")
    print_text(
        f"train_ctx {numbers['train_ctx']}, ctx {numbers['ctx']}, {numbers['n_head']} heads of {numbers['d_head']}"
    )
    for note in numbers["notes"]:
        print_text(f"note: {note}")
    if numbers["rotation"] is not None:
        _print_rotation(numbers)
    if numbers["bias"] is not None:
        distances = [d for d in (0, 1, 2, 4, 16, 64, 256, 1024, 4096) if d < numbers["ctx"]]
        print_text("bias by distance\nhead" + "".join(f"{d:>12}" for d in distances))
        for head, row in enumerate(numbers["bias"]["by_distance"]):
            print_text(f"{head + 1:>4}" + "".join(f"{row[d] + 0.0:>12.5g}" for d in distances))
    if numbers["embedding"] is not None:
        rows, columns = len(numbers["embedding"]), len(numbers["embedding"][0])
        scale = numbers["embedding_scale"]
        times = "" if scale is None else f", times {scale:.4g}"
        print_text(
            f"embedding table of {rows} positions x {columns} dimensions{times}; -o FILE.png draws it, --json has it"
        )


def _print_rotation(numbers: dict[str, Any]) -> None:
    rotation, rows = numbers["rotation"], numbers["coverage"]
    print_text(f"attention factor {rotation['attention_factor']:.4f} (scores get its square)")
    if rotation["start_tokens"]:
        print_text(f"the first {rotation['start_tokens']} positions keep the angles of the unscaled spectrum")
    print_text(
        "pair   radians/token    wavelength   turns in training   full period   trained to   asked at ctx   new radians"
        + ("   half left after" if rotation["decay"] else "")
    )
    for row, inv_freq in zip(rows, rotation["inv_freq"], strict=True):
        wavelength = "does not turn" if row["wavelength"] is None else f"{row['wavelength']:.1f}"
        line = (
            f"{row['pair']:>4}   {inv_freq:>13.6g} {wavelength:>13}   {row['turns_train']:>17.3f}   "
            f"{'yes' if row['full_period'] else 'no':>11}   {row['trained_to']:>10.3f}   {row['asked_to']:>12.3f}   "
            f"{row['outside'] if row['new'] else '-':>11{'.3f' if row['new'] else ''}}"
        )
        print_text(
            line + (f"   {rotation['decay']['half_life'][row['pair']]:>8.0f} tokens" if rotation["decay"] else "")
        )
    new = sum(row["new"] for row in rows)
    full = sum(row["full_period"] for row in rows)
    print_text(
        f"{full} of {len(rows)} pairs saw a full period in training; at {numbers['ctx']} tokens {new} are asked for "
        "angles that training did not show"
    )


def _print_diagnosis(numbers: dict[str, Any]) -> None:
    diagnosed = numbers["diagnosis"]
    from rich.table import Table
    from rich.text import Text

    from ropelab.report import figures

    current = (numbers["scaling"], numbers["factor"], numbers["scaling_changed"])
    if not any((one["scaling"], one["factor"], one["changed"]) == current for one in diagnosed["evaluated"]):
        scaled = "" if current[0] == "none" else f" --scaling {current[0]}"
        scaled += "" if current[1] is None else f" --factor {current[1]:g}"
        scaled += "".join(f" scaling.{key}={value}" for key, value in current[2].items())
        print_text(f"\nnot evaluated: run `ropelab eval {numbers['run']} --protocol last{scaled}`")
    if not diagnosed["evaluated"]:
        return
    named = [
        (figures.scaling_name(one["scaling"], one["factor"], one["changed"]), one) for one in diagnosed["evaluated"]
    ]
    for protocol in dict.fromkeys(one["observed"]["protocol"] for _, one in named):
        table = Table(title=f"Predicted and observed breakdown, in tokens (protocol {protocol})", title_justify="left")
        table.add_column("scaling", min_width=26, overflow="fold")
        for column in ("at", "new", "predicted", "observed"):
            table.add_column(column, justify="right")
        for name, one in named:
            if one["observed"]["protocol"] == protocol:
                table.add_row(
                    Text(name + (" (trained)" if one["trained"] else "")),
                    str(one["ctx"]),
                    "-" if one["new_pairs"] is None else f"{one['new_pairs']} of {diagnosed['pairs']}",
                    str(one["predicted"]["breaks_from"] or "none"),
                    figures.observed_words(one["observed"]),
                )
        print_table(table)
    print_text("at: the longest length evaluated; new: pairs asked there for angles that training did not show")
    print_text("predicted: the first length that asks for what training did not show")
    for name, one in named:
        print_text(f"  {name}: {one['predicted']['why']}")
    threshold = diagnosed["evaluated"][0]["observed"]["threshold"]
    print_text(
        f"observed: the loss is more than {threshold:g} nats above that of the model as trained at train_ctx, on the "
        "same targets (own: above its own)"
    )
    known = [one for one in diagnosed["evaluated"] if one["by_position"] is not None]
    if not known:
        print_text(f"loss by position: not evaluated; run `ropelab eval {numbers['run']} --protocol nonoverlapping`")
    for one in known:
        curve, name = one["by_position"], figures.scaling_name(one["scaling"], one["factor"], one["changed"])
        print_text(f"\nloss by position, {name}, at {curve['ctx']} tokens ({curve['protocol']}): nats")
        for low, high, nll in zip(curve["edges"][:-1], curve["edges"][1:], curve["nll"], strict=True):
            print_text(f"  {low:>8.0f} to {high:<8.0f} {'-' if nll is None else f'{nll:.4f}':>8}")


def _print_attention(found: dict[str, Any], train_ctx: int) -> None:
    documents = "1 document" if found["documents"] == 1 else f"{found['documents']} documents"
    print_text(
        f"\nattention by distance at {found['ctx']} tokens, {found['scaling']}: {found['queries']} queries at the end "
        f"of {documents} of {found['text']} ({found['split']}), "
        "% of their attention"
    )
    from ropelab.report import figures

    labels = figures.bucket_labels(found["edges"])
    print_text("layer head" + "".join(f"{label:>11}" for label in labels) + f"{f'from {train_ctx}':>11}{'mean':>9}")
    for layer, heads in enumerate(found["mass"]):
        for head, row in enumerate(heads):
            print_text(
                f"{layer + 1:>5} {head + 1:>4}"
                + "".join(f"{100 * share:>11.1f}" for share in row)
                + f"{100 * found['beyond'][layer][head]:>11.1f}{found['mean_distance'][layer][head]:>9.0f}"
            )
    print_text(f"{'all alike':>10}" + "".join(f"{100 * share:>11.1f}" for share in found["uniform"]))
