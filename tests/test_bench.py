"""`ropelab bench`: its fields and arithmetic, that rivals do the same work, and the script that runs it on a GPU."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ropelab import bench, config, devices
from ropelab.attention import Request, choose_kernel
from ropelab.bench import accuracy, ours, peers, timing
from ropelab.bench.train import causal_flops_per_token, flops_per_token
from ropelab.cli.bench import WIDTH, written
from ropelab.config import Config
from ropelab.positions import slopes
from tests.lab import changed, invoke

pytestmark = pytest.mark.integration

SHAPE = ["model.n_layer=1", "model.d_model=16", "model.n_head=2", "train.ctx=16"]
SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check.sh"
TRAIN, ATTENTION = (sys.modules[f"ropelab.bench.{name}"] for name in ("train", "attention"))

of_x_transformers = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def tiny(*more: str) -> Config:
    return config.load(changed((*SHAPE, "device=cpu", "train.dtype=fp32"), *more))


def answer(*arguments: str) -> tuple[int, str, str]:
    result = invoke("bench", *arguments)
    return result.exit_code, result.stdout, result.stderr


# --- timing ---------------------------------------------------------------------------------------------------------


def test_the_least_of_interleaved_rounds_counts_and_the_first_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the contestants move: what they take is known."""
    now, calls = 0.0, ""
    seconds = {"a": iter([1.0, 7.0, 5.0]), "b": iter([2.0, 3.0, 9.0])}

    def contestant(name: str) -> Callable[[], None]:
        def call() -> None:
            nonlocal now, calls
            now += next(seconds[name])
            calls += name

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    found = timing.best({name: contestant(name) for name in "ab"}, rounds=2, synchronise=lambda: None)
    assert calls == "ababab"
    assert found == {"a": 5.0, "b": 3.0}


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be reset on Linux")
def test_the_peak_is_that_since_the_reset() -> None:
    device = torch.device("cpu")
    torch.ones(2**26).sum()  # 256 MB, gone again
    at_rest = timing.reset_peak(device)
    assert timing.peak_mb(device) - at_rest < 64
    torch.ones(2**25).sum()
    assert 100 < timing.peak_mb(device) - at_rest < 200


# --- training -------------------------------------------------------------------------------------------------------


@of_x_transformers
def test_the_fields_of_the_contract() -> None:
    result = bench.train(tiny("train.batch_size=2"), methods=["rope", "alibi"], peers=True, rounds=1)
    assert set(result) >= {
        "tokens_per_s", "params", "flops_per_token", "mfu", "device", "dtype", "attention_backend", "peers",
    }  # fmt: skip
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["tokens_per_s"] > 0
    assert result["mfu"] is None  # the peak of this device is not known
    assert result["attention_backend"] == "materialised"
    assert result["flops_per_token"] == 6 * result["params"] + 12 * 1 * 16 * 16
    assert result["share_of_matmul"] == pytest.approx(
        result["tokens_per_s"] * result["causal_flops_per_token"] / result["matmul_flops_per_s"]
    )
    assert set(result["peers"]) == set(peers.PEERS)
    for peer in result["peers"].values():
        assert peer["ratio"] == peer["equal_dtype_ratio"]  # narrow, in fp32: torch's defaults are ours
        assert peer["ratio"] == pytest.approx(result["tokens_per_s"] / peer["tokens_per_s"])
    first, second = result["methods"]
    assert (first["pos"], first["ratio"], second["pos"]) == ("rope", 1, "alibi")
    assert second["ratio"] == pytest.approx(second["tokens_per_s"] / first["tokens_per_s"])


def test_flops_of_a_token_by_hand() -> None:
    """The 124M shape at 1024 tokens, N = 12 L C^2 + V C: 741.5M for the weights, 113.2M for all pairs of tokens."""
    resolved = config.load(["model=gpt2", "train.ctx=1024"])
    params = 12 * 12 * 768**2 + 50304 * 768
    assert flops_per_token(resolved, params) == pytest.approx(854.7e6, rel=1e-3)
    assert causal_flops_per_token(resolved, params) == pytest.approx(798.0e6, rel=1e-3)


def test_mfu_is_of_the_device_and_a_table_of_positions_multiplies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "device_name", lambda device: "NVIDIA H200")
    result = bench.train(tiny("train.batch_size=2"), methods=["learned"], peers=False, rounds=1)
    assert result["params"] == 257 * 16 + 12 * 16**2 + 3 * 16 + 16 * 16  # tokens, matrices, norms, positions
    assert result["flops_per_token"] == 6 * (result["params"] - 16 * 16) + 12 * 16 * 16
    assert result["mfu"] == pytest.approx(result["tokens_per_s"] * result["flops_per_token"] / 989e12)


@of_x_transformers
def test_peers_are_timed_at_their_defaults_and_at_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast and torch's precision of fp32 products are the whole process's: every turn must find its own."""
    seen: dict[str, set[tuple[bool, str]]] = {}
    build = peers.peer

    def watched(name: str, config: Config, windows: Any, vocab: int, dtype: torch.dtype) -> peers.Peer:
        one = build(name, config, windows, vocab, dtype)
        of_turns = seen.setdefault(f"{name} {dtype}", set())
        one.model.register_forward_pre_hook(
            lambda *_: of_turns.add((torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()))
        )
        return one

    monkeypatch.setattr(TRAIN, "peer", watched)
    monkeypatch.setattr(TRAIN, "matmul_precision", lambda device, width: "medium")
    result = bench.train(tiny("train.batch_size=2", "train.dtype=bf16"), methods=["rope"], peers=True, rounds=1)
    torch.set_float32_matmul_precision("highest")
    assert result["dtype"] == "bf16"
    assert result["fp32_tokens_per_s"] not in (None, result["tokens_per_s"])
    for name in peers.PEERS:
        assert seen[f"{name} torch.float32"] == {(False, "highest")}
        assert seen[f"{name} torch.bfloat16"] == {(True, "medium")}
        assert result["peers"][name]["ratio"] != result["peers"][name]["equal_dtype_ratio"]


@of_x_transformers
@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_trains_at_the_shape_that_was_asked_for(name: str) -> None:
    """It has as many weights as ropelab's model, within its biases and positions, and its steps learn the batch."""
    torch.manual_seed(0)
    resolved = tiny("model.d_model=64", "train.batch_size=2")
    windows = torch.from_numpy(ours.same_batch(resolved, 300)(1))
    one = peers.peer(name, resolved, windows, 300, torch.float32)
    mine = ours.model_of(resolved, 300).n_parameters()
    assert abs(sum(p.numel() for p in one.model.parameters()) / mine - 1) < 0.05
    losses: list[float] = []

    def note(module: torch.nn.Module, given: Any, out: Any) -> None:
        losses.append((out if isinstance(out, torch.Tensor) else out.loss).item())

    one.model.register_forward_hook(note)
    for _ in range(60):
        one.turn()
    assert losses[0] == pytest.approx(math.log(300), abs=1)
    assert losses[-1] < losses[0] - 0.2


@of_x_transformers
def test_what_is_not_installed_is_left_out_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "x_transformers" else object())
    shape = (*SHAPE, "train.batch_size=2", "device=cpu", "train.dtype=fp32", "--rounds", "1")
    status, out, err = answer("train", *shape, "--json")
    assert (status, err) == (0, "x-transformers is not installed: left out\n")
    assert list(json.loads(out)["peers"]) == ["transformers GPT-2"]
    status, out, err = answer("train", *shape, "--peers")
    assert (status, out) == (2, "")
    assert "pip install x-transformers" in err


def test_an_encoding_keeps_the_parameters_that_it_was_given() -> None:
    resolved = tiny("pos=rope", "pos.base=500")
    rope, alibi = ours.with_encodings(resolved, ["rope", "alibi"])
    assert rope.pos.parameters["base"] == 500
    assert alibi == dataclasses.replace(resolved, pos=config.load(["pos=alibi"]).pos)


def test_positions_with_gaps_are_not_timed_as_if_they_had_none() -> None:
    with pytest.raises(ValueError, match="positions=randomized"):
        ours.model_of(tiny("positions=randomized"))


# --- attention ------------------------------------------------------------------------------------------------------


def test_every_kernel_is_timed_beside_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "LENGTHS", (300,))
    result = bench.attention(tiny(), contexts=(64,), rounds=1)
    rows = {(row["bias"], row["use"], row["kernel"]): row for row in result["rows"]}
    assert not [row for row in result["rows"] if "error" in row]
    by_distance = {"fixed": {"digits", "materialised"}, "learned": {"materialised"}}
    for use, kernel in (("forward", "blocks"), ("with gradients", "recomputed")):
        of_use = {(bias, name) for bias, which, name in rows if which == use}
        assert of_use == {
            ("none", "sdpa"), ("none", "materialised"), ("FIRE", "blocks"), ("FIRE", "materialised"),
            *([("FIRE", "recomputed")] if kernel == "recomputed" else []),
            *((bias, name) for bias, names in by_distance.items() for name in (*names, kernel)),
        }  # fmt: skip
        assert rows["none", use, "sdpa"]["ratio"] == 1
    row = rows["none", "forward", "sdpa"]
    # two products of T x T x D, each a multiplication and an addition, for 2 heads of 64 sequences; half of the pairs
    assert row["tflops"] == pytest.approx(2 * 2 * 64 * 2 * 64 * 64 * 8 / 2 / row["seconds"] / 1e12)
    assert row["backend"] in ("flash", "math")
    for label, bias, _ in ATTENTION._biases(tiny(), 64, torch.device("cpu")):
        for use, training in (("forward", False), ("with gradients", True)):
            chosen = choose_kernel(Request(64, bias, torch.device("cpu"), training, torch.float32)).name
            assert [key[2] for key, row in rows.items() if key[:2] == (label, use) and row["chosen"]] == [chosen]


def test_a_kernel_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(attend: Any, *rest: Any) -> None:
        if attend.kernel == "digits":
            raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setattr(accuracy, "LENGTHS", ())
    monkeypatch.setattr(ATTENTION, "_call", broken)
    rows = bench.attention(tiny(), contexts=(32,), rounds=1)["rows"]
    assert {row["kernel"] for row in rows if "error" in row} == {"digits"}
    assert {row["error"] for row in rows if "error" in row} == {"RuntimeError: no such kernel"}
    assert all("seconds" in row for row in rows if "error" not in row)


def test_the_reference_of_the_accuracy_is_the_definition_of_alibi() -> None:
    """Press et al. 2022, section 3, key by key in Python's floats."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, 4, generator=draw, dtype=torch.float64) for _ in range(3))
    found = accuracy.expected(q, k, v, 0.3 * torch.arange(9), rows=3)
    for row, i in enumerate(range(6, 9)):
        weights = [math.exp(float(q[i] @ k[j]) / 2 - 0.3 * (i - j)) for j in range(i + 1)]
        wanted = sum(w * v[j] for j, w in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(found[row], wanted)


def test_the_position_in_digits_is_as_good_as_fp32_and_in_one_number_it_is_not() -> None:
    device = torch.device("cpu")
    rows = {
        (row["dtype"], row["kernel"]): row
        for dtype in (torch.bfloat16, torch.float32)
        for row in accuracy.errors(2048, dtype, slopes(12)[[0, 7, 8]], device)
    }
    assert rows["fp32", "blocks"]["max_error"] < 1e-5
    assert rows["fp32", "digits"]["max_error"] < 1e-3
    assert rows["bf16", "digits"]["max_error"] < 0.01 < 0.3 < rows["bf16", "one number"]["tv_at_least"]
    assert rows["bf16", "rounded"]["max_error"] <= 2**-9  # of numbers below 1


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_a_curve_from_one_pass_is_that_of_a_pass_for_each_length() -> None:
    """Of a model whose curve is not flat, or a wrong slice would not show."""
    result = bench.evaluation(tiny(), contexts=(1024,), methods=["alibi"], rounds=1)
    prefix = result["prefix"]
    assert prefix["contexts"] == [512, 1024]
    assert prefix["largest_difference_nats"] < 1e-4 < 1e-3 < prefix["spread_nats"]
    assert prefix["ratio"] == pytest.approx(prefix["pass_per_ctx_s"] / prefix["one_pass_s"])
    (row,) = result["rows"]
    assert (row["pos"], row["seconds_ratio"], row["memory_ratio"]) == ("alibi", 1, 1)


def test_an_encoding_without_a_meaning_at_a_length_is_refused_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, err = answer("eval", *SHAPE, "--methods", "rope,learned", "--ctx", "64,")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "leave it out of --methods" in err
    timed: list[list[str]] = []
    monkeypatch.setattr(bench, "evaluation", lambda config, **facts: timed.append(facts["methods"]) or {})
    assert answer("eval", *SHAPE, "--methods", "all", "--ctx", "64,", "--json")[0] == 0
    assert set(timed[0]) == set(config.choices("pos")) - {"learned"}
    assert timed[0][0] == "rope"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be reset on Linux")
def test_a_bias_at_16384_needs_no_more_memory_than_rope() -> None:
    """A (T, T) mask of one head would be 1 GB; what is measured is 0.055 GB with RoPE, in a heap without holes."""
    methods = ["rope", "alibi", "t5", "kerple_log"]
    result = bench.evaluation(config.load(["device=cpu"]), contexts=(16384,), methods=methods, rounds=1)
    for row in result["rows"]:
        assert row["memory_ratio"] <= 1.1
        assert row["extra_mb"] < 128


# --- many runs, and the start ---------------------------------------------------------------------------------------


def test_many_models_are_timed_in_three_ways() -> None:
    result = bench.many(tiny("train.batch_size=2"), models=3, rounds=1)
    rows = {row["how"]: row for row in result["rows"]}
    assert set(rows) == {"one after another", "one stack", "side by side"}
    assert rows["one after another"]["ratio"] == 1
    assert all(row["tokens_per_s"] > 0 for row in rows.values())
    assert result["processes"] == min(3, torch.get_num_threads())
    assert result["start_s"] > 0.5  # torch alone takes longer to import


def test_models_that_cannot_be_stacked_are_refused() -> None:
    status, out, err = answer("many", *SHAPE, "--pos", "fox", "device=cpu")
    assert (status, out) == (2, "")
    assert "cannot be stacked" in err


def test_the_start_is_that_of_fresh_processes() -> None:
    status, out, _ = answer("start", *SHAPE, "device=cpu", "train.batch_size=2", "--json")
    assert status == 0
    result = json.loads(out)
    for row, seconds in zip(result["rows"], (result["cold_s"], result["warm_s"]), strict=True):
        assert row["import_s"] > 0.5  # torch alone takes longer
        assert row["seconds"] == seconds == pytest.approx(row["import_s"] + row["build_s"] + row["step_s"])


# --- the command ----------------------------------------------------------------------------------------------------


def test_tables_are_printed_for_people_and_fit_the_page() -> None:
    shape = (*SHAPE, "train.batch_size=2", "device=cpu", "train.dtype=fp32")
    status, out, err = answer("train", *shape, "--methods", "alibi,rope", "--rounds", "1", "--no-peers")
    assert (status, err) == (0, "")
    assert "6 N + 12 L d T" in out
    assert out.index("alibi") < out.index("rope")
    assert max(map(len, out.splitlines())) <= WIDTH
    long = written({"rows": [{"ctx": 1, "ratio": None, "seconds": 0.123456}, {"ctx": 2, "error": "because " * 30}]})
    assert max(map(len, long.splitlines())) == WIDTH
    assert long.splitlines()[-2].split() == ["1", "–", "0.1235", "–"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["walk"], "bench takes train, eval, attention, many or start"),
        (["train", "--rounds", "0"], "--rounds must be at least 1"),
        (["train", "--methods", "rope,alibee"], "did you mean alibi?"),
        (["train", "--methods", ","], "takes encodings such as rope,alibi"),
        (["train", "--methods", "rope,rope"], "names rope twice"),
        (["train", "--methods", "rope", "--pos", "alibi"], "not both"),
        (["eval", "--pos", "rope", "--pos", "alibi"], "--methods"),
        (["attention", "--methods", "rope"], "takes no --methods"),
        (["train", "--ctx", "64"], "use train.ctx=64"),
        (["many", "--models", "0"], "--models must be at least 1"),
        (["many", "--no-peers"], "takes no --peers"),
        (["train", "--vocab", "2"], "--vocab must be at least 3"),
        (["eval", "--ctx", "x"], "--ctx takes a length"),
        *([] if torch.cuda.is_available() else [(["train", "device=cuda"], "this machine has no CUDA device")]),
    ],
)
def test_mistakes_end_with_a_line(arguments: list[str], says: str) -> None:
    status, out, err = answer(*arguments)
    assert (status, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


# --- the script -----------------------------------------------------------------------------------------------------

STUB = """#!/usr/bin/env bash
printf '%s\\n' "$(printf '%q ' "$@")" >> "$STUB_LOG"
[[ "$*" == *"bench start"* ]] && { echo "it broke" >&2; exit 3; }
echo '{}'
"""


def script(folder: Path, python: str, **places: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), str(folder / "out")], env={**os.environ, "PYTHON": python, **places},
        capture_output=True, text=True, check=False, cwd=SCRIPT.parent.parent,
    )  # fmt: skip


@pytest.mark.parametrize("dry", ["", "1"])
def test_the_gpu_check_goes_on_after_a_part_that_fails(
    tmp_path: Path, dry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stub for Python that fails in one part; and the commands that it was given are commands of ropelab."""
    stub = tmp_path / "python"
    stub.write_text(STUB, encoding="utf-8")
    stub.chmod(0o755)
    log = tmp_path / "log"
    done = script(tmp_path, str(stub), STUB_LOG=str(log), ROPELAB_GPU_CHECK_DRY=dry, ROPELAB_DATA="somewhere")
    assert done.returncode == 1
    assert "it broke" in done.stderr
    assert done.stderr.endswith("failed: start\n")
    parts = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))["parts"]
    assert {name for name, part in parts.items() if part["status"]} == {"start"}
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "out").glob("*.json")}
    assert set(found) == {*parts, "summary"} >= {"tests", "attention", "train-1024", "train-8192", "many", "evaluation"}
    assert found["start"] == {"failed": True, "status": 3, "log": "start.log"}

    def nothing(*arguments: Any, **options: Any) -> dict[str, Any]:
        return {}

    for word in ("attention", "evaluation", "many", "start", "train"):
        monkeypatch.setattr(bench, word, nothing)
    lines = [shlex.split(line) for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("-m")]
    assert len(lines) == 8
    for _, module, command, *rest in lines:
        assert module == "ropelab"
        if command == "bench":
            assert answer(*rest) == (0, "{}\n", "")
        else:  # settings and options exist
            settings = [item for item in rest if "=" in item and not item.startswith("data=")]
            config.load(settings)
            assert set(filter(lambda item: item.startswith("--"), rest)) <= {"--pos", "--json", "--ctx", "--protocol"}


@pytest.mark.slow
def test_the_gpu_check_runs_as_a_whole(tmp_path: Path) -> None:
    """In its dry form, on this machine: every part writes what it should."""
    done = script(tmp_path, sys.executable, ROPELAB_GPU_CHECK_DRY="1", ROPELAB_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "out").glob("*.json")}
    assert set(found) == {
        "environment", "tests", "attention", "train-1024", "train-8192", "eval", "start", "many", "train",
        "evaluation", "summary",
    }  # fmt: skip
    assert not any("failed" in part for part in found.values())
    assert found["train"]["status"] == "done"
    assert found["evaluation"]["rows"][0]["status"] == "ok"
    assert len(found["train-1024"]["methods"]) == 5
    assert found["eval"]["prefix"]["contexts"] == [512, 1024]
