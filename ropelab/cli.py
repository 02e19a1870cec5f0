"""The commands: parse, call one function, print. Results on stdout, progress and logs on stderr.

Exit status: 0 done, 1 a run failed or a verdict is FAIL, 2 the user's mistake (one line, no traceback), 130 and 143
interrupted after saving. Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
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


def main() -> None:
    """Entry point of the `ropelab` command."""
    if sys.argv[1:] == ["--version"]:
        from ropelab import __version__

        print(f"ropelab {__version__}")
        return
    app()


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """The user's mistakes in one line and exit 2; failed runs exit 1; our own bugs keep their traceback."""
    try:
        yield
    except ValueError as error:
        _fail(2, str(error))
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
    typer.echo(f"ropelab: {' '.join(message.split())}", err=True)
    raise typer.Exit(status)


def _say(message: str) -> None:
    typer.echo(message, err=True)


def _option(overrides: list[str], option: str, key: str, values: list[str] | None) -> None:
    """Add an option's value as an override. `ValueError` when it is given twice or beside its override."""
    for value in values or []:
        other = next((item for item in overrides if item.partition("=")[0] == key), None)
        if other is not None:
            raise ValueError(f"{option} {value} and {other}: give {key} once")
        overrides.append(f"{key}={value}")


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
            if item.startswith("data.tokenizer") or item.startswith("data.vocab_size"):
                raise ValueError(f"{item}: evaluation uses the run's own tokeniser")
        from ropelab import config, runs

        plain = [item for item in settings if item.partition("=")[0].partition(".")[0] not in ("scaling", "data")]
        base = config.load(plain)
        runs_dir = Path(base.runs_dir).expanduser()
        found = [runs.find_run(name, runs_dir) for name in named] or [runs.latest_finished(runs_dir)]
        if not named:
            _say(f"evaluating the latest finished run, {found[0].name}")
        for run in found:  # before any work: every run is usable and every scaling applies
            run.load_weights()
        from ropelab import experiment
        from ropelab.progress import Bar

        results = []
        with Bar() as bar:
            for run in found:
                for scaled, text in _questions(run.manifest()["config"], settings, base.eval.scalings):
                    done = experiment.evaluate(
                        run, base.eval, scaling=scaled, other_text=text, device=base.device,
                        cache_dir=base.cache_dir, progress=bar,
                    )  # fmt: skip
                    results.append(done.result)
        if as_json:
            _print_json(results[0] if len(results) == 1 else {"results": results})
            return
        from rich.console import Console

        from ropelab import figures, report

        Console().print(report.terminal_table(results))
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
        if own["name"] == "none":
            raise ValueError(f"{mine[0]} needs a scaling to belong to; add --scaling linear, ntk, dynamic_ntk or yarn")
        inherited = [f"scaling.{key}={value}" for key, value in own.items() if key != "name" and value is not None]
        given = {item.partition("=")[0] for item in mine}
        mine = [f"scaling={own['name']}", *(i for i in inherited if i.partition("=")[0] not in given), *mine]
    methods = [config.parse_scaling(item) for item in scalings] or [config.load(mine).scaling if mine else None]

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

    from ropelab import reproduce
    from ropelab.progress import Bar

    plan = reproduce.plan_set(names[0]) if names[0] in reproduce.sets() else reproduce.plan_claims(names)
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
        _fail(128 + outcome.interrupted, "interrupted; finished runs and checkpoints are kept, the same command goes on")
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
        command = f"ropelab demo{f' --seeds {count}' if count > 1 else ''}" if names == ["demo"] else f"ropelab reproduce {' '.join(names)} --seeds {count}"
        page = report.write_report(
            output, evals=outcome.evals, verdicts=verdicts, title=plan.title, notes=[f"Made by `{command}`."], manifest=facts
        )
    if as_json:
        _print_json({"evals": outcome.evals, "verdicts": verdicts})
    else:
        console = Console()
        console.print(report.terminal_table(outcome.evals))
        console.print(report.verdict_table(verdicts))
        _say(f"{outcome.trained} of {len(outcome.manifests)} runs trained, the rest was there; {time.time() - began:.0f} s")
        if output is not None:
            print(page)
    if any(verdict["verdict"] == "FAIL" for verdict in verdicts):
        raise typer.Exit(1)
