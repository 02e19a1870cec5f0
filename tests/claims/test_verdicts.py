"""Verdicts on synthetic measurements with known answers: statistics, gates, exact checks, calibration."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ropelab.claims import Claim, Measurement, Training, Verdict, calibration, cell_digest, judge
from ropelab.claims.statistics import Contrast, needed_seeds, two_way
from tests.claims.synthetic import (
    CELL,
    CHECK,
    DOCS,
    SEEDS,
    Loss,
    levels,
    load,
    load_check,
    measure,
    pos_of,
    spelling,
    train,
    verdict_of,
)
from tests.sum_of_t import quantile, tail

# In length equal, beyond it alibi ahead of rope by 0.5 nats: the claim holds. Or level, or the other way round.
IN_LENGTH = {"alibi@128|last": 1.5, "rope@128|last": 1.5}
HOLDS = {**IN_LENGTH, "alibi": 1.5, "rope": 2.0}
SMALL = {**IN_LENGTH, "alibi": 1.5, "rope": 1.6}
REVERSED = {**IN_LENGTH, "alibi": 2.0, "rope": 1.5}


# --- statistics of a check ---


def test_theta_and_interval_by_hand(configs):
    """Losses are paired by seed and document; the interval is the two-way one."""
    b = [[1.9, 2.1, 2.3, 1.8, 2.2, 2.0], [2.0, 2.3, 2.2, 1.9, 2.5, 2.1]]  # (seed, document)
    a = [[1.5, 1.6, 1.7, 1.5, 1.5, 1.6], [1.4, 1.8, 1.7, 1.5, 1.9, 1.6]]
    table = {"alibi@512|last": a, "rope@512|last": b}
    claim = load(configs)
    (verdict,) = judge(
        [claim],
        measure([claim], lambda t, s, d: table[t][s][d] if t in table else 1.5, seeds=[0, 1], docs=6),
        train([claim], seeds=[0, 1]),
        [0, 1],
    )
    theta = [[y - x for x, y in zip(row_a, row_b, strict=True)] for row_a, row_b in zip(a, b, strict=True)]
    seeds, documents = sources_of_error(theta)
    (check,) = verdict.checks
    assert check.theta == pytest.approx(statistics.mean(statistics.mean(row) for row in theta))
    half = quantile(0.025, seeds, documents)
    assert check.interval == pytest.approx((check.theta - half, check.theta + half), rel=1e-4)
    assert check.p == pytest.approx(tail(check.theta - 0.2, seeds, documents), rel=1e-4)
    assert (check.n_seeds, check.n_docs, check.in_length) == (2, 6, 0)
    # with one degree of freedom between the seeds, 0.5 against 0.2 is no pass
    assert (verdict.verdict, verdict.one_seed) == ("PASS" if check.p < 0.025 else "INCONCLUSIVE", False)


def sources_of_error(theta: Sequence[Sequence[float]]) -> tuple[tuple[float, int], tuple[float, int]]:
    """Scale and degrees of freedom of the mean over seeds (rows) and of that over documents (columns)."""
    rows = [statistics.mean(row) for row in theta]
    columns = [statistics.mean(column) for column in zip(*theta, strict=True)]
    return tuple((statistics.stdev(x) / math.sqrt(len(x)), len(x) - 1) for x in (rows, columns))  # type: ignore[return-value]


def test_pass(configs):
    verdict = verdict_of(load(configs), levels(HOLDS))
    assert (verdict.verdict, verdict.raw_verdict, verdict.reason) == ("PASS", "PASS", "the check holds")
    assert verdict.checks[0].theta == pytest.approx(0.5, abs=0.03)
    assert verdict.notes == ()


def test_fail_because_smaller(configs):
    verdict = verdict_of(load(configs), levels(SMALL))
    assert verdict.verdict == "FAIL"
    assert not verdict.checks[0].reversed
    assert "smaller than published" in verdict.reason


def test_fail_because_reversed(configs):
    verdict = verdict_of(load(configs), levels(REVERSED))
    assert verdict.verdict == "FAIL"
    assert verdict.checks[0].reversed
    assert verdict.reason.endswith("reversed")


def test_a_margin_is_broken_not_reversed(configs):
    """A check "at most 5% worse" has no direction to reverse."""
    claim = load_check(configs, contrast={"a@L": 1, "a@4L": -1}, tau="-ln(1.05)")
    verdict = verdict_of(claim, levels({"alibi@128|last": 1.5, "alibi@512|last": 1.7}))
    assert verdict.verdict == "FAIL"
    assert not verdict.checks[0].reversed
    assert "beyond the margin" in verdict.reason


def test_open_says_what_it_needs(configs):
    wide = levels({**IN_LENGTH, "alibi": 1.5, "rope": 1.75}, spread=0.2)
    verdict = verdict_of(load(configs), wide)
    assert verdict.verdict == "INCONCLUSIVE"
    needs = verdict.checks[0].needs
    assert needs is not None
    assert f"needs {needs}" in verdict.reason
    assert needs == "more documents" or needs.startswith("about ")


def test_needed_seeds_are_those_of_the_bound(configs):
    """Documents agree, seeds do not: the claim asks for what `needed_seeds` says of its contrast."""
    offsets = [0.0, 0.2, 0.4]
    claim = load_check(configs, tau=-0.2)
    verdict = verdict_of(claim, lambda t, s, d: 1.5 + (offsets[s] if t.startswith("rope@512") else 0) + 0.001 * (d % 2))
    assert verdict.verdict == "INCONCLUSIVE"
    contrast = two_way(np.array([[o] * DOCS for o in offsets]))
    needed = needed_seeds(contrast, -0.2)
    assert needed is not None
    assert (verdict.needs, verdict.checks[0].needs) == (f"about {needed} seeds",) * 2
    assert verdict.reason.endswith(f"needs about {needed} seeds")


def test_needed_seeds_of_a_failure_follow_its_stricter_bound(configs):
    """Below tau the open question is a FAIL, at 0.025 / 2 for one of two checks."""
    offsets = [0.0, 0.2, 0.4]
    claim = load(configs, checks=[{**CHECK, "tau": 0.9}, {**CHECK, "tau": -5}])
    verdict = verdict_of(claim, lambda t, s, d: 1.5 + (offsets[s] if t.startswith("rope@512") else 0) + 0.001 * (d % 2))
    contrast = two_way(np.array([[o] * DOCS for o in offsets]))
    assert verdict.checks[0].needs == f"about {needed_seeds(contrast, 0.9, alpha=0.0125)} seeds"
    assert verdict.checks[1].needs is None


def test_needed_seeds_include_holms_correction(configs):
    """Alone open or not: among ten claims a check asks for the seeds of a tenth of the level."""
    loss = levels({**IN_LENGTH, "alibi": 1.5, "rope": 1.75}, spread=0.02)
    claims = [bounded_claim(configs, f"claim{i}", loss, 0, 0.02) for i in range(10)]
    verdicts = judge(claims, measure(claims, loss), train(claims), SEEDS)
    assert {(v.verdict, v.raw_verdict) for v in verdicts} == {("INCONCLUSIVE", "PASS")}
    contrast = verdicts[0].checks[0].contrast
    assert contrast is not None
    needed = needed_seeds(contrast, verdicts[0].checks[0].tau or 0, alpha=0.0025)
    assert verdicts[0].needs == ("more documents" if needed is None else f"about {needed} seeds")


def test_a_claim_needs_all_its_checks(configs):
    open_check = {**CHECK, "statement": "too close to call", "tau": 0.5}
    failing = {**CHECK, "statement": "far too much", "tau": 0.9}
    loss = levels(HOLDS, spread=0.05)
    assert verdict_of(load(configs, checks=[CHECK, open_check]), loss).verdict == "INCONCLUSIVE"
    verdict = verdict_of(load(configs, checks=[CHECK, open_check, failing]), loss)
    assert verdict.verdict == "FAIL"
    assert verdict.reason.startswith("far too much: ")
    assert [check.verdict for check in verdict.checks] == ["PASS", "INCONCLUSIVE", "FAIL"]
    p_values = [check.p or 0 for check in verdict.checks]
    assert p_values[0] < p_values[1] < p_values[2] == verdict.p


def bounded_claim(configs: Path, name: str, loss: Loss, side: int, alpha: float, n_checks: int = 1) -> Claim:
    """A claim whose tau is the confidence bound at `alpha` of its own contrast: p, or 1 - p, is exactly alpha."""
    theta = np.array([[loss("rope@512|last", s, d) - loss("alibi@512|last", s, d) for d in range(DOCS)] for s in SEEDS])
    check = {**CHECK, "tau": two_way(theta).bound(alpha)[side]}
    return load(configs, name, checks=[check, *[{**CHECK, "tau": -5}] * (n_checks - 1)])


def test_a_failure_among_checks_is_corrected_for_their_number(configs):
    """Upper bound at 0.010 below tau: FAIL of a lone check, not of one among five (0.025 / 5)."""
    loss = levels(HOLDS)
    assert verdict_of(bounded_claim(configs, "one", loss, 1, 0.010), loss).verdict == "FAIL"
    assert verdict_of(bounded_claim(configs, "five", loss, 1, 0.010, 5), loss).verdict == "INCONCLUSIVE"


def test_holm_turns_pass_into_inconclusive(configs):
    """p = 0.010 passes alone and among two (0.02), not among three (0.03)."""
    loss = levels(HOLDS)
    claims = [bounded_claim(configs, name, loss, 0, 0.010) for name in ("one", "two", "three")]
    for n, expected in ((1, "PASS"), (2, "PASS"), (3, "INCONCLUSIVE")):
        verdicts = judge(claims[:n], measure(claims[:n], loss), train(claims[:n]), SEEDS)
        assert {verdict.verdict for verdict in verdicts} == {expected}
        assert {verdict.raw_verdict for verdict in verdicts} == {"PASS"}
        assert verdicts[0].p == pytest.approx(0.010)
        assert verdicts[0].p_adjusted == pytest.approx(0.010 * n)
    assert "passes alone (p = 0.01), not among 3 claims" in verdicts[0].reason


def test_holm_turns_fail_into_inconclusive(configs):
    loss = levels(HOLDS)
    claims = [bounded_claim(configs, name, loss, 1, 0.010) for name in ("one", "two", "three")]
    for n, expected in ((1, "FAIL"), (2, "FAIL"), (3, "INCONCLUSIVE")):
        verdicts = judge(claims[:n], measure(claims[:n], loss), train(claims[:n]), SEEDS)
        assert {verdict.verdict for verdict in verdicts} == {expected}
        assert {verdict.raw_verdict for verdict in verdicts} == {"FAIL"}
    assert "fails alone (p = 0.01), not among 3 claims" in verdicts[0].reason


def test_holm_leaves_failures_and_strong_passes(configs):
    loss = levels(HOLDS)
    claims = [load(configs, "strong"), load_check(configs, "failing", tau=0.9), load_check(configs, "weak", tau=0.6)]
    verdicts = judge(claims, measure(claims, loss), train(claims), SEEDS)
    assert [verdict.verdict for verdict in verdicts] == ["PASS", "FAIL", "FAIL"]


def test_exact_claims_are_outside_holm(configs):
    loss = levels(HOLDS)
    exact = load(configs, "exact", checks=[{"statement": "it runs", "exact": "defined", "terms": ["a@L"]}])
    claims = [bounded_claim(configs, "one", loss, 0, 0.020), exact]
    verdicts = judge(claims, measure(claims, loss), train(claims), SEEDS)
    assert [verdict.verdict for verdict in verdicts] == ["PASS", "PASS"]
    assert verdicts[1].p is None


def test_two_looks_halve_alpha(configs):
    loss = levels(HOLDS)
    claim = bounded_claim(configs, "one", loss, 0, 0.020)
    inputs = ([claim], measure([claim], loss), train([claim]), SEEDS)
    assert judge(*inputs)[0].verdict == "PASS"
    assert judge(*inputs, alpha=0.0125)[0].verdict == "INCONCLUSIVE"


@pytest.mark.integration
@pytest.mark.parametrize(("seed_sd", "expected"), [(0.02, "PASS"), (0.3, "INCONCLUSIVE")])
def test_one_seed_with_a_known_deviation(configs, seed_sd, expected):
    claim = load_check(configs, seed_sd=seed_sd, seed_sd_n=6)
    verdict = verdict_of(claim, levels(HOLDS), seeds=[0])
    assert (verdict.verdict, verdict.one_seed) == (expected, True)
    assert any(note.startswith("one seed") for note in verdict.notes)
    loss = levels(HOLDS)
    theta = [loss("rope@512|last", 0, d) - loss("alibi@512|last", 0, d) for d in range(DOCS)]
    half = quantile(0.025, (3 * seed_sd, 5), (statistics.stdev(theta) / math.sqrt(DOCS), DOCS - 1))
    expected = (statistics.mean(theta) - half, statistics.mean(theta) + half)
    assert verdict.checks[0].interval == pytest.approx(expected, rel=1e-4)


def test_a_deviation_of_the_same_cell_is_pooled_and_only_then(configs):
    """The calibration's digest covers the run's recipe with its text, the dtype, and the evaluation."""
    loss = levels(HOLDS)
    plain = load_check(configs, seed_sd=0.05, seed_sd_n=10)
    facts = [replace(training, recipe="the recipe") for training in train([plain])]
    digests = {name: cell_digest(plain, facts[0]) for name in plain.runs}
    checks = [{**CHECK, "seed_sd": 0.05, "seed_sd_n": 10}]
    claim = load(configs, checks=checks, calibrated=digests)

    def contrast(changed: list[Training], of: Claim = claim) -> Contrast:
        found = judge([of], measure([of], loss), changed, SEEDS)[0].checks[0].contrast
        assert found is not None
        return found

    alone = judge([plain], measure([plain], loss), facts, SEEDS)[0].checks[0].contrast
    assert alone is not None
    assert (alone.seed_df, contrast(facts).seed_df) == (2, 11)
    assert contrast(facts).seed_sd == pytest.approx(math.sqrt((2 * alone.seed_sd**2 + 9 * 0.05**2) / 11))
    assert contrast([replace(t, recipe="another text") for t in facts]) == alone
    assert contrast([replace(t, dtype="fp32") for t in facts]) == alone
    assert contrast([*facts[:-1], replace(facts[-1], recipe="one seed")]) == alone
    one_run = load(configs, checks=checks, calibrated={"a": digests["a"]})
    assert contrast(facts, one_run) == alone


def test_authors_are_the_texts_of_a_verdict(configs):
    """Eight documents, three by one author: theta is the mean over six authors, with five degrees of freedom."""
    claim = load(configs)
    loss = levels(HOLDS, spread=0.1)
    authors = {f"document{d}": "the same" for d in range(3)}
    measurements = measure([claim], loss)
    measurements[0] = replace(measurements[0], clusters=authors)  # one evaluation that knows is enough
    (check,) = judge([claim], measurements, train([claim]), SEEDS)[0].checks
    theta = np.array([[loss("rope@512|last", s, d) - loss("alibi@512|last", s, d) for d in range(DOCS)] for s in SEEDS])
    texts = np.column_stack([theta[:, :3].mean(axis=1), theta[:, 3:]])
    assert check.theta == pytest.approx(texts.mean())
    assert (check.n_docs, check.n_clusters) == (8, 6)
    half = quantile(0.025, *sources_of_error(texts.tolist()))
    assert check.interval == pytest.approx((texts.mean() - half, texts.mean() + half), rel=1e-4)
    assert check.as_json()["clusters"] == 6


def test_size_is_informative(configs):
    """exp(0.5) = 1.65 against published ratios; the verdict stays."""
    for ratio, expected in (([1.5, 3], "matches"), ([2, 4], "smaller"), ([1.1, 1.3], "larger")):
        claim = load_check(configs, published={"ratio": ratio, "source": "table 1"})
        verdict = verdict_of(claim, levels(HOLDS))
        assert (verdict.verdict, verdict.checks[0].size) == ("PASS", expected)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(st.permutations(SEEDS), st.permutations(range(DOCS)))
def test_order_does_not_matter(configs, seeds, docs):
    """Seeds, documents and measurements may come in any order."""
    claim = load(configs)
    loss = levels(HOLDS, spread=0.1)
    measurements = [
        replace(
            m,
            rows={c: replace(r, nll={k: r.nll[k] for k in (list(r.nll)[d] for d in docs)}) for c, r in m.rows.items()},
        )
        for m in reversed(measure([claim], loss))
    ]
    one, other = verdict_of(claim, loss), judge([claim], measurements, train([claim]), seeds)[0]
    assert other.checks[0].theta == pytest.approx(one.checks[0].theta)
    assert other.checks[0].interval == pytest.approx(one.checks[0].interval)


def test_json_is_finite_and_has_the_contract(configs):
    claims = [load(configs), load_check(configs, "alone", seed_sd=None)]
    verdicts = judge(claims, measure(claims[:1], levels(HOLDS), seeds=[0]), train(claims, seeds=[0]), [0])
    for data in (verdict.as_json() for verdict in verdicts):
        assert json.loads(json.dumps(data, allow_nan=False)) == data
        assert {"claim", "verdict", "raw_verdict", "reason", "one_seed", "notes", "checks"} <= data.keys()
        assert {"statement", "theta", "tau", "interval", "p", "verdict", "size"} <= data["checks"][0].keys()
        assert data["checks"][0]["interval"] is None  # one seed without a known deviation
    passing = verdict_of(load(configs), levels(HOLDS)).as_json()
    assert passing["checks"][0]["interval"][0] > 0.2


# --- gates ---


def changed(measurements: list[Measurement], where: Callable[[str], bool], **changes: Any) -> list[Measurement]:
    """Rows whose term fits, changed."""
    return [
        replace(
            m,
            rows={c: replace(row, **changes) if where(spelling(m.evaluation, c)) else row for c, row in m.rows.items()},
        )
        for m in measurements
    ]


def test_gate_one_seed(configs):
    verdict = verdict_of(load(configs), levels(HOLDS), seeds=[0])
    assert verdict.verdict == "INCONCLUSIVE"
    assert "no seed_sd" in verdict.reason
    assert verdict.p == 1


def test_gate_no_seed(configs):
    assert "no seed was run" in verdict_of(load(configs), levels(HOLDS), seeds=[]).reason


def test_gate_documents(configs):
    verdict = verdict_of(load(configs), levels(HOLDS), docs=5)
    assert verdict.verdict == "INCONCLUSIVE"
    assert "5 documents: a verdict over texts needs at least 6" in verdict.reason
    assert verdict_of(load(configs), levels(HOLDS), docs=6).verdict == "PASS"


def test_gate_authors(configs):
    claim = load(configs)
    authors = {f"document{d}": f"author{d % 5}" for d in range(DOCS)}
    measurements = [replace(m, clusters=authors) for m in measure([claim], levels(HOLDS))]
    (verdict,) = judge([claim], measurements, train([claim]), SEEDS)
    assert verdict.verdict == "INCONCLUSIVE"
    assert "8 documents by 5 authors" in verdict.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"nll": {f"document{d}": math.nan for d in range(DOCS)}}, "a@4L, seed 0: a loss is not finite"),
        ({"nll": {f"document{d}": math.inf for d in range(DOCS)}}, "a@4L, seed 0: a loss is not finite"),
        ({"nll": {f"document{d}": 1.5 for d in range(DOCS - 1)}}, "documents differ"),
        ({"targets": "others"}, "targets differ under last: b@4L, seed 0 against a@4L, seed 0"),
        ({"targets": None}, "targets differ under last"),
        ({"status": "undefined", "reason": "past the table"}, "a@4L, seed 0: undefined (past the table)"),
    ],
)
def test_gate_rows(configs, changes, reason):
    claim = load(configs)
    measurements = changed(measure([claim], levels(HOLDS)), lambda term: term == "alibi@512|last", **changes)
    (verdict,) = judge([claim], measurements, train([claim]), SEEDS)
    assert (verdict.verdict, verdict.p) == ("INCONCLUSIVE", 1)
    assert reason in verdict.reason
    json.dumps(verdict.as_json(), allow_nan=False)


def test_prefix_scores_other_targets_at_every_ctx(configs):
    """A difference of differences under `prefix`: targets agree within a ctx, and that is enough."""
    claim = load_check(configs, contrast={"b@4L": 1, "a@4L": -1, "b@L": -1, "a@L": 1}, protocol="prefix")
    table = {"alibi@128|prefix": 1.5, "rope@128|prefix": 1.5, "alibi": 1.5, "rope": 2.0}
    measurements = [
        replace(m, rows={c: replace(row, targets=f"the first {c}") for c, row in m.rows.items()})
        for m in measure([claim], levels(table))
    ]
    assert judge([claim], measurements, train([claim]), SEEDS)[0].verdict == "PASS"
    measurements = changed(measurements, lambda term: term == "rope@512|prefix", targets="others")
    (verdict,) = judge([claim], measurements, train([claim]), SEEDS)
    assert "targets differ under prefix at ctx 512" in verdict.reason


def test_gate_targets_without_a_digest(configs):
    claim = load(configs)
    measurements = changed(measure([claim], levels(HOLDS)), lambda term: True, targets=None)
    assert "targets differ" in judge([claim], measurements, train([claim]), SEEDS)[0].reason


def test_gate_no_documents(configs):
    assert "no document was scored" in verdict_of(load(configs), levels(HOLDS), docs=0).reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"val_bpb": 3.01}, "a, seed 1: untrained, 3.01 bits per byte against at most 3"),
        ({"best_val_loss": 1.37}, "a, seed 1: overfitted, the validation loss rose by 0.030"),
        ({"train_loss": 1.1}, "a, seed 1: overfitted, the validation loss is 0.30 nats above the training loss"),
        ({"val_loss": math.nan}, "a, seed 1: a training or validation loss is not finite"),
        ({"dtype": "fp32"}, "trained in different dtypes: b in bf16, a in fp32"),
    ],
)
def test_gate_training(configs, changes, reason):
    claim = load(configs)
    facts = [replace(t, **changes) if (t.run, t.seed) == (claim.runs["a"], 1) else t for t in train([claim])]
    (verdict,) = judge([claim], measure([claim], levels(HOLDS)), facts, SEEDS)
    assert (verdict.verdict, verdict.p) == ("INCONCLUSIVE", 1)
    assert reason in verdict.reason
    assert verdict.checks[0].theta == pytest.approx(0.5, abs=0.03)  # the numbers are shown all the same


def test_gates_of_training_have_room(configs):
    """Just inside every limit is fine."""
    claim = load(configs)
    facts = [replace(t, val_bpb=3.0, best_val_loss=1.381, train_loss=1.151) for t in train([claim])]
    assert judge([claim], measure([claim], levels(HOLDS)), facts, SEEDS)[0].verdict == "PASS"


def test_gate_of_a_claim_wins_over_the_cells(configs):
    claim = load(configs, gates={"max_bpb": 1.5})
    assert "untrained" in verdict_of(claim, levels(HOLDS)).reason


def test_gate_missing(configs):
    claim = load(configs)
    measurements, facts = measure([claim], levels(HOLDS)), train([claim])
    unmeasured = [m for m in measurements if (pos_of(m.evaluation), m.seed) != ("alibi", 2)]
    assert "a@4L, seed 2: not measured" in judge([claim], unmeasured, facts, SEEDS)[0].reason
    untrained = [t for t in facts if (t.run, t.seed) != (claim.runs["b"], 2)]
    assert "b, seed 2: not trained" in judge([claim], measurements, untrained, SEEDS)[0].reason


def test_gate_evaluation_in_low_precision(configs):
    claim = load(configs)
    measurements = [replace(m, dtype="bf16") for m in measure([claim], levels(HOLDS))]
    (verdict,) = judge([claim], measurements, train([claim]), SEEDS)
    assert verdict.verdict == "INCONCLUSIVE"
    assert "evaluated in bf16" in verdict.reason


def test_gate_not_comparable_in_length(configs):
    """The runs are 0.3 nats apart at L: too far for 0.25, near enough for a claim that says 0.35."""
    apart = levels({**HOLDS, "rope@128|last": 1.8}, spread=0.001)
    verdict = verdict_of(load(configs), apart)
    assert verdict.verdict == "INCONCLUSIVE"
    assert "b is 0.30 nats behind a at the training length" in verdict.reason
    assert verdict.checks[0].in_length == pytest.approx(0.3, abs=0.03)
    assert verdict_of(load(configs, gates={"gap": 0.35}), apart).verdict == "PASS"


def test_no_length_gate_in_length_or_within_a_run(configs):
    in_length = load_check(configs, contrast={"b@L": 1, "a@L": -1})
    assert verdict_of(in_length, levels({"alibi@128|last": 1.0, "rope@128|last": 2.0})).verdict == "PASS"
    within = load_check(configs, contrast={"b@4L": 1, "b+ntk:4@4L": -1})
    table = {"rope@128|last": 0.5, "rope@512|last": 2.0, "rope+ntk:4@512|last": 1.5}
    verdict = verdict_of(within, levels(table))
    assert (verdict.verdict, verdict.checks[0].in_length) == ("PASS", None)


@pytest.mark.parametrize(
    ("spectrum", "reason"),
    [("None None", "b+ntk:4@4L: spectrum unchanged by the scaling"), (None, "no spectrum was recorded")],
)
def test_gate_spectrum(configs, spectrum, reason):
    claim = load_check(configs, contrast={"b@4L": 1, "b+ntk:4@4L": -1})
    table = {"rope@128|last": 0.5, "rope@512|last": 2.0, "rope+ntk:4@512|last": 1.5}
    measurements = measure([claim], levels(table))
    assert judge([claim], measurements, train([claim]), SEEDS)[0].verdict == "PASS"
    measurements = changed(measurements, lambda term: "+ntk" in term, spectrum=spectrum)
    (verdict,) = judge([claim], measurements, train([claim]), SEEDS)
    assert verdict.verdict == "INCONCLUSIVE"
    assert reason in verdict.reason


def test_a_dynamic_scaling_may_leave_the_spectrum_up_to_L(configs):
    claim = load_check(configs, contrast={"b@L": 1, "b+dynamic_ntk@L": -1}, tau=-0.1)
    table = {"rope@128|last": 1.5, "rope+dynamic_ntk:1@128|last": 1.5}
    measurements = changed(measure([claim], levels(table)), lambda term: True, spectrum="the same")
    assert judge([claim], measurements, train([claim]), SEEDS)[0].verdict == "PASS"


def test_gate_learning_rate(configs):
    favoured = {"a": {0.5: 1.50, 1: 1.40, 2: 1.385}}  # 0.015 better at the edge
    verdict = verdict_of(load(configs, gates={"lr_check": favoured}), levels(HOLDS))
    assert verdict.verdict == "INCONCLUSIVE"
    assert "a: its learning-rate check prefers 2 times train.lr by 0.015 nats" in verdict.reason
    close = {"a": {0.5: 1.50, 1: 1.40, 2: 1.395}}
    assert verdict_of(load(configs, gates={"lr_check": close}), levels(HOLDS)).verdict == "PASS"


def test_what_was_not_checked_is_said(configs):
    (configs / "cell" / "toy.yaml").write_text(yaml.safe_dump({**CELL, "max_bpb": None, "lr_check": None}))
    verdict = verdict_of(load(configs), levels(HOLDS))
    assert verdict.verdict == "PASS"
    assert [note.partition(":")[0] for note in verdict.notes] == ["lr unchecked", "training level unchecked"]


# --- exact checks ---

EDGE = {"statement": "undefined past the table", "exact": "undefined", "terms": ["a@2L", "a@4L"]}
SAME = {"statement": "dynamic is plain", "exact": "identical", "terms": ["b@L", "b+dynamic_ntk@L"]}


def exact_verdict(
    configs: Path, check: dict[str, Any], change: Callable[[list[Measurement]], list[Measurement]]
) -> Verdict:
    claim = load(configs, checks=[check])
    return judge([claim], change(measure([claim], lambda t, s, d: 1.5 + 0.1 * d)), [], SEEDS)[0]


def test_undefined(configs):
    def past(term: str) -> bool:
        return "@128" not in term

    def undefine(rows: list[Measurement], reason: str | None = "the table ends at 128") -> list[Measurement]:
        return changed(rows, past, status="undefined", nll={}, reason=reason)

    verdict = exact_verdict(configs, EDGE, undefine)
    assert (verdict.verdict, verdict.checks[0].reason) == ("PASS", "undefined: the table ends at 128")
    assert (verdict.notes, verdict.one_seed) == ((), False)
    assert exact_verdict(configs, EDGE, lambda rows: rows).verdict == "FAIL"
    assert exact_verdict(configs, EDGE, lambda rows: undefine(rows, None)).verdict == "FAIL"
    last_seed = exact_verdict(configs, EDGE, lambda rows: undefine(rows[:-1]) + rows[-1:])
    assert (last_seed.verdict, "seed 2" in last_seed.reason) == ("FAIL", True)


def test_defined(configs):
    check = {"statement": "it runs", "exact": "defined", "terms": ["a@L"]}
    assert exact_verdict(configs, check, lambda rows: rows).verdict == "PASS"
    broken = exact_verdict(configs, check, lambda rows: changed(rows, lambda t: True, status="undefined"))
    assert broken.verdict == "FAIL"
    diverged = exact_verdict(configs, check, lambda rows: changed(rows, lambda t: True, nll={"d": math.nan}))
    assert (diverged.verdict, "not finite" in diverged.reason) == ("FAIL", True)


@pytest.mark.parametrize(
    ("changes", "expected", "reason"),
    [
        ({"spectrum": "None None"}, "PASS", "the check holds"),
        ({"spectrum": "another"}, "FAIL", "another spectrum"),
        (
            {"spectrum": "None None", "nll": {f"document{d}": 1.6 for d in range(DOCS)}},
            "FAIL",
            "differs from b@L by 0.6",
        ),
        ({"spectrum": "None None", "targets": "others"}, "INCONCLUSIVE", "different targets"),
    ],
)
def test_identical(configs, changes, expected, reason):
    verdict = exact_verdict(configs, SAME, lambda rows: changed(rows, lambda term: "+dynamic" in term, **changes))
    assert verdict.verdict == expected
    assert reason in verdict.reason


def test_identical_needs_a_spectrum(configs):
    verdict = exact_verdict(configs, SAME, lambda rows: changed(rows, lambda term: True, spectrum=None))
    assert verdict.verdict == "INCONCLUSIVE"


def test_exact_not_measured(configs):
    verdict = exact_verdict(configs, SAME, lambda rows: rows[:-1])
    assert (verdict.verdict, "b+dynamic_ntk@L, seed 2: not measured" in verdict.reason) == ("INCONCLUSIVE", True)


def test_an_exact_failure_is_one_whatever_the_gates_say(configs):
    """One seed forbids a verdict on the contrast, not on the identity."""
    claim = load(configs, checks=[SAME, CHECK])
    loss = levels({**HOLDS, "rope+dynamic_ntk:1": 1.5})
    measurements = measure([claim], loss, seeds=[0])
    verdict = judge([claim], measurements, train([claim], seeds=[0]), [0])[0]
    assert (verdict.verdict, "another spectrum" in verdict.reason) == ("FAIL", True)


# --- calibration ---


def test_calibration_by_hand(configs):
    """The standard deviation over seeds of the mean over documents; incomplete seeds and exact checks are left out."""
    claim = load(configs, checks=[SAME, CHECK])
    seeds, offsets = [100, 101, 102, 103], [0.1, 0.4, 0.2, 0.9]

    def loss(term: str, seed: int, doc: int) -> float:
        return 1.5 + doc + (offsets[seed - 100] if term == "rope@512|last" else 0)

    measurements = measure([claim], loss, seeds=seeds)
    assert calibration(claim, measurements) == {1: (pytest.approx(statistics.stdev(offsets)), 4)}
    incomplete = [m for m in measurements if (pos_of(m.evaluation), m.seed) != ("alibi", 103)]
    assert calibration(claim, incomplete) == {1: (pytest.approx(statistics.stdev(offsets[:3])), 3)}
    assert calibration(claim, [m for m in measurements if m.seed == 100]) == {}
