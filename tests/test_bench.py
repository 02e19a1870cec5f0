"""`ropelab bench`: its fields, its arithmetic, and the memory of a long evaluation (memory is no wall time)."""

from __future__ import annotations

import pytest

from ropelab import bench, config, experiment
from ropelab.schema import Config


def tiny(*more: str) -> Config:
    return config.load(["model.n_layer=1", "model.d_model=16", "model.n_head=2", "train.ctx=16", *more])


def test_the_fields_of_the_contract() -> None:
    result = bench.train(tiny("train.batch_size=2"), peers=True, rounds=1)
    assert set(result) >= {
        "tokens_per_s", "params", "flops_per_token", "mfu", "device", "dtype", "attention_backend", "peers",
    }  # fmt: skip
    assert result["tokens_per_s"] > 0
    assert result["attention_backend"] == "materialised"
    peer = result["peers"]["transformers GPT-2"]
    assert peer["ratio"] == pytest.approx(result["tokens_per_s"] / peer["tokens_per_s"])


def test_flops_of_a_token_by_hand() -> None:
    """The 124M shape at 1024 tokens: 6 N + 6 L C T = 741.5M + 56.6M, N = 12 L C^2 + V C."""
    resolved = config.load(["model=gpt2", "train.ctx=1024"])
    assert bench.flops_per_token(resolved, 12 * 12 * 768**2 + 50304 * 768) == pytest.approx(798.0e6, rel=1e-3)


def test_contestants_are_timed_turn_by_turn_without_the_first_round() -> None:
    calls: list[str] = []
    best = bench._best(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, synchronise=lambda: None
    )
    assert calls == ["a", "b"] * 3
    assert all(value >= 0 for value in best.values())


def test_attention_kernels_are_listed_with_their_ratio() -> None:
    rows = bench.attention(tiny(), contexts=(64,), rounds=1)["rows"]
    assert {(row["kernel"], row["bias"]) for row in rows} == {
        ("sdpa", "none"), ("materialised", "none"), ("blocks", "by distance"), ("materialised", "by distance"),
    }  # fmt: skip
    assert next(row["ratio"] for row in rows if row["kernel"] == "sdpa") == 1


@pytest.mark.slow
def test_alibi_at_16384_needs_no_more_memory_than_rope() -> None:
    """A (T, T) mask of one head would be 1 GB; both evaluations stay within 0.5 GB, ALiBi within 1.2 times RoPE."""
    if experiment.resolve_device("auto").type != "cpu":
        pytest.skip("the CPU's kernel")
    rows = bench.evaluation(config.load(["device=cpu"]), contexts=(16384,), names=("rope", "alibi"))["rows"]
    assert rows[1]["memory_ratio"] <= 1.2
    assert max(row["extra_mb"] for row in rows) < 512
