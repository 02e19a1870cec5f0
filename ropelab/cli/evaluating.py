"""`ropelab eval` and `ropelab report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    option,
    print_json,
    reported,
    say,
    separate,
)

EVAL_KEYS = ("eval", "scaling", "data", "track", "device", "runs_dir", "cache_dir")


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
    with reported():
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
        from ropelab import config, runs

        plain = [item for item in settings if item.partition("=")[0].partition(".")[0] not in ("scaling", "data")]
        base = config.load(plain)
        if output is not None:
            check_output(output, picture=True)
        runs_dir = Path(base.runs_dir).expanduser()
        found = [runs.find_run(name, runs_dir) for name in named] or [runs.latest_finished(runs_dir)]
        if not named:
            say(f"evaluating the latest finished run, {found[0].name}")
        from ropelab import experiment
        from ropelab.progress import Bar

        questions = []
        for run in found:  # before any work: every run is usable and every scaling applies
            run.load_weights()
            for scaled, text in questions_of(run.manifest()["config"], settings, base.eval.scalings):
                experiment.resolve_ladder(run, base.eval, scaling=scaled)
                questions.append((run, scaled, text))
        results = []
        with Bar() as bar:
            for run, scaled, text in questions:
                done = experiment.evaluate(
                    run, base.eval, scaling=scaled, other_text=text, device=base.device, cache_dir=base.cache_dir,
                    progress=bar, notice=say,
                )  # fmt: skip
                results.append(done.result)
        for result in results:
            if all(row.get("idle", False) for row in result["rows"]):
                say(
                    f"{result['scaling']} with these parameters changes nothing at these lengths: the numbers are the "
                    "plain model's; give others, or a longer --ctx"
                )
        if as_json:
            print_json(results[0] if len(results) == 1 else {"results": results})
        else:
            from rich.console import Console

            from ropelab import report

            Console().print(report.terminal_table(results))
        if output is not None or not as_json:
            from ropelab import figures

            path = output or found[0].path / "curves.png"
            figures.save(figures.curves(results, title="Perplexity past the training length"), path)
            say(f"plot: {path}")


def questions_of(trained: dict[str, Any], settings: list[str], scalings: tuple[str, ...]) -> list[tuple[Any, Any]]:
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


@app.command("report")
def make_report(
    arguments: RunsAndOverrides = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Where it goes.")] = Path("report"),
) -> None:
    """One self-contained page from the evaluations that runs hold already; without RUN, of all runs."""
    with reported():
        from ropelab import config, runs

        named, settings = separate(list(arguments or []))
        runs_dir = Path(config.load(settings).runs_dir).expanduser()
        found = [runs.find_run(name, runs_dir) for name in named] or runs.all_runs(runs_dir)
        check_output(output, picture=False)
        from ropelab.experiment.stored import evaluations

        evals = [item for run in found for item in evaluations(run)]
        if not evals:
            raise ValueError(
                f"no evaluation in {runs_dir if not named else ', '.join(named)}; run `ropelab eval` first"
            )
        from ropelab import report
        from ropelab.experiment.diagnosing import diagnosis

        manifest = found[0].manifest()
        page = report.write_report(
            output, evals=evals, verdicts=[], title="Perplexity past the training length",
            notes=["Made by `ropelab report`."],
            manifest={
                "runs": [run.name for run in found],
                "environment": manifest["environment"],
                "device": manifest["device"],
            },
            diagnoses=[diagnosis(run.manifest(), evals) for run in found],
        )  # fmt: skip
        print(page)
