"""Looks at growing data: what they may spend, how they are kept, and what a verdict says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ropelab.claims import Claim, History, Look, Looks, Verdict, claim_key, judge
from tests.claims.synthetic import levels, load, load_check, measure, train

LOSS = levels({"alibi@128|last": 1.5, "rope@128|last": 1.5, "alibi": 1.5, "rope": 1.8}, spread=0.03)


def look_at(claim: Claim, seeds: int, looks: Looks, *, last: bool = False) -> Verdict:
    """One verdict, kept as `reproduce` keeps it."""
    key, numbers = claim_key(claim), list(range(seeds))
    histories = looks.of_family([key])
    (verdict,) = judge(
        [claim], measure([claim], LOSS, seeds=numbers), train([claim], seeds=numbers), numbers,
        histories=histories, last_look=last,
    )  # fmt: skip
    if verdict.look is not None:
        looks.keep(key, histories[key].after(verdict.look, [key]))
    return verdict


def test_the_kth_look_spends_its_share(configs: Path, tmp_path: Path) -> None:
    claim, looks = load(configs), Looks(tmp_path)
    for k, seeds in enumerate((2, 3, 6), start=1):
        verdict = look_at(claim, seeds, looks)
        assert (verdict.looks, verdict.level) == (k, pytest.approx(0.025 / (k * (k + 1))))
        assert verdict.as_json()["looks"] == k
        listed = ", ".join(str(n) for n in (2, 3, 6)[:k])
        assert verdict.notes[-1].startswith(f"look {k} of {k} known (seeds: {listed}): judged at ")


def test_the_same_data_are_the_same_look(configs: Path, tmp_path: Path) -> None:
    claim, looks = load(configs), Looks(tmp_path)
    first = look_at(claim, 3, looks)
    look_at(claim, 6, looks)
    again = look_at(claim, 3, looks)
    assert (again.level, again.looks, again.verdict) == (first.level, 2, first.verdict)


def test_a_threshold_that_is_moved_is_another_look(configs: Path, tmp_path: Path) -> None:
    looks = Looks(tmp_path)
    assert look_at(load(configs), 3, looks).looks == 1
    assert look_at(load_check(configs, tau=0.15), 3, looks).looks == 2


def test_a_last_look_spends_what_is_left(configs: Path, tmp_path: Path) -> None:
    """`--more`: 3 seeds, then 6, each at 0.0125; nothing is left then, and the claim says so."""
    claim, looks = load_check(configs, tau=0.3), Looks(tmp_path)
    assert look_at(claim, 3, looks).level == pytest.approx(0.0125)
    assert look_at(claim, 6, looks, last=True).level == pytest.approx(0.0125)
    spent = look_at(claim, 9, looks)
    assert (spent.level, spent.verdict) == (0, "INCONCLUSIVE")
    assert "earlier looks have spent the error rate" in spent.reason


def test_a_gate_spends_nothing(configs: Path, tmp_path: Path) -> None:
    claim, looks = load(configs), Looks(tmp_path)
    assert "no seed_sd" in look_at(claim, 1, looks).reason
    assert look_at(claim, 3, looks).looks == 1


def test_claims_that_were_judged_together_stay_a_family(configs: Path) -> None:
    """One picked out of ten is judged as one of ten, those that were decided then left out."""
    claim = load(configs)
    key, numbers = claim_key(claim), [0, 1, 2]
    inputs = ([claim], measure([claim], LOSS), train([claim]), numbers)
    alone = judge(*inputs, histories={})[0]
    assert alone.p is not None
    assert alone.p_adjusted == pytest.approx(2 * alone.p)
    others = {f"other{i}": History((Look(3, "data", 0.5, p, 1.0),), frozenset()) for i, p in enumerate((0.9, 1e-6))}
    picked = judge(*inputs, histories={key: History((), frozenset(others)), **others})[0]
    assert picked.p_adjusted == pytest.approx(2 * 2 * alone.p)


def test_a_damaged_record_is_named(configs: Path, tmp_path: Path) -> None:
    claim, looks = load(configs), Looks(tmp_path)
    look_at(claim, 3, looks)
    (path,) = (tmp_path / "looks").glob("*.json")
    value = json.loads(path.read_text())
    for broken in ({**value, "looks": []}, [], {"looks": 3, "family": []}, {"looks": [{"seeds": "x"}], "family": []}):
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=r"is no record of looks .*remove it"):
            looks.of(claim_key(claim))
