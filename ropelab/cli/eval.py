"""`ropelab eval` and `ropelab report`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ropelab.cli.options import (
    Ctx,
    Factor,
    Json,
    Protocol,
    RunsAndOverrides,
    Scaling,
    app,
    check_output,
    counted,
    one_line,
    option,
    print_json,
    print_table,
    print_text,
    reported,
    say,
    separate,
    status_of,
)
from ropelab.distributed import init_distributed
from ropelab.errors import RunError
from ropelab.progress import plain

if TYPE_CHECKING:
    from ropelab.evaluation import EvalResult
    from ropelab.runs import RunDir
    from ropelab.sweeps import Sweep

EVAL_KEYS = ("eval", "scaling", "data", "track", "device", "runs_dir", "cache_dir")


@app.command("eval")
def evaluate(
    arguments: RunsAndOverrides = None,
    ctx: Ctx = None,
    scaling: Scaling = None,
    factor: Factor = None,
    protocol: Protocol = None,
    hf: Annotated[
        list[str] | None,
        typer.Option("--hf", metavar="PATH|NAME", help="A checkpoint of transformers instead of a run: folder or hub."),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="FOLDER", help="A LoRA adapter to add to the one --hf.")
    ] = None,
    as_json: Json = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where the plot goes (default: curves.png in the run folder).")
    ] = None,
) -> None:
    """Perplexity of finished runs far past their training length; without RUN, of the latest."""
    with reported(over_ranks=True), init_distributed(status_of) as ranks:
        named, settings = separate(list(arguments or []))
        option(settings, "--ctx", "eval.ctx", ctx)
        option(settings, "--scaling", "scaling", scaling)
        option(settings, "--factor", "scaling.factor", factor)
        option(settings, "--protocol", "eval.protocol", protocol)
        for item in settings:
            head = item.partition("=")[0].partition(".")[0]
            if head in ("pos", "model", "train", "seed"):
                raise ValueError(f"{item} is fixed by the run; eval takes {', '.join(EVAL_KEYS)}")
            if item.startswith(("data.tokenizer", "data.vocab_size")):
                raise ValueError(f"{item}: evaluation uses the run's own tokeniser")
        if adapter is not None and len(hf or []) != 1:
            raise ValueError(f"--adapter {adapter} is added to one checkpoint: give one --hf with it")
        from ropelab import config, runs

        rest = [item for item in settings if item.partition("=")[0].partition(".")[0] not in ("scaling", "data")]
        base = config.load(rest)
        if output is not None:
            check_output(output, picture=True)
        runs_dir = Path(base.runs_dir).expanduser()
        opened = [runs.open_run(runs.find_run(name, runs_dir)) for name in named]
        if not named and not hf:
            opened = [runs.latest_finished(runs_dir)]
            say(f"evaluating the latest finished run, {opened[0].name}")
        from ropelab import evaluation
        from ropelab.progress import Bar, Progress, silent

        with ExitStack() as held:
            progress: Progress = held.enter_context(Bar()) if ranks.is_first else silent
            resources = evaluation.Resources(base.cache_dir, base.device, progress, say, ranks)
            plans = []
            for one in opened:  # before any work: every run is usable and every scaling applies
                if ranks.is_first:  # until its numbers are kept, it is neither removed nor trained again
                    held.enter_context(one.folder.in_use())
                model = evaluation.RunModel(one)
                for scaled, text in questions_of(config.to_dict(one.config), settings, base.eval.scalings):
                    plans.append(evaluation.resolve(model, base.eval, resources, scaling=scaled, other_text=text))
                if len(opened) > 1:
                    one.close()  # one model at a time is in memory
            folders = [run.folder.path for run in opened]
            asked: list[Callable[[], evaluation.Evaluated]] = [
                partial(evaluation.execute, plan, resources, last=plan.model not in [one.model for one in plans[done:]])
                for done, plan in enumerate(plans, 1)
            ]
            if hf:
                from ropelab import huggingface

                for name in hf:
                    source = huggingface.Checkpoint(
                        name, base, text_of(config.to_dict(base)["data"], settings), adapter
                    )
                    folders.append(source.results.parent)
                    for scaled in scalings_of(source.manifest["config"]["scaling"], settings, base.eval.scalings):
                        source.check(base.eval, scaled)
                        asked.append(
                            partial(huggingface.evaluate, source, base.eval, scaling=scaled, resources=resources)
                        )
            results = [question().result for question in asked]
        if not ranks.is_first:
            return
        for line in dict.fromkeys(line for result in results for line in said_of(result)):
            say(plain(line))
        for result in results:
            if all(row.idle for row in result.rows):
                say(
                    f"{result.scaling} with these parameters changes nothing at these lengths: the numbers are the "
                    "plain model's; give others, or a longer --ctx"
                )
        if as_json:
            shown = [result.to_json() for result in results]
            print_json(shown[0] if len(shown) == 1 else {"results": shown})
        else:
            from ropelab import report

            print_table(report.terminal_table(results))
        if output is not None or not as_json:
            from ropelab.report import figures

            path = output or folders[0] / "curves.png"
            figures.save(figures.curves(results, title="Perplexity past the training length"), path)
            say(f"plot: {path}")


def said_of(result: EvalResult) -> list[str]:
    """What has to be said of an evaluation beside its numbers: its warnings, and the layers that a scaling reached."""
    lines = [f"{result.run}: {line}" for line in result.warnings]
    for layers in dict.fromkeys(row.layers for row in result.rows):
        if layers is not None:
            lines.append(f"{result.run}: scaling={result.scaling} reaches {layers}; the others are as they were")
    return lines


def questions_of(trained: dict[str, Any], settings: list[str], scalings: tuple[str, ...]) -> list[tuple[Any, Any]]:
    """The (scaling, other text) pairs to evaluate one run under; None where the run's own holds."""
    text = text_of(trained["data"], settings)
    return [(method, text) for method in scalings_of(trained["scaling"], settings, scalings)]


def scalings_of(own: dict[str, Any], settings: list[str], scalings: tuple[str, ...]) -> list[Any]:
    """The scalings to evaluate under; None where the trained one, `own`, holds."""
    from ropelab import config

    mine = [item for item in settings if item.startswith(("scaling=", "scaling."))]
    if mine and scalings:
        raise ValueError("give either --scaling or eval.scalings, not both")
    if mine and not any(item.startswith("scaling=") for item in mine):
        inherited = [f"scaling.{key}={value}" for key, value in own.items() if key != "name" and value is not None]
        given = {item.partition("=")[0] for item in mine}
        mine = [f"scaling={own['name']}", *(i for i in inherited if i.partition("=")[0] not in given), *mine]
    methods: list[Any] = [config.parse_scaling(item) for item in scalings]
    return methods or [config.load(mine).scaling if mine else None]


def text_of(own: dict[str, Any], settings: list[str]) -> Any:
    """The text that the settings name, and what they leave open as in `own`; None where they name none."""
    from ropelab import config

    texts = [item for item in settings if item.startswith(("data=", "data."))]
    if not texts:
        return None
    if not any(item.startswith("data=") for item in texts):
        path = [f"data.path={own['path']}"] if own["path"] else []
        if any(item.startswith("data.path=") for item in texts):
            path = []
        texts = [f"data={own['name']}", *path, *texts]
    return config.load(texts).data


@app.command("report")
def make_report(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN | SWEEP | KEY=VALUE]...", help="Runs, sweeps, and where they are."),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Where it goes.")] = Path("report"),
) -> None:
    """One self-contained page from the evaluations that runs hold already; without RUN or SWEEP, of all runs.

    Of a RUN all that it holds is shown, of a SWEEP what the sweep asked of its runs.
    """
    with reported():
        from ropelab import config, runs

        named, settings = separate(list(arguments or []))
        runs_dir = Path(config.load(settings).runs_dir).expanduser()
        found: list[RunDir] = []
        only: dict[str, set[str]] = {}
        for name in named:
            sweep = _sweep_of(name, runs_dir)
            if sweep is None:
                found.append(runs.find_run(name, runs_dir))
            else:
                found += sweep.finished()
                for run, asked in sweep.evaluated().items():
                    only.setdefault(run, set()).update(asked)
        if named and not found:
            raise ValueError(f"no run of {', '.join(named)} is done; `ropelab status {named[0]}` says how they stand")
        check_output(output, picture=False)
        where = f"in {runs_dir if not named else ', '.join(named)}"
        print_text(write_report(found or runs.all_runs(runs_dir), output, where, only, leave_out=not named))


def _sweep_of(name: str, runs_dir: Path) -> Sweep | None:
    """The sweep that is named, by its path, its whole name, or, where no run is, by the beginning of one."""
    from ropelab import runs, sweeps

    matches = sweeps.matching(name, runs_dir)
    if not matches:
        return None
    if matches[0].name != Path(name).name:
        with suppress(RunError):
            runs.find_run(name, runs_dir)
            return None
    return sweeps.find_sweep(name, runs_dir)


def write_report(
    found: Iterable[RunDir], output: Path, where: str, only: Mapping[str, set[str]], *, leave_out: bool = False
) -> Path:
    """The page of these runs' evaluations; of the runs in `only` just those. `ValueError` when there are none.

    `leave_out`: a run that cannot be read is said and left out, instead of a `RunError`.
    """
    from ropelab.evaluation import evaluations

    shown, evals, notes = [], [], ["Made by `ropelab report`."]
    for run in {run.path.resolve(): run for run in found}.values():
        try:
            if own := evaluations(run, only.get(run.name)):
                shown.append(run.manifest())
                evals += own
        except RunError as error:
            if not leave_out:
                raise
            notes.append(f"Left out: {error}.")  # one broken run must not hide the others
            say(one_line(f"left out: {error}"))
    if not evals:
        raise ValueError(f"no evaluation {where}; run `ropelab eval` first")
    say(f"making the report of {counted(len(evals), 'evaluation')} ...")
    from ropelab import report
    from ropelab.analysis import diagnose_run

    page: Path = report.write_report(
        output, evals=evals, verdicts=[], title="Perplexity past the training length", notes=notes,
        manifest={
            "runs": [manifest["run"] for manifest in shown],
            "environment": shown[0].get("environment", {}),
            "device": shown[0].get("device"),
        },
        diagnoses=[diagnose_run(manifest, evals) for manifest in shown],
    )  # fmt: skip
    return page
