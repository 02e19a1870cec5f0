"""A cell and a claim of two runs, written to a folder, and measurements of what claims ask for, losses as given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ropelab.claims import Claim, Evaluation, Measurement, Row, Training, Verdict, judge, load_claim, required

CONFIGS = Path(__file__).parent.parent.parent / "configs"
SEEDS = [0, 1, 2]
DOCS = 8

CELL: dict[str, Any] = {
    "train": ["model=tiny", "train.ctx=128", "train.lr=1e-2"],
    "eval": {"ctx": ["L", "2L", "4L", 1024], "tokens": 4096, "last": 32},
    "max_bpb": 3.0,
    "lr_check": {name: {0.5: 1.5, 1: 1.4, 2: 1.45} for name in ("a", "b")},
}
CHECK: dict[str, Any] = {"statement": "a is better than b at 4L", "contrast": {"b@4L": 1, "a@4L": -1}, "tau": 0.2}
CLAIM: dict[str, Any] = {
    "statement": "a is better than b",
    "source": "nobody, table 0",
    "tier": "cpu",
    "cell": "toy",
    "protocol": "last",
    "runs": {"a": ["pos=alibi"], "b": ["pos=rope"]},
    "checks": [CHECK],
}


def load(configs: Path, name: str = "mine", **changes: Any) -> Claim:
    """The claim above with some keys replaced; None drops a key."""
    values = {key: value for key, value in {**CLAIM, **changes}.items() if value is not None}
    path = configs / "claim" / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return load_claim(path, configs)


def load_check(configs: Path, name: str = "mine", **changes: Any) -> Claim:
    """The claim with its one check changed; None drops a key."""
    check = {key: value for key, value in {**CHECK, **changes}.items() if value is not None}
    return load(configs, name, checks=[check])


# --- synthetic measurements ---


def pos_of(evaluation: Evaluation) -> str:
    return next(text.partition("=")[2] for text in evaluation.run if text.startswith("pos="))


def spelling(evaluation: Evaluation, ctx: int) -> str:
    """A term of a measurement, run named by its encoding: alibi/window@1024|last."""
    scaling = f"+{evaluation.scaling}:{evaluation.factor:g}" if evaluation.scaling else ""
    control = f"/{evaluation.control}" if evaluation.control else ""
    return f"{pos_of(evaluation)}{scaling}{control}@{ctx}|{evaluation.protocol}"


Loss = Callable[[str, int, int], float]  # (term, seed, document) -> nats


def measure(
    claims: Sequence[Claim], loss: Loss, *, seeds: Sequence[int] = SEEDS, docs: int = DOCS
) -> list[Measurement]:
    """What `required` asks for, with the losses given and nothing wrong."""
    measurements = []
    for evaluation in required(claims):
        for seed in seeds:
            rows = {
                ctx: Row(
                    status="ok",
                    reason=None,
                    nll={f"document{d}": loss(spelling(evaluation, ctx), seed, d) for d in range(docs)},
                    targets=f"targets of {evaluation.protocol}",
                    spectrum=f"{evaluation.scaling} {evaluation.factor}",
                )
                for ctx in evaluation.ctxs
            }
            measurements.append(Measurement(evaluation, seed, "fp32", rows))
    return measurements


def train(claims: Sequence[Claim], *, seeds: Sequence[int] = SEEDS) -> list[Training]:
    """Healthy training facts of every run."""
    runs = dict.fromkeys(run for claim in claims for run in claim.runs.values())
    return [Training(run, seed, 1.40, 1.40, 1.30, 2.0, "bf16") for run in runs for seed in seeds]


def noise(*key: int) -> float:
    """A standard normal number that depends on the key alone."""
    return float(np.random.default_rng(key).normal())


def levels(table: dict[str, float], *, spread: float = 0.01) -> Loss:
    """Losses by encoding or term, with seeds and documents around them."""

    def loss(term: str, seed: int, doc: int) -> float:
        name = term if term in table else term.partition("@")[0]
        own = spread * (noise(seed, 7, len(name)) + noise(doc, 11, len(name)))
        return table[name] + 0.1 * noise(seed) + 0.3 * noise(doc) + own

    return loss


def verdict_of(claim: Claim, loss: Loss, *, seeds: Sequence[int] = SEEDS, docs: int = DOCS) -> Verdict:
    return judge([claim], measure([claim], loss, seeds=seeds, docs=docs), train([claim], seeds=seeds), seeds)[0]
