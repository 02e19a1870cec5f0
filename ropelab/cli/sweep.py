"""`ropelab sweep`, and `status`, `collect`, `cancel` and `retry` of one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ropelab.cli.options import Json, app, check_output, fail, print_json, print_table, print_text, reported, say
from ropelab.cli.train import composed
from ropelab.errors import SchedulerError

if TYPE_CHECKING:
    from ropelab.sweeps import Checked, Standing, Sweep

SweepAndSettings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SWEEP] [runs_dir=FOLDER]", help="Its name or the beginning of it; else the latest."),
]
POLL = 10.0  # seconds between two looks at a cluster


@contextmanager
def asking(*, over_ranks: bool = False) -> Iterator[None]:
    """`reported`, with a scheduler that refuses or does not answer as a failure in one line."""
    with reported(over_ranks=over_ranks):
        try:
            yield
        except SchedulerError as error:
            fail(1, str(error))


@app.command()
def sweep(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME | FILE.yaml] KEY=VALUES...", help="A shipped sweep; values to combine."),
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option("--launcher", metavar="local|slurm", help="Where it runs (default: local).")
    ] = None,
    skip_invalid: Annotated[bool, typer.Option("--skip-invalid", help="Leave out points that cannot be.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every point and say what would be done.")] = False,
    emit_sbatch: Annotated[
        bool, typer.Option("--emit-sbatch", help="Print a batch script for what is missing, and submit nothing.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="With slurm: stay until all have ended, then collect.")] = False,
    as_json: Json = False,
) -> None:
    """Train and evaluate every combination of several values; what is there already is not made again.

    ropelab sweep pos=rope,alibi seed='range(0,3)' eval.ctx=1024 eval.scalings=[none,yarn]

    Values are a,b or range(0,3) or choice(a,b) or glob(kerple*), Hydra's grammar. After its training each run is
    evaluated as eval.* says. launcher.KEY=VALUE sets what configs/launcher/*.yaml list. hydra/launcher=NAME hands
    everything to one of Hydra's own launchers.
    """
    with asking():
        from ropelab import config, sweeps
        from ropelab.progress import Bar

        given = list(arguments or [])
        hydras = next((item for item in given if item.startswith(("hydra/", "hydra."))), None)
        if hydras is not None:
            options = {"--launcher": where, "--skip-invalid": skip_invalid, "--dry-run": dry_run,
                       "--emit-sbatch": emit_sbatch, "--wait": wait, "--json": as_json}  # fmt: skip
            asked = next((option for option, value in options.items() if value), None)
            if asked is not None:
                raise ValueError(f"{asked} and {hydras}: Hydra's multirun knows no {asked}; give one of them")
            _hand_to_hydra(given)
            return
        named, settings, name, launching = _separate(given, where)
        chosen = config.launcher(name, launching)
        if wait and name != "slurm":
            raise ValueError("--wait belongs to --launcher slurm; a local sweep stays until its runs have ended")
        if emit_sbatch and name != "slurm":
            raise ValueError("--emit-sbatch belongs to --launcher slurm")
        if emit_sbatch and dry_run:
            raise ValueError("--dry-run starts nothing and prints no script; leave out one of --dry-run, --emit-sbatch")
        if name == "slurm" and not (emit_sbatch or dry_run):
            sweeps.check_slurm()
        with Bar() as bar:
            checked = sweeps.check(settings, composed, bar)
        _refuse(checked, skip_invalid=skip_invalid)
        if name == "slurm":
            sweeps.check_folder(checked.runs_dir)
        if dry_run:
            _print_plan(checked, as_json=as_json)
            return
        stem = Path(named).stem if named else "sweep"
        made = sweeps.create(checked.runs_dir, stem, checked.tasks, settings=settings, points=checked.points)
        if emit_sbatch:
            from ropelab.config import SlurmLauncher

            assert isinstance(chosen, SlurmLauncher)
            missing = sweeps.missing(made)
            if not missing:
                say(f"{made.name}: nothing is missing; there is no script to print")
                return
            made.logs.mkdir(exist_ok=True)
            say(f"{made.name}: sbatch the script that follows, then ropelab status {made.name}")
            print_text(sweeps.sbatch_script(made, missing, chosen).removesuffix("\n"))
            return
        _work(made, chosen, wait=wait, as_json=as_json)


def _separate(given: list[str], where: list[str] | None) -> tuple[str | None, list[str], str, list[str]]:
    """The command line as (shipped sweep, settings, launcher, its settings)."""
    from ropelab import config

    named = [item for item in given if "=" not in item or Path(item).is_file()]
    if len(named) > 1:
        raise ValueError(f"sweep takes one NAME or FILE.yaml, not {len(named)}: {', '.join(named)}")
    mine = [item for item in given if item not in named]
    places = [item.partition("=")[2] for item in mine if item.startswith("launcher=")] + list(where or [])
    if len(places) > 1:
        raise ValueError(f"the launcher is given {len(places)} times: {', '.join(places)}; give it once")
    launching = [item for item in mine if item.startswith("launcher.")]
    mine = [item for item in mine if not item.startswith(("launcher=", "launcher."))]
    own = {item.partition("=")[0] for item in mine}
    shipped = config.named_sweep(named[0]) if named else []
    settings = [item for item in shipped if item.partition("=")[0] not in own] + mine
    if not settings:
        raise ValueError("sweep needs values to combine, such as pos=rope,alibi seed=0,1,2")
    return (named[0] if named else None), settings, (places or ["local"])[0], launching


def _refuse(checked: Checked, *, skip_invalid: bool) -> None:
    """Name the points that cannot be; exit 2 unless they are to be left out."""
    if not checked.invalid:
        return
    if len(checked.invalid) >= len(checked.points) and len({reason for _, reason in checked.invalid}) == 1:
        fail(2, checked.invalid[0][1])  # one mistake, in every point
    alike: dict[str, list[str]] = {}
    for label, reason in checked.invalid:
        alike.setdefault(reason, []).append(label)
    for reason, labels in list(alike.items())[:50]:
        more = f" and {len(labels) - 1} more points" if len(labels) > 1 else ""
        say(f"{'left out' if skip_invalid else 'invalid'}: {labels[0]}{more}: {' '.join(reason.split())}")
    if len(alike) > 50:
        say(f"and {len(alike) - 50} more mistakes")
    if not checked.tasks:
        fail(2, "no point of this sweep can be")
    if not skip_invalid:
        fail(2, f"{len(checked.invalid)} of {len(checked.points)} points cannot be; --skip-invalid leaves them out")


def _print_plan(checked: Checked, *, as_json: bool) -> None:
    if as_json:
        print_json({"points": checked.points, "tasks": checked.tasks, "invalid": checked.invalid})
        return
    for task in checked.tasks:
        number = len(task["evaluations"])
        print_text(f"{task['run']:<48} {number} evaluation{'s' if number != 1 else ''}   {task['points'][0]}")
    say(f"{len(checked.points)} points, {len(checked.tasks)} runs; nothing was started")


def _hand_to_hydra(given: list[str]) -> None:
    """Hydra's multirun over our configuration, with the launcher that the user asked for."""
    from ropelab import config, sweeps

    config.check_for_hydra(given)
    config.run_with_hydra(given, sweeps.work_for_hydra)


def _work(made: Sweep, chosen: Any, *, wait: bool, as_json: bool) -> None:
    """Start what is missing, and say how it stands: of a local sweep at its end, of a submitted one at once."""
    from ropelab import sweeps
    from ropelab.config import LocalLauncher
    from ropelab.progress import Bar

    if isinstance(chosen, LocalLauncher):
        say(f"{made.name}: {len(made.tasks)} runs, in {made.path}")
        with Bar() as bar:
            interrupted = sweeps.work_here(made, chosen, bar)
        if interrupted is not None:
            fail(128 + interrupted, f"{made.name} stopped; the same command, or ropelab retry {made.name}, goes on")
        _collect(made, as_json=as_json)
        return
    submitted = sweeps.submit(made, chosen)
    say(f"{made.name}: {len(submitted)} of {len(made.tasks)} runs submitted, in {made.path}")
    if wait:
        _wait(made)
        _collect(made, as_json=as_json)
    elif as_json:
        print_json({"sweep": made.name, "folder": str(made.path), "submitted": len(submitted)})
    else:
        print_text(f"ropelab status {made.name}")


def _find(arguments: list[str] | None) -> Sweep:
    from ropelab import config, sweeps

    named = [item for item in arguments or [] if "=" not in item]
    if len(named) > 1:
        raise ValueError(f"give one SWEEP, not {len(named)}: {', '.join(named)}")
    settings = [item for item in arguments or [] if "=" in item]
    for item in settings:
        if not item.startswith("runs_dir="):
            raise ValueError(f"{item} is fixed by the sweep; only runs_dir=FOLDER says where it is")
    runs_dir = Path(config.load(settings).runs_dir).expanduser()
    return sweeps.find_sweep(named[0] if named else None, runs_dir)


@app.command()
def status(arguments: SweepAndSettings = None, as_json: Json = False) -> None:
    """How the runs of a sweep stand: PENDING, RUNNING, DONE, FAILED, CANCELLED or LOST."""
    with asking():
        from ropelab import sweeps

        made = _find(arguments)
        stands = sweeps.standings(made)
        if as_json:
            print_json({"sweep": made.name, "runs": [one._asdict() for one in stands]})
            return
        _print_standings(made, stands)


def _print_standings(made: Sweep, stands: list[Standing]) -> None:
    for one in stands:
        step = "" if one.step is None else f"{one.step}/{one.steps}"
        note = " ".join(one.note.split())
        print_text(f"{one.run:<48} {one.state:<10} {step:<14} {note}".rstrip())
    counts: dict[str, int] = {}
    for one in stands:
        counts[one.state] = counts.get(one.state, 0) + 1
    say(f"{made.name}: {', '.join(f'{number} {state}' for state, number in counts.items())}")


def _wait(made: Sweep) -> None:
    """Until nothing of the sweep is waiting or running."""
    from ropelab import sweeps
    from ropelab.progress import Bar

    with Bar() as bar:
        while True:
            stands = sweeps.standings(made)
            going = sum(_is_to_come(one) for one in stands)
            bar("sweep", len(stands) - going, len(stands))
            if not going:
                return
            time.sleep(POLL)


def _is_to_come(one: Standing) -> bool:
    """Is a run waiting or running, so that something will come of it?"""
    from ropelab import sweeps

    return one.state in (sweeps.PENDING, sweeps.RUNNING) and one.note != sweeps.NOT_SUBMITTED


@app.command()
def collect(
    arguments: SweepAndSettings = None,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until all runs have ended.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="Also write the report there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """The results of a sweep so far; exit 1 where a run failed, was cancelled or is lost."""
    with asking():
        made = _find(arguments)
        if output is not None:
            check_output(output, picture=False)
        if wait:
            _wait(made)
        _collect(made, as_json=as_json, output=output)


def _collect(made: Sweep, *, as_json: bool, output: Path | None = None) -> None:
    from ropelab import sweeps

    stands = sweeps.standings(made)
    results = [result for one in stands if one.state == sweeps.DONE for result in made.results(one.task)]
    if output is not None:
        from ropelab.cli.eval import write_report

        say(f"report: {write_report(made.finished(), output, f'in {made.name}', made.evaluated())}")
    if as_json:
        shown = [result.to_json() for result in results]
        print_json({"sweep": made.name, "runs": [one._asdict() for one in stands], "results": shown})
    else:
        if results:
            from ropelab import report

            print_table(report.terminal_table(results))
        _print_counts(made, stands)
    bad = [one for one in stands if one.state != sweeps.DONE and not _is_to_come(one)]
    if bad:
        for one in bad:
            say(f"{one.state}: {one.run}: {' '.join(one.note.split())}")
        fail(1, f"{len(bad)} of {len(stands)} runs are not done; ropelab retry {made.name} starts them again")


def _print_counts(made: Sweep, stands: list[Standing]) -> None:
    from ropelab import sweeps

    done = sum(one.state == sweeps.DONE for one in stands)
    going = sum(_is_to_come(one) for one in stands)
    rest = f", {going} still to come" if going else ""
    say(f"{made.name}: {done} of {len(stands)} runs done{rest}; a page of it: ropelab report {made.name}")


@app.command()
def cancel(arguments: SweepAndSettings = None) -> None:
    """Stop what is waiting or running of a sweep; what was trained is saved, and `retry` goes on from there."""
    with asking():
        from ropelab import sweeps

        made = _find(arguments)
        jobs, process = sweeps.stop(made)
        told = [f"{jobs} jobs cancelled"] if jobs else []
        told += [f"process {process} told to stop"] if process is not None else []
        left = sum(made.is_at_work(index) for index in range(len(made.tasks))) if not told else 0
        nothing = f"its process is gone, and {left} of its runs save themselves and end" if left else "nothing of it is"
        say(f"{made.name}: {', '.join(told) or nothing}{'' if told or left else ' waiting or running'}")


@app.command()
def retry(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SWEEP] [KEY=VALUE]...", help="Its name; launcher.*, cache_dir and track.* to be others."
        ),
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option("--launcher", metavar="local|slurm", help="Another launcher than before.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="With slurm: stay until all have ended, then collect.")] = False,
    as_json: Json = False,
) -> None:
    """Start the runs of a sweep again that failed, were cancelled or are lost; they go on from their checkpoints."""
    with asking():
        from ropelab import config, sweeps

        launching = [item for item in arguments or [] if item.startswith("launcher.")]
        mine = [item for item in arguments or [] if item.startswith(("cache_dir=", "track."))]
        made = _find([item for item in arguments or [] if item not in (*launching, *mine)])
        others = sweeps.place(made, config.load(mine))
        name = (where or [made.launcher])[0]
        chosen = config.launcher(name, launching)  # what is given is right, before something is said of the rest
        given = {item.partition("=")[0].removeprefix("launcher.") for item in launching}
        chosen = config.launcher(name, [*sweeps.kept_settings(made, name, given), *launching])
        if name == "slurm":
            sweeps.check_slurm()
        for line in others:
            say(line)
        _work(made, chosen, wait=wait, as_json=as_json)


@app.command(hidden=True)
def task(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of the sweep.")],
    index: Annotated[int, typer.Argument(metavar="N", help="Which of its tasks.")],
    max_requeues: Annotated[int, typer.Option(help="How often it may be queued again.")] = 20,
) -> None:
    """One task of a sweep, inside a job: what the script of `sweep --emit-sbatch` runs."""
    with asking(over_ranks=True):
        from ropelab import sweeps

        found = sweeps.Sweep(folder)
        if not 0 <= index < len(found.tasks):
            raise ValueError(f"{found.name} has tasks 0 to {len(found.tasks) - 1}, not {index}")
        sweeps.run_task(found, index, max_requeues=max_requeues)
