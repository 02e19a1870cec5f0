"""Claims: files that are refused, what has to be measured, verdicts on synthetic measurements with known answers."""

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
from scipy.stats import t

from ropelab.claims import (
    Claim,
    ContrastCheck,
    Evaluation,
    ExactCheck,
    Measurement,
    Row,
    Training,
    Verdict,
    calibration,
    claim_path,
    judge,
    load_cell,
    load_claim,
    packaged_claims,
    parse_number,
    required,
)
from ropelab.stats import two_way

CONFIGS = Path(__file__).parent.parent / "configs"
PACKAGED = packaged_claims(CONFIGS)
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


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A folder of configurations with one cell and the names of four scalings."""
    for name in ("claim", "cell", "scaling"):
        (tmp_path / name).mkdir()
    for name in ("none", "ntk", "yarn", "dynamic_ntk"):
        (tmp_path / "scaling" / f"{name}.yaml").touch()
    (tmp_path / "cell" / "toy.yaml").write_text(yaml.safe_dump(CELL))
    return tmp_path


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
    window = "/window" if evaluation.window else ""
    return f"{pos_of(evaluation)}{scaling}{window}@{ctx}|{evaluation.protocol}"


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


# In length equal, beyond it alibi ahead of rope by 0.5 nats: the claim holds. Or level, or the other way round.
IN_LENGTH = {"alibi@128|last": 1.5, "rope@128|last": 1.5}
HOLDS = {**IN_LENGTH, "alibi": 1.5, "rope": 2.0}
SMALL = {**IN_LENGTH, "alibi": 1.5, "rope": 1.6}
REVERSED = {**IN_LENGTH, "alibi": 2.0, "rope": 1.5}


# --- numbers and terms ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (0.25, 0.25),
        (-2, -2.0),
        ("1e-2", 0.01),
        ("-ln(1.05)", -0.04879016416943201),
        ("ln(2)", 0.6931471805599453),
        ("+ ln( 10 )", 2.302585092994046),
        ("31.58/18.41", 1.7153720803910918),
        ("-ln(31.58/18.41)", -0.53963001358),
    ],
)
def test_numbers(text, value):
    assert parse_number(text) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(
    "text",
    [None, True, math.nan, math.inf, [1], "", "ln", "ln()", "ln(2", "ln2)", "2)", "ln(0)", "ln(-1)", "1/0", "1e999"],
)
def test_what_is_no_number(text):
    with pytest.raises(ValueError, match="write one such as"):
        parse_number(text)


@pytest.mark.parametrize("text", ["__import__('os')", "2*3", "--1", "log(2)", "1 2", "1; import os"])
def test_nothing_is_evaluated(text):
    with pytest.raises(ValueError, match="write one such as"):
        parse_number(text)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    run=st.sampled_from(["a", "b"]),
    scaling=st.sampled_from([None, "ntk", "yarn", "dynamic_ntk", "none"]),
    factor=st.sampled_from([None, "1", "4", "2.5"]),
    window=st.booleans(),
    ctx=st.sampled_from([("L", 128), ("2L", 256), ("8L", 1024), ("512", 512)]),
    protocol=st.sampled_from([None, "nonoverlapping", "sliding"]),
)
def test_terms(configs, run, scaling, factor, window, ctx, protocol):
    """Every part of the grammar comes out as it went in."""
    if scaling in (None, "none"):
        factor = None
    elif scaling in ("ntk", "yarn") and factor is None:
        factor = "8"
    text = run + (f"+{scaling}" if scaling else "") + (f":{factor}" if factor else "")
    text += ("/window" if window else "") + f"@{ctx[0]}" + (f"|{protocol}" if protocol else "")
    claim = load(configs, checks=[{"statement": "it runs", "exact": "defined", "terms": [text]}])
    check = claim.checks[0]
    assert isinstance(check, ExactCheck)
    (term,) = check.terms
    expected_factor = float(factor) if factor else 1.0 if scaling == "dynamic_ntk" else None
    expected = (text, run, scaling, expected_factor, window, ctx[1], protocol or "last")
    assert (term.text, term.run, term.scaling, term.factor, term.window, term.ctx, term.protocol) == expected


# --- files that are refused ---


def with_check(**changes: Any) -> dict[str, Any]:
    return {"checks": [{key: value for key, value in {**CHECK, **changes}.items() if value is not None}]}


def with_terms(*terms: str) -> dict[str, Any]:
    return {"checks": [{"statement": "x", "exact": "defined", "terms": list(terms)}]}


BAD = [
    ({"statment": "x"}, "statment: unknown key; did you mean 'statement'?"),
    ({"statement": None}, "statement: must be a text, not nothing"),
    ({"source": 7}, "source: must be a text, not '7'"),
    ({"tier": "gpus"}, "tier: 'gpus' is unknown; did you mean 'gpu'?"),
    ({"cell": "toi"}, "cell: 'toi' is unknown; did you mean 'toy'?"),
    ({"cell": "missing.yaml"}, "missing.yaml: cannot be read"),
    ({"protocol": "slidin"}, "protocol: 'slidin' is unknown; did you mean 'sliding'?"),
    ({"runs": ["pos=rope"]}, "runs must be a mapping"),
    ({"runs": {"a": []}}, "runs.a: must be a list with at least one item"),
    ({"runs": {"a": ["alibi"]}}, "runs.a: 'alibi' is no override; write KEY=VALUE"),
    ({"runs": {"a": ["seed=3"]}}, "runs.a: 'seed=3' does not describe a run"),
    ({"runs": {"a": ["eval.tokens=3"]}}, "runs.a: 'eval.tokens=3' does not describe a run"),
    ({"runs": {"a": ["train.ctx=many"]}}, "runs.a: train.ctx must be a whole number"),
    ({"runs": {"a b": ["pos=rope"]}}, "runs.a b: a run's name"),
    ({"checks": []}, "checks: must be a list with at least one item"),
    ({"checks": ["x"]}, "checks[0] must be a mapping"),
    ({"gates": {"gapp": 1}}, "gates.gapp: unknown key; did you mean 'gap'?"),
    ({"gates": {"gap": -1}}, "gates.gap: must be >= 0, not -1"),
    ({"gates": {"lr_check": {"a": {1: 2.0, 2: 2.1}}}}, "gates.lr_check.a: needs the losses at 1 and at a smaller"),
    ({"gates": {"lr_check": {"a": {"half": 2.0}}}}, "gates.lr_check.a: needs the losses at 1 and at a smaller"),
    ({"gates": {"lr_check": {"a": {0.5: "x", 1: 2, 2: 3}}}}, "gates.lr_check.a.0.5: 'x' is no number"),
    (with_check(taus=0), "checks[0].taus: unknown key; did you mean 'tau'?"),
    (with_check(tau=None), "checks[0].tau: 'None' is no number"),
    (with_check(tau="5%"), "checks[0].tau: '5%' is no number; write one such as"),
    (with_check(protocol="lastt"), "checks[0].protocol: 'lastt' is unknown; did you mean 'last'?"),
    (with_check(seed_sd=0), "checks[0].seed_sd: must be > 0 or null"),
    (with_check(seed_sd_n=4), "checks[0].seed_sd_n: must be a whole number >= 5, not '4'"),
    (with_check(published={"ratio": [1, 2]}), "checks[0].published.source: must be a text"),
    (with_check(published={"ratio": [2, 1], "source": "t"}), "checks[0].published.ratio: must be [lowest, highest]"),
    (with_check(published={"ratio": ["a", 1], "source": "t"}), "checks[0].published.ratio: 'a' is no number"),
    (with_check(published={"ratio": 2, "source": "t"}), "checks[0].published.ratio: must be a list"),
    (with_check(contrast={"b@4L": 1}), "weights must sum to 0 on the same targets, not to 1 (last)"),
    (with_check(contrast={"b@4L": 1, "a@4L|sliding": -1}), "weights must sum to 0 on the same targets"),
    (with_check(contrast={"b@4L": 1, "a@4L": -0.9}), "not to 0.1"),
    (with_check(contrast={"b@4L": 1, "a@4L": -1, "a@L": 0}), "a@L has weight 0"),
    (with_check(contrast={"b@4L": 1, "b@512": -1}), "b@512 and b@4L are the same"),
    (with_check(contrast={"b@4L|prefix": 1, "b@L|prefix": -1}), "weights must sum to 0 on the same targets"),
    (with_check(contrast={"b@4L": "one", "a@4L": -1}), "checks[0].contrast.b@4L: 'one' is no number"),
    (with_check(exact="identicl", contrast=None, tau=None, terms=["a@L"]), "did you mean 'identical'?"),
    (with_check(exact="identical", contrast=None, tau=None, terms=["a@L"]), "identical needs two terms"),
    (with_check(exact="identical"), "checks[0].contrast: unknown key"),
    (with_terms("c@L"), "checks[0].terms: c@L: run 'c' is not in runs; one of a, b"),
    (with_terms("a"), "a: is no term; write RUN[+SCALING[:FACTOR]][/window]@CTX[|PROTOCOL]"),
    (with_terms("a@3x"), "ctx '3x' is not understood; write L, 8L or a number of tokens"),
    (with_terms("a@0L"), "ctx '0L' is not understood"),
    (with_terms("a@16L"), "ctx 2048 is beyond the cell's longest, 1024"),
    (with_terms("a@L|lst"), "protocol 'lst' is unknown; did you mean 'last'?"),
    (with_terms("a+ntk@L"), "scaling ntk needs a factor, such as ntk:4"),
    (with_terms("a+ntk:half@L"), "'half' is no number"),
    (with_terms("a+ntk:0.5@L"), "factor must be >= 1, not 0.5"),
    (with_terms("a+none:2@L"), "scaling none has no factor"),
    (with_terms("a+yarm:4@L"), "scaling 'yarm' is unknown; did you mean 'yarn'?"),
    (with_terms("a@500|nonoverlapping"), "nonoverlapping needs a ctx that divides 1024; nearest 512"),
    (with_terms("a@40"), "last scores 32 targets and needs a ctx of at least 64, not 40"),
    (with_terms("a@40|sliding"), "sliding moves by 64 targets"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_bad_claims_are_refused_in_one_line(configs, changes, message):
    with pytest.raises(ValueError) as error:
        load(configs, **changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert ".yaml: " in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("statement: [", "mine.yaml: no valid YAML"),
        ("- a\n- b\n", "mine.yaml: the file must be a mapping"),
        ("", "mine.yaml: the file must be a mapping, not nothing"),
        ("runs: {a: [pos=rope], a: [pos=alibi]}", "mine.yaml: a: given twice (line 1); keep one"),
        ("checks:\n  - contrast: {a@L: 1, a@L: -1}\n", "a@L: given twice (line 2)"),
        ("? [a]\n: 1\n", "no valid YAML"),
        ("x: &x [*x]", "mine.yaml: x: unknown key"),
        ("x: !!python/object/apply:os.getcwd []", "no valid YAML"),
    ],
)
def test_bad_yaml(configs, text, message):
    path = configs / "claim" / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_claim(path, configs)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ["model=tiny"]}, "toy.yaml: train: must set train.ctx=TOKENS"),
        ({"train": None}, "toy.yaml: train: must be a list"),
        ({"eval": {"ctx": ["L"]}}, "toy.yaml: eval.tokens: must be a whole number >= 1, not nothing"),
        ({"eval": {"ctx": [], "tokens": 5}}, "toy.yaml: eval.ctx: must be a list"),
        ({"eval": {"ctx": ["2x"], "tokens": 5}}, "toy.yaml: eval.ctx: ctx '2x' is not understood"),
        (
            {"eval": {"ctx": ["L"], "tokens": 5, "token": 5}},
            "toy.yaml: eval.token: unknown key; did you mean 'tokens'?",
        ),
        ({"max_bpb": "low"}, "toy.yaml: max_bpb: 'low' is no number"),
    ],
)
def test_bad_cells(tmp_path, changes, message):
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump({**CELL, **changes}))
    with pytest.raises(ValueError) as error:
        load_cell(path)
    assert str(error.value).startswith(message)


def test_names_of_claims(configs):
    load(configs, "c-order")
    assert packaged_claims(configs) == ["c-order"]
    assert claim_path("c-order", configs) == configs / "claim" / "c-order.yaml"
    assert claim_path("their.yaml", configs) == Path("their.yaml")
    with pytest.raises(ValueError, match="no claim 'c-ordr'; did you mean 'c-order'"):
        claim_path("c-ordr", configs)


def test_a_cell_beside_the_claim(configs):
    (configs / "claim" / "own.yaml").write_text(yaml.safe_dump({**CELL, "train": ["train.ctx=64"]}))
    assert load(configs, cell="own.yaml").train_ctx("a") == 64


# --- what to measure ---


def test_a_run_is_its_overrides_in_any_order(configs):
    """The claim's overrides win over the cell's; equal runs are equal tuples."""
    one = load(configs, "one", runs={"a": ["pos=alibi", "train.lr=1e-3"], "b": ["pos=rope"]})
    two = load(configs, "two", runs={"a": ["train.lr=1e-3", "pos=alibi"], "b": ["pos=rope"]})
    assert one.runs["a"] == ("model=tiny", "pos=alibi", "train.ctx=128", "train.lr=1e-3") == two.runs["a"]
    assert {e.run for e in required([one, two])} == set(one.runs.values())


def test_L_is_the_runs_own(configs):
    claim = load(configs, runs={"a": ["pos=alibi", "train.ctx=64"], "b": ["pos=rope"]})
    check = claim.checks[0]
    assert isinstance(check, ContrastCheck)
    assert {term.text: term.ctx for term, _ in check.terms} == {"b@4L": 512, "a@4L": 256}


def test_required_is_without_repetition(configs):
    """Two claims on the same runs: each evaluation once, with all its ctxs; L for comparing the runs in length."""
    one = load(configs, "one")
    two = load_check(configs, "two", contrast={"b@2L": 1, "b+ntk:4@2L": -1})
    three = load_check(configs, "three", contrast={"b/window@8L": 1, "b@8L|last": -1})
    found = {spelling(e, 0).replace("@0", ""): e.ctxs for e in required([one, two, three, one])}
    assert found == {
        "rope|last": (128, 256, 512, 1024),
        "alibi|last": (128, 512),
        "rope+ntk:4|last": (256,),
        "rope/window|last": (1024,),
    }


def test_required_says_how_to_evaluate(configs):
    claim = load_check(configs, contrast={"b/window@8L": 1, "b@8L": -1})
    windowed, plain = required([claim])
    shared = {"eval.dtype=fp32", "eval.last=32", "eval.max_ctx=1024", "eval.protocol=last", "eval.stride=64"}
    assert set(plain.overrides) == shared | {"eval.tokens=4096"}
    assert set(windowed.overrides) == shared | {"eval.tokens=4096", "eval.window=128"}


def test_a_check_in_length_needs_no_further_ctx(configs):
    assert [e.ctxs for e in required([load_check(configs, contrast={"b@L": 1, "a@L": -1})])] == [(128,), (128,)]


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
    seed_means = [statistics.mean(row) for row in theta]
    doc_means = [statistics.mean(column) for column in zip(*theta, strict=True)]
    by_seed, by_doc = statistics.variance(seed_means) / 2, statistics.variance(doc_means) / 6
    (check,) = verdict.checks
    assert check.theta == pytest.approx(statistics.mean(seed_means))
    df = (by_seed + by_doc) ** 2 / (by_seed**2 / 1 + by_doc**2 / 5)
    half = t.ppf(0.975, df) * math.sqrt(by_seed + by_doc)
    assert check.interval == pytest.approx((check.theta - half, check.theta + half))
    assert check.p == pytest.approx(t.sf((check.theta - 0.2) / math.sqrt(by_seed + by_doc), df))
    assert (check.n_seeds, check.n_docs, check.in_length) == (2, 6, 0)
    assert (verdict.verdict, verdict.one_seed) == ("PASS", False)


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


def test_needed_seeds_are_counted_from_the_seeds(configs):
    """Documents agree, seeds do not: more seeds are what helps, and their number follows from the variance."""
    offsets = [0.0, 0.2, 0.4]
    claim = load_check(configs, tau=0.1)
    verdict = verdict_of(claim, lambda t, s, d: 1.5 + (offsets[s] if t.startswith("rope@512") else 0) + 0.001 * (d % 2))
    # theta 0.2 +- 4.303 * 0.2 / sqrt(3): (4.303 * 0.2 / 0.1)^2 = 74.05
    assert verdict.verdict == "INCONCLUSIVE"
    assert verdict.checks[0].needs == "about 75 seeds"


def test_needed_seeds_of_a_failure_follow_its_stricter_bound(configs):
    """Below tau the open question is a FAIL, at 0.025 / 2 for one of two checks."""
    offsets = [0.0, 0.2, 0.4]
    claim = load(configs, checks=[{**CHECK, "tau": 0.3}, {**CHECK, "tau": -5}])
    verdict = verdict_of(claim, lambda t, s, d: 1.5 + (offsets[s] if t.startswith("rope@512") else 0) + 0.001 * (d % 2))
    # theta 0.2, t(0.9875; 2) = 6.205: (6.205 * 0.2 / 0.1)^2 = 154.02
    assert verdict.checks[0].needs == "about 155 seeds"


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


@pytest.mark.parametrize(("seed_sd", "expected"), [(0.02, "PASS"), (0.3, "INCONCLUSIVE")])
def test_one_seed_with_a_known_deviation(configs, seed_sd, expected):
    claim = load_check(configs, seed_sd=seed_sd, seed_sd_n=6)
    verdict = verdict_of(claim, levels(HOLDS), seeds=[0])
    assert (verdict.verdict, verdict.one_seed) == (expected, True)
    assert any(note.startswith("one seed") for note in verdict.notes)
    loss = levels(HOLDS)
    theta = [loss("rope@512|last", 0, d) - loss("alibi@512|last", 0, d) for d in range(DOCS)]
    by_seed, by_doc = (1.5 * seed_sd) ** 2, statistics.variance(theta) / DOCS
    df = (by_seed + by_doc) ** 2 / (by_seed**2 / 5 + by_doc**2 / (DOCS - 1))
    half = t.ppf(0.975, df) * math.sqrt(by_seed + by_doc)
    assert verdict.checks[0].interval == pytest.approx((statistics.mean(theta) - half, statistics.mean(theta) + half))


def test_size_is_informative(configs):
    """exp(0.5) = 1.65 against published ratios; the verdict stays."""
    for ratio, expected in (([1.5, 3], "matches"), ([2, 4], "smaller"), ([1.1, 1.3], "larger")):
        claim = load_check(configs, published={"ratio": ratio, "source": "table 1"})
        verdict = verdict_of(claim, levels(HOLDS))
        assert (verdict.verdict, verdict.checks[0].size) == ("PASS", expected)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15, deadline=None)
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


# --- the packaged claims ---

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
    """The whole tier trains four models a seed, on equal terms but for the encoding."""
    evaluations = required([packaged(name) for name in PACKAGED])
    assert sorted({pos_of(e) for e in evaluations}) == ["alibi", "learned", "rope", "sinusoidal"]
    assert len({e.run for e in evaluations}) == 4
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
