"""The referee's own error, a short form of scripts/referee_error.py: through `claims.judge`, at known truths."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "referee_error.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("referee_error", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["referee_error"] = module
    spec.loader.exec_module(module)
    return module


def noise(rate: float, draws: int) -> float:
    """Three standard errors of a rate."""
    return 3 * math.sqrt(rate * (1 - rate) / draws)


@pytest.mark.parametrize("n_seeds", [1, 2, 3, 6])
def test_ten_claims_at_tau(script: ModuleType, n_seeds: int) -> None:
    """At most 3.5 of 100 sets with a false PASS, as many with a false FAIL; one check 3; coverage 93 to 97."""
    draws = 120
    shipped = script.shipped_claims()
    truths = script.shipped_truths(shipped)
    assert len(shipped) == 10
    bench = script.Bench(shipped, truths, calibrated=True)
    rates = script.errors(bench, script.at_tau(truths), n_seeds, draws)
    assert rates["any_pass"] <= 0.035 + noise(0.035, draws)
    assert rates["any_fail"] <= 0.035 + noise(0.035, draws)
    assert rates["pass"] <= 0.03 + noise(0.03, 10 * draws)
    assert 0.93 - noise(0.07, 10 * draws) <= rates["cover"] <= 0.97 + noise(0.03, 10 * draws)


@pytest.mark.parametrize("ratio", [0.5, 3.0])
@pytest.mark.parametrize("n_seeds", [1, 2])
def test_a_wrong_seed_sd_from_elsewhere_does_no_harm(script: ModuleType, n_seeds: int, ratio: float) -> None:
    draws = 60
    shipped = script.shipped_claims()
    truths = script.shipped_truths(shipped)
    bench = script.Bench(shipped, truths, calibrated=False)
    rates = script.errors(bench, script.at_tau(truths), n_seeds, draws, ratio=ratio, calibrate=False)
    assert rates["pass"] <= 0.03 + noise(0.03, 10 * draws)
    assert rates["any_pass"] <= 0.035 + noise(0.035, draws)


@pytest.mark.parametrize("sizes", [(2,) * 7, (9, *(1,) * 6)])
def test_authors(script: ModuleType, sizes: tuple[int, ...]) -> None:
    """Books by one author judged as independent passed wrongly in 12 of 100, and were covered in 54 to 79."""
    draws = 80
    truth = script.Truth(0.05, 0.05, 0.02, sizes, by_author=0.1)
    rates = script.errors(script.single_checks(truth, calibrated=True), [[0.0]] * 10, 3, draws)
    assert rates["pass"] <= 0.03 + noise(0.03, 10 * draws)
    assert rates["fail"] <= 0.03 + noise(0.03, 10 * draws)
    assert rates["cover"] >= 0.93 - noise(0.07, 10 * draws)


@pytest.mark.parametrize("n_checks", [1, 5])
def test_false_fail_of_several_checks(script: ModuleType, n_checks: int) -> None:
    draws = 300
    bench = script.single_checks(script.Truth(0.1, 0.2, 0.05, (1,) * 30), 1, n_checks, calibrated=True)
    assert script.errors(bench, [[0.0] * n_checks], 3, draws)["fail"] <= 0.03 + noise(0.03, draws)


@pytest.mark.parametrize("adaptive", [False, True])
def test_judging_until_it_passes(script: ModuleType, adaptive: bool) -> None:
    draws = 200
    rate = script.looks_until_pass(script.Truth(0.1, 0.2, 0.05, (1,) * 30), draws, adaptive=adaptive)
    assert rate <= 0.025 + noise(0.025, draws)


def test_needed_seeds_are_enough(script: ModuleType) -> None:
    rates = script.needed_seeds_pass(3, 25)
    assert rates["has a number or a reason"] == 1
    assert rates["decided"] >= 0.8 - noise(0.8, 40)
