"""Measure what the claim files ship: seed_sd of every check, the learning-rate check, the level of a trained run.

    python scripts/calibrate.py [CLAIM ...] [--seeds 10] [--rates] runs_dir=runs-calibration > calibration.json

Seeds from 100 and the validation split, which no claim is ever judged on. Each different run of the claims (none named:
all with thresholds) is trained once a seed, with `--rates` also at half and twice its learning rate; what is finished
already is not trained again. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ropelab import claims, config, reproduce
from ropelab.progress import Bar
from ropelab.sweeps.launchers import local

FIRST_SEED = 100
RATES = (0.5, 1.0, 2.0)  # multiples of the cell's learning rate


def learning_rates(plan: reproduce.Plan, overrides: list[str], bar: Bar) -> dict[str, dict[float, float]]:
    """Validation loss at L by run and multiple of train.lr, at the full number of steps; seed 100."""
    runs = {name: run for claim in plan.claims for name, run in claim.runs.items()}
    jobs, tasks = [], []
    for name, run in sorted(runs.items()):
        base = config.load(list(run))
        for rate in RATES:
            kept = [item for item in run if not item.startswith("train.lr=")]
            resolved = config.load([*kept, f"train.lr={rate * base.train.lr}", f"seed={FIRST_SEED}", *overrides])
            jobs.append((name, rate))
            tasks.append({"config": config.to_dict(resolved), "evaluations": []})
    results, _ = local.run_side_by_side(tasks, slots=local.cores(), progress=bar)
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="CLAIM | KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rates", action="store_true")
    asked = parser.parse_intermixed_args()
    overrides = [word for word in asked.words if "=" in word]
    folder = config.config_dir()
    names = [word for word in asked.words if "=" not in word] or [
        name
        for name in claims.packaged_claims(folder)
        if any(hasattr(check, "tau") for check in claims.load_claim(folder / "claim" / f"{name}.yaml", folder).checks)
    ]
    plan = reproduce.plan_claims(names)
    seeds = range(FIRST_SEED, FIRST_SEED + asked.seeds)
    with Bar() as bar:
        outcome = reproduce.run_plan(plan, seeds=seeds, overrides=overrides, split="validation", progress=bar)
        rates = learning_rates(plan, overrides, bar) if asked.rates else None
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
