"""Every encoding and every scaling as a user meets them: trained, stopped and resumed, evaluated past the length."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ropelab import config, evaluation, runs, training
from ropelab.config import choices
from ropelab.runs import RunDir
from ropelab.scalings import SCALINGS
from tests.test_experiment import enlarged, evaluate, settings

L = 16
UNDEFINED_PAST_L = ("learned",)
FACTORS = {"long_factors": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.0], "start_tokens": 2}  # 8 pairs


@pytest.fixture(scope="module")
def zoo(folder: Path) -> dict[str, RunDir]:
    """Runs by encoding, each trained when it is asked for."""

    class Runs(dict[str, RunDir]):
        def __missing__(self, pos: str) -> RunDir:
            result = training.train(settings(folder, f"pos={pos}", "train.dtype=fp32", "seed=3"))
            self[pos] = enlarged(RunDir(Path(result["run_dir"])))
            return self[pos]

    return Runs()


@pytest.mark.parametrize("pos", choices("pos"))
def test_every_encoding_resumes_bit_by_bit(folder: Path, pos: str) -> None:
    """Stopped after step 3 of 4 and gone on from the checkpoint of step 2: the tensors of a training in one go."""
    shape = (f"pos={pos}", "train.dtype=fp32", "train.steps=4", "train.checkpoint_every=2", "seed=3")
    straight = RunDir(Path(training.train(settings(folder, *shape))["run_dir"]))
    resolved = dataclasses.replace(settings(folder, *shape), runs_dir=str(folder / "stopped"))

    def stop(description: str, done: int, total: int, **facts: Any) -> None:
        if description == "train" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(resolved, progress=stop)
    again = RunDir(Path(training.train(resolved)["run_dir"]))
    weights = straight.load_weights()
    resumed = again.load_weights()
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    assert [line["loss"] for line in again.metrics()] == [line["loss"] for line in straight.metrics()]
    trained = [name for name in weights if name.startswith("encoding.")]
    start = runs.build_model(settings(folder, *shape), 257, scaling=runs.NO_SCALING, original_ctx=L)
    for name in trained:
        assert not torch.equal(weights[name], start.state_dict()[name]), f"{name} is not trained"


@pytest.mark.parametrize("pos", choices("pos"))
def test_every_encoding_is_evaluated_past_its_length(zoo: dict[str, RunDir], folder: Path, pos: str) -> None:
    result = evaluate(zoo[pos], folder, "eval.protocol=last", "eval.ctx=16,32,64")
    status = [row["status"] for row in result["rows"]]
    assert status == (["ok", "undefined", "undefined"] if pos in UNDEFINED_PAST_L else ["ok"] * 3)
    windowed = evaluate(zoo[pos], folder, "eval.protocol=last", "eval.ctx=16,32,64", "eval.window=8")
    assert windowed["rows"][0]["nll"] != result["rows"][0]["nll"]


@pytest.mark.parametrize("pos", [pos for pos in choices("pos") if pos not in UNDEFINED_PAST_L])
def test_one_pass_and_a_pass_for_each_ctx_agree(zoo: dict[str, RunDir], folder: Path, pos: str) -> None:
    """`prefix` reads every ctx off the longest pass where the encoding does not depend on the length."""
    at_once = evaluate(zoo[pos], folder, "eval.protocol=prefix", "eval.ctx=16,32,64")
    for ctx, row in zip((16, 32, 64), at_once["rows"], strict=True):
        alone = evaluate(zoo[pos], folder, "eval.protocol=prefix", f"eval.ctx={ctx},", "eval.max_ctx=64")
        assert row["nll"] == pytest.approx(alone["rows"][0]["nll"], abs=1e-4)


def applicable(scaling: str) -> str:
    to = SCALINGS[scaling].applies_to
    return "alibi" if to is None else to[0]


@pytest.mark.parametrize("scaling", [name for name in choices("scaling") if name != "none"])
def test_every_scaling_changes_what_it_should(zoo: dict[str, RunDir], folder: Path, scaling: str) -> None:
    """At 4L the losses are not the plain model's; of a dynamic scaling they are at L; the digests say the same."""
    pos = applicable(scaling)
    chosen = [f"scaling={scaling}"]
    if scaling == "longrope":
        (folder / "factors.json").write_text(json.dumps(FACTORS))
        chosen += [f"scaling.factors={folder / 'factors.json'}"]
    if "factor" in config.load([f"scaling={scaling}"]).scaling.parameters and not SCALINGS[scaling].dynamic:
        chosen += ["scaling.factor=4"]
    resolved = settings(folder, "eval.last=4", "eval.tokens=200", "eval.protocol=last", "eval.ctx=16,64").eval
    method = config.load(chosen).scaling
    scaled = evaluation.evaluate(zoo[pos], resolved, scaling=method, cache_dir=str(folder / "cache")).result.to_json()
    plain = evaluate(zoo[pos], folder, "eval.protocol=last", "eval.ctx=16,64")
    assert scaled["scaling"] == scaling
    at_l, far = scaled["rows"]
    assert far["status"] == "ok"
    assert far["nll"] != plain["rows"][1]["nll"]
    assert far.get("spectrum_digest") != plain["rows"][1].get("spectrum_digest")
    unchanged = at_l["nll"] == plain["rows"][0]["nll"]
    assert unchanged == (at_l["spectrum_digest"] == plain["rows"][0]["spectrum_digest"])
    if SCALINGS[scaling].dynamic or scaling in ("block_causal", "clamp"):
        assert unchanged


@pytest.mark.parametrize("name", choices("scaling"))
def test_a_run_trains_with_a_scaling_or_says_why_not(folder: Path, name: str) -> None:
    if name in ("none", "longrope"):
        return
    pos = applicable(name)
    chosen = [f"pos={pos}", f"scaling={name}", "train.steps=1", "train.dtype=fp32"]
    if "factor" in config.load([f"scaling={name}"]).scaling.parameters:
        chosen += ["scaling.factor=2"]
    if SCALINGS[name].evaluation_only:
        with pytest.raises(ValueError, match="for evaluation"):
            training.train(settings(folder, *chosen))
    else:
        run = RunDir(Path(training.train(settings(folder, *chosen))["run_dir"]))
        assert run.name.startswith(f"{pos}-{name}-text")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"long_factors": [1.0, 2.0]}, "8"),
        ({"long_factors": [2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]}, "scaling.factors"),
        ({"long_factors": [0.5] * 8}, "scaling.factors"),
        ({"long_factors": [1.0] * 7 + ["x"]}, "a list of numbers"),
        ({"long_factors": [1.0] * 7 + [float("nan")]}, "not finite"),
        ({"long_factors": 3}, "no list long_factors"),
        ([1, 2], "no list long_factors"),
        ("{", "truncated or altered"),
        ({**FACTORS, "start_tokens": [1]}, "start_tokens must be a number"),
        ({**FACTORS, "start_tokens": -1}, "start_tokens"),
        ({**FACTORS, "factor": 0.5}, "scaling.factor"),
    ],
)
def test_bad_factor_files_are_refused(zoo: dict[str, RunDir], folder: Path, content: Any, says: str) -> None:
    file = folder / "bad.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=says):
        method = config.load(["scaling=longrope", f"scaling.factors={file}", "scaling.original_ctx=16"]).scaling
        resolved = settings(folder, "eval.tokens=200", "eval.ctx=64").eval
        evaluation.evaluate(zoo["rope"], resolved, scaling=method, cache_dir=str(folder / "cache"))
