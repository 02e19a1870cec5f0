"""Claim files: what a good one says, what is refused, and what has to be measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ropelab.claims import (
    ContrastCheck,
    Evaluation,
    ExactCheck,
    claim_path,
    load_cell,
    load_claim,
    load_set,
    packaged_claims,
    parse_number,
    required,
    united,
)
from tests.claims.synthetic import CELL, CHECK, CLAIM, load, load_check, spelling

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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    run=st.sampled_from(["a", "b"]),
    scaling=st.sampled_from([None, "ntk", "yarn", "dynamic_ntk", "none"]),
    factor=st.sampled_from([None, "1", "4", "2.5"]),
    control=st.sampled_from([None, "window", "unigram"]),
    ctx=st.sampled_from([("L", 128), ("2L", 256), ("8L", 1024), ("512", 512)]),
    protocol=st.sampled_from([None, "nonoverlapping", "sliding"]),
)
def test_terms(configs, run, scaling, factor, control, ctx, protocol):
    """Every part of the grammar comes out as it went in."""
    if scaling in (None, "none"):
        factor = None
    elif scaling in ("ntk", "yarn") and factor is None:
        factor = "8"
    text = run + (f"+{scaling}" if scaling else "") + (f":{factor}" if factor else "")
    text += (f"/{control}" if control else "") + f"@{ctx[0]}" + (f"|{protocol}" if protocol else "")
    claim = load(configs, checks=[{"statement": "it runs", "exact": "defined", "terms": [text]}])
    check = claim.checks[0]
    assert isinstance(check, ExactCheck)
    (term,) = check.terms
    expected_factor = float(factor) if factor else 1.0 if scaling == "dynamic_ntk" else None
    expected = (text, run, scaling, expected_factor, control, ctx[1], protocol or "last")
    assert (term.text, term.run, term.scaling, term.factor, term.control, term.ctx, term.protocol) == expected


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
        ("statement: [", "no valid YAML"),
        ("- a\n- b\n", "mine.yaml: the file must be a mapping"),
        ("", "mine.yaml: the file must be a mapping, not nothing"),
        ("runs: {a: [pos=rope], a: [pos=alibi]}", "mine.yaml: a: given twice (line 1); keep one"),
        ("checks:\n  - contrast: {a@L: 1, a@L: -1}\n", "a@L: given twice (line 2)"),
        ("? [a]\n: 1\n", "no valid YAML"),
        ("x: &x [*x]", "aliases make it too large"),
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


def test_united_keeps_every_ctx_and_the_first_order():
    def evaluation(pos: str, *ctxs: int) -> Evaluation:
        return Evaluation((f"pos={pos}",), None, None, None, "last", ctxs, ())

    found = united(
        [evaluation("rope", 512), evaluation("alibi", 128), evaluation("rope", 128, 512), evaluation("none")]
    )
    assert found == [evaluation("rope", 128, 512), evaluation("alibi", 128), evaluation("none")]


# --- sets ---

SET: dict[str, Any] = {
    "title": "Two runs",
    "claims": ["mine"],
    "cell": "toy",
    "runs": {"r": ["pos=rope"], "n": ["pos=none", "train.ctx=64"]},
    "evaluations": ["r+ntk:4@4L|last", "n/window@4L|sliding"],
}


def write_set(configs: Path, **changes: Any) -> Path:
    """The set above in `configs`/set/ours.yaml beside the claim `mine`; None drops a key."""
    load(configs)
    path = configs / "set" / "ours.yaml"
    path.parent.mkdir(exist_ok=True)
    values = {key: value for key, value in {**SET, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_a_set(configs):
    """Title, claims, and each evaluation over the rungs 128, 256, 512, 1024 up to the ctx of its term."""
    write_set(configs)
    found = load_set("ours", configs)
    shared = ("eval.dtype=fp32", "eval.last=32", "eval.max_ctx=1024")
    rope = Evaluation(
        ("model=tiny", "pos=rope", "train.ctx=128", "train.lr=1e-2"),
        "ntk",
        4.0,
        None,
        "last",
        (128, 256, 512),
        (*shared, "eval.protocol=last", "eval.stride=64", "eval.tokens=4096"),
    )
    none = Evaluation(
        ("model=tiny", "pos=none", "train.ctx=64", "train.lr=1e-2"),
        None,
        None,
        "window",
        "sliding",
        (128, 256),
        (*shared, "eval.protocol=sliding", "eval.stride=64", "eval.tokens=4096", "eval.window=64"),
    )
    assert (found.title, found.claims, found.evaluations) == ("Two runs", (load(configs),), (rope, none))


@pytest.mark.parametrize(
    ("terms", "ctxs"),
    [
        (["r@8L|last"], [(128, 256, 512, 1024)]),
        (["r@300|last"], [(128, 256, 300)]),  # the ctx itself, even between two rungs
        (["r@64|last"], [(64,)]),  # and below them
        (["r@2L|last", "r@512|last"], [(128, 256, 512)]),
        (["r@2L|last", "r@4L|sliding"], [(128, 256), (128, 256, 512)]),
    ],
)
def test_the_ladder_of_a_set(configs, terms, ctxs):
    write_set(configs, evaluations=terms)
    assert [evaluation.ctxs for evaluation in load_set("ours", configs).evaluations] == ctxs


def test_a_set_of_claims_alone(configs):
    write_set(configs, cell=None, runs=None, evaluations=None)
    found = load_set("ours", configs)
    assert ([claim.id for claim in found.claims], found.evaluations) == (["mine"], ())


def test_a_set_file_names_files_beside_it(configs, tmp_path_factory):
    """FILE.yaml of a claim or a cell is looked for where the set is, not where the command runs."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "own.yaml").write_text(yaml.safe_dump({**CELL, "train": ["train.ctx=64"]}))
    (folder / "theirs.yaml").write_text(yaml.safe_dump({**CLAIM, "cell": "own.yaml"}))
    (folder / "set.yaml").write_text(
        yaml.safe_dump({**SET, "claims": ["theirs.yaml"], "cell": "own.yaml", "evaluations": ["r@2L|last"]})
    )
    found = load_set(str(folder / "set.yaml"), configs)
    assert [(claim.id, claim.train_ctx("a")) for claim in found.claims] == [("theirs", 64)]
    assert [evaluation.ctxs for evaluation in found.evaluations] == [(64, 128)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titel": "x"}, "ours.yaml: titel: unknown key; did you mean 'title'?"),
        ({"title": None}, "ours.yaml: title: must be a text, not nothing"),
        ({"claims": None}, "ours.yaml: claims: must be a list with at least one item, not nothing"),
        ({"claims": []}, "ours.yaml: claims: must be a list with at least one item"),
        ({"claims": ["mime"]}, "ours.yaml: claims: 'mime' is unknown; did you mean 'mine'?, or give a FILE.yaml"),
        ({"claims": [3]}, "ours.yaml: claims: '3' is unknown; one of mine"),
        ({"claims": ["mine", "mine"]}, "ours.yaml: claims: 'mine' is given twice; keep one"),
        ({"claims": ["no.yaml"]}, "no.yaml: cannot be read"),
        ({"cell": None}, "ours.yaml: cell: must be a text, not nothing"),
        ({"cell": "toi"}, "ours.yaml: cell: 'toi' is unknown; did you mean 'toy'?"),
        ({"runs": None}, "ours.yaml: runs must be a mapping, not nothing"),
        ({"runs": {"r": ["seed=1"]}}, "ours.yaml: runs.r: 'seed=1' does not describe a run"),
        ({"runs": {"r": ["train.ctx=x"]}}, "ours.yaml: runs.r: train.ctx must be a whole number"),
        ({"evaluations": []}, "ours.yaml: evaluations: must be a list with at least one item"),
        ({"evaluations": None}, "ours.yaml: cell: is of use to evaluations only"),
        ({"evaluations": None, "cell": None}, "ours.yaml: runs: is of use to evaluations only"),
        ({"evaluations": ["r@4L"]}, "ours.yaml: evaluations: r@4L: names no protocol; write r@4L|last"),
        ({"evaluations": ["r@4L|lst"]}, "evaluations: r@4L|lst: protocol 'lst' is unknown; did you mean 'last'?"),
        ({"evaluations": ["q@4L|last"]}, "evaluations: q@4L|last: run 'q' is not in runs; one of n, r"),
        ({"evaluations": ["r+yarm:4@4L|last"]}, "scaling 'yarm' is unknown; did you mean 'yarn'?"),
        ({"evaluations": ["r|last"]}, "evaluations: r|last: is no term; write RUN"),
        ({"evaluations": ["r@16L|last"]}, "evaluations: r@16L|last: ctx 2048 is beyond the cell's longest, 1024"),
        ({"evaluations": [["r@4L|last"]]}, "evaluations: ['r@4L|last']: is no term"),
    ],
)
def test_bad_sets_are_refused_in_one_line(configs, changes, message):
    write_set(configs, **changes)
    with pytest.raises(ValueError) as error:
        load_set("ours", configs)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_rung_of_a_set_can_be_measured(configs):
    """At 4L the protocol `last` has its 100 targets, at L = 128 it has not: refused before anything is trained."""
    (configs / "cell" / "toy.yaml").write_text(yaml.safe_dump({**CELL, "eval": {**CELL["eval"], "last": 100}}))
    write_set(configs, evaluations=["r@4L|last"])
    with pytest.raises(
        ValueError, match=r"r@4L\|last: last scores 100 targets and needs a ctx of at least 200, not 128"
    ):
        load_set("ours", configs)


def test_names_of_sets(configs):
    path = write_set(configs)
    assert load_set(str(path), configs) == load_set("ours", configs)
    with pytest.raises(ValueError, match="no set 'our'; did you mean 'ours'"):
        load_set("our", configs)
    path.write_text("title: a\ntitle: b\n")
    with pytest.raises(ValueError, match=r"ours.yaml: title: given twice \(line 2\); keep one"):
        load_set("ours", configs)
