"""Runs that go on from a run, training positions that skip, and rotations that are dropped."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from ropelab import config, files, runs, training
from ropelab.config import Config, Method
from ropelab.data import drawn_positions
from ropelab.errors import ContextLengthError
from ropelab.runs import RunDir, recipe
from tests.test_experiment import evaluate, settings


@pytest.fixture(scope="module")
def parent(folder: Path) -> RunDir:
    return trained(settings(folder, "pos=rope", "train.dtype=fp32", "seed=7"))


def trained(resolved: Config) -> RunDir:
    return RunDir(Path(training.train(resolved)["run_dir"]))


def child(folder: Path, parent: RunDir, *changes: str) -> Config:
    places = [f"runs_dir={folder / 'runs'}", f"cache_dir={folder / 'cache'}"]
    return config.load([f"parent={parent.name}", *places, *changes], parent=parent.manifest()["config"])


# --- --from RUN -----------------------------------------------------------------------------------------------------


def test_a_child_has_its_parents_settings_but_for_those_given(folder: Path, parent: RunDir) -> None:
    resolved = child(folder, parent, "scaling=yarn", "scaling.factor=4", "train.ctx=64", "train.steps=2")
    theirs = config.from_dict(parent.manifest()["config"])
    assert (resolved.model, resolved.data, resolved.pos, resolved.seed) == (theirs.model, theirs.data, theirs.pos, 7)
    assert (resolved.train.ctx, resolved.train.steps) == (64, 2)
    assert resolved.train.lr == theirs.train.lr
    assert resolved.parent == parent.name


def test_no_steps_of_training_change_nothing(folder: Path, parent: RunDir) -> None:
    """A child trained with a rate of (almost) nothing is its parent, whatever its window: the weights come over."""
    run = trained(child(folder, parent, "train.ctx=32", "train.steps=1", "train.lr=1e-30", "train.weight_decay=0"))
    mine, theirs = run.load_weights(), parent.load_weights()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=1e-12)
    manifest = run.manifest()
    named = {"run": parent.name, "digest": parent.manifest()["digest"], "recipe": recipe(parent.manifest())}
    assert manifest["parent"] == named
    assert (manifest["train_ctx"], manifest["original_ctx"], manifest["first_step"]) == (32, 16, 3)


def test_scalings_of_a_child_refer_to_its_roots_length(folder: Path, parent: RunDir) -> None:
    """Trained on at 64 = 4 x 16 by interpolation: `auto` is 4, and a grandchild and every evaluation refer to 16."""
    run = trained(child(folder, parent, "scaling=linear", "train.ctx=64", "train.steps=1"))
    assert run.manifest()["config"]["scaling"]["factor"] == 4.0
    kept = evaluate(run, folder, "eval.ctx=64,128")
    assert [row["factor"] for row in kept["rows"]] == [4.0, 4.0]
    other = evaluate(run, folder, "eval.ctx=64,128", scaling="yarn")
    assert other["factor"] == 8.0
    dynamic = evaluate(run, folder, "eval.ctx=16,32,64", scaling="dynamic_ntk")
    plain = evaluate(run, folder, "eval.ctx=16,32,64", scaling="none")
    same = [a["nll"] == b["nll"] for a, b in zip(dynamic["rows"], plain["rows"], strict=True)]
    assert same == [True, False, False]
    grandchild = trained(child(folder, run, "train.steps=1", "train.ctx=128", "scaling=ntk"))
    assert grandchild.manifest()["config"]["scaling"]["factor"] == 8.0
    assert (grandchild.manifest()["original_ctx"], grandchild.manifest()["first_step"]) == (16, 4)


def test_a_child_sees_the_batches_after_its_parents(folder: Path, parent: RunDir) -> None:
    """The first loss of a child at no learning rate is the parent's loss on batch 4, which the parent never saw."""
    from ropelab import data
    from ropelab.runs import open_run

    run = trained(child(folder, parent, "train.steps=1", "train.lr=1e-30"))
    theirs = config.from_dict(parent.manifest()["config"])
    corpus = data.prepare(theirs.data, cache_dir=folder / "cache")
    windows = data.Batches(corpus.train, ctx=16, separator=256).at(4, seed=7, batch_size=theirs.train.batch_size)
    model = open_run(parent).model(torch.device("cpu"))
    with torch.no_grad():
        losses = model.nll(model(torch.from_numpy(windows[:, :-1])), torch.from_numpy(windows[:, 1:]))
    scored = losses[torch.from_numpy(windows[:, 1:]) != 256]
    assert run.metrics()[0]["loss"] == pytest.approx(scored.mean().item(), rel=1e-5)


def test_a_child_resumes_bit_by_bit_and_is_not_trained_twice(folder: Path, parent: RunDir) -> None:
    """Stopped after step 5, it goes on from the checkpoint of step 4: weights, positions and batches as in one go."""
    changes = ("scaling=linear", "scaling.factor=2", "positions=pose", "train.steps=6", "train.checkpoint_every=2")
    straight = trained(child(folder, parent, *changes))
    assert training.train(child(folder, parent, *changes))["skipped"]

    elsewhere = folder / "again"
    shutil.copytree(parent.path, elsewhere / parent.name)
    resolved = dataclasses.replace(child(folder, parent, *changes), runs_dir=str(elsewhere))

    def stop(description: str, done: int, total: int, **facts: Any) -> None:
        if description == "train" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(resolved, progress=stop)
    again = trained(resolved)
    assert again.name == straight.name
    assert [line["step"] for line in again.metrics()] == [1, 2, 3, 4, 5, 6]
    weights = straight.load_weights()
    for name, tensor in again.load_weights().items():
        assert torch.equal(tensor, weights[name])


def test_searched_factors_are_trained_with_and_kept(folder: Path, parent: RunDir) -> None:
    """The factors live in the run, not in the file: the file may go, and another file is another run."""
    file = folder / "factors.json"
    factors = [1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    file.write_text(json.dumps({"long_factors": factors, "start_tokens": 2, "factor": 4, "original_ctx": 16}))
    chosen = ("scaling=longrope", f"scaling.factors={file}", "train.ctx=64", "train.steps=1")
    run = trained(child(folder, parent, *chosen))
    other = folder / "other.json"
    file.rename(other)
    assert trained(child(folder, parent, chosen[0], f"scaling.factors={other}", *chosen[2:])).name == run.name
    kept = evaluate(run, folder, "eval.ctx=64,")
    assert (kept["scaling"], kept["factor"], kept["kept_scaling"]) == ("longrope", 4.0, True)
    other.write_text(json.dumps({"long_factors": [1.0, *factors[1:-1], 4.0], "start_tokens": 0, "factor": 4}))
    assert trained(child(folder, parent, chosen[0], f"scaling.factors={other}", *chosen[2:])).name != run.name


@pytest.mark.parametrize("method", ["ntk", "yarn", "llama3", "ntk_by_parts", "dynamic_yarn"])
def test_contexts_are_extended_with_every_kind_of_spectrum(folder: Path, parent: RunDir, method: str) -> None:
    more = ("scaling.high_freq_factor=2", "scaling.low_freq_factor=0.5") if method == "llama3" else ()
    run = trained(
        child(folder, parent, f"scaling={method}", "scaling.factor=4", *more, "train.ctx=64", "train.steps=1")
    )
    assert [row["status"] for row in evaluate(run, folder, "eval.ctx=64,128")["rows"]] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["model=small"], "model.n_layer=6 differs from that of the parent"),
        (["model.d_model=64"], "model.d_model=64 differs"),
        (["data.tokenizer=bpe"], "data.tokenizer=bpe differs"),
        (["pos=learned"], "its position weights are others"),
        (["scaling=yarn"], "changes nothing; give scaling.factor"),
        (["scaling=rerope"], "for evaluation"),
        (["parent=nobody"], "there is no run 'nobody'"),
    ],
)
def test_what_a_parent_cannot_be_gone_on_with_is_refused(
    folder: Path,
    parent: RunDir,
    changes: list[str],
    says: str,
) -> None:
    before = sorted(path.name for path in (folder / "runs").iterdir())
    with pytest.raises(ValueError, match=says):
        named = [item for item in changes if item.startswith("parent=")]
        resolved = child(folder, parent, "train.steps=1", *(item for item in changes if item not in named))
        if named:
            resolved = config.load([*named, f"runs_dir={folder / 'runs'}", f"cache_dir={folder / 'cache'}"])
        training.train(resolved)
    assert sorted(path.name for path in (folder / "runs").iterdir()) == before


def test_an_unfinished_parent_is_refused(folder: Path, parent: RunDir) -> None:
    status = parent.manifest()["status"]
    parent.update_manifest(status="running")
    try:
        with pytest.raises(ValueError, match="is interrupted, not done"):
            training.train(child(folder, parent, "train.steps=1"))
    finally:
        parent.update_manifest(status=status)


# --- positions ------------------------------------------------------------------------------------------------------


def places(name: str, parameters: dict[str, Any], n: int = 20000) -> np.ndarray:
    draw = drawn_positions(Method(name, parameters), ctx=8, original_ctx=8, factor=4.0)
    assert draw is not None
    assert np.array_equal(draw(3, 5, 7), draw(3, 5, 9)[:7])
    assert not np.array_equal(draw(3, 5, 7), draw(3, 6, 7))
    assert not np.array_equal(draw(3, 5, 7), draw(4, 5, 7))
    return draw(0, 1, n)


def test_randomized_positions_are_uniform_subsets() -> None:
    """Sorted, distinct, every subset as likely as another: single positions and pairs by chi-square."""
    drawn = places("randomized", {"max_ctx": 12})
    assert (np.diff(drawn, axis=1) > 0).all()
    assert (drawn.min(), drawn.max()) == (0, 11)
    held = np.zeros((len(drawn), 12), bool)
    np.put_along_axis(held, drawn, True, axis=1)
    subsets = np.bincount(held @ (1 << np.arange(12)), minlength=1 << 12)
    subsets = subsets[[bin(i).count("1") == 8 for i in range(1 << 12)]]
    assert len(subsets) == math.comb(12, 8)
    assert scipy_stats.chisquare(subsets).pvalue > 1e-3


def test_pose_is_the_papers_definition() -> None:
    """Two chunks: contiguous inside, the second moved by u ~ U{0 .. 32 - 8}, cut after 1 .. 7 tokens, uniformly."""
    drawn = places("pose", {"chunks": 2, "max_ctx": None})
    assert (drawn[:, 0] == 0).all()
    steps = np.diff(drawn, axis=1)  # (n, 7)
    assert ((steps > 1).sum(axis=1) <= 1).all()
    skips = steps.max(axis=1) - 1
    assert scipy_stats.chisquare(np.bincount(skips, minlength=25)).pvalue > 1e-3
    cuts = steps.argmax(axis=1)[skips > 0]
    assert scipy_stats.chisquare(np.bincount(cuts, minlength=7)).pvalue > 1e-3
    assert drawn.max() == 31


def test_pose_of_three_chunks_skips_twice() -> None:
    drawn = places("pose", {"chunks": 3, "max_ctx": 100})
    steps = np.diff(drawn, axis=1)
    assert ((steps > 1).sum(axis=1) <= 2).all()
    assert ((steps > 1).sum(axis=1) == 2).any()
    assert (drawn[:, -1] <= 99).all()


def test_positions_reach_the_angles(folder: Path) -> None:
    """A model given positions sees those: equal to a rotation by the given places, pair by pair, in fp64."""
    from ropelab.model import rotate
    from ropelab.runs import build_model

    resolved = settings(folder, "pos=rope")
    model = build_model(resolved, 257, scaling=Method("none", {}), original_ctx=16)
    where = torch.tensor([[0, 1, 5, 6], [0, 10, 11, 12]])
    prepared = model.prepare(4, positions=where)
    q = torch.randn(2, 2, 4, 16)
    rotation = prepared.record.rotation
    turned = rotate(q, rotation.cos_q, rotation.sin_q, interleaved=False)
    for b in range(2):
        for t in range(4):
            for i in range(8):
                angle = where[b, t].item() * 10000 ** (-2 * i / 16)
                pair = complex(q[b, 1, t, i], q[b, 1, t, i + 8]) * complex(math.cos(angle), math.sin(angle))
                assert turned[b, 1, t, i].item() == pytest.approx(pair.real, abs=1e-5)
                assert turned[b, 1, t, i + 8].item() == pytest.approx(pair.imag, abs=1e-5)
    tokens = torch.arange(8).view(2, 4)
    with torch.no_grad():
        plain = torch.arange(4).expand(2, 4)
        torch.testing.assert_close(model(tokens, positions=plain), model(tokens))
        assert not torch.allclose(model(tokens, positions=where), model(tokens))


@pytest.mark.parametrize("pos", ["rope", "p_rope", "sinusoidal"])
def test_skipping_positions_do_not_depend_on_the_micro_batch(folder: Path, pos: str) -> None:
    shape = (f"pos={pos}", "positions=randomized", "train.dtype=fp32", "train.lr=1e-4", f"runs_dir={folder / 'micro'}")
    whole = trained(settings(folder, *shape))
    weights, first = whole.load_weights(), whole.metrics()[0]["loss"]
    whole.update_manifest(status="failed")
    for file in (whole.path / "checkpoints").rglob("*.safetensors"):
        file.unlink()
    halved = trained(settings(folder, *shape, "train.micro_batch_size=32"))
    assert halved.name == whole.name
    assert halved.metrics()[0]["loss"] == pytest.approx(first, rel=1e-6)
    for name, tensor in halved.load_weights().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["pos=alibi", "positions=randomized"], "needs an encoding whose positions may skip"),
        (["pos=t5", "positions=pose"], "not pos=t5"),
        (["positions=pose"], "add --scaling NAME"),
        (["positions=pose", "positions.max_ctx=16"], "above train.ctx=16"),
        (["positions=pose", "positions.max_ctx=64", "positions.chunks=1"], "positions.chunks must be from 2"),
        (["positions=pose", "positions.max_ctx=64", "positions.chunks=17"], "positions.chunks must be from 2"),
        (["positions=randomized", "positions.max_ctx=8"], "above train.ctx=16"),
        (["pos=drope", "pos.drop_after=1.0"], r"pos.drop_after must be in \[0, 1\)"),
    ],
)
def test_what_cannot_be_trained_is_refused(folder: Path, changes: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        training.train(settings(folder, *changes, f"runs_dir={folder / 'none'}"))
    assert not (folder / "none").exists()


# --- DroPE ----------------------------------------------------------------------------------------------------------


def test_a_dropped_rotation_stays_dropped(folder: Path, parent: RunDir) -> None:
    """Two thirds of the steps with a rotation are those of RoPE; the finished run is a model without positions."""
    shape = ("train.dtype=fp32", "train.steps=6", "seed=7")
    dropped = trained(settings(folder, "pos=drope", "pos.drop_after=0.5", *shape))
    rope = trained(settings(folder, "pos=rope", *shape))
    losses = [line["loss"] for line in dropped.metrics()]
    assert losses[:3] == [line["loss"] for line in rope.metrics()][:3]
    assert losses[3:] != [line["loss"] for line in rope.metrics()][3:]
    model = runs.open_run(dropped).model(torch.device("cpu"))
    assert model.prepare(16).record.rotation is None
    # the same weights as NoPE give the same losses
    row = evaluate(dropped, folder, "eval.ctx=64")["rows"][-1]
    manifest = dropped.manifest()
    manifest["config"]["pos"] = {"name": "none"}
    as_nope = RunDir(folder / "as-nope")
    as_nope.path.mkdir()
    for file in dropped.path.rglob("*"):
        if file.is_file() and "results" not in file.parts:
            target = as_nope.path / file.relative_to(dropped.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    files.write_sealed(as_nope.manifest_path, manifest)
    assert evaluate(as_nope, folder, "eval.ctx=64")["rows"][-1]["nll"] == row["nll"]


def test_a_rope_run_is_recalibrated_without_its_rotation(folder: Path, parent: RunDir) -> None:
    run = trained(child(folder, parent, "pos=drope", "pos.drop_after=0", "train.steps=2"))
    assert run.name.startswith("drope-text-s7-")
    with pytest.raises(ValueError, match="applies to pos=rope"):
        evaluate(run, folder, "eval.ctx=64", scaling="yarn:4")
    warm = evaluate(run, folder, "eval.ctx=64", scaling="temperature:4")
    assert warm["rows"][0]["nll"] != evaluate(run, folder, "eval.ctx=64")["rows"][0]["nll"]
    with pytest.raises(ValueError, match=r"pos\.drop_after=0"):
        training.train(child(folder, run, "train.steps=1", "pos.drop_after=0.5"))


def test_a_learned_table_cannot_be_trained_past_its_end(folder: Path) -> None:
    run = trained(settings(folder, "pos=learned", "train.dtype=fp32"))
    with pytest.raises(ContextLengthError, match="16"):
        training.train(child(folder, run, "train.ctx=32", "train.steps=1"))
