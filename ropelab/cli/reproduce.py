"""`ropelab reproduce` and `ropelab demo`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ropelab.cli.options import (
    Json,
    Overrides,
    app,
    check_output,
    check_writable,
    fail,
    print_json,
    print_table,
    print_text,
    reported,
    say,
)

if TYPE_CHECKING:
    from ropelab.claims import Verdict

MOST = 10_000  # seeds, and runs in a stack
Stack = Annotated[
    int, typer.Option(help="Runs of one shape trained in one batched step: for a GPU that one small model leaves idle.")
]


@app.command()
def reproduce(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CLAIM | FILE.yaml | demo | KEY=VALUE]...", help="Claims by id or file, or a set."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0 .. N-1 of every run.")] = 1,
    more: Annotated[
        bool, typer.Option("--more", help="3 seeds, then a last look at 6 where a claim is open; each at 0.0125.")
    ] = False,
    list_only: Annotated[bool, typer.Option("--list", help="List the claims and sets.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of report.html, curves.png, results.json.")
    ] = None,
    stack: Stack = 1,
    as_json: Json = False,
) -> None:
    """From nothing to verdicts: train the runs that are missing, evaluate them, judge the claims."""
    with reported():
        from ropelab import config

        if list_only:
            _list_claims(as_json=as_json)
            return
        names = [item for item in arguments or [] if "=" not in item or Path(item).is_file()]
        settings = [item for item in arguments or [] if item not in names]
        if not names:
            raise ValueError("name a claim, a claim file or a set; `ropelab reproduce --list` lists them")
        _check_count("--seeds", seeds)
        in_sets = [name for name in names if name in config.choices("set")]
        if in_sets and len(names) > 1:
            raise ValueError(f"{in_sets[0]} is a set of claims of its own; name it alone")
        _reproduce(names, settings, seeds, stack, more=more, output=output, as_json=as_json)


@app.command()
def demo(
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(help="Seeds 0 .. N-1 of every run.")] = 1,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the report.")] = Path("demo"),
    stack: Stack = 1,
    as_json: Json = False,
) -> None:
    """The main job on the embedded text: five encodings trained, evaluated to 8 times their length, judged."""
    with reported():
        _check_count("--seeds", seeds)
        _reproduce(["demo"], list(overrides or []), seeds, stack, more=False, output=output, as_json=as_json)


def _check_count(option: str, count: int) -> None:
    if not 1 <= count <= MOST:
        raise ValueError(
            f"{option} must be at least 1 and at most {MOST}, not {count if abs(count) < 10**20 else 'that'}"
        )


def _looks(verdicts: Sequence[Verdict]) -> list[str]:
    """What is known of earlier looks, claims with the same together."""
    of: dict[str, list[str]] = {}
    for verdict in verdicts:
        for note in verdict.notes:
            if note.startswith("look "):
                of.setdefault(note, []).append(verdict.claim)
    return [note if len(of) == 1 else f"{', '.join(names)}: {note}" for note, names in of.items()]


def _list_claims(*, as_json: bool) -> None:
    from ropelab import claims, config

    folder = config.config_dir()
    loaded = [claims.load_claim(claims.claim_path(name, folder), folder) for name in claims.packaged_claims(folder)]
    if as_json:
        print_json([{"claim": c.id, "tier": c.tier, "statement": c.statement, "source": c.source} for c in loaded])
        return
    for claim in loaded:
        print_text(f"{claim.id:<18} {claim.statement}\n{'':<18} {claim.source} ({claim.tier})")
    for name in config.choices("set"):
        print_text(f"{name:<18} a set of claims with one report")


def _reproduce(
    names: list[str], settings: list[str], seeds: int, stack: int, *, more: bool, output: Path | None, as_json: bool
) -> None:
    _check_count("--stack", stack)
    import time

    from ropelab import config, devices, reproduce
    from ropelab.progress import Bar

    plan = reproduce.plan_set(names[0]) if names[0] in reproduce.sets() else reproduce.plan_claims(names)
    if output is not None:
        check_output(output, picture=False)
    resolved = config.load(settings)
    devices.resolve_device(resolved.device)
    check_writable(f"runs_dir={resolved.runs_dir}", Path(resolved.runs_dir).expanduser())
    began = time.monotonic()
    for count, last in [(3, False), (6, True)] if more else [(seeds, False)]:
        with Bar() as bar:
            outcome = reproduce.run_plan(
                plan, seeds=range(count), overrides=settings, split="test", stack=stack, last_look=last, progress=bar
            )
        if all(verdict.verdict != "INCONCLUSIVE" for verdict in outcome.verdicts):
            break
    if outcome.interrupted:
        fail(128 + outcome.interrupted, "interrupted; finished runs and checkpoints are kept, the same command goes on")
    if outcome.failures:
        fail(1, "; ".join(f"{name}: {message}" for name, message in outcome.failures))
    verdicts = [verdict.as_json() for verdict in outcome.verdicts]
    from ropelab import report

    if output is not None:
        from ropelab.analysis import diagnose_run

        facts = {
            "runs": [manifest["run"] for manifest in outcome.manifests],
            "seeds": count,
            "environment": outcome.manifests[0]["environment"],
            "device": outcome.manifests[0]["device"],
            "training dtype": sorted({manifest["dtype"] for manifest in outcome.manifests}),
            "text": outcome.manifests[0]["corpus"],
        }
        say(f"making the report of {len(outcome.evals)} evaluations ...")
        command = f"ropelab reproduce {' '.join(names)} --seeds {count}"
        page = report.write_report(
            output,
            evals=outcome.evals,
            verdicts=verdicts,
            title=plan.title,
            notes=[f"Made by `{command}`."],
            manifest=facts,
            diagnoses=[diagnose_run(manifest, outcome.evals) for manifest in outcome.manifests],
        )
    if as_json:
        print_json({"evals": [item.to_json() for item in outcome.evals], "verdicts": verdicts})
    else:
        print_table(report.terminal_table(outcome.evals))
        print_table(report.verdict_table(verdicts))
        seconds = time.monotonic() - began
        say(f"{outcome.trained} of {len(outcome.manifests)} runs trained, the rest was there; {seconds:.0f} s")
        for line in _looks(outcome.verdicts):
            say(line)
        if output is not None:
            print_text(page)
    if any(verdict["verdict"] == "FAIL" for verdict in verdicts):
        raise typer.Exit(1)
