"""Claims from nothing to verdicts, in miniature: real worker processes, a claim file of the user's own, one report."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ropelab import config, reproduce
from tests.lab import invoke

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("forked_workers")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of random words, a cell and a claim."""
    place = tmp_path_factory.mktemp("reproduce")
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(400)]
    (place / "text").mkdir()
    for i in range(160):  # 5% of them are test documents: 8, above the gate of 6
        (place / "text" / f"{i}.txt").write_text(" ".join(rng.choices(words, k=60)), encoding="utf-8")
    (place / "mini.yaml").write_text(
        f"""
train: [data=text, 'data.path={place / "text"}', model.n_layer=1, model.d_model=16, model.n_head=2, train.ctx=16,
        train.batch_size=32, train.steps=6, train.dtype=fp32]
eval: {{ctx: [L, 2L], tokens: 1000, last: 4, stride: 4}}
""",
        encoding="utf-8",
    )
    (place / "my claim.yaml").write_text(
        """
statement: Six steps of training make no method a hundred times better than another
source: common sense
tier: cpu
cell: mini.yaml
protocol: last
runs: {rope: [pos=rope], alibi: [pos=alibi], learned: [pos=learned]}
checks:
  - statement: ALiBi is not much better than RoPE at 2L
    contrast: {alibi@2L: 1, rope@2L: -1}
    tau: -4.6
  - statement: learned is undefined
    exact: undefined
    terms: [learned@2L]
  - statement: NTK at factor 2 leaves something
    contrast: {rope@2L: 1, rope+ntk:2@2L: -1}
    tau: -4.6
""",
        encoding="utf-8",
    )
    return place


def run(place: Path, name: str, *arguments: str) -> Any:
    folders = [f"runs_dir={place / 'runs'}", f"cache_dir={place / 'cache'}"]
    return invoke("reproduce", place / name, *folders, *arguments)


def test_a_claim_file_is_trained_evaluated_and_judged_once(place: Path) -> None:
    result = run(place, "my claim.yaml", "--seeds", "2", "-o", str(place / "out"), "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    (verdict,) = answer["verdicts"]
    # the models are untrained against nothing: no gate is set, and two seeds carry the verdict
    assert verdict["verdict"] == "PASS", verdict["reason"]
    assert [check["verdict"] for check in verdict["checks"]] == ["PASS"] * 3
    assert verdict["checks"][0]["seeds"] == 2
    assert len(list((place / "runs").glob("*/manifest.json"))) == 6
    stored = json.loads((place / "out" / "results.json").read_text(encoding="utf-8"))
    assert {key: stored[key] for key in answer} == answer
    assert len(stored["diagnoses"]) == len({item["run"] for item in answer["evals"]})
    assert (place / "out" / "report.html").stat().st_size > 100_000
    assert (place / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    by_hand = contrast_by_hand(answer["evals"])
    assert verdict["checks"][0]["theta"] == pytest.approx(by_hand, rel=1e-6)

    again = run(place, "my claim.yaml", "--seeds", "2")
    assert again.exit_code == 0
    assert "0 of 6 runs trained" in again.stderr


def test_runs_in_a_stack_give_the_same_numbers(place: Path) -> None:
    """The six runs in two batched steps of three: the losses of runs that were trained alone."""
    alone = json.loads(run(place, "my claim.yaml", "--seeds", "2", "--json").stdout)
    arguments = ["reproduce", str(place / "my claim.yaml"), "--seeds", "2", "--stack", "3", "--json"]
    result = invoke(*arguments, f"runs_dir={place / 'stacked'}", f"cache_dir={place / 'cache'}")
    assert result.exit_code == 0, result.output
    stacked = json.loads(result.stdout)
    manifests = [json.loads(path.read_text()) for path in (place / "stacked").glob("*/manifest.json")]
    assert [manifest["stacked"] for manifest in manifests] == [3] * 6
    losses = [
        {(item["run"], item["scaling"], row["ctx"]): row["nll"] for item in found["evals"] for row in item["rows"]}
        for found in (alone, stacked)
    ]
    assert losses[0].keys() == losses[1].keys()
    assert [losses[1][key] for key in losses[0]] == pytest.approx([losses[0][key] for key in losses[0]], abs=2e-4)


def contrast_by_hand(evals: list[dict[str, Any]]) -> float:
    """ALiBi minus RoPE at 2L from the rows: every document has the same number of targets."""
    nll: dict[tuple[str, int], float] = {}
    for item in evals:
        if item["protocol"]["name"] == "last" and item["scaling"] == "none" and item["window"] is None:
            row = next(row for row in item["rows"] if row["ctx"] == 32)
            nll[item["pos"], item["seed"]] = row["nll"]
    return sum(nll["alibi", seed] - nll["rope", seed] for seed in (0, 1)) / 2


def test_a_failing_run_is_named_and_the_others_finish(place: Path, tmp_path: Path) -> None:
    text = (place / "my claim.yaml").read_text(encoding="utf-8")
    broken = tmp_path / "broken.yaml"
    (tmp_path / "mini.yaml").write_text((place / "mini.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    broken.write_text(text.replace("rope: [pos=rope]", "rope: [pos=rope, model.d_model=6]"), encoding="utf-8")
    result = invoke("reproduce", broken, f"runs_dir={tmp_path}", f"cache_dir={place / 'cache'}")
    assert result.exit_code == 1
    assert "even head dimension" in result.stderr
    assert "pos=rope" in result.stderr
    trained = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert len(trained) == 2


def test_a_false_claim_fails_with_exit_1(place: Path, tmp_path: Path) -> None:
    text = (place / "my claim.yaml").read_text(encoding="utf-8")
    false = place / "false.yaml"
    false.write_text(text.replace("tau: -4.6", "tau: 4.6", 1), encoding="utf-8")
    result = run(place, "false.yaml", "--seeds", "2", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["verdicts"][0]["verdict"] == "FAIL"


def test_the_demo_measures_what_it_promises() -> None:
    """Five plain models by two protocols, RoPE under seven scalings, three window controls, each over the ladder."""
    plan = reproduce.plan_set("demo")
    assert len(plan.claims) == 11
    assert len({item.run for item in plan.evaluations}) == 5
    seen = set()
    for item in plan.evaluations:
        assert item.ctxs == (128, 256, 512, 1024)
        pos = config.load(list(item.run)).pos.name
        seen.add((pos, item.scaling, item.factor, item.control, item.protocol))
    plain = {(pos, None, None, None, p) for pos in ("none", "sinusoidal", "learned", "alibi", "rope")
             for p in ("nonoverlapping", "last")}  # fmt: skip
    scaled = {("rope", name, s, None, "last") for name in ("linear", "ntk", "yarn") for s in (4.0, 8.0)}
    walled = {(pos, None, None, "window", "last") for pos in ("alibi", "rope", "sinusoidal")}
    assert seen == plain | scaled | walled | {("rope", "dynamic_ntk", 1.0, None, "last")}
