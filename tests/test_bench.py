"""`ropelab bench`: its fields and its arithmetic, that rivals do the same work, and the memory of a long evaluation."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ropelab import bench, cli, config
from ropelab.bench import peers
from ropelab.bench.timing import best
from ropelab.bench.train import causal_flops_per_token, flops_per_token
from ropelab.schema import Config

SHAPE = ["model.n_layer=1", "model.d_model=16", "model.n_head=2", "train.ctx=16"]
SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check.sh"


of_x_transformers = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def tiny(*more: str) -> Config:
    last = {item.partition("=")[0]: item for item in (*SHAPE, "device=cpu", "train.dtype=fp32", *more)}
    return config.load(list(last.values()))


@of_x_transformers
def test_the_fields_of_the_contract() -> None:
    result = bench.train(tiny("train.batch_size=2"), methods=["rope", "alibi"], peers=True, rounds=1)
    assert set(result) >= {
        "tokens_per_s", "params", "flops_per_token", "mfu", "device", "dtype", "attention_backend", "peers",
    }  # fmt: skip
    assert result["tokens_per_s"] > 0
    assert result["mfu"] is None  # the peak of this device is not known
    assert result["attention_backend"] == "materialised"
    assert set(result["peers"]) == set(peers.PEERS)
    for peer in result["peers"].values():
        assert (
            peer["ratio"] == peer["equal_dtype_ratio"] == pytest.approx(result["tokens_per_s"] / peer["tokens_per_s"])
        )
    first, second = result["methods"]
    assert (first["pos"], first["ratio"], second["pos"]) == ("rope", 1, "alibi")
    assert second["ratio"] == pytest.approx(second["tokens_per_s"] / first["tokens_per_s"])


@of_x_transformers
def test_peers_in_bf16_are_beside_those_at_their_default() -> None:
    result = bench.train(tiny("train.batch_size=2", "train.dtype=bf16"), methods=["rope"], peers=True, rounds=1)
    assert result["dtype"] == "bf16"
    assert all(peer["ratio"] != peer["equal_dtype_ratio"] for peer in result["peers"].values())


@of_x_transformers
@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_trains(name: str) -> None:
    """Its loss on one batch falls, and its step is a step of the shape asked for."""
    torch.manual_seed(0)
    windows = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 17)))
    build = peers._gpt2 if name == "transformers GPT-2" else peers._x_transformers
    model, loss_of = build(tiny(), windows)
    hidden = {m.weight.shape for m in model.modules() if hasattr(m, "weight") and getattr(m.weight, "ndim", 0) == 2}
    assert any(16 in shape for shape in hidden)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = loss_of().item()
    for _ in range(20):
        loss_of().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of().item() < before - 0.5


def test_flops_of_a_token_by_hand() -> None:
    """The 124M shape at 1024 tokens, N = 12 L C^2 + V C: 741.5M for the weights, 113.2M for all pairs of tokens."""
    resolved = config.load(["model=gpt2", "train.ctx=1024"])
    params = 12 * 12 * 768**2 + 50304 * 768
    assert flops_per_token(resolved, params) == pytest.approx(854.7e6, rel=1e-3)
    assert causal_flops_per_token(resolved, params) == pytest.approx(798.0e6, rel=1e-3)


def test_contestants_are_timed_turn_by_turn_without_the_first_round() -> None:
    calls: list[str] = []
    found = best({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, synchronise=lambda: None)
    assert calls == ["a", "b"] * 3
    assert all(value >= 0 for value in found.values())


def test_attention_kernels_are_listed_with_their_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["ropelab.bench.attention"], "EXACT_AT", {"cpu": (300,)})
    result = bench.attention(tiny(), contexts=(64,), rounds=1)
    rows = {(row["bias"], row["use"], row["kernel"]): row for row in result["rows"]}
    for use in ("forward", "with gradients"):
        assert rows["none", use, "sdpa"]["ratio"] == 1
        assert ("FIRE", use, "materialised") in rows
    assert ("learned", "with gradients", "recomputed") in rows
    assert ("fixed", "forward", "blocks") in rows
    errors = {(row["dtype"], row["kernel"]): row["max_error"] for row in result["accuracy"]}
    assert errors["fp32", "blocks"] < 1e-5
    assert errors["bf16", "digits"] < 0.02 < 0.2 < errors["bf16", "one number"]


def test_a_curve_from_one_pass_is_that_of_a_pass_for_each_length() -> None:
    result = bench.evaluation(tiny(), contexts=(1024,), methods=["alibi"], rounds=1)
    prefix = result["prefix"]
    assert prefix["contexts"] == [512, 1024]
    assert prefix["largest_difference_nats"] < 1e-3
    assert prefix["ratio"] == pytest.approx(prefix["pass_per_ctx_s"] / prefix["one_pass_s"])
    (row,) = result["rows"]
    assert (row["pos"], row["seconds_ratio"], row["memory_ratio"]) == ("alibi", 1, 1)


def test_many_models_are_timed_in_three_ways() -> None:
    result = bench.many(tiny("train.batch_size=2"), models=2, rounds=1)
    rows = {row["how"]: row for row in result["rows"]}
    assert set(rows) == {"one after another", "one stack", "side by side"}
    assert rows["one after another"]["ratio"] == 1
    assert all(row["tokens_per_s"] > 0 for row in rows.values())


@functools.cache
def answer(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["bench", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_start_is_that_of_fresh_processes() -> None:
    status, out, _ = answer("start", *SHAPE, "device=cpu", "--json")
    assert status == 0
    result = json.loads(out)
    assert min(result["cold_s"], result["warm_s"]) > 0.5  # torch alone takes longer to import


def test_tables_are_printed_for_people() -> None:
    shape = (*SHAPE, "train.batch_size=2", "device=cpu", "train.dtype=fp32")
    status, out, _ = answer("train", *shape, "--methods", "alibi,rope", "--rounds", "1", "--no-peers")
    assert status == 0
    assert "flops_convention: 6 N + 12 L C T" in out
    assert out.index("alibi") < out.index("rope")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["walk"], "bench takes train, eval, attention, many or start"),
        (["train", "--rounds", "0"], "--rounds must be at least 1"),
        (["train", "--methods", "rope,alibee"], "did you mean alibi?"),
        (["train", "--methods", ","], "takes encodings such as rope,alibi"),
        (["train", "--methods", "rope,rope"], "names rope twice"),
        (["train", "--methods", "rope", "--pos", "alibi"], "not both"),
        (["attention", "--methods", "rope"], "takes no --methods"),
        (["train", "--ctx", "64"], "use train.ctx=64"),
        (["many", "--models", "0"], "--models must be at least 1"),
        (["train", "--vocab", "10"], "--vocab must be at least 257"),
        (["eval", "--ctx", "x"], "--ctx takes a length"),
        *([] if torch.cuda.is_available() else [(["train", "device=cuda"], "this machine has no CUDA device")]),
    ],
)
def test_mistakes_end_with_a_line(arguments: list[str], says: str) -> None:
    status, out, err = answer(*arguments)
    assert (status, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_bias_at_16384_needs_no_more_memory_than_rope() -> None:
    """A (T, T) mask of one head would be 1 GB; what is measured is 0.1 GB, give or take a tenth by the heap's moods."""
    methods = ["rope", "alibi", "t5", "kerple_log"]
    result = bench.evaluation(config.load(["device=cpu"]), contexts=(16384,), methods=methods, rounds=1)
    for row in result["rows"]:
        assert row["memory_ratio"] <= 1.25
        assert row["extra_mb"] < 256


@pytest.mark.slow
def test_the_gpu_check_runs_as_a_whole(tmp_path: Path) -> None:
    """In its dry form, on this machine: every part writes what it should."""
    places = {
        "ROPELAB_GPU_CHECK_DRY": "1",
        "PYTHON": sys.executable,
        "ROPELAB_CACHE": str(tmp_path / "c"),
    }
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "out")], env={**os.environ, **places}, capture_output=True, text=True,
        check=False, cwd=SCRIPT.parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = ["environment", "start", "train-1024", "train-8192", "attention", "eval", "many", "train", "evaluation"]
    found = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in names}
    assert found["train"]["status"] == "done"
    assert found["evaluation"]["rows"][0]["status"] == "ok"
    assert (tmp_path / "out" / "tests.txt").read_text()
