"""The memory of an evaluation: what is planned, what is taken, and what is refused."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ropelab import config, evaluation, model, runs
from ropelab.config import Method, ModelConfig
from ropelab.evaluation import memory
from ropelab.evaluation.memory import plan
from ropelab.model import GPT, pass_bytes
from ropelab.positions import ENCODINGS, Geometry, PositionEncoding, learned_numbers
from ropelab.scalings import build
from tests.test_positions import method

CPU = torch.device("cpu")
SHAPE = ModelConfig("test", n_layer=2, d_model=16, n_head=2, qk_norm=False)


def encodings(*contexts: int, pos: str = "rope", scaling: Method = runs.NO_SCALING) -> dict[int, PositionEncoding]:
    return {ctx: build(method("pos", pos), scaling, Geometry.of(SHAPE, 64)) for ctx in contexts}


SCALED = [("rope", "rerope"), ("rope", "self_extend"), ("none", "temperature"), ("alibi", "block_causal")]


@pytest.mark.parametrize(("pos", "scaling"), [*((name, "none") for name in ENCODINGS), *SCALED])
def test_a_sequence_in_pieces_is_the_whole_sequence(pos: str, scaling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states of 30 tokens, 7 at a time, against the pass that keeps a gradient, which knows no pieces."""
    scaled = method("scaling", scaling)
    if "factor" in scaled.parameters:
        scaled = Method(scaled.name, {**scaled.parameters, "factor": 4.0})
    net = GPT(SHAPE, 12, build(method("pos", pos), scaled, Geometry(16, 2, 16 if pos != "learned" else 30, 2)), seed=0)
    net.set_training_fraction(1.0)
    net.eval()
    tokens = torch.randint(0, 11, (2, 30), generator=torch.Generator().manual_seed(0))
    whole = net(tokens)
    assert whole.requires_grad
    seen: list[int] = []
    for block in net.blocks:
        block.mlp_in.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0].shape[1]))  # type: ignore[union-attr]
    monkeypatch.setattr(model, "pieces_of", lambda device: 7)
    with torch.no_grad():
        torch.testing.assert_close(net(tokens), whole)
    assert seen == 2 * [7, 7, 7, 7, 2]


def _taken(pos: str, ctx: int) -> tuple[int, int]:
    """(bytes planned, bytes taken) of a pass in this fresh process."""
    torch.set_num_threads(1)

    def field(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))

    resolved = config.load([f"pos={pos}", "model.n_layer=1", "model.d_model=256"])
    net = runs.build_model(resolved, 257, scaling=runs.NO_SCALING, original_ctx=128).eval()
    net.set_training_fraction(1.0)
    scorer = evaluation.scorer_of(net, window=None, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, 256, (1, ctx + 1))
    scorer(tokens[:, :65], tokens[:, 2:66])  # libraries load their kernels on the first call
    before = field("VmRSS")
    scorer(tokens[:, :-1], tokens[:, 1:])
    return pass_bytes(resolved.model, 257, ctx, CPU), field("VmHWM") - before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("pos", ["rope", "alibi", "fire", "xpos", "cable"])
def test_a_pass_takes_no_more_than_was_planned(pos: str) -> None:
    """And the plan is no more than four times what is taken: a bound that says nothing would be none."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        planned, taken = pool.apply(_taken, (pos, 16384))
    assert taken <= planned <= 4 * taken


def test_windows_of_a_pass_shrink_to_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**12)
    full = plan(SHAPE, 257, encodings(64, 128, 8192), CPU, limit_gb=None)
    assert full.windows == {64: 64, 128: 32, 8192: 1}
    assert full.longest == 8192
    narrow = pass_bytes(SHAPE, 257, 1024, CPU) / 10**9
    fewer = plan(SHAPE, 257, encodings(64, 128), CPU, limit_gb=narrow)
    assert fewer.windows == {64: 16, 128: 8}
    assert fewer.needed <= narrow * 10**9
    assert "1024 tokens at a time" in str(fewer)


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    limit = pass_bytes(SHAPE, 257, 4096, CPU) / 10**9
    with pytest.raises(ValueError, match=r"over 16384 tokens takes .* use --ctx 4096 or less, or more eval.memory_gb"):
        plan(SHAPE, 257, encodings(64, 16384), CPU, limit_gb=limit)
    with pytest.raises(ValueError, match=r"use more eval\.memory_gb"):
        plan(SHAPE, 257, encodings(64), CPU, limit_gb=1e-6)
    # a length at which nothing is computed needs no memory
    assert plan(SHAPE, 257, encodings(64, 16384, pos="learned"), CPU, limit_gb=limit).windows.keys() == {64}


def test_scores_of_far_keys_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**12)
    far = plan(SHAPE, 257, encodings(8192, scaling=method("scaling", "rerope")), CPU, limit_gb=None)
    plain = plan(SHAPE, 257, encodings(8192), CPU, limit_gb=None)
    assert far.needed - plain.needed == 4 * 2 * 8192 * 16


def test_the_limit_of_a_job_counts_as_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 2 of Linux' control groups: what is left of memory.max, cached files not counted; `max` is no limit."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 300000\nactive_file 100000\n")
    assert memory.free_bytes(CPU) == 2400000
    (tmp_path / "memory.max").write_text("max\n")
    free = memory.free_bytes(CPU)
    assert free is None or free > 3000000


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pos", ENCODINGS)
def test_what_an_encoding_learns_is_counted_without_making_it(pos: str) -> None:
    shape = ModelConfig("test", n_layer=3, d_model=16, n_head=2, qk_norm=False)
    built = build(method("pos", pos), runs.NO_SCALING, Geometry.of(shape, 64))
    counted, pairs = learned_numbers(method("pos", pos), shape, 64)
    assert counted == sum(parameter.numel() for parameter in built.parameters())
    assert (pairs > 0) == (pos == "fire")


def test_a_training_that_does_not_fit_names_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting that is named, set as it is said, is planned within what is free."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**9)

    def refusal(*settings: str) -> str:
        resolved = config.load(settings)
        with pytest.raises(ValueError, match="training takes at least") as refused:
            memory.check_training(resolved, CPU, original_ctx=resolved.train.ctx)
        return str(refused.value)

    for large in (
        ["train.ctx=65536"], ["model.n_layer=2048"], ["model.d_model=8192"], ["train.batch_size=32768"],
        ["pos=fire", "pos.width=65536"], ["positions=randomized", "positions.max_ctx=1000000000"],
        ["train.ctx=4096", "model.n_layer=8"],
    ):  # fmt: skip
        said = refusal(*large)
        offered = re.findall(r"[a-z_]+\.[a-z_]+=\w+", said)
        assert offered, said
        for change in offered:
            key = change.partition("=")[0]
            fitting = config.load([*(item for item in large if item.partition("=")[0] != key), change])
            memory.check_training(fitting, CPU, original_ctx=fitting.train.ctx)
    assert "train.activation_checkpointing=true" in refusal("train.ctx=32768", "train.batch_size=2", "model.n_layer=20",
                                                           "train.micro_batch_size=1")  # fmt: skip
    memory.check_training(config.load(["train.ctx=65536"]), CPU, original_ctx=65536, elsewhere=True)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    memory.check_training(config.load(["train.ctx=65536"]), CPU, original_ctx=65536)


def _trained(settings: list[str]) -> tuple[int, int]:
    """(bytes planned, bytes taken) by a training step in this fresh process."""
    torch.set_num_threads(1)

    def field(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))

    from ropelab.bench.ours import training_steps

    tiny = {"train.ctx": "16", "model.d_model": "16", "model.n_layer": "1", "model.n_head": "2"}
    given = {item.partition("=")[0]: item.partition("=")[2] for item in settings}
    small = config.load([f"{key}={value}" for key, value in {**given, **tiny}.items()])
    training_steps(small, torch.float32, 257).turn()  # libraries load their kernels on the first call
    before = field("VmRSS")
    resolved = config.load(settings)
    training_steps(resolved, torch.float32, 257).turn()
    return memory.training_bytes(resolved, 257, CPU, original_ctx=resolved.train.ctx), field("VmHWM") - before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("pos", ["rope", "alibi", "learned", "cable", "fire"])
@pytest.mark.parametrize(
    "shape",
    [["train.ctx=2048", "train.batch_size=4", "model.d_model=128", "model.n_layer=4"],
     ["train.ctx=64", "train.batch_size=2", "model.d_model=1024", "model.n_layer=4", "model.n_head=8"]],
    ids=["activations", "weights"],
)  # fmt: skip
def test_a_training_step_takes_at_least_what_was_planned(pos: str, shape: list[str]) -> None:
    """Else what fits would be refused; and at most six times that, or the plan would say nothing."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        planned, taken = pool.apply(_trained, ([f"pos={pos}", "train.dtype=fp32", "device=cpu", *shape],))
    assert planned <= taken <= 6 * planned
