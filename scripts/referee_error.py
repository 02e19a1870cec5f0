"""How often the referee errs: verdicts on made-up losses with a known truth, through the code that judges real ones.

    python scripts/referee_error.py [--draws N] [--json]

Every draw is judged by `claims.judge`. The main case is the ten statistical claims of `configs/set/demo.yaml` at their
weakest: one check of each has its truth exactly at tau, the others far beyond it, 64 documents. The other cases are
single checks whose texts come from few or unequal authors, have heavy tails or are skewed, and claims that are judged
again as seeds are added. A rate from n draws is known to about 2 sqrt(rate (1 - rate) / n), which `--json` has as
"error"; side cases have a tenth of the draws, of ten claims each.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropelab import claims, config
from ropelab.claims import ALPHA, Claim, ContrastCheck, History, Measurement, Row, Training, Verdict

Floats = NDArray[np.float64]
Noise = Callable[[np.random.Generator, tuple[int, ...]], Floats]  # zero mean, unit variance
FAR = 30.0  # standard deviations beyond tau: a check that always passes
SEEDS = (1, 2, 3, 6)
CALIBRATION = 10  # seeds


def normal(generator: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    return generator.normal(size=shape)


def heavy(generator: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    return generator.standard_t(3, size=shape) / math.sqrt(3)


def skewed(generator: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    return generator.exponential(size=shape) - 1


@dataclass(frozen=True)
class Truth:
    """Standard deviations of a check's contrast (nats) and how its texts are grouped.

    `sizes`: documents of each author; `by_author` is the deviation that an author's documents share.
    """

    by_seed: float
    by_document: float
    residual: float
    sizes: tuple[int, ...]
    by_author: float = 0.0
    noise: Noise = normal
    seed_noise: Noise = normal

    def draw(self, generator: np.random.Generator, n_seeds: int) -> Floats:
        """(n_seeds, n_documents) deviations of the contrast from its truth."""
        n = sum(self.sizes)
        seeds = self.by_seed * self.seed_noise(generator, (n_seeds, 1))
        authors = self.by_author * self.noise(generator, (len(self.sizes),))
        documents = self.by_document * self.noise(generator, (n,)) + np.repeat(authors, self.sizes)
        return seeds + documents + self.residual * generator.normal(size=(n_seeds, n))


class Bench:
    """Claims whose checks have runs of their own, so that each check's truth can be set alone."""

    def __init__(self, shipped: Sequence[Claim], truths: Sequence[Sequence[Truth]], *, calibrated: bool) -> None:
        """`truths`: of each claim's checks, in order. `calibrated`: seed_sd is of the same recipe, text and dtype."""
        self.truths = truths
        self.claims = [_with_own_runs(claim, i, calibrated=calibrated) for i, claim in enumerate(shipped)]
        self._needed = claims.required(self.claims)
        self._checks = [[check for check in claim.checks if isinstance(check, ContrastCheck)] for claim in self.claims]

    def draw(self, generator: np.random.Generator, n_seeds: int) -> list[list[Floats]]:
        """(n_seeds, n_documents) of every check."""
        return [[truth.draw(generator, n_seeds) for truth in of] for of in self.truths]

    def judge(
        self,
        deviations: Sequence[Sequence[Floats]],
        effects: Sequence[Sequence[float]],
        n_seeds: int,
        *,
        seed_sds: Sequence[Sequence[float | None]] | None = None,
        histories: dict[str, History] | None = None,
    ) -> list[Verdict]:
        """Verdicts where each check's truth is tau plus its effect; `seed_sds` replace those of the files."""
        judged = list(self.claims)
        if seed_sds is not None:
            judged = [_with_seed_sds(claim, sds) for claim, sds in zip(judged, seed_sds, strict=True)]
        noisy = {}  # evaluation and ctx of the term that carries a check's contrast -> its losses
        for claim, checks, of, effect in zip(self.claims, self._checks, deviations, effects, strict=True):
            for check, deviation, beyond in zip(checks, of, effect, strict=True):
                term, weight = check.terms[0]
                noisy[claim.evaluation(term), term.ctx] = 2.0 + (check.tau + beyond + deviation) / weight
        measurements = []
        sizes = self.truths[0][0].sizes
        names = [f"{i:03d}" for i in range(sum(sizes))]
        authors = [str(author) for author, size in enumerate(sizes) for _ in range(size)]
        clusters = dict(zip(names, authors, strict=True)) if max(sizes) > 1 else {}
        level = dict.fromkeys(names, 2.0)
        for evaluation in self._needed:
            key = evaluation.key
            spectrum = f"{evaluation.scaling} {evaluation.factor}"
            for seed in range(n_seeds):
                rows = {}
                for ctx in evaluation.ctxs:
                    losses = noisy.get((key, ctx))
                    nll = level if losses is None else dict(zip(names, losses[seed].tolist(), strict=True))
                    rows[ctx] = Row("ok", None, nll, evaluation.protocol, spectrum)
                measurements.append(Measurement(key, seed, "fp32", rows, clusters))
        trainings = [
            Training(run, seed, 1.4, 1.4, 1.3, 1.0, "fp32", "recipe")
            for run in dict.fromkeys(evaluation.run for evaluation in self._needed)
            for seed in range(n_seeds)
        ]
        return claims.judge(judged, measurements, trainings, range(n_seeds), histories=histories)


def _with_own_runs(claim: Claim, number: int, *, calibrated: bool) -> Claim:
    runs: dict[str, tuple[str, ...]] = {}
    checks: list[ContrastCheck] = []
    for i, check in enumerate(check for check in claim.checks if isinstance(check, ContrastCheck)):
        terms = []
        for term, weight in check.terms:
            name = f"{term.run}{i}"
            runs[name] = (*claim.runs[term.run], f"train.simulated={number}.{i}")
            terms.append((replace(term, run=name), weight))
        checks.append(replace(check, terms=tuple(terms)))
    own = replace(claim, runs=runs, checks=tuple(checks), lr_check={}, calibrated={})
    if not calibrated:
        return own
    digest = claims.cell_digest(own, Training((), 0, 0, 0, 0, 0, "fp32", "recipe"))
    return replace(own, calibrated=dict.fromkeys(runs, digest))


def _with_seed_sds(claim: Claim, sds: Sequence[float | None]) -> Claim:
    checks = tuple(replace(check, seed_sd=sd) for check, sd in zip(claim.checks, sds, strict=True))
    return replace(claim, checks=checks)


class Rates:
    """Counts of events and of chances."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}

    def add(self, name: str, happened: bool) -> None:
        count = self._counts.setdefault(name, [0, 0])
        count[0] += happened
        count[1] += 1

    def __getitem__(self, name: str) -> float:
        happened, chances = self._counts.get(name, [0, 0])
        return happened / chances if chances else math.nan


def shipped_claims() -> list[Claim]:
    """The statistical claims of the demo."""
    found = claims.load_set("demo", config.config_dir()).claims
    return [claim for claim in found if any(isinstance(check, ContrastCheck) for check in claim.checks)]


def shipped_truths(of: Sequence[Claim], *, noise: Noise = normal, seed_noise: Noise = normal) -> list[list[Truth]]:
    """The shipped seed_sd as the truth; documents vary twice as much, as they do in the demo, and the rest half."""
    return [
        [Truth(sd, 2 * sd, sd / 2, (1,) * 64, noise=noise, seed_noise=seed_noise) for sd in _seed_sds(claim)]
        for claim in of
    ]


def _seed_sds(claim: Claim) -> list[float]:
    return [check.seed_sd or 0.1 for check in claim.checks if isinstance(check, ContrastCheck)]


def at_tau(truths: Sequence[Sequence[Truth]]) -> list[list[float]]:
    """Effects with the truth of each claim's first check at tau and of the others far beyond."""
    return [[0.0 if i == 0 else FAR * (t.by_seed + t.by_document) for i, t in enumerate(of)] for of in truths]


def errors(
    bench: Bench,
    effects: Sequence[Sequence[float]],
    n_seeds: int,
    draws: int,
    *,
    ratio: float = 1.0,
    calibrate: bool = True,
    seed: int = 0,
) -> Rates:
    """Rates over draws: any_pass, any_fail of the claims, pass, fail of one alone, cover of an interval.

    `ratio`: true over shipped deviation of seeds; `calibrate` draws the shipped one as ten seeds would give it.
    """
    generator = np.random.default_rng([seed, n_seeds])
    rates = Rates()
    for _ in range(draws):
        sds: list[list[float | None]] = [
            [t.by_seed / ratio * _estimated(generator, calibrate) for t in of] for of in bench.truths
        ]
        verdicts = bench.judge(bench.draw(generator, n_seeds), effects, n_seeds, seed_sds=sds)
        rates.add("any_pass", any(verdict.verdict == "PASS" for verdict in verdicts))
        rates.add("any_fail", any(verdict.verdict == "FAIL" for verdict in verdicts))
        for verdict, of in zip(verdicts, effects, strict=True):
            rates.add("fail", verdict.raw_verdict == "FAIL")
            rates.add("pass", verdict.raw_verdict == "PASS")
            for check, effect in zip(verdict.checks, of, strict=True):
                assert check.tau is not None, check
                if check.interval is not None:
                    rates.add("cover", check.interval[0] <= check.tau + effect <= check.interval[1])
    return rates


def _estimated(generator: np.random.Generator, calibrate: bool) -> float:
    """A standard deviation from `CALIBRATION` seeds over the true one."""
    return math.sqrt(generator.chisquare(CALIBRATION - 1) / (CALIBRATION - 1)) if calibrate else 1.0


def single_checks(truth: Truth, n_claims: int = 10, n_checks: int = 1, *, calibrated: bool = False) -> Bench:
    """Claims of equal checks with one truth."""
    pattern = next(claim for claim in shipped_claims() if claim.id == "c-rope-breaks")
    check = replace(pattern.checks[0], tau=0.2)
    made = [replace(pattern, id=f"claim{i}", checks=(check,) * n_checks) for i in range(n_claims)]
    return Bench(made, [[truth] * n_checks] * n_claims, calibrated=calibrated)


def looks_until_pass(truth: Truth, draws: int, *, adaptive: bool) -> float:
    """How often a claim at tau passes at any of the looks at 1, 3 and 6 seeds; `adaptive`: one more seed where p is
    small, three where it is not, eight looks at most."""
    bench = single_checks(truth, 1, calibrated=True)
    (key,) = (claims.claim_key(claim) for claim in bench.claims)
    generator = np.random.default_rng(5)
    rates = Rates()
    for _ in range(draws):
        deviations = bench.draw(generator, 32)
        sds: list[list[float | None]] = [[truth.by_seed * _estimated(generator, True)]]
        histories: dict[str, History] = {}
        passed, n_seeds, looks = False, 1, 0
        while not passed and looks < (8 if adaptive else 3):
            (verdict,) = bench.judge(
                [[d[:n_seeds] for d in of] for of in deviations], [[0.0]], n_seeds, seed_sds=sds, histories=histories
            )
            assert verdict.look is not None, verdict
            assert verdict.p is not None, verdict
            histories = {key: histories.get(key, History()).after(verdict.look, [key])}
            passed, looks = verdict.verdict == "PASS", looks + 1
            n_seeds = n_seeds + (1 if verdict.p < 0.2 else 3) if adaptive else {1: 3, 3: 6}.get(n_seeds, 6)
        rates.add("pass", passed)
    return rates["pass"]


def needed_seeds_pass(pilot: int, draws: int) -> dict[str, float]:
    """How often "needs about N seeds" passes with N, those of the pilot included, among claims judged ten together.

    Effects are drawn evenly from 0 to 8 standard deviations over seeds; claims that ask for more than 40 are left out.
    """
    truth = Truth(0.1, 0.2, 0.05, (1,) * 64)
    bench = single_checks(truth, calibrated=True)
    generator = np.random.default_rng([7, pilot])
    rates = Rates()
    for _ in range(draws):
        deviations = bench.draw(generator, 40)
        effects = [[float(generator.uniform(0, 0.8))] for _ in bench.claims]
        sds: list[list[float | None]] = [[0.1 * _estimated(generator, True)] for _ in bench.claims]
        first = bench.judge([[d[:pilot] for d in of] for of in deviations], effects, pilot, seed_sds=sds)
        wanted: dict[int, list[int]] = {}
        for i, verdict in enumerate(first):
            if verdict.verdict == "INCONCLUSIVE":
                rates.add("has a number or a reason", verdict.needs is not None)
                words = (verdict.needs or "").split()
                if words[:1] == ["about"] and effects[i][0] > 0 and int(words[1]) <= 40:
                    wanted.setdefault(int(words[1]), []).append(i)
        for n_seeds, asked in wanted.items():
            later = bench.judge([[d[:n_seeds] for d in of] for of in deviations], effects, n_seeds, seed_sds=sds)
            for i in asked:
                rates.add("decided", later[i].verdict == "PASS")
    return {name: rates[name] for name in ("decided", "has a number or a reason")}


def measure(draws: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """All cases; `tell` is told which one begins."""
    shipped = shipped_claims()
    truths = shipped_truths(shipped)
    effects = at_tau(truths)
    result: dict[str, Any] = {"draws": draws, "any_false_pass": {}, "one_check": {}, "coverage": {}}
    result |= {"any_false_fail": {}, "elsewhere": {}, "trusted_wrongly": {}, "tails": {}, "authors": {}}

    def main_case(n_seeds: int, rates: Rates) -> None:
        for name, key in (("any_false_pass", "any_pass"), ("one_check", "pass"), ("coverage", "cover"),
                          ("any_false_fail", "any_fail")):  # fmt: skip
            result[name][str(n_seeds)] = rates[key]

    bench = Bench(shipped, truths, calibrated=True)
    for n_seeds in SEEDS:
        tell(f"ten claims, {n_seeds} seeds")
        main_case(n_seeds, errors(bench, effects, n_seeds, draws))
    fewer = max(1, draws // 10)
    elsewhere = Bench(shipped, truths, calibrated=False)
    for ratio in (0.5, 1.0, 2.0, 3.0):
        tell(f"seed_sd wrong by {ratio:g}")
        for name, of in (("elsewhere", elsewhere), ("trusted_wrongly", bench)):
            rates = {n: errors(of, effects, n, fewer, ratio=ratio, calibrate=False) for n in (1, 2, 3)}
            result[name][f"{ratio:g}"] = {
                str(n): {"any_false_pass": r["any_pass"], "one_check": r["pass"], "coverage": r["cover"]}
                for n, r in rates.items()
            }
    for name, noise, seed_noise in (("heavy", heavy, normal), ("heavy, seeds too", heavy, heavy),
                                    ("skewed up", skewed, normal), ("skewed down", _mirrored, normal)):  # fmt: skip
        tell(f"tails: {name}")
        odd = shipped_truths(shipped, noise=noise, seed_noise=seed_noise)
        rates_3 = errors(Bench(shipped, odd, calibrated=True), effects, 3, fewer)
        result["tails"][name] = _row(rates_3)
    for name, sizes in {"6 x 1": (1,) * 6, "6 x 4": (4,) * 6, "7 x 2": (2,) * 7, "7, one wrote 9 of 15": (9, *(1,) * 6),
                        "12 x 2": (2,) * 12, "20 x 2": (2,) * 20,
                        "30 modules of the demo": (8, 8, 8, 7, 5, 3, 2, *(1,) * 23)}.items():  # fmt: skip
        tell(f"authors: {name}")
        for noise_name, noise in (("", normal), (", heavy", heavy)):
            truth = Truth(0.05, 0.05, 0.02, sizes, by_author=0.1, noise=noise)
            rates_3 = errors(single_checks(truth, calibrated=True), [[0.0]] * 10, 3, fewer)
            result["authors"][name + noise_name] = _row(rates_3)
    tell("false FAIL of several checks")
    truth = Truth(0.1, 0.2, 0.05, (1,) * 64)
    result["false_fail_of_checks"] = {
        str(n): errors(single_checks(truth, 1, n, calibrated=True), [[0.0] * n], 3, draws)["fail"] for n in (1, 2, 5)
    }
    tell("looks")
    result["looks"] = {
        "1, 3, 6 until PASS": looks_until_pass(truth, draws, adaptive=False),
        "eight, as p suggests": looks_until_pass(truth, fewer, adaptive=True),
    }
    tell("needed seeds")
    result["needed_seeds"] = {f"after {pilot}": needed_seeds_pass(pilot, max(1, draws // 20)) for pilot in (1, 3)}
    result["error"] = {"0.025": 2 * math.sqrt(ALPHA * (1 - ALPHA) / draws)}
    return result


def _mirrored(generator: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    return -skewed(generator, shape)


def _row(rates: Rates) -> dict[str, float]:
    names = {"any_false_pass": "any_pass", "one_check": "pass", "one_fail": "fail", "coverage": "cover"}
    return {name: rates[key] for name, key in names.items()}


def _print(result: Any, indent: int = 0) -> None:
    for key, value in result.items():
        if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
            print(f"{' ' * indent}{key}")
            _print(value, indent + 2)
        elif isinstance(value, dict):
            print(f"{' ' * indent}{key}: " + ", ".join(f"{name} {100 * rate:.1f}%" for name, rate in value.items()))
        else:
            print(f"{' ' * indent}{key}: {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--draws", type=int, default=2000, help="of the main cases; side cases of ten claims have a tenth"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.draws < 1:
        parser.error("--draws must be at least 1")
    result = measure(arguments.draws, lambda line: print(line, file=sys.stderr))
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        _print(result)


if __name__ == "__main__":
    main()
