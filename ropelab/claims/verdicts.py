"""Verdicts: measurements of a claim's terms, judged; the gates say where numbers cannot carry a verdict.

A check passes or fails where the confidence interval of its contrast, over seeds and documents, lies on one side of its
threshold. Nothing here runs a model: the caller supplies rows of losses and what the trainings came to.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ropelab.claims.files import (
    EXACT,
    Claim,
    ContrastCheck,
    Evaluation,
    ExactCheck,
    Term,
    changes_spectrum,
    in_length_terms,
    plain_term,
    terms_of,
)
from ropelab.claims.looks import History, Look, claim_key
from ropelab.claims.statistics import (
    ALPHA,
    FOREIGN_SD,
    POWER,
    Contrast,
    Decision,
    FloatArray,
    SeedSpread,
    cluster_means,
    combine,
    decide,
    holm,
    look_share,
    needed_seeds,
    two_way,
)

MIN_DOCS = 6  # documents, and clusters of documents
MAX_OVERFIT = 0.02  # nats of the final above the best validation loss
MAX_GENERALISATION_GAP = 0.25  # nats of the validation above the training loss
LR_TOLERANCE = 0.01  # nats above the best learning rate of the check
SAME_LOSS = 1e-5  # nats; below what float32 arithmetic in another order changes


# --- what the caller supplies ---


@dataclass(frozen=True)
class Row:
    """One evaluation at one ctx.

    `nll` maps a document's digest to its mean loss (nats per target); `targets` is the digest of what was scored, and
    `spectrum` a digest of everything that the encoding under its scaling says at this ctx (None: nothing to digest).
    """

    status: str  # "ok", "undefined", ...
    reason: str | None
    nll: Mapping[str, float]
    targets: str | None
    spectrum: str | None


@dataclass(frozen=True)
class Measurement:
    """The rows (ctx -> Row) of one evaluation of one seed. It may hold more ctxs than were asked for."""

    evaluation: Evaluation
    seed: int
    dtype: str  # of the evaluation's arithmetic
    rows: Mapping[int, Row]
    clusters: Mapping[str, str] = field(
        default_factory=dict
    )  # document digest -> its author, or package; absent: itself


@dataclass(frozen=True)
class Training:
    """What the training of one run and seed came to. Losses in nats per token."""

    run: tuple[str, ...]
    seed: int
    val_loss: float
    best_val_loss: float
    train_loss: float  # mean over the last 5% of the steps
    val_bpb: float  # validation bits per byte
    dtype: str  # as resolved on the device
    recipe: str = ""  # digest of all that changes the run's numbers but its seed: settings, text, tokeniser


# --- what comes out ---


@dataclass(frozen=True)
class CheckResult:
    """What a check came to. Statistics are None where they could not be computed."""

    statement: str
    kind: str  # "contrast" or one of EXACT
    verdict: Decision
    reason: str
    tau: float | None = None
    theta: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    reversed: bool = False  # FAIL: the whole interval lies on the other side of 0 than was published
    size: str | None = None  # exp(interval) beside the published ratios: matches, smaller, larger
    published: tuple[float, float] | None = None
    published_source: str | None = None
    in_length: float | None = None  # largest difference of the compared runs at their training length, nats
    n_seeds: int | None = None
    n_docs: int | None = None
    n_clusters: int | None = None  # authors, packages; documents where the data names neither
    p_less: float | None = None  # as `p`, of the hypothesis that theta is at least tau
    needs: str | None = None  # what would decide an open check
    contrast: Contrast | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become None."""
        return {
            "statement": self.statement,
            "kind": self.kind,
            "theta": _finite(self.theta),
            "tau": self.tau,
            "interval": None if self.interval is None else [_finite(bound) for bound in self.interval],
            "p": _finite(self.p),
            "verdict": self.verdict,
            "reversed": self.reversed,
            "reason": self.reason,
            "size": self.size,
            "published": None if self.published is None else list(self.published),
            "published_source": self.published_source,
            "in_length": _finite(self.in_length),
            "seeds": self.n_seeds,
            "documents": self.n_docs,
            "clusters": self.n_clusters,
            "needs": self.needs,
        }


@dataclass(frozen=True)
class Verdict:
    """The verdict of a claim: `raw_verdict` alone, `verdict` among all claims judged together (Holm).

    Both are at the level of this look, `level`: the share of the error rate that it may spend. `looks` counts those at
    this claim that are known, this one included; without a record of looks it is 1, and the level is the whole rate.
    """

    claim: str
    statement: str
    source: str
    verdict: Decision
    raw_verdict: Decision
    reason: str
    p: float | None  # the largest of its checks, 1 where a gate forbids a verdict; None for exact claims
    p_adjusted: float | None  # corrected for looks and claims: PASS where it is below the whole error rate
    p_fail: float | None  # the smallest of its checks that the truth is beyond tau, times their number
    p_fail_adjusted: float | None
    one_seed: bool
    notes: tuple[str, ...]
    checks: tuple[CheckResult, ...]
    level: float | None = None
    looks: int | None = None
    look: Look | None = None  # this one; None where a gate forbids a verdict, so that nothing could be passed
    next_level: float | None = None  # of a look at more seeds
    needs: str | None = None  # what would decide a claim that is open; None where the reason is no lack of data

    def as_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become None."""
        return {
            "claim": self.claim,
            "statement": self.statement,
            "source": self.source,
            "verdict": self.verdict,
            "raw_verdict": self.raw_verdict,
            "reason": self.reason,
            "p": _finite(self.p),
            "p_adjusted": _finite(self.p_adjusted),
            "p_fail": _finite(self.p_fail),
            "p_fail_adjusted": _finite(self.p_fail_adjusted),
            "level": self.level,
            "looks": self.looks,
            "needs": self.needs,
            "one_seed": self.one_seed,
            "notes": list(self.notes),
            "checks": [check.as_json() for check in self.checks],
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# --- judging ---


class _Measured:
    """Rows by claim, term and seed."""

    def __init__(self, measurements: Iterable[Measurement]) -> None:
        self._by_key = {(m.evaluation.key if m.evaluation.ctxs else m.evaluation, m.seed): m for m in measurements}
        # a document is the author's whichever evaluation says so: one that was stored earlier may not
        self._clusters = {document: name for m in self._by_key.values() for document, name in m.clusters.items()}
        self.seeds = sorted({seed for _, seed in self._by_key})
        self._asked: dict[tuple[str, Term], Evaluation] = {}

    def of(self, claim: Claim, term: Term, seed: int) -> Measurement | None:
        evaluation = self._asked.get((claim.id, term))
        if evaluation is None:
            evaluation = self._asked[claim.id, term] = claim.evaluation(term)
        measurement = self._by_key.get((evaluation, seed))
        return measurement if measurement is not None and term.ctx in measurement.rows else None

    def clusters(self, documents: Iterable[str]) -> list[str]:
        """The cluster of each document; a document without one is its own."""
        return [f"in {self._clusters[d]}" if d in self._clusters else d for d in documents]

    def row(self, claim: Claim, term: Term, seed: int) -> Row:
        measurement = self.of(claim, term, seed)
        assert measurement is not None, (term, seed)
        return measurement.rows[term.ctx]


def judge(
    claims: Sequence[Claim],
    measurements: Iterable[Measurement],
    trainings: Iterable[Training],
    seeds: Sequence[int],
    *,
    alpha: float = ALPHA,
    histories: Mapping[str, History] | None = None,
    last_look: bool = False,
) -> list[Verdict]:
    """The verdicts of claims judged together from the runs with these seeds.

    A claim passes if all checks pass, fails if one fails, and is inconclusive otherwise, or whenever a gate says that
    the numbers cannot carry a verdict: too few seeds or documents, losses that are not finite, different targets, an
    unchanged spectrum, runs that are untrained, overfitted, or too far apart at their training length, mixed dtypes.
    Over the statistical claims, Holm's correction can turn PASS and FAIL into INCONCLUSIVE, never the other way: the
    chance of any false PASS is at most alpha, and so is that of any false FAIL.

    Args:
        alpha: one-sided error rate of all claims and looks together.
        histories: earlier looks by `claim_key`, those at other claims of the families included; their claims count in
            Holm's correction with what they came to. None: the data were never looked at and never will be again.
        last_look: no other look is to follow, so that this one spends all that is left.
    """
    measured = _Measured(measurements)
    trained = {(training.run, training.seed): training for training in trainings}
    keys = {claim.id: claim_key(claim) for claim in claims} if histories is not None else {}
    open_to: list[Verdict] = []
    for claim in claims:
        history = None if histories is None else histories.get(keys[claim.id], History())
        open_to.append(_judge_alone(claim, measured, trained, seeds, alpha, history, last_look))
    others = [history.best() for key, history in (histories or {}).items() if key not in set(keys.values())]
    return _among_all(open_to, others, alpha)


def _among_all(verdicts: Sequence[Verdict], others: Sequence[tuple[float, float]], alpha: float) -> list[Verdict]:
    """Holm's correction for PASS and for FAIL, each over these claims and `others` of their families; and what is
    needed where that leaves a claim open."""
    statistical = [i for i, verdict in enumerate(verdicts) if verdict.level is not None]
    n_claims = len(statistical) + len(others)
    corrected = list(verdicts)
    for passing in (True, False):
        known = [_for_the_look(verdicts[i], passing, alpha) for i in statistical]
        adjusted = holm([*known, *(best[0 if passing else 1] for best in others)])
        n_open = sum(p >= alpha for p in adjusted)
        for i, p_adjusted in zip(statistical, adjusted, strict=False):
            corrected[i] = _with_holm(corrected[i], p_adjusted, passing, n_claims, alpha)
            corrected[i] = _with_needs(corrected[i], passing, n_open)
    return corrected


def _for_the_look(verdict: Verdict, passing: bool, alpha: float) -> float:
    """A claim's p, corrected for the share of the error rate that its look may spend."""
    p = verdict.p if passing else verdict.p_fail
    assert p is not None, verdict
    return min(1.0, p * alpha / verdict.level) if verdict.level else 1.0


def _with_holm(verdict: Verdict, p_adjusted: float, passing: bool, n_claims: int, alpha: float) -> Verdict:
    verdict = replace(verdict, p_adjusted=p_adjusted) if passing else replace(verdict, p_fail_adjusted=p_adjusted)
    if verdict.verdict != ("PASS" if passing else "FAIL") or p_adjusted < alpha or _fails_exactly(verdict.checks):
        return verdict
    p = verdict.p if passing else verdict.p_fail
    word = "passes" if passing else "fails"
    reason = f"{word} alone (p = {p:.2g}), not among {n_claims} claims judged together (Holm: {p_adjusted:.2g})"
    return replace(verdict, verdict="INCONCLUSIVE", reason=reason)


def _with_needs(verdict: Verdict, passing: bool, n_open: int) -> Verdict:
    """What would decide an open claim, if the estimates stayed: a pass where all are above tau, a fail otherwise."""
    contrasts = [(i, check.contrast, check.tau) for i, check in enumerate(verdict.checks) if check.contrast is not None]
    above = all(contrast.theta > tau for _, contrast, tau in contrasts if tau is not None)
    if verdict.verdict != "INCONCLUSIVE" or verdict.look is None or above != passing or verdict.next_level is None:
        return verdict
    level, checks = verdict.next_level / n_open, list(verdict.checks)
    found: dict[int, tuple[float, str]] = {}
    for i, contrast, tau in contrasts:
        assert tau is not None, checks[i]
        if passing:  # all have to pass, so each with a better chance
            found[i] = _needs(contrast, tau, level, 1 - (1 - POWER) / len(contrasts))
        elif contrast.theta <= tau:  # one is enough
            found[i] = _needs(contrast, tau, level / len(contrasts), POWER)
    for i, (_, words) in found.items():
        if checks[i].verdict == "INCONCLUSIVE" or verdict.raw_verdict != "INCONCLUSIVE":
            checks[i] = replace(checks[i], needs=words, reason=f"{checks[i].reason}; needs {words}")
    needs = (max if passing else min)(found.values())[1]
    reason = f"{verdict.reason}; needs {needs}"
    return replace(verdict, checks=tuple(checks), needs=needs, reason=reason)


def _needs(contrast: Contrast, tau: float, level: float, power: float) -> tuple[float, str]:
    """A number to compare by, and what would decide a check in words."""
    n = needed_seeds(contrast, tau, alpha=level, power=power) if level > 0 else None
    if n is not None:
        return n, f"about {n} seeds"
    if level == 0:
        return math.inf, "data of its own: earlier looks have spent the error rate"
    if abs(contrast.theta - tau) <= replace(contrast, seed_sd=0.0).bound(level)[1] - contrast.theta:
        return math.inf, "more documents"
    return math.inf, "more seeds than can be foretold: the estimate is too near its threshold"


def _fails_exactly(results: Sequence[CheckResult]) -> bool:
    return any(result.verdict == "FAIL" and result.kind in EXACT for result in results)


def _same_cell(claim: Claim, trained: Mapping[tuple[tuple[str, ...], int], Training], seeds: Sequence[int]) -> set[str]:
    """The runs that are as those of the calibration were: recipe, text, dtype, and what they are evaluated on."""
    same = set()
    for name, run in claim.runs.items():
        found = [trained[run, seed] for seed in seeds if (run, seed) in trained]
        if found and {cell_digest(claim, training) for training in found} == {claim.calibrated.get(name)}:
            same.add(name)
    return same


def cell_digest(claim: Claim, training: Training) -> str:
    """What a calibration is valid for: the run's recipe with its text, the dtype it trained in, and the evaluation."""
    asked = json.dumps([training.recipe, training.dtype, claim.cell.evaluation])
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def _data_digest(claim: Claim, trained: Mapping[tuple[tuple[str, ...], int], Training], seeds: Sequence[int]) -> str:
    """Of the runs that a claim is judged on, text included, and of the thresholds: another one is another look."""
    found = [[run, seed, trained[run, seed].recipe, trained[run, seed].dtype]
             for run in sorted(set(claim.runs.values())) for seed in seeds if (run, seed) in trained]  # fmt: skip
    limits = [[c.tau, c.seed_sd, c.seed_sd_n] for c in claim.checks if isinstance(c, ContrastCheck)]
    return hashlib.sha256(json.dumps([found, limits]).encode()).hexdigest()[:16]


def _judge_alone(
    claim: Claim,
    measured: _Measured,
    trained: Mapping[tuple[tuple[str, ...], int], Training],
    seeds: Sequence[int],
    alpha: float,
    history: History | None,
    last_look: bool,
) -> Verdict:
    statistical = [check for check in claim.checks if isinstance(check, ContrastCheck)]
    data = _data_digest(claim, trained, seeds)
    share = 1.0 if history is None else history.share(len(seeds), data, last=last_look)
    same = _same_cell(claim, trained, seeds)
    results: list[CheckResult] = []
    problems = _training_problems(claim, statistical, trained, seeds) if statistical else []
    for check in claim.checks:
        if isinstance(check, ExactCheck):
            results.append(_judge_exact(claim, check, measured, seeds))
        else:
            result, found = _judge_contrast(claim, check, measured, seeds, alpha * share, len(statistical), same)
            results.append(result)
            problems += found
    problems = list(dict.fromkeys(problems))
    verdict = combine([result.verdict for result in results])
    if problems and not _fails_exactly(results):
        verdict, reason = "INCONCLUSIVE", "; ".join(problems)
    else:
        reason = _reason(verdict, results)
    contrasts = [result for result in results if result.kind == "contrast"]
    p = 1.0 if problems else max((1.0 if r.p is None else r.p for r in contrasts), default=1.0)
    smallest = min((1.0 if r.p_less is None else r.p_less for r in contrasts), default=1.0)
    p_fail = 1.0 if problems else min(1.0, len(contrasts) * smallest)
    look = Look(len(seeds), data, share, p, p_fail) if statistical and not problems else None
    looks, next_share = _looks(history, look)
    return Verdict(
        claim=claim.id,
        statement=claim.statement,
        source=claim.source,
        verdict=verdict,
        raw_verdict=verdict,
        reason=reason,
        p=p if statistical else None,
        p_adjusted=None,
        p_fail=p_fail if statistical else None,
        p_fail_adjusted=None,
        one_seed=len(seeds) == 1 and bool(statistical),
        notes=(*_notes(claim, statistical, seeds, same), *_look_notes(history, look, alpha)),
        checks=tuple(results),
        level=alpha * share if statistical else None,
        looks=looks if statistical else None,
        look=look,
        next_level=alpha * next_share,
    )


def _looks(history: History | None, look: Look | None) -> tuple[int, float]:
    """How many looks are known, this one included, and the share of the one that follows."""
    if history is None:
        return 1, 1.0
    looks = history.looks
    if look is not None and history.find(look.seeds, look.data) is None:
        looks = (*looks, look)
    return len(looks), look_share([item.share for item in looks])


def _look_notes(history: History | None, look: Look | None, alpha: float) -> tuple[str, ...]:
    """Which looks are known, and at what level this one judges."""
    if history is None or look is None:
        return ()
    known = history.find(look.seeds, look.data)
    place = len(history.looks) if known is None else known
    seeds = [item.seeds for item in history.looks] + ([] if known is not None else [look.seeds])
    listed = ", ".join(str(n) for n in seeds)
    return (
        f"look {place + 1} of {len(seeds)} known ({'seeds' if seeds != [1] else 'seed'}: {listed}): "
        f"judged at {alpha * look.share:.2g} of {alpha:g}",
    )


def _reason(verdict: Decision, results: Sequence[CheckResult]) -> str:
    if verdict == "PASS":
        return "the check holds" if len(results) == 1 else f"all {len(results)} checks hold"
    first = next(result for result in results if result.verdict == verdict)
    return f"{first.statement}: {first.reason}"


def _runs(checks: Sequence[ContrastCheck]) -> list[str]:
    return list(dict.fromkeys(term.run for check in checks for term in terms_of(check)))


def _notes(
    claim: Claim, statistical: Sequence[ContrastCheck], seeds: Sequence[int], same: Container[str]
) -> tuple[str, ...]:
    if not statistical:
        return ()
    notes = []
    if all(check.seed_sd is not None for check in statistical):
        foreign = [run for run in _runs(statistical) if run not in same]
        if not foreign:
            notes.append("the variation over seeds is that of these and the calibration seeds, pooled")
        elif len(seeds) == 1:
            notes.append(
                f"one seed: seed_sd was not measured with this recipe, text and dtype ({', '.join(foreign)}), "
                f"so it is taken {FOREIGN_SD:g} times as wide"
            )
    unchecked = [run for run in _runs(statistical) if run not in claim.lr_check]
    if unchecked:
        notes.append(f"lr unchecked: no learning-rate check for {', '.join(unchecked)}")
    if claim.max_bpb is None:
        notes.append("training level unchecked: no max_bpb")
    return tuple(notes)


# --- gates ---


def _training_problems(
    claim: Claim,
    statistical: Sequence[ContrastCheck],
    trained: Mapping[tuple[tuple[str, ...], int], Training],
    seeds: Sequence[int],
) -> list[str]:
    """Why the runs cannot carry a verdict: one line per run and cause, with the first seed that shows it."""
    problems: list[str] = []
    dtypes: dict[str, str] = {}
    for run in _runs(statistical):
        found: dict[str, str] = {}
        for seed in seeds:
            training = trained.get((claim.runs[run], seed))
            if training is None:
                found.setdefault("missing", f"{run}, seed {seed}: not trained")
                continue
            dtypes.setdefault(training.dtype, f"{run} in {training.dtype}")
            for cause, message in _training_faults(training, claim.max_bpb):
                found.setdefault(cause, f"{run}, seed {seed}: {message}")
        problems += found.values()
        problems += _lr_problems(run, claim.lr_check.get(run))
    if len(dtypes) > 1:
        problems.append(f"trained in different dtypes: {', '.join(dtypes.values())}; set train.dtype")
    return problems


def _training_faults(training: Training, max_bpb: float | None) -> list[tuple[str, str]]:
    losses = (training.val_loss, training.best_val_loss, training.train_loss, training.val_bpb)
    if not all(math.isfinite(loss) for loss in losses):
        return [("finite", "a training or validation loss is not finite")]
    faults: list[tuple[str, str]] = []
    if max_bpb is not None and training.val_bpb > max_bpb:
        faults.append(("untrained", f"untrained, {training.val_bpb:.2f} bits per byte against at most {max_bpb:g}"))
    if training.val_loss > training.best_val_loss + MAX_OVERFIT:
        rise = training.val_loss - training.best_val_loss
        faults.append(("overfitted", f"overfitted, the validation loss rose by {rise:.3f} nats from its best"))
    gap = training.val_loss - training.train_loss
    if gap > MAX_GENERALISATION_GAP:
        faults.append(("memorised", f"overfitted, the validation loss is {gap:.2f} nats above the training loss"))
    return faults


def _lr_problems(run: str, losses: Mapping[float, float] | None) -> list[str]:
    """A rate of the check is better than the common one by more than the tolerance: the comparison favours others."""
    if losses is None:
        return []
    best = min(losses, key=lambda multiple: losses[multiple])
    if losses[1.0] - losses[best] <= LR_TOLERANCE:
        return []
    return [f"{run}: its learning-rate check prefers {best:g} times train.lr by {losses[1.0] - losses[best]:.3f} nats"]


def _row_problems(claim: Claim, terms: Sequence[Term], measured: _Measured, seeds: Sequence[int]) -> list[str]:
    """Why no contrast of these terms can be computed; the first of each kind."""
    documents: Mapping[str, float] | None = None
    for term in terms:
        for seed in seeds:
            if measured.of(claim, term, seed) is None:
                return [f"{term.text}, seed {seed}: not measured"]
            row = measured.row(claim, term, seed)
            if row.status != "ok":
                return [f"{term.text}, seed {seed}: {row.status}{f' ({row.reason})' if row.reason else ''}"]
            if not all(map(math.isfinite, row.nll.values())):
                return [f"{term.text}, seed {seed}: a loss is not finite"]
            documents = row.nll if documents is None else documents
            if row.nll.keys() != documents.keys():
                return ["documents differ between the evaluations"]
    return [] if documents else ["no document was scored"]


def _same_ground_problems(
    claim: Claim, terms: Sequence[Term], measured: _Measured, seeds: Sequence[int], n_docs: int, n_clusters: int
) -> list[str]:
    """Too few documents, different targets, an evaluation in low precision."""
    problems: list[str] = []
    targets: dict[str, dict[str | None, str]] = {}
    for term in terms:
        for seed in seeds:
            measurement = measured.of(claim, term, seed)
            assert measurement is not None, term
            if measurement.dtype != "fp32":
                problems.append(f"{term.text} was evaluated in {measurement.dtype}; claims need eval.dtype=fp32")
            row = measurement.rows[term.ctx]
            targets.setdefault(term.targets, {}).setdefault(row.targets, f"{term.text}, seed {seed}")
    if n_clusters < MIN_DOCS:
        what = f"{n_docs} document{'' if n_docs == 1 else 's'}"
        if n_clusters != n_docs:
            what += f" by {n_clusters} author{'' if n_clusters == 1 else 's'}"
        problems.append(f"{what}: a verdict over texts needs at least {MIN_DOCS}")
    for name, digests in targets.items():
        if len(digests) > 1 or None in digests:
            problems.append(f"targets differ under {name}: {' against '.join(digests.values())}")
    return problems


def _spectrum_problems(claim: Claim, terms: Sequence[Term], measured: _Measured, seeds: Sequence[int]) -> list[str]:
    """A scaling was asked for and the encoding says what it said without."""
    for term in terms:
        if not changes_spectrum(claim, term):
            continue
        plain = plain_term(claim, term.run, term.protocol)
        for seed in seeds:
            if measured.of(claim, plain, seed) is None:
                return [f"{plain.text}, seed {seed}: not measured"]
            spectrum = measured.row(claim, term, seed).spectrum
            if spectrum is None:
                return [f"{term.text}: no spectrum was recorded, so the scaling may not have been applied"]
            if spectrum == measured.row(claim, plain, seed).spectrum:
                return [f"{term.text}: spectrum unchanged by the scaling"]
    return []


def _in_length_gap(
    claim: Claim, check: ContrastCheck, measured: _Measured, seeds: Sequence[int]
) -> tuple[float | None, list[str]]:
    """The largest difference (nats) between the compared runs at L, and what is wrong with it."""
    largest: float | None = None
    problems: list[str] = []
    for protocol, plain in in_length_terms(claim, check).items():
        if missing := _row_problems(claim, plain, measured, seeds):
            return None, missing
        means = {term.run: float(_by_cluster(claim, [(term, 1.0)], measured, seeds).mean()) for term in plain}
        low, high = min(means, key=lambda r: means[r]), max(means, key=lambda r: means[r])
        difference = means[high] - means[low]
        largest = difference if largest is None else max(largest, difference)
        if difference > claim.gap:
            problems.append(
                f"not comparable in length: {high} is {difference:.2f} nats behind {low} at the training length "
                f"({protocol}; at most {claim.gap:g})"
            )
    return largest, problems


# --- checks ---


def _losses(claim: Claim, term: Term, measured: _Measured, seeds: Sequence[int]) -> FloatArray:
    """(n_seeds, n_docs) mean losses of a term, documents in the order of their digests."""
    rows = [measured.row(claim, term, seed).nll for seed in seeds]
    documents = sorted(rows[0])
    return np.array([[nll[document] for document in documents] for nll in rows], dtype=np.float64)


def _by_cluster(
    claim: Claim, weighted: Sequence[tuple[Term, float]], measured: _Measured, seeds: Sequence[int]
) -> FloatArray:
    """(n_seeds, n_clusters) contrast, paired: the same seed and the same documents in every term."""
    parts = [weight * _losses(claim, term, measured, seeds) for term, weight in weighted]
    documents = sorted(measured.row(claim, weighted[0][0], seeds[0]).nll)
    return cluster_means(np.sum(np.stack(parts), axis=0), measured.clusters(documents))


def _judge_contrast(
    claim: Claim,
    check: ContrastCheck,
    measured: _Measured,
    seeds: Sequence[int],
    level: float,
    n_checks: int,
    same: Container[str],
) -> tuple[CheckResult, list[str]]:
    """The result of a check at an error rate of `level` and the gates that it did not pass."""
    result = CheckResult(
        check.statement,
        "contrast",
        "INCONCLUSIVE",
        "",
        tau=check.tau,
        published=check.published,
        published_source=check.published_source,
    )
    terms = terms_of(check)
    problems = [f"{check.statement}: no seed was run"] if not seeds else _row_problems(claim, terms, measured, seeds)
    if problems:
        return replace(result, reason=problems[0]), problems
    spread = None
    if check.seed_sd is not None:
        spread = SeedSpread(check.seed_sd, check.seed_sd_n, all(term.run in same for term in terms))
    contrast = two_way(_by_cluster(claim, check.terms, measured, seeds), spread=spread)
    n_docs = len(measured.row(claim, terms[0], seeds[0]).nll)
    in_length, problems = _in_length_gap(claim, check, measured, seeds)
    if len(seeds) == 1 and check.seed_sd is None:
        problems.append("one seed, and no seed_sd in the claim file: run at least 2 seeds")
    problems += _same_ground_problems(claim, terms, measured, seeds, n_docs, contrast.n_texts)
    problems += _spectrum_problems(claim, terms, measured, seeds)
    interval = contrast.bound()
    result = replace(
        result,
        theta=contrast.theta,
        interval=interval if contrast.known else None,
        p=contrast.p_greater(check.tau) if contrast.known else None,
        p_less=contrast.p_less(check.tau) if contrast.known else None,
        size=_size(interval, check.published) if contrast.known else None,
        in_length=in_length,
        n_seeds=contrast.n_seeds,
        n_docs=n_docs,
        n_clusters=contrast.n_texts,
        contrast=contrast,
    )
    if problems:
        return replace(result, reason="; ".join(dict.fromkeys(problems))), problems
    verdict = decide(contrast, check.tau, alpha=level, n_checks=n_checks)
    reversed_ = verdict == "FAIL" and interval[1] < 0 <= check.tau
    reason = _explain(verdict, contrast, interval, check.tau, reversed_, level)
    return replace(result, verdict=verdict, reason=reason, reversed=reversed_), []


def _size(interval: tuple[float, float], published: tuple[float, float] | None) -> str | None:
    """Whether the measured effect is of the published size. Informative: it never changes a verdict."""
    if published is None:
        return None
    low, high = math.log(published[0]), math.log(published[1])
    if interval[1] < low:
        return "smaller"
    return "larger" if interval[0] > high else "matches"


def _explain(
    verdict: Decision, contrast: Contrast, interval: tuple[float, float], tau: float, reversed_: bool, level: float
) -> str:
    numbers = f"{contrast.theta:+.3f} nats ({interval[0]:+.3f} to {interval[1]:+.3f}) against {tau:+.3f}"
    if verdict == "PASS":
        return numbers
    if verdict == "INCONCLUSIVE":
        p = min(contrast.p_greater(tau), contrast.p_less(tau))
        return f"{numbers}: p = {p:.2g}, not below {level:.2g}" if p < ALPHA else numbers
    if reversed_:
        return f"{numbers}: reversed"
    return f"{numbers}: {'beyond the margin' if tau < 0 else 'smaller than published'}"


def _judge_exact(claim: Claim, check: ExactCheck, measured: _Measured, seeds: Sequence[int]) -> CheckResult:
    result = CheckResult(check.statement, check.kind, "INCONCLUSIVE", "no seed was run")
    judge_seed: Callable[[Mapping[Term, Row]], tuple[Decision, str]] = {
        "defined": _judge_defined,
        "undefined": _judge_undefined,
        "identical": _judge_identical,
    }[check.kind]
    for seed in seeds:
        for term in check.terms:
            if measured.of(claim, term, seed) is None:
                return replace(result, verdict="INCONCLUSIVE", reason=f"{term.text}, seed {seed}: not measured")
    for seed in seeds:
        verdict, reason = judge_seed({term: measured.row(claim, term, seed) for term in check.terms})
        result = replace(result, verdict=verdict, reason=reason, n_seeds=len(seeds))
        if verdict != "PASS":
            return replace(result, reason=f"seed {seed}: {reason}")
    return result


def _judge_defined(rows: Mapping[Term, Row]) -> tuple[Decision, str]:
    for term, row in rows.items():
        if row.status != "ok" or not all(math.isfinite(nll) for nll in row.nll.values()):
            return "FAIL", f"{term.text} is {row.status if row.status != 'ok' else 'not finite'}"
    return "PASS", "every row has a perplexity"


def _judge_undefined(rows: Mapping[Term, Row]) -> tuple[Decision, str]:
    reasons: list[str] = []
    for term, row in rows.items():
        if row.status != "undefined":
            return "FAIL", f"{term.text} is {row.status}, not undefined"
        if not row.reason:
            return "FAIL", f"{term.text} is undefined without a reason"
        reasons.append(row.reason)
    return "PASS", f"undefined: {reasons[0]}"


def _judge_identical(rows: Mapping[Term, Row]) -> tuple[Decision, str]:
    (first, reference), *others = rows.items()
    if reference.spectrum is None or reference.status != "ok":
        return "INCONCLUSIVE", f"{first.text} has no spectrum to compare"
    for term, row in others:
        if row.spectrum != reference.spectrum:
            return "FAIL", f"{term.text} has another spectrum than {first.text}"
        if row.targets != reference.targets or row.nll.keys() != reference.nll.keys():
            return "INCONCLUSIVE", f"{term.text} and {first.text} score different targets"
        largest = max((abs(row.nll[d] - reference.nll[d]) for d in row.nll), default=0.0)
        if not largest <= SAME_LOSS:
            return "FAIL", f"{term.text} differs from {first.text} by {largest:.2g} nats in a document"
    return "PASS", "one spectrum, the same losses"


# --- calibration ---


def calibration(claim: Claim, measurements: Iterable[Measurement]) -> dict[int, tuple[float, int]]:
    """`seed_sd` and `seed_sd_n` of each check: standard deviation of its contrast over the seeds, and their number.

    Keys are indices into `claim.checks`. A check with fewer than two complete seeds, and an exact one, has no entry.
    Use seeds and documents that the claim itself is never judged on.
    """
    measured = _Measured(measurements)
    table: dict[int, tuple[float, int]] = {}
    for index, check in enumerate(claim.checks):
        if not isinstance(check, ContrastCheck):
            continue
        seeds = [seed for seed in measured.seeds if not _row_problems(claim, terms_of(check), measured, [seed])]
        if len(seeds) >= 2 and not _row_problems(claim, terms_of(check), measured, seeds):
            means = _by_cluster(claim, check.terms, measured, seeds).mean(axis=1)  # (n_seeds,)
            table[index] = (float(means.std(ddof=1)), len(seeds))
    return table
