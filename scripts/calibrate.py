"""Measure what the claim files ship: seed_sd of every check, the learning-rate check, the level of a trained run.

    python scripts/calibrate.py runs_dir=runs-calibration > calibration.json

Seeds 100 to 109 and the validation split, which no claim is ever judged on. Takes 36 runs of the cpu cell; what is
finished already is not trained again. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from ropelab import claims, config, launcher, reproduce
from ropelab.progress import Bar

SEEDS = range(100, 110)
RATES = (0.5, 1.0, 2.0)  # multiples of the cell's learning rate


def learning_rates(plan: reproduce.Plan, overrides: list[str], bar: Bar) -> dict[str, dict[float, float]]:
    """Validation loss at L by run and multiple of train.lr, at the full number of steps; seed 100."""
    runs = {name: run for claim in plan.claims for name, run in claim.runs.items()}
    jobs, tasks = [], []
    for name, run in sorted(runs.items()):
        base = config.load(list(run))
        for rate in RATES:
            kept = [item for item in run if not item.startswith("train.lr=")]
            resolved = config.load([*kept, f"train.lr={rate * base.train.lr}", f"seed={SEEDS[0]}", *overrides])
            jobs.append((name, rate))
            tasks.append({"config": config.to_dict(resolved), "evaluations": []})
    results, _ = launcher.run_side_by_side(tasks, slots=launcher.cores(), progress=bar)
    table: dict[str, dict[float, float]] = {}
    for (name, rate), result in zip(jobs, results, strict=True):
        table.setdefault(name, {})[rate] = round(result["train"]["val_nll"], 4)
    return table


def calibrated(of: Sequence[claims.Claim], trainings: Sequence[claims.Training]) -> dict[str, str]:
    """By run, the digest of what its seeds were trained and evaluated with."""
    names = {(claim.id, name): run for claim in of for name, run in claim.runs.items()}
    found = {}
    for claim in of:
        for training in trainings:
            for name in claim.runs:
                if names[claim.id, name] == training.run:
                    found[name] = claims.cell_digest(claim, training)
    return found


def main() -> None:
    overrides = sys.argv[1:]
    folder = config.config_dir()
    names = [
        name
        for name in claims.packaged_claims(folder)
        if any(hasattr(check, "tau") for check in claims.load_claim(folder / "claim" / f"{name}.yaml", folder).checks)
    ]
    plan = reproduce.plan_claims(names)
    with Bar() as bar:
        rates = learning_rates(plan, overrides, bar)
        outcome = reproduce.run_plan(plan, seeds=SEEDS, overrides=overrides, split="validation", progress=bar)
    if outcome.failures or outcome.interrupted:
        sys.exit(f"calibration is incomplete: {outcome.failures}")
    tables = {claim.id: claims.calibration(claim, outcome.measurements) for claim in plan.claims}
    result = {
        "lr_check": rates,
        "calibrated": calibrated(plan.claims, outcome.trainings),
        "val_bits_per_byte": {m["run"]: round(m["val_bits_per_byte"], 4) for m in outcome.manifests},
        "seed_sd": {
            name: {index: {"sd": round(sd, 4), "seeds": seeds} for index, (sd, seeds) in table.items()}
            for name, table in tables.items()
        },
        "evals": [
            [
                e["pos"],
                e["scaling"],
                e["factor"],
                e["window"],
                e["protocol"]["name"],
                e["seed"],
                [r["nll"] for r in e["rows"]],
            ]
            for e in outcome.evals
        ],
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
