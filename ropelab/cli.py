"""The commands: parse, call one function, print. Results on stdout, progress and logs on stderr.

Exit status: 0 done, 1 a run failed or a verdict is FAIL, 2 the user's mistake (one line, no traceback), 130 and 143
interrupted after saving. Heavy imports happen inside the commands, so that `--help` answers at once.
"""

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


# a mistake in options and arguments; typer brings its own click, so the class has no one public name
UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def main() -> None:
    """Entry point of the `ropelab` command."""
    if sys.argv[1:] == ["--version"]:
        from ropelab import __version__

        print(f"ropelab {__version__}")
        return
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except UsageError as error:
        status = 2
        _say(_one_line(error.format_message()))  # type: ignore[attr-defined]
    except typer.Abort:
        status = 1
        _say(_one_line("nothing was done; answer y, or add --yes"))
    sys.exit(status)


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """The user's mistakes in one line and exit 2; failed runs exit 1; our own bugs keep their traceback."""
    try:
        yield
        sys.stdout.flush()
    except ValueError as error:
        _fail(2, str(error))
    except BrokenPipeError:  # whoever read it has seen enough, as in `ropelab show | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at the end must not fail again
        raise typer.Exit(128 + signal.SIGPIPE) from None
    except OSError as error:
        _fail(1, str(error))
    except KeyboardInterrupt:
        _fail(130, "interrupted")
    except Exception as error:
        kind = type(error).__name__
        if kind == "Interrupted":
            signum = error.signum  # type: ignore[attr-defined]
            _fail(130 if signum == signal.SIGINT else 143, str(error))
        if kind == "NonFiniteLossError":
            _fail(1, str(error))
        raise


def _fail(status: int, message: str) -> NoReturn:
    _say(_one_line(message))
    raise typer.Exit(status)


def _one_line(message: str) -> str:
    return f"ropelab: {' '.join(message.split())}"


def _say(message: str) -> None:
    typer.echo(message, err=True)


def _option(overrides: list[str], option: str, key: str, values: list[str] | None) -> None:
    """Add an option's value as an override. `ValueError` when it is given twice or beside its override."""
    for value in values or []:
        other = next((item for item in overrides if item.partition("=")[0] == key), None)
        if other is not None:
            raise ValueError(f"{option} {value} and {other}: give {key} once")
        overrides.append(f"{key}={value}")


def _check_output(path: Path, *, picture: bool) -> None:
    """`ValueError`, before hours of work, for an -o that cannot be written; missing folders are made later."""
    if picture and path.suffix.lower() != ".png":
        raise ValueError(f"-o {path} is drawn as PNG; give it a name that ends in .png")
    if picture and path.is_dir():
        raise ValueError(f"-o {path} is a folder; give the name of a file in it, such as {path / 'curves.png'}")
    _check_writable(f"-o {path}", path.absolute().parent if picture else path.absolute())


def _check_writable(what: str, folder: Path) -> None:
    """`ValueError` when files could not be made in a folder, or the folder itself; nothing is left behind."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"{what} cannot be written ({error.strerror}); choose another place") from None


def _print_json(data: Any) -> None:
    print(json.dumps(data, allow_nan=False))


# --- commands -------------------------------------------------------------------------------------------------------


@app.command()
def train(
    overrides: Overrides = None,
    pos: Pos = None,
    scaling: Scaling = None,
    factor: Factor = None,
    ctx: Ctx = None,
    as_json: Json = False,
) -> None:
    """Train one run; resumes where it stopped, or says that it is finished."""
    with _reported():
        from ropelab import config

        settings = list(overrides or [])
        if ctx:
            raise ValueError(f"train takes no --ctx; use train.ctx={ctx[0]}")
        _option(settings, "--pos", "pos", pos)
        _option(settings, "--scaling", "scaling", scaling)
        _option(settings, "--factor", "scaling.factor", factor)
        resolved = config.load(settings)
        from ropelab import experiment
        from ropelab.progress import Bar

        with Bar() as bar:
            result = experiment.train(resolved, progress=bar)
        if as_json:
            _print_json(result)
            return
        if result["skipped"]:
            _say(f"{result['run']} is finished already (step {result['step']}); nothing was trained")
        print(
            f"{result['run']}: {result['step']} steps, train loss {result['train_loss']:.4f}, "
            f"validation {result['val_nll']:.4f} nats per token, {result['params']:,} parameters, "
            f"{result['tokens_per_s']:,.0f} tokens/s on {result['device']} in {result['dtype']}"
        )
        print(result["run_dir"])


EVAL_KEYS = ("eval", "scaling", "data", "track", "device", "runs_dir", "cache_dir")


def _separate(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(runs, overrides): a path that exists is a run even when its name holds '='."""
    named = [item for item in arguments if "=" not in item or (Path(item) / "manifest.json").exists()]
    return named, [item for item in arguments if item not in named]


@app.command("eval")
def evaluate(
    arguments: RunsAndOverrides = None,
    ctx: Ctx = None,
    scaling: Scaling = None,
    factor: Factor = None,
    protocol: Protocol = None,
    as_json: Json = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where the plot goes (default: curves.png in the run folder).")
    ] = None,
) -> None:
    """Perplexity of finished runs far past their training length; without RUN, of the latest."""
    with _reported():
        named, settings = _separate(list(arguments or []))
        _option(settings, "--ctx", "eval.ctx", ctx)
        _option(settings, "--scaling", "scaling", scaling)
        _option(settings, "--factor", "scaling.factor", factor)
        _option(settings, "--protocol", "eval.protocol", protocol)
        for item in settings:
            head = item.partition("=")[0].partition(".")[0]
            if head in ("pos", "model", "train", "seed"):
                raise ValueError(f"{item} is fixed by the run; eval takes {', '.join(EVAL_KEYS)}")
            if item.startswith(("data.tokenizer", "data.vocab_size")):
                raise ValueError(f"{item}: evaluation uses the run's own tokeniser")
        from ropelab import config, runs

        plain = [item for item in settings if item.partition("=")[0].partition(".")[0] not in ("scaling", "data")]
        base = config.load(plain)
        if output is not None:
            _check_output(output, picture=True)
        runs_dir = Path(base.runs_dir).expanduser()
        found = [runs.find_run(name, runs_dir) for name in named] or [runs.latest_finished(runs_dir)]
        if not named:
            _say(f"evaluating the latest finished run, {found[0].name}")
        from ropelab import experiment
        from ropelab.progress import Bar

        questions = []
        for run in found:  # before any work: every run is usable and every scaling applies
            run.load_weights()
            for scaled, text in _questions(run.manifest()["config"], settings, base.eval.scalings):
                experiment.resolve_ladder(run, base.eval, scaling=scaled)
                questions.append((run, scaled, text))
        results = []
        with Bar() as bar:
            for run, scaled, text in questions:
                done = experiment.evaluate(
                    run, base.eval, scaling=scaled, other_text=text, device=base.device, cache_dir=base.cache_dir,
                    progress=bar,
                )  # fmt: skip
                results.append(done.result)
        if as_json:
            _print_json(results[0] if len(results) == 1 else {"results": results})
        else:
            from rich.console import Console

            from ropelab import report

            Console().print(report.terminal_table(results))
        if output is not None or not as_json:
            from ropelab import figures

            path = output or found[0].path / "curves.png"
            figures.save(figures.curves(results, title="Perplexity past the training length"), path)
            _say(f"plot: {path}")


def _questions(trained: dict[str, Any], settings: list[str], scalings: tuple[str, ...]) -> list[tuple[Any, Any]]:
    """The (scaling, other text) pairs to evaluate one run under; None where the run's own holds."""
    from ropelab import config

    mine = [item for item in settings if item.startswith(("scaling=", "scaling."))]
    if mine and scalings:
        raise ValueError("give either --scaling or eval.scalings, not both")
    if mine and not any(item.startswith("scaling=") for item in mine):
        own = trained["scaling"]
        inherited = [f"scaling.{key}={value}" for key, value in own.items() if key != "name" and value is not None]
        given = {item.partition("=")[0] for item in mine}
        mine = [f"scaling={own['name']}", *(i for i in inherited if i.partition("=")[0] not in given), *mine]
    methods: list[Any] = [config.parse_scaling(item) for item in scalings]
    methods = methods or [config.load(mine).scaling if mine else None]

    texts = [item for item in settings if item.startswith(("data=", "data."))]
    text = None
    if texts:
        if not any(item.startswith("data=") for item in texts):
            own_text = trained["data"]
            texts = [
                f"data={own_text['name']}",
                *(f"data.path={own_text['path']}" for _ in [0] if own_text["path"]),
                *texts,
            ]
            if sum(item.startswith("data.path=") for item in texts) == 2:
                texts.pop(1)
        text = config.load(texts).data
    return [(method, text) for method in methods]


@app.command()
def reproduce(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CLAIM | FILE.yaml | demo | KEY=VALUE]...", help="Claims by id or file, or a set."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0 .. N-1 of every run.")] = 1,
    more: Annotated[
        bool, typer.Option("--more", help="3 seeds, then one look at 6 where a claim is open; both looks at 0.0125.")
    ] = False,
    list_only: Annotated[bool, typer.Option("--list", help="List the claims and sets.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of report.html, curves.png, results.json.")
    ] = None,
    as_json: Json = False,
) -> None:
    """From nothing to verdicts: train the runs that are missing, evaluate them, judge the claims."""
    with _reported():
        from ropelab import config

        if list_only:
            _list_claims(as_json=as_json)
            return
        names = [item for item in arguments or [] if "=" not in item or Path(item).is_file()]
        settings = [item for item in arguments or [] if item not in names]
        if not names:
            raise ValueError("name a claim, a claim file or a set; `ropelab reproduce --list` lists them")
        if seeds < 1:
            raise ValueError(f"--seeds must be at least 1, not {seeds}")
        in_sets = [name for name in names if name in config.choices("set")]
        if in_sets and len(names) > 1:
            raise ValueError(f"{in_sets[0]} is a set of claims of its own; name it alone")
        _reproduce(names, settings, seeds, more=more, output=output, as_json=as_json)


@app.command()
def demo(
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0 .. N-1 of every run.")] = 1,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the report.")] = Path("demo"),
    as_json: Json = False,
) -> None:
    """The main job on the embedded text: five encodings trained, evaluated to 8 times their length, judged."""
    with _reported():
        if seeds < 1:
            raise ValueError(f"--seeds must be at least 1, not {seeds}")
        _reproduce(["demo"], list(overrides or []), seeds, more=False, output=output, as_json=as_json)


def _list_claims(*, as_json: bool) -> None:
    from ropelab import claims, config

    folder = config.config_dir()
    loaded = [claims.load_claim(claims.claim_path(name, folder), folder) for name in claims.packaged_claims(folder)]
    if as_json:
        _print_json([{"claim": c.id, "tier": c.tier, "statement": c.statement, "source": c.source} for c in loaded])
        return
    for claim in loaded:
        print(f"{claim.id:<18} {claim.statement}\n{'':<18} {claim.source} ({claim.tier})")
    for name in config.choices("set"):
        print(f"{name:<18} a set of claims with one report")


def _reproduce(
    names: list[str], settings: list[str], seeds: int, *, more: bool, output: Path | None, as_json: bool
) -> None:
    import time

    from ropelab import config, experiment, reproduce
    from ropelab.progress import Bar

    plan = reproduce.plan_set(names[0]) if names[0] in reproduce.sets() else reproduce.plan_claims(names)
    if output is not None:
        _check_output(output, picture=False)
    resolved = config.load(settings)
    experiment.resolve_device(resolved.device)
    _check_writable(f"runs_dir={resolved.runs_dir}", Path(resolved.runs_dir).expanduser())
    began = time.time()
    looks = [(3, 0.0125), (6, 0.0125)] if more else [(seeds, 0.025)]
    for count, alpha in looks:
        with Bar() as bar:
            outcome = reproduce.run_plan(
                plan, seeds=range(count), overrides=settings, alpha=alpha, split="test", progress=bar
            )
        if all(verdict.verdict != "INCONCLUSIVE" for verdict in outcome.verdicts):
            break
    if outcome.interrupted:
        _fail(
            128 + outcome.interrupted, "interrupted; finished runs and checkpoints are kept, the same command goes on"
        )
    if outcome.failures:
        _fail(1, "; ".join(f"{name}: {message}" for name, message in outcome.failures))
    verdicts = [verdict.as_json() for verdict in outcome.verdicts]
    from rich.console import Console

    from ropelab import report

    if output is not None:
        facts = {
            "runs": [manifest["run"] for manifest in outcome.manifests],
            "seeds": count,
            "environment": outcome.manifests[0]["environment"],
            "device": outcome.manifests[0]["device"],
            "training dtype": sorted({manifest["dtype"] for manifest in outcome.manifests}),
            "text": outcome.manifests[0]["corpus"],
        }
        command = f"ropelab reproduce {' '.join(names)} --seeds {count}"
        page = report.write_report(
            output,
            evals=outcome.evals,
            verdicts=verdicts,
            title=plan.title,
            notes=[f"Made by `{command}`."],
            manifest=facts,
        )
    if as_json:
        _print_json({"evals": outcome.evals, "verdicts": verdicts})
    else:
        console = Console()
        console.print(report.terminal_table(outcome.evals))
        console.print(report.verdict_table(verdicts))
        seconds = time.time() - began
        _say(f"{outcome.trained} of {len(outcome.manifests)} runs trained, the rest was there; {seconds:.0f} s")
        if output is not None:
            print(page)
    if any(verdict["verdict"] == "FAIL" for verdict in verdicts):
        raise typer.Exit(1)


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
    with _reported():
        named, settings = _separate(list(arguments or []))
        method = pos or scaling or any(item.startswith(("pos=", "scaling=")) for item in settings)
        _option(settings, "--pos", "pos", pos)
        _option(settings, "--scaling", "scaling", scaling)
        _option(settings, "--factor", "scaling.factor", factor)
        if len(named) > 1 or (named and method):
            raise ValueError("show takes one RUN, or one method, or settings")
        if ctx and not (method or named):
            raise ValueError("--ctx belongs to a method or a run; add --pos NAME")
        if output is not None and not (method or named):
            raise ValueError("-o draws a method or a run; add --pos NAME")
        if output is not None:
            _check_output(output, picture=True)
        if not (named or settings):
            _show_methods(as_json=as_json)
        elif named or method:
            _show_numbers(named, settings, ctx, as_json=as_json, output=output)
        else:
            from ropelab import config

            _print_tree(config.to_dict(config.load(settings)), as_json=as_json)


def _show_methods(*, as_json: bool) -> None:
    from ropelab import config

    table = {group: config.summaries(group) for group in config.METHODS}
    if as_json:
        _print_json({g: {n: {"summary": s, "paper": p} for n, (s, p) in rows.items()} for g, rows in table.items()})
        return
    titles = {"pos": "Position encodings, --pos NAME", "scaling": "Scalings of a rotary spectrum, --scaling NAME"}
    for group, rows in table.items():
        print(titles[group])
        for name, (summary, paper) in rows.items():
            print(f"  {name:<20} {summary}\n  {'':<20} {paper}")
        print()
    print("The numbers of one: ropelab show --pos rope --scaling yarn --factor 8 --ctx 1024; -o FILE.png draws them.")


def _print_tree(tree: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        _print_json(tree)
        return
    import yaml

    print(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), end="")


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
        _say(f"picture: {output}")
    if as_json:
        _print_json({**numbers, "run": run.name} if named else numbers)
        return
    if named:
        manifest = run.manifest()
        keys = ("status", "step", "train_loss", "val_nll", "params", "device", "dtype", "attention_backend", "error")
        _print_tree({"run": run.name, **{key: manifest.get(key) for key in keys}}, as_json=False)
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


@app.command("runs")
def list_runs(
    action: Annotated[str, typer.Argument(metavar="[list|rm]", help="What to do.")] = "list",
    arguments: RunsAndOverrides = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    as_json: Json = False,
) -> None:
    """The runs there are; `runs rm RUN ...` removes them after asking."""
    with _reported():
        from ropelab import config, runs

        if "=" in action:
            arguments, action = [action, *(arguments or [])], "list"
        named, settings = _separate(list(arguments or []))
        runs_dir = Path(config.load(settings).runs_dir).expanduser()
        if action == "rm":
            if not named:
                raise ValueError("runs rm needs the runs to remove")
            _remove([runs.find_run(name, runs_dir) for name in named], yes=yes)
            return
        if action != "list":
            raise ValueError(f"runs takes list or rm, not '{action}'")
        fields = ("step", "train_loss", "val_nll", "params", "train_ctx", "error")
        rows: list[dict[str, Any]] = []
        for run in [runs.find_run(name, runs_dir) for name in named] or runs.all_runs(runs_dir):
            try:
                status, manifest = run.status(), run.manifest()
            except runs.RunError as error:  # one broken run must not hide the others
                status, manifest = "damaged", {"error": str(error)}
            rows.append({"run": run.name, "status": status, **{key: manifest.get(key) for key in fields}})
        if as_json:
            _print_json(rows)
            return
        if not rows:
            _say(f"there are no runs in {runs_dir}")
        for row in rows:
            loss = "" if row["val_nll"] is None else f"val {row['val_nll']:.4f}"
            length = f"L={row['train_ctx'] or '?'}"
            print(f"{row['run']:<44} {row['status']:<12} {length:<8} {loss}  {row['error'] or ''}".rstrip())


def _remove(found: list[Any], *, yes: bool) -> None:
    import shutil

    for run in found:
        if not yes and not typer.confirm(f"Remove {run.path} and its checkpoints and results?", err=True):
            continue
        with run.locked():
            shutil.rmtree(run.path)
        _say(f"removed {run.name}")


@app.command("data")
def prepare_data(
    action: Annotated[str, typer.Argument(metavar="[list|prepare]", help="What to do.")] = "list",
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """The corpora there are; `data prepare data=books data.tokenizer=bpe` reads, checks and tokenises one."""
    with _reported():
        from ropelab import config

        resolved = config.load(list(overrides or []))
        from ropelab import data

        if action == "list":
            found = [
                info._asdict() if hasattr(info, "_asdict") else vars(info) for info in data.describe(resolved.data.path)
            ]
            if as_json:
                _print_json(found)
                return
            for info in found:
                present = {True: "here", False: "not here", None: "give data.path"}[info["present"]]
                print(f"{info['name']:<12} {present:<16} {info['summary']}")
        elif action == "prepare":
            from ropelab.progress import Bar

            evaluate_only = resolved.data.name in ("nonfiction", "wikitext")
            with Bar() as bar:
                corpus = data.prepare(
                    resolved.data, cache_dir=Path(resolved.cache_dir), evaluate_only=evaluate_only, progress=bar
                )
            splits = {split.name: split for split in (corpus.train, corpus.validation, corpus.test)}
            facts = {
                "name": corpus.name,
                "digest": corpus.digest,
                "tokenizer": corpus.tokenizer.name,
                "n_vocab": corpus.tokenizer.n_vocab,
                "tokens": {name: len(split.tokens) for name, split in splits.items()},
                "longest_test_document": max(
                    (len(corpus.test.document(i)) for i in range(len(corpus.test))), default=0
                ),
                **corpus.details,
            }
            _print_tree(facts, as_json=as_json)
        else:
            raise ValueError(f"data takes list or prepare, not '{action}'")


@app.command("report")
def make_report(
    arguments: RunsAndOverrides = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Where it goes.")] = Path("report"),
) -> None:
    """One self-contained page from the evaluations that runs hold already; without RUN, of all runs."""
    with _reported():
        from ropelab import config, runs

        named, settings = _separate(list(arguments or []))
        runs_dir = Path(config.load(settings).runs_dir).expanduser()
        found = [runs.find_run(name, runs_dir) for name in named] or runs.all_runs(runs_dir)
        evals = [_stored(path) for run in found for path in sorted(run.results.glob("*.json"))]
        _check_output(output, picture=False)
        if not evals:
            raise ValueError(
                f"no evaluation in {runs_dir if not named else ', '.join(named)}; run `ropelab eval` first"
            )
        from ropelab import report

        manifest = found[0].manifest()
        page = report.write_report(
            output, evals=evals, verdicts=[], title="Perplexity past the training length",
            notes=["Made by `ropelab report`."],
            manifest={
                "runs": [run.name for run in found],
                "environment": manifest["environment"],
                "device": manifest["device"],
            },
        )  # fmt: skip
        print(page)


def _stored(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it and evaluate again") from None


@app.command()
def bench(
    what: Annotated[str, typer.Argument(metavar="train|eval|attention", help="What to time.")],
    overrides: Overrides = None,
    pos: Pos = None,
    ctx: Ctx = None,
    peers: Annotated[bool, typer.Option(help="train: also time transformers' GPT-2 at the same shape.")] = True,
    rounds: Annotated[int, typer.Option(help="Rounds; the best counts.")] = 10,
    as_json: Json = False,
) -> None:
    """Time training steps beside peers, long evaluations with their memory, or the attention kernels."""
    with _reported():
        from ropelab import config
        from ropelab.evaluation import ladder

        if what not in ("train", "eval", "attention"):
            raise ValueError(f"bench takes train, eval or attention, not '{what}'")
        if rounds < 1:
            raise ValueError(f"--rounds must be at least 1, not {rounds}")
        settings = list(overrides or [])
        _option(settings, "--pos", "pos", pos)
        from ropelab import bench as timing

        if what == "train":
            if ctx:
                raise ValueError(f"bench train takes no --ctx; use train.ctx={ctx[0]}")
            given = {item.partition("=")[0] for item in settings}
            shape = [] if "model" in given else [i for i in timing.TRAIN_SHAPE if i.partition("=")[0] not in given]
            result = timing.train(config.load([*shape, *settings]), peers=peers, rounds=rounds)
        elif what == "eval":
            resolved = config.load(settings)
            names = ("rope", "alibi") if not pos else ("rope", *(name for name in pos if name != "rope"))
            result = timing.evaluation(resolved, contexts=ladder((ctx or ["16384,"])[0], 128), names=names)
        else:
            result = timing.attention(
                config.load(settings), contexts=ladder((ctx or ["512,2048,8192"])[0], 128), rounds=rounds
            )
        if as_json:
            _print_json(result)
            return
        rows = result.pop("rows", None)
        _print_tree(result, as_json=False)
        for row in rows or []:
            print(
                "  ".join(
                    f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
                )
            )
