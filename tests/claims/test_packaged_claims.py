"""The packaged claims: they hold on numbers as measured once, fail on reversed ones, and share their runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import yaml

from ropelab import reproduce
from ropelab.claims import Claim, ContrastCheck, claim_path, judge, load_claim, load_set, packaged_claims, required
from tests.claims.synthetic import CONFIGS, SEEDS, measure, noise, pos_of, train

PACKAGED = packaged_claims(CONFIGS)

# Perplexities of one small model per encoding (0.8M parameters, bytes, L=128), as measured once: all claims hold there.
PPL = {
    "alibi@128|nonoverlapping": 6.20,
    "alibi@512|nonoverlapping": 6.04,
    "alibi@1024|nonoverlapping": 6.03,
    "rope@128|nonoverlapping": 5.30,
    "rope@512|nonoverlapping": 10.2,
    "rope@1024|nonoverlapping": 16.4,
    "sinusoidal@128|nonoverlapping": 6.84,
    "sinusoidal@256|nonoverlapping": 14.2,
    "sinusoidal@512|nonoverlapping": 23.6,
    "sinusoidal@1024|nonoverlapping": 35.0,
    "alibi@128|last": 4.94,
    "alibi@1024|last": 4.94,
    "alibi/window@1024|last": 4.92,
    "rope@128|last": 4.43,
    "rope@256|last": 9.05,
    "rope@512|last": 17.8,
    "rope@1024|last": 29.6,
    "rope+linear:4@128|last": 21.6,
    "rope+ntk:4@128|last": 4.67,
    "rope+ntk:4@256|last": 4.73,
    "rope+ntk:4@512|last": 9.42,
    "rope+yarn:4@128|last": 5.62,
    "rope+yarn:4@512|last": 5.95,
    "rope+yarn:8@1024|last": 7.39,
    "rope+linear:8@1024|last": 32.2,
    "rope+dynamic_ntk:1@128|last": 4.43,
    "rope+dynamic_ntk:1@256|last": 5.9,
    "rope+ntk_by_parts:8@1024|last": 8.94,
    "t5@128|last": 5.71,
    "t5@512|last": 10.3,
    "kerple_log@128|last": 4.62,
    "kerple_log@1024|last": 4.80,
    "none@128|last": 9.36,
    "none/unigram@128|last": 23.0,
}


def packaged(name: str) -> Claim:
    return load_claim(claim_path(name, CONFIGS), CONFIGS)


def as_measured(term: str, seed: int, doc: int) -> float:
    nats = math.log(PPL.get(term, 5.0))
    return nats + 0.1 * noise(seed) + 0.3 * noise(doc) + 0.002 * noise(seed, doc, int(nats * 1000))


def test_the_demo_is_packaged():
    demo = "alibi-flat order sin-breaks rope-breaks learned-edge pi-cost ntk-free ntk-spent yarn-8x window early-token"
    assert {f"c-{name}" for name in demo.split()} <= set(PACKAGED)


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_claims_hold_on_the_measured_table(name):
    """Signs, ctxs and thresholds of the files are those of the statements."""
    claim = packaged(name)
    measurements = []
    for m in measure([claim], as_measured):
        rows = dict(m.rows)
        for ctx, row in m.rows.items():
            if pos_of(m.evaluation) == "learned" and ctx > 128:
                rows[ctx] = replace(row, status="undefined", reason="the table ends at 128", nll={})
            elif m.evaluation.scaling == "dynamic_ntk" and ctx == 128:
                plain = {d: as_measured("rope@128|last", m.seed, i) for i, d in enumerate(row.nll)}
                rows[ctx] = replace(row, spectrum="None None", nll=plain)
        measurements.append(replace(m, rows=rows))
    (verdict,) = judge([claim], measurements, train([claim]), SEEDS)
    assert verdict.verdict == "PASS", verdict.reason


CONTRASTS = [
    (name, i) for name in PACKAGED for i, c in enumerate(packaged(name).checks) if isinstance(c, ContrastCheck)
]


@pytest.mark.parametrize(("name", "index"), CONTRASTS)
def test_packaged_contrasts_can_fail(name, index):
    """Each check fails when its losses are the other way round."""
    claim = packaged(name)
    check = claim.checks[index]
    assert isinstance(check, ContrastCheck)
    claim = replace(claim, checks=(check,))
    weights = {(claim.evaluation(term), term.ctx): weight for term, weight in check.terms}
    measurements = []
    for m in measure([claim], as_measured):
        rows = {}
        for ctx, row in m.rows.items():
            weight = weights.get((m.evaluation.key, ctx), 0.0)
            rows[ctx] = replace(row, nll={d: 2 - weight + 0.01 * noise(m.seed, i) for i, d in enumerate(row.nll)})
        measurements.append(replace(m, rows=rows))
    (verdict,) = judge([claim], measurements, train([claim]), SEEDS)
    assert verdict.verdict == "FAIL", verdict.reason


def test_packaged_claims_share_their_runs():
    """The whole tier trains seven models a seed, on equal terms but for the encoding."""
    evaluations = required([packaged(name) for name in PACKAGED])
    used = ["alibi", "kerple_log", "learned", "none", "rope", "sinusoidal", "t5"]
    assert sorted({pos_of(e) for e in evaluations}) == used
    assert len({e.run for e in evaluations}) == len(used)
    assert len({tuple(text for text in e.run if not text.startswith("pos=")) for e in evaluations}) == 1
    assert len({e.key for e in evaluations}) == len(evaluations)


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_claims_are_explained(name):
    """Two lines of comment or more before the first key; a paper named."""
    lines = (CONFIGS / "claim" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert all(line.startswith("# ") for line in lines[:2])
    claim = packaged(name)
    assert "20" in claim.source
    assert claim.robustness
    for check in claim.checks:
        if isinstance(check, ContrastCheck) and check.published:
            assert check.published_source


def test_the_demo_is_what_its_file_says():
    """Every claim, and one evaluation per line over 128 to 1024 tokens; every run of a claim is a run of the set."""
    lines = yaml.safe_load((CONFIGS / "set" / "demo.yaml").read_text(encoding="utf-8"))
    found = load_set("demo", CONFIGS)
    assert [claim.id for claim in found.claims] == lines["claims"]
    assert len(found.evaluations) == len(lines["evaluations"])
    assert {evaluation.ctxs for evaluation in found.evaluations} == {(128, 256, 512, 1024)}
    runs = {evaluation.run for evaluation in found.evaluations}
    assert len(runs) == len(lines["runs"])
    assert {run for claim in found.claims for run in claim.runs.values()} <= runs


def test_the_plan_of_the_demo_measures_nothing_twice():
    """What the claims need is united with what the set adds; the set comes first."""
    plan, found = reproduce.plan_set("demo"), load_set("demo", CONFIGS)
    assert (plan.title, tuple(plan.claims)) == (found.title, found.claims)
    assert plan.evaluations[: len(found.evaluations)] == list(found.evaluations)
    measured = {evaluation.key: set(evaluation.ctxs) for evaluation in plan.evaluations}
    assert len(measured) == len(plan.evaluations)
    for evaluation in required(found.claims):
        assert set(evaluation.ctxs) <= measured[evaluation.key]


def test_the_plan_of_a_set_without_evaluations_is_that_of_its_claims(tmp_path):
    """Nothing is added but the rungs of the ladder that no check names."""
    path = tmp_path / "ours.yaml"
    path.write_text("title: An order\nclaims: [c-order]\n")
    plan = reproduce.plan_set(str(path))
    assert (plan.title, plan.claims) == ("An order", [packaged("c-order")])
    needed = {evaluation.key for evaluation in required(plan.claims)}
    assert needed
    assert {evaluation.key: evaluation.ctxs for evaluation in plan.evaluations} == dict.fromkeys(
        needed, (128, 256, 512, 1024)
    )
