"""Claims from nothing to verdicts: train what is missing, evaluate, judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ropelab import claims, config, runs, sweeps
from ropelab.claims import Claim, Evaluation, Measurement, Row, Training, Verdict
from ropelab.config import Config
from ropelab.evaluation import EvalResult, Evaluated

Progress = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is reproduced together: claims, and evaluations for the figures beside them."""

    title: str
    claims: list[Claim]
    evaluations: list[Evaluation]  # each once; ctxs are those of the cell


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Verdicts, the evaluations behind them, and the runs that failed as (name, message)."""

    verdicts: list[Verdict]
    evals: list[EvalResult]
    manifests: list[dict[str, Any]]
    measurements: list[Measurement]
    trainings: list[Training]
    failures: list[tuple[str, str]]
    interrupted: int | None
    trained: int  # runs that were not finished before


def plan_claims(names: Sequence[str]) -> Plan:
    """The plan of claims given by id or file. `ValueError` for an unknown id or a file that is not understood."""
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice; the correction for several claims would count it twice")
    folder = config.config_dir()
    loaded = [claims.load_claim(claims.claim_path(name, folder), folder) for name in names]
    return Plan(", ".join(claim.id for claim in loaded), loaded, _over_the_ladder(claims.required(loaded), loaded))


def plan_set(name: str) -> Plan:
    """The plan of `configs/set/NAME.yaml`, or of a FILE.yaml: claims and further evaluations.

    `ValueError` for an unknown name or a file that is not understood.
    """
    found = claims.load_set(name, config.config_dir())
    needed = _over_the_ladder(claims.required(found.claims), found.claims)
    return Plan(found.title, list(found.claims), claims.united([*found.evaluations, *needed]))


def sets() -> tuple[str, ...]:
    return config.choices("set")


def _over_the_ladder(required: Sequence[Evaluation], of: Sequence[Claim]) -> list[Evaluation]:
    """Each evaluation at all lengths of its cell: the curve costs little more than the points a check needs."""
    ladder = {claim.runs[run]: claim.cell.ctxs for claim in of for run in claim.runs}
    return [dataclasses.replace(item, ctxs=tuple(sorted({*item.ctxs, *ladder[item.run]}))) for item in required]


def run_plan(
    plan: Plan,
    *,
    seeds: Sequence[int],
    overrides: Sequence[str],
    split: str,
    progress: Progress,
    stack: int = 1,
    last_look: bool = False,
) -> Outcome:
    """Train the runs of a plan for every seed where they are missing, evaluate them, and judge the claims.

    `overrides` apply to every run (device, runs_dir, cache_dir, track). `split` is the one that is scored: `test`, or
    `validation` for calibration, which judges nothing. The look at the verdicts is kept in the folder of runs;
    `last_look` lets it spend what earlier ones have left of the error rate.

    `stack`: so many runs of one shape and recipe are trained in one batched step, those that can be. `ValueError` for
    an override that a claim fixes, before anything starts.
    """
    for override in overrides:
        head = override.partition("=")[0].partition(".")[0]
        if head not in ("device", "runs_dir", "cache_dir", "track"):
            raise ValueError(
                f"{override} is fixed by the claim's file; reproduce takes device, runs_dir, cache_dir, track"
            )
    jobs: list[tuple[int, tuple[str, ...], list[Evaluation]]] = []
    for seed in seeds:
        for run in dict.fromkeys(item.run for item in plan.evaluations):
            jobs.append((seed, run, [item for item in plan.evaluations if item.run == run]))
    jobs.sort(key=lambda job: -len(job[2]))  # the longest first
    tasks = []
    for seed, run, items in jobs:
        resolved = config.load([*run, f"seed={seed}", *overrides])
        questions = [{"eval": _eval_tree(item, split), "scaling": _scaling_text(item)} for item in items]
        tasks.append({"config": config.to_dict(resolved), "evaluations": questions})
    from ropelab.devices import side_by_side
    from ropelab.evaluation import EvalResult, Evaluated

    sharing = side_by_side(config.load(list(overrides)).device)
    results, interrupted = sweeps.run_in_batches(tasks, stack=stack, slots=sweeps.cores(), progress=progress, **sharing)

    measurements, trainings, evals, manifests, failures, trained = [], [], [], [], [], 0
    for (seed, run, items), result in zip(jobs, results, strict=True):
        if "train" not in result:
            failures.append((" ".join(run) + f" seed={seed}", result.get("error") or result["cancelled"]))
            continue
        trained += not result["train"]["skipped"]
        manifests.append(result["manifest"])
        trainings.append(_training(run, seed, result["manifest"]))
        for item, done in zip(items, result["evaluations"], strict=True):
            evaluated = Evaluated(EvalResult.from_json(done["result"]), Path(done["losses"]))
            evals.append(evaluated.result)
            measurements.append(_measurement(item, seed, evaluated))
    verdicts: list[Verdict] = []
    if split == "test" and not failures and not interrupted:
        runs_dir = Path(config.load(list(overrides)).runs_dir).expanduser()
        verdicts = _judged(plan.claims, measurements, trainings, seeds, claims.Looks(runs_dir), last_look)
    evals.sort(key=lambda item: (item.seed, item.protocol.name))
    return Outcome(verdicts, evals, manifests, measurements, trainings, failures, interrupted, trained)


def _judged(
    of: Sequence[Claim],
    measurements: Sequence[Measurement],
    trainings: Sequence[Training],
    seeds: Sequence[int],
    looks: claims.Looks,
    last_look: bool,
) -> list[Verdict]:
    """The verdicts at the level that earlier looks leave; this look is kept with them."""
    assert list(seeds) == list(range(len(seeds))), seeds  # chosen seeds could be chosen by what they came to
    keys = [claims.claim_key(claim) for claim in of]
    with looks.held():
        histories = looks.of_family(keys)
        verdicts = claims.judge(of, measurements, trainings, seeds, histories=histories, last_look=last_look)
        looked = [(key, verdict.look) for key, verdict in zip(keys, verdicts, strict=True) if verdict.look is not None]
        for key, look in looked:
            looks.keep(key, histories[key].after(look, [other for other, _ in looked]))
    return verdicts


def _eval_tree(item: Evaluation, split: str) -> dict[str, Any]:
    overrides = [*item.overrides, f"eval.ctx={','.join(map(str, item.ctxs))},", f"eval.split={split}"]
    tree: dict[str, Any] = config.to_dict(config.load(overrides))["eval"]
    return tree


def _scaling_text(item: Evaluation) -> str | None:
    if item.scaling is None or item.factor is None:
        return item.scaling
    return f"{item.scaling}:{item.factor:g}"


def _measurement(item: Evaluation, seed: int, evaluated: Evaluated) -> Measurement:
    rows = {}
    for row in evaluated.result.rows:
        rows[row.ctx] = Row(
            status=row.status,
            reason=row.reason,
            nll=evaluated.document_means(row.ctx) if row.ok else {},
            targets=row.targets_digest,
            spectrum=row.spectrum_digest,
        )
    protocol = evaluated.result.protocol
    authors = dict(zip(protocol.document_digests or (), protocol.authors or (), strict=True))
    clusters = {digest: author for digest, author in authors.items() if author}
    return Measurement(item, seed, protocol.dtype or "", rows, clusters)


def _training(run: tuple[str, ...], seed: int, manifest: dict[str, Any]) -> Training:
    return Training(
        run,
        seed,
        val_loss=manifest["val_nll"],
        best_val_loss=manifest["best_val_nll"],
        train_loss=manifest["train_loss"],
        val_bpb=manifest["val_bits_per_byte"],
        dtype=manifest["dtype"],
        recipe=runs.recipe(manifest),
    )


__all__ = ["Config", "Outcome", "Plan", "plan_claims", "plan_set", "run_plan", "sets"]
