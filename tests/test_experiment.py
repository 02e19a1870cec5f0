"""Train and evaluate as a whole: rows against a slow loop over single targets, scalings, windows, undefined rows."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from ropelab import config, data, evaluation, training
from ropelab.attention import Attend
from ropelab.config import Config, EvalConfig, Method
from ropelab.model import GPT
from ropelab.positions import Geometry, Spectrum
from ropelab.runs import NO_SCALING, RunDir, build_model
from ropelab.scalings import SCALINGS, Scaling, build
from tests.lab import changed

SHAPE = [
    "model.n_layer=2",
    "model.d_model=32",
    "model.n_head=2",
    "train.ctx=16",
    "train.batch_size=64",  # and validation, of 1024 windows, in 16 passes
    "train.steps=3",
]


def settings(folder: Path, *more: str) -> Config:
    """The configuration of a tiny run; of a key given twice the last counts."""
    places = [
        "data=text",
        f"data.path={folder / 'text'}",
        f"runs_dir={folder / 'runs'}",
        f"cache_dir={folder / 'cache'}",
    ]
    chosen = (*SHAPE, *places)
    for item in more:
        chosen = changed(chosen, item)
    return config.load(chosen)


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, RunDir]:
    """Finished runs whose weights are then made large, so that a wrong angle or a wrong window shows in the losses."""
    trained = {}
    for pos in ("rope", "alibi", "learned", "sinusoidal", "none"):
        result = training.train(settings(folder, f"pos={pos}", "train.dtype=fp32"))
        trained[pos] = enlarged(RunDir(Path(result["run_dir"])))
    return trained


def enlarged(run: RunDir) -> RunDir:
    weights = {name: tensor * 6 if tensor.dim() >= 2 else tensor for name, tensor in run.load_weights().items()}
    run.save_step(3, {"model": weights}, {}, last=True)
    return run


def evaluate(run: RunDir, folder: Path, *changes: str, scaling: str | None = None) -> dict[str, Any]:
    resolved: EvalConfig = settings(folder, "eval.last=4", "eval.stride=4", "eval.tokens=200", *changes).eval
    method = None if scaling is None else config.parse_scaling(scaling)
    return evaluation.evaluate(run, resolved, scaling=method, cache_dir=str(folder / "cache")).result.to_json()


def test_docs(folder: Path) -> None:
    corpus = data.prepare(settings(folder).data, cache_dir=folder / "cache")
    assert len(corpus.test) == 1
    assert len(corpus.test.document(0)) > 600


def model_of(run: RunDir, scaling: Method | None = None) -> GPT:
    trained = config.from_dict(run.manifest()["config"])
    model = build_model(trained, 257, scaling=NO_SCALING, original_ctx=trained.train.ctx)
    model.load_state_dict(run.load_weights())
    if scaling is not None:
        model.encoding = build(trained.pos, scaling, Geometry(32, 2, 16))
    return model.eval()


def single_losses(
    model: GPT, document: Any, pairs: list[tuple[int, int, int]], window: int | None = None
) -> list[float]:
    """Loss of each (target, first token, ctx) by a forward pass of its own, softmax in fp64 over the 256 bytes."""
    losses = []
    for target, first, ctx in pairs:
        inputs = torch.tensor(document[first : first + ctx].astype("int64"))[None]
        with torch.no_grad():
            hidden = model(inputs, window=window)[0, target - first - 1]
            scores = (model.tokens.weight[:256].double() @ hidden.double()).log_softmax(0)
        losses.append(-scores[int(document[target])].item())
    return losses


PAIRS = {
    "nonoverlapping": lambda ctx: [(t, (t - 1) // ctx * ctx, ctx) for t in range(1, 193)],
    "last": lambda ctx: [(t, end - ctx, ctx) for end in (64, 128, 192) for t in range(end - 3, end + 1)],
    "sliding": lambda ctx: [
        (t, first + 3 - ctx, ctx) for first in range(61, 190, 4) for t in range(first, first + 4) if first + 3 <= 192
    ],
    "prefix": lambda ctx: [(t, 0, ctx) for t in range(1, ctx + 1)],
}  # fmt: skip


@pytest.mark.parametrize("protocol", PAIRS)
@pytest.mark.parametrize("pos", ["rope", "alibi"])
def test_rows_equal_a_loop_over_single_targets(runs: dict[str, RunDir], folder: Path, protocol: str, pos: str) -> None:
    """Perplexity, nats and bits per byte of every row, from forward passes of one target each."""
    result = evaluate(runs[pos], folder, f"eval.protocol={protocol}", "eval.ctx=16,32,64")
    document = data.prepare(settings(folder).data, cache_dir=folder / "cache").test.document(0)
    for row in result["rows"]:
        losses = single_losses(model_of(runs[pos]), document, PAIRS[protocol](row["ctx"]))
        nll = math.fsum(losses) / len(losses)
        assert row["tokens"] == len(losses)
        assert row["nll"] == pytest.approx(nll, rel=1e-5)
        assert row["ppl"] == pytest.approx(math.exp(nll), rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(nll / math.log(2), rel=1e-5)
        assert row["status"] == "ok"


@pytest.mark.parametrize("name", ["linear:4", "ntk:4", "yarn:4", "dynamic_ntk:2"])
def test_scalings_apply_to_a_trained_run(runs: dict[str, RunDir], folder: Path, name: str) -> None:
    result = evaluate(runs["rope"], folder, "eval.protocol=last", "eval.ctx=64,", scaling=name)
    method = config.parse_scaling(name)
    scaled = Method(method.name, {**method.parameters, "original_ctx": None})
    document = data.prepare(settings(folder).data, cache_dir=folder / "cache").test.document(0)
    losses = single_losses(model_of(runs["rope"], scaled), document, PAIRS["last"](64))
    plain = single_losses(model_of(runs["rope"]), document, PAIRS["last"](64))
    assert result["rows"][0]["nll"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)
    assert abs(math.fsum(losses) - math.fsum(plain)) > 0.01  # far above what the comparison tolerates
    assert result["scaling"] == method.name
    assert result["factor"] == method.parameters["factor"]


def test_the_factor_follows_the_ladder_or_the_row(runs: dict[str, RunDir], folder: Path) -> None:
    auto = evaluate(runs["rope"], folder, "eval.ctx=64", scaling="yarn")
    assert [row["factor"] for row in auto["rows"]] == [4.0, 4.0, 4.0]
    assert auto["factor"] == 4.0
    by_row = evaluate(runs["rope"], folder, "eval.ctx=64", scaling="yarn:auto-row")
    assert [row["factor"] for row in by_row["rows"]] == [1.0, 2.0, 4.0]
    assert by_row["factor"] is None
    assert by_row["rows"][2]["nll"] == auto["rows"][2]["nll"]
    assert by_row["rows"][0]["nll"] == evaluate(runs["rope"], folder, "eval.ctx=64")["rows"][0]["nll"]


def test_the_window_control_hides_far_keys(runs: dict[str, RunDir], folder: Path) -> None:
    """At ctx 64 with a window of 16: equal to a forward pass whose attention is a plain loop over 16 keys."""
    result = evaluate(runs["rope"], folder, "eval.protocol=last", "eval.ctx=64,", "eval.window=16")
    document = data.prepare(settings(folder).data, cache_dir=folder / "cache").test.document(0)
    model = model_of(runs["rope"])
    prepared = model.prepare(64)

    class Loop(Attend):
        def __init__(self) -> None:
            self.kernel = "loop"

        def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **nothing: None) -> torch.Tensor:
            out = torch.zeros_like(q)
            for i in range(q.shape[2]):
                keys = slice(max(0, i - 15), i + 1)
                weights = (q[:, :, i : i + 1] @ k[:, :, keys].transpose(-2, -1) / 4).softmax(-1)
                out[:, :, i : i + 1] = weights @ v[:, :, keys]
            return out

    model._prepared = (model._prepared[0], prepared._replace(attend=Loop()))  # type: ignore[index]
    losses = single_losses(model, document, PAIRS["last"](64))
    assert result["rows"][0]["nll"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)
    assert result["window"] == 16
    plain = evaluate(runs["rope"], folder, "eval.protocol=last", "eval.ctx=64,")
    assert result["rows"][0]["nll"] != plain["rows"][0]["nll"]


def test_learned_positions_end_in_an_undefined_row(runs: dict[str, RunDir], folder: Path) -> None:
    result = evaluate(runs["learned"], folder, "eval.ctx=64")
    assert [row["status"] for row in result["rows"]] == ["ok", "undefined", "undefined"]
    assert result["rows"][1]["ppl"] is None
    assert "16" in result["rows"][1]["reason"]
    assert "--scaling clamp" in result["rows"][1]["reason"]


def test_prefix_passes_are_shared_only_where_the_length_does_not_matter(
    runs: dict[str, RunDir], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward pass for a length-independent method, one per ctx for a dynamic one; the numbers are the same
    as those of passes of their own."""
    passes: list[int] = []
    original = GPT.forward

    def counted(self: GPT, tokens: torch.Tensor, **keys: Any) -> torch.Tensor:
        passes.append(tokens.shape[1])
        return original(self, tokens, **keys)

    monkeypatch.setattr(GPT, "forward", counted)
    shared = evaluate(runs["rope"], folder, "eval.protocol=prefix", "eval.ctx=16,32,128")
    assert passes == [128]
    passes.clear()
    dynamic = evaluate(runs["rope"], folder, "eval.protocol=prefix", "eval.ctx=16,32,128", scaling="dynamic_ntk")
    assert sorted(passes) == [16, 32, 128]
    for row, ctx in zip(shared["rows"], (16, 32, 128), strict=True):
        alone = evaluate(runs["rope"], folder, "eval.protocol=prefix", f"eval.ctx={ctx},", "eval.max_ctx=128")
        assert row["nll"] == pytest.approx(alone["rows"][0]["nll"], rel=1e-6)
    assert dynamic["rows"][0]["nll"] == pytest.approx(shared["rows"][0]["nll"], rel=1e-6)
    assert dynamic["rows"][2]["nll"] != shared["rows"][2]["nll"]


def test_an_evaluation_is_done_once(runs: dict[str, RunDir], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate(runs["alibi"], folder, "eval.ctx=32")
    monkeypatch.setattr(GPT, "forward", lambda *a, **k: pytest.fail("computed again"))
    assert evaluate(runs["alibi"], folder, "eval.ctx=32") == first


def test_the_stored_losses_are_those_of_the_row(runs: dict[str, RunDir], folder: Path) -> None:
    resolved = settings(folder, "eval.ctx=32", "eval.tokens=200").eval
    done = evaluation.evaluate(runs["none"], resolved, cache_dir=str(folder / "cache"))
    means = done.document_means(32)
    assert list(means) == done.result.protocol.document_digests
    assert next(iter(means.values())) == pytest.approx(done.result.rows[1].nll, rel=1e-9)


def test_a_scaling_that_changes_nothing_is_refused(
    runs: dict[str, RunDir], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken method that leaves the spectrum as it is, and a right one whose parameters leave every pair as it is."""
    with pytest.raises(ValueError, match="scaling=llama3 changes no pair"):
        resolved = settings(folder, "eval.ctx=32,", "eval.tokens=200").eval
        method = config.load(["scaling=llama3", "scaling.factor=8", "scaling.original_ctx=10000000"]).scaling
        evaluation.evaluate(runs["rope"], resolved, scaling=method, cache_dir=str(folder / "cache"))
    monkeypatch.setattr(SCALINGS["ntk"], "spectrum", lambda self, inv_freq, **keys: Spectrum(inv_freq))
    with pytest.raises(ValueError, match="scaling=ntk changes no pair"):
        evaluate(runs["rope"], folder, "eval.ctx=32", scaling="ntk:8")
    monkeypatch.setattr(SCALINGS["block_causal"], "record", Scaling.record)
    with pytest.raises(ValueError, match="scaling=block_causal changed nothing at 32"):
        evaluate(runs["rope"], folder, "eval.ctx=32,", scaling="block_causal")


def test_training_with_a_scaling_is_another_run_and_keeps_it(runs: dict[str, RunDir], folder: Path) -> None:
    result = training.train(settings(folder, "scaling=linear", "scaling.factor=4", "train.dtype=fp32"))
    run = enlarged(RunDir(Path(result["run_dir"])))
    assert run.name.startswith("rope-linear-text-s0-")
    kept = evaluate(run, folder, "eval.ctx=16,")
    assert (kept["scaling"], kept["factor"], kept["kept_scaling"]) == ("linear", 4.0, True)
    removed = evaluate(run, folder, "eval.ctx=16,", scaling="none")
    assert removed["scaling"] == "none"
    assert removed["rows"][0]["nll"] != kept["rows"][0]["nll"]
    replaced = evaluate(run, folder, "eval.ctx=16,", scaling="linear:4")
    assert replaced["rows"][0]["nll"] == kept["rows"][0]["nll"]


def test_the_runs_own_text_by_another_name_is_its_test_split(runs: dict[str, RunDir], folder: Path) -> None:
    same = config.load(["data=text", f"data.path={folder / 'runs' / '..' / 'text'}"]).data
    resolved = settings(folder, "eval.ctx=32,", "eval.tokens=200").eval
    done = evaluation.evaluate(runs["rope"], resolved, other_text=same, cache_dir=str(folder / "cache"))
    assert done.result.to_json() == evaluate(runs["rope"], folder, "eval.ctx=32,")


def test_the_same_text_in_other_tokens_is_other_targets(runs: dict[str, RunDir], folder: Path) -> None:
    """A BPE of single bytes makes the same tokens as bytes do; the digests of the targets differ all the same."""
    digests = []
    for tokenizer in ("bytes", "bpe"):
        more = [f"data.tokenizer={tokenizer}", "data.vocab_size=258"]
        run = RunDir(Path(training.train(settings(folder, *more))["run_dir"]))
        result = evaluate(run, folder, "eval.ctx=16,")
        digests.append(result["protocol"]["targets_digest"])
        assert result["rows"][0]["tokens"] == 192
    assert digests[0] != digests[1]


def test_other_text_is_scored_with_the_runs_tokeniser(runs: dict[str, RunDir], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other text.txt").write_text(
        "Something else that no training text holds. " + "xyz " * 9, encoding="utf-8"
    )
    other = config.load(["data=text", f"data.path={tmp_path}"]).data
    resolved = settings(folder, "eval.ctx=32,", "eval.tokens=64").eval
    done = evaluation.evaluate(runs["rope"], resolved, other_text=other, cache_dir=str(folder / "cache"))
    assert done.result.data == "text"
    assert done.result.protocol.documents == 1
    assert done.result.rows[0].unit is None or done.result.rows[0].unit == "block"
    corpus = data.prepare(settings(folder).data, cache_dir=folder / "cache")
    own = config.load(["data=text", f"data.path={folder / 'text' / corpus.train.names[0]}"]).data
    with pytest.raises(ValueError, match="training text"):
        evaluation.evaluate(runs["rope"], resolved, other_text=own, cache_dir=str(folder / "cache"))


def test_the_unigram_baseline_is_the_training_texts_frequencies(runs: dict[str, RunDir], folder: Path) -> None:
    """Same targets as the model's, each scored by counts of the training tokens plus one, by a plain loop."""
    result = evaluate(
        runs["none"], folder, "eval.protocol=last", "eval.ctx=64,", "eval.baseline=unigram", "eval.memory_gb=1e-6"
    )
    corpus = data.prepare(settings(folder).data, cache_dir=folder / "cache")
    counts = [1] * 256
    for token in corpus.train.tokens.tolist():
        if token < 256:
            counts[token] += 1
    losses = []
    for number in range(result["protocol"]["documents"]):
        document = corpus.test.document(number).tolist()
        for block in range(200 // result["protocol"]["documents"] // 64 or 1):
            end = (block + 1) * 64
            losses += [-math.log(counts[document[t]] / sum(counts)) for t in range(end - 3, end + 1)]
    assert len(losses) == result["rows"][0]["tokens"]
    assert result["rows"][0]["nll"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
    plain = evaluate(runs["none"], folder, "eval.protocol=last", "eval.ctx=64,")
    assert plain["rows"][0]["targets_digest"] == result["rows"][0]["targets_digest"]
    assert (result["pos"], plain["pos"]) == ("unigram", "none")
    with pytest.raises(ValueError, match=r"eval\.baseline=unigram knows no positions"):
        evaluate(runs["rope"], folder, "eval.ctx=64,", "eval.baseline=unigram", scaling="ntk:4")


def test_what_a_verdict_will_lack_is_said_before(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before training in a line on stderr, before evaluation through `notice`; documents of one author are one."""
    from ropelab.evaluation import enough
    from ropelab.training import recorder

    source = tmp_path / "in"
    for number in range(40):
        place = source / ("train" if number < 30 else "test") / f"{number}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        draw = random.Random(number)
        place.write_text("".join(draw.choices("abcdefgh ", k=400 if number < 34 else 40)))

    def said(*more: str) -> str:
        caplog.clear()
        recorder._warn_once.cache_clear()
        places = (f"data.path={source}", f"cache_dir={tmp_path / 'cache'}", f"runs_dir={tmp_path / str(more)}")
        training.train(settings(folder, *places, "train.steps=1", *more))
        return caplog.text

    assert said() == ""  # 10 documents hold train.ctx
    assert "at ctx 64 the test text has 4 documents of 10, and 6 are needed" in said("eval.ctx=64")
    assert "data.test_path" in caplog.text
    assert said("eval.ctx=4096") == ""  # an evaluation refuses that
    corpus = data.prepare(settings(folder, f"data.path={source}").data, cache_dir=tmp_path / "cache")
    authors = ["A", "A", None, None, None, "B", "B"]
    split = dataclasses.replace(corpus.test, authors=[*authors, "B", "B", "B"])
    assert "7 documents by 5 authors of 10" in str(enough.lacking(split, range(7), 32))
    assert "1 document of 10" in str(enough.lacking(split, [3], 32))
    assert enough.lacking(corpus.test, range(6), 32) is None
    told: list[str] = []
    run = RunDir(Path(training.train(settings(folder, f"data.path={source}", "train.steps=1"))["run_dir"]))
    resolved = settings(folder, "eval.ctx=64").eval
    evaluation.evaluate(run, resolved, cache_dir=str(tmp_path / "cache"), notice=told.append)
    assert any("has 4 documents of 10" in line for line in told)


def test_one_document_is_no_documents() -> None:
    from ropelab.evaluation import ProtocolRecord
    from ropelab.report.figures import protocol_facts
    from ropelab.report.figures.lines import Panel

    assert protocol_facts(Panel(ProtocolRecord(name="last", documents=1), "x", ())) == "1 document · data x"
    two = Panel(ProtocolRecord(name="last", documents=2, left_out=3), "x", ())
    assert protocol_facts(two) == "2 documents, 3 left out as too short · data x"
