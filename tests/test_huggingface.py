"""Hugging Face, both ways: against transformers itself, on tiny checkpoints that it makes here, without the hub."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from ropelab import config, data, huggingface, runs, training
from ropelab.config import Method
from ropelab.evaluation import resolve_methods
from ropelab.huggingface import checkpoint, import_checkpoint, rotary
from ropelab.huggingface.export import _target
from ropelab.positions import ENCODINGS
from ropelab.runs import RunDir
from tests.lab import changed, good, invoke, refused

pytestmark = pytest.mark.integration

CTX = 32  # training length of everything here
SHAPE = ("model.n_layer=2", "model.d_model=32", "model.n_head=4")
CPU = torch.device("cpu")
MODULES = ("argparse", "calendar", "cmd", "codecs", "copy", "csv", "dis", "fnmatch", "glob", "string", "textwrap")


class Place(NamedTuple):
    """Folders of this module's tests."""

    base: Path
    text: Path

    @property
    def settings(self) -> list[str]:
        return [f"runs_dir={self.base / 'runs'}", f"cache_dir={self.base / 'cache'}", "device=cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Real text: modules of the standard library, which no two share."""
    base = tmp_path_factory.mktemp("huggingface")
    for number, name in enumerate(MODULES):
        folder = base / "text" / ("test" if number < 4 else "validation" if number == 4 else "train")
        folder.mkdir(parents=True, exist_ok=True)
        source = inspect.getsource(importlib.import_module(name))[:12000]
        (folder / f"{name}.txt").write_text(source, encoding="utf-8")
    return Place(base, base / "text")


# pos and its settings -> the architecture that it comes to
EXPORTED = {
    "rope": ((), "GPTNeoXForCausalLM"),
    "rope interleaved": (("pos.layout=interleaved", "pos.fraction=0.5"), "GPTNeoXForCausalLM"),
    "p_rope": (("pos.p=0.5",), "GPTNeoXForCausalLM"),
    "alibi": ((), "MptForCausalLM"),
    "alibi of three heads": (("model.n_head=3", "model.d_model=24"), "MptForCausalLM"),
    "learned": ((), "GPT2LMHeadModel"),
    "sinusoidal": ((), "GPT2LMHeadModel"),
    "sinusoidal_fairseq": ((), "GPT2LMHeadModel"),
    "sinusoidal_scaled": ((), "GPT2LMHeadModel"),
    "none": ((), "GPT2LMHeadModel"),
    "drope": ((), "GPT2LMHeadModel"),
}


@pytest.fixture(scope="module")
def trained(place: Place) -> Callable[[str], RunDir]:
    """A run of an item of EXPORTED, trained on real text when it is first asked for."""
    made: dict[str, RunDir] = {}

    def run(name: str) -> RunDir:
        if name not in made:
            settings, _ = EXPORTED[name]
            bpe = ["data.tokenizer=bpe", "data.vocab_size=300"] if name == "rope" else []
            resolved = config.load([
                f"pos={name.split()[0]}", *changed(SHAPE, *settings), *bpe, f"train.ctx={CTX}", "train.steps=60",
                "train.batch_size=8", "train.lr=1e-2", "train.dtype=fp32", "data=text", f"data.path={place.text}",
                *place.settings,
            ])  # fmt: skip
            made[name] = RunDir(Path(training.train(resolved)["run_dir"]))
        return made[name]

    return run


@torch.no_grad()
def native(folder: Path, ids: Tensor, change: Callable[[Any], None] = lambda config: None) -> Tensor:
    """Logits (B, T, V) of transformers' own forward, in fp32, its configuration changed by `change`."""
    found = transformers.AutoConfig.from_pretrained(folder)
    change(found)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=found, dtype=torch.float32).eval()
    logits: Tensor = model(ids).logits
    return logits


@torch.no_grad()
def ours(run: RunDir, ids: Tensor, scaling: Method = runs.NO_SCALING) -> Tensor:
    """Logits (B, T, V - 1) of ropelab's GPT."""
    model = runs.open_run(run).model(CPU)
    manifest = run.manifest()
    encoding = runs.encoding_of(config.from_dict(manifest["config"]), scaling, manifest["original_ctx"])
    runs.set_encoding(model, encoding)
    logits: Tensor = model.logits(model(ids))
    return logits


def ids_of(run: RunDir, place: Place, length: int) -> Tensor:
    """Tokens (1, T) of real text."""
    tokenizer = data.load_tokenizer(run.tokenizer_path)
    text = (place.text / "test" / "argparse.txt").read_text(encoding="utf-8")
    return torch.from_numpy(tokenizer.encode(text)[:length].astype(np.int64))[None]


# --- a run goes out, and comes back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_is_the_run_and_comes_back_bit_by_bit(
    name: str, trained: Callable[[str], RunDir], place: Place, tmp_path: Path
) -> None:
    run = trained(name)
    assert "agrees" in good("export", run.path, "-o", tmp_path / "out", *place.settings).stderr
    parity = json.loads((tmp_path / "out" / "parity.json").read_text())
    lengths = [CTX] if name == "learned" else [CTX, 2 * CTX, 4 * CTX]
    assert [row["ctx"] for row in parity["rows"]] == lengths
    assert parity["architecture"] == EXPORTED[name][1]
    # the report's own words are not believed: the folder as anybody would load it
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def f(x):\n    return 'é — 東' * 12  # x\n\n"
    mine = data.load_tokenizer(run.tokenizer_path).encode(text)
    assert tokenizer(text)["input_ids"] == mine.tolist()
    assert tokenizer.decode(mine.tolist()) == text
    for length in lengths:
        ids = ids_of(run, place, length)
        theirs, own = native(tmp_path / "out", ids), ours(run, ids)
        assert theirs.shape == own.shape
        assert float((theirs - own).abs().max()) <= 1e-5 * float(own.abs().max())
        # and where the encoding says something, it matters
    assert (
        "| protocol |" in (tmp_path / "out" / "README.md").read_text()
        or "None is stored" in (tmp_path / "out" / "README.md").read_text()
    )

    back = json.loads(
        good("import", tmp_path / "out", f"runs_dir={tmp_path / 'runs'}", place.settings[1], "--json").stdout
    )
    weights, before = RunDir(Path(back["run_dir"])).load_weights(), run.load_weights()
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[key], before[key]) for key in before)
    again = good("import", tmp_path / "out", f"runs_dir={tmp_path / 'runs'}", place.settings[1])
    assert again.stdout.strip() == back["run"]
    assert "already" in again.stderr


LONG = [1.0, 1.5, 2.5, 4.0]
SHORT = [1.0, 1.0, 1.1, 1.2]
# options of export -> parameters that transformers is given by hand: None where its own name differs
SCALED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "linear": (["scaling.factor=4"], {"rope_type": "linear", "factor": 4.0}),
    "dynamic_ntk": ([], {"rope_type": "dynamic", "factor": 1.0}),
    "yarn": (["scaling.factor=4"], {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CTX}),
    "llama3": (
        ["scaling.factor=4"],
        {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": CTX, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0},
    ),
    "longrope": (
        [f"scaling.long_factors={LONG}".replace(" ", ""), f"scaling.short_factors={SHORT}".replace(" ", ""),
         "scaling.factor=4"],
        {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": CTX, "long_factor": LONG,
         "short_factor": SHORT},
    ),
    "ntk": (["scaling.factor=4"], {"rope_type": "default", "rope_theta": 10000 * 4 ** (8 / 6)}),
    "ntk_by_parts": (
        ["scaling.factor=4"],
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CTX, "attention_factor": 1.0},
    ),
    "proportional": (
        ["scaling.factor=4"], {"rope_type": "proportional", "factor": 4.0, "partial_rotary_factor": 0.75}
    ),
}  # fmt: skip


def asked(name: str, settings: list[str]) -> Method:
    return config.load([f"scaling={name}", *settings]).scaling


def by_hand(parameters: dict[str, Any]) -> Callable[[Any], None]:
    """Transformers' own parameters, written into a configuration, whatever it said before."""

    def change(found: Any) -> None:
        now = found.get_text_config()
        nested = all(isinstance(value, dict) for value in now.rope_parameters.values())
        one = now.rope_parameters["full_attention"] if nested else now.rope_parameters
        kept = {key: one[key] for key in ("rope_theta", "partial_rotary_factor") if key in one}
        written = {**kept, **parameters}
        now.rope_parameters = {**now.rope_parameters, "full_attention": written} if nested else written

    return change


def number(method: Method) -> Method:
    """A scaling with its factor as a number: `auto` of a dynamic one is 1."""
    factor = method.parameters["factor"]
    return Method(method.name, {**method.parameters, "factor": 1.0 if factor == "auto" else float(factor)})


@pytest.mark.parametrize("name", SCALED)
def test_an_export_under_a_scaling_is_read_in_both_generations(
    name: str, trained: Callable[[str], RunDir], place: Place, tmp_path: Path
) -> None:
    """Against ropelab beyond the training length, and against parameters of transformers that are written by hand."""
    run = trained("rope")
    settings, parameters = SCALED[name]
    out = tmp_path / "out"
    good("export", run.path, "-o", out, "--scaling", name, *settings, *place.settings)
    raw = json.loads((out / "config.json").read_text())
    older = ("rope_scaling", "rope_theta", "rotary_emb_base", "rotary_pct")
    for length in (4 * CTX, 2 * CTX, CTX):
        ids = ids_of(run, place, length)
        own = ours(run, ids, number(asked(name, settings)))
        close = 2e-5 * float(own.abs().max())
        if length > CTX or name != "dynamic_ntk":  # a scaling that changed nothing would agree with anything
            assert float((own - ours(run, ids)).abs().max()) > 1e-3
        for gone in ((), older, ("rope_parameters",)):  # what each generation would see
            (out / "config.json").write_text(json.dumps({key: raw[key] for key in raw if key not in gone}))
            assert float((native(out, ids) - own).abs().max()) <= close
        assert float((native(out, ids, by_hand(parameters)) - own).abs().max()) <= close


def test_a_table_is_written_out_as_far_as_asked(trained: Callable[[str], RunDir], place: Place, tmp_path: Path) -> None:
    good("export", trained("sinusoidal").path, "-o", tmp_path / "a", "--max-ctx", 2 * CTX, *place.settings)
    assert load_file(tmp_path / "a" / "model.safetensors")["transformer.wpe.weight"].shape == (2 * CTX, 32)
    assert [row["times"] for row in json.loads((tmp_path / "a" / "parity.json").read_text())["rows"]] == [1, 2]
    line = refused("export", trained("learned").path, "-o", tmp_path / "b", "--max-ctx", 2 * CTX, *place.settings)
    assert f"end at {CTX}" in line
    stretched = ("--scaling", "interpolate", "--factor", 2, "--max-ctx", 2 * CTX)
    good("export", trained("learned").path, "-o", tmp_path / "c", *stretched, *place.settings)
    back = json.loads(good(
        "import", tmp_path / "c", f"runs_dir={tmp_path / 'runs'}", place.settings[1], "--json"
    ).stdout)  # fmt: skip
    weights, before = RunDir(Path(back["run_dir"])).load_weights(), trained("learned").load_weights()
    assert all(torch.equal(weights[key], before[key]) for key in before)


def test_a_stretched_table_reaches_as_far_as_its_factor(
    trained: Callable[[str], RunDir], place: Place, tmp_path: Path
) -> None:
    """Without --max-ctx it is asked for at 8 times the training length, which a factor of 4 does not reach."""
    stretched = ("--scaling", "interpolate", "--factor", 4)
    good("export", trained("learned").path, "-o", tmp_path / "a", *stretched, *place.settings)
    assert load_file(tmp_path / "a" / "model.safetensors")["transformer.wpe.weight"].shape == (4 * CTX, 32)


REASONS = {
    "t5": "not ALiBi's", "kerple_log": "not ALiBi's", "kerple_power": "not ALiBi's", "sandwich": "not ALiBi's",
    "fire": "query's index", "cable": "the text decides", "fox": "the text decides", "xpos": "scaled by their position",
    "sinusoidal_qk": "in every layer",
}  # fmt: skip
SCALINGS_REFUSED = {
    ("rope", "dynamic_yarn"): "does not know", ("rope", "dynamic_linear"): "does not know",
    ("rope", "rerope"): "other scores", ("rope", "self_extend"): "other scores", ("rope", "block_causal"): "in blocks",
    ("alibi", "interpolated_slopes"): "slopes", ("none", "temperature"): "depends on the query",
    ("p_rope", "yarn"): "only a linear factor",
}  # fmt: skip


def test_encodings_here_are_exported_or_refused() -> None:
    """A new one needs no line: a field of its record that transformers does not know is refused."""
    assert {*REASONS} | {name.split()[0] for name in EXPORTED} <= {*ENCODINGS}


@pytest.mark.parametrize(
    ("pos", "scaling", "reason"),
    [*((pos, "none", reason) for pos, reason in REASONS.items()), *((*k, v) for k, v in SCALINGS_REFUSED.items())],
)
def test_what_transformers_has_no_place_for_is_refused_with_the_reason(pos: str, scaling: str, reason: str) -> None:
    resolved = config.load([f"pos={pos}", f"scaling={scaling}", *SHAPE])
    method = resolved.scaling
    if "factor" in method.parameters:
        method = Method(scaling, {**method.parameters, "factor": 4.0})
    model = runs.build_model(resolved, 257, scaling=method, original_ctx=CTX)
    model.set_training_fraction(1.0)
    with pytest.raises(ValueError, match=reason):
        _target(model, resolved.pos, method, CTX, CTX, None)


def test_a_norm_of_queries_and_other_slopes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = config.load(["pos=rope", *SHAPE, "model.qk_norm=true"])
    model = runs.build_model(resolved, 257, scaling=runs.NO_SCALING, original_ctx=CTX)
    with pytest.raises(ValueError, match="qk_norm"):
        _target(model, resolved.pos, runs.NO_SCALING, CTX, CTX, None)
    resolved = config.load(["pos=alibi", *SHAPE])
    model = runs.build_model(resolved, 257, scaling=runs.NO_SCALING, original_ctx=CTX)
    other = torch.tensor([0.0625, 0.25, 0.00390625, 0.015625])
    monkeypatch.setattr(sys.modules[_target.__module__], "_mpt_slopes", lambda heads: other)
    with pytest.raises(ValueError, match="4 heads with slopes in ALiBi's order, which no"):
        _target(model, resolved.pos, runs.NO_SCALING, CTX, CTX, None)


def test_an_export_that_transformers_reads_otherwise_fails(
    trained: Callable[[str], RunDir], place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong factor in the configuration, which transformers takes without complaint."""
    right = rotary.to_hf_rope

    def wrong(*arguments: Any, **named: Any) -> rotary.HfRope:
        made = right(*arguments, **named)
        return made._replace(parameters={**made.parameters, "factor": 2.0})

    monkeypatch.setattr(rotary, "to_hf_rope", wrong)
    done = invoke("export", trained("rope").path, "-o", tmp_path / "out", "--scaling", "linear", "--factor", 4,
                  *place.settings)  # fmt: skip
    assert done.exit_code == 1
    assert "DIFFERS" in done.stderr
    assert not (tmp_path / "out").exists()
    assert [*tmp_path.iterdir()] == []


# --- a checkpoint under our protocols ---------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": CTX, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
TWO_KINDS = {"head_dim": 8, "sliding_window": 16, "pad_token_id": 0}


def families() -> dict[str, Any]:
    """Configurations of tiny models, one of each way to say positions."""
    t = transformers
    gpt2 = {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": None, "eos_token_id": None}
    return {
        "llama": t.LlamaConfig(**GROUPED),
        "mistral": t.MistralConfig(**GROUPED, sliding_window=None),
        "qwen3": t.Qwen3Config(**GROUPED, head_dim=16),
        "gpt_neox": t.GPTNeoXConfig(**SMALL, rotary_pct=0.5),
        "phi": t.PhiConfig(**SMALL),
        "phi3": t.Phi3Config(**GROUPED, pad_token_id=0, original_max_position_embeddings=CTX),
        "gemma2": t.Gemma2Config(**GROUPED, **TWO_KINDS),  # its logits are capped
        "gemma3": t.Gemma3TextConfig(**GROUPED, **TWO_KINDS, layer_types=["sliding_attention", "full_attention"]),
        "cohere": t.CohereConfig(**GROUPED, pad_token_id=0),  # interleaved pairs, scaled logits
        "gpt2": t.GPT2Config(**gpt2, n_positions=4 * CTX),
        "opt": t.OPTConfig(
            **{**SMALL, "max_position_embeddings": 4 * CTX, "intermediate_size": None}, ffn_dim=64,
            word_embed_proj_dim=32, pad_token_id=1,
        ),
        "mpt": t.MptConfig(vocab_size=256, d_model=32, n_layers=2, n_heads=4, max_seq_len=CTX),
        "bloom": t.BloomConfig(vocab_size=256, hidden_size=32, n_layer=2, n_head=4, seq_length=CTX),
    }  # fmt: skip


def save(folder: Path, found: Any, *, tokenizer: dict[str, Any] | None = None) -> Path:
    """A checkpoint with random weights, large enough for attention to matter."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(found)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, 0, 0.2)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer or data.to_json(data.Bytes())))
    return folder


@pytest.fixture(scope="module")
def saved(place: Place) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint of a family."""

    def folder(name: str) -> Path:
        path = place.base / "checkpoints" / name
        if not path.exists():
            save(path, families()[name])
        return path

    return folder


def losses(
    folder: Path, scaling: Method | None, place: Place, ids: Tensor, window: int | None = None
) -> dict[int, Tensor]:
    """Losses (B, T) of a checkpoint as an evaluation gets them, at 4x, 2x and 1x, in that order."""
    windowed = [] if window is None else [f"eval.window={window}"]
    base = config.load([*place.settings, f"eval.ctx={CTX},{2 * CTX},{4 * CTX}", *windowed])
    text = config.load(["data=text", f"data.path={place.text}"]).data
    source = huggingface.Checkpoint(str(folder), base, text)
    source.check(base.eval, scaling)
    ladder = resolve_methods(source.trained, source.original_ctx, base.eval, scaling=scaling)
    source.plan(ladder.encodings, CPU, torch.float32, limit_gb=None)
    loaded = source.load(CPU, torch.float32, window=window, kept=scaling is None)
    found = {}
    for ctx in (4 * CTX, 2 * CTX, CTX):
        at = loaded.at(ctx, ladder.methods[ctx], ladder.encodings[ctx])
        found[ctx] = torch.from_numpy(at.scorer(ids[:, :ctx].numpy(), ids[:, 1 : ctx + 1].numpy()))
    return found


def native_losses(folder: Path, ids: Tensor, ctx: int, change: Callable[[Any], None] = lambda c: None) -> Tensor:
    logits = native(folder, ids[:, :ctx], change)  # a fresh model: `dynamic` remembers
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1 : ctx + 1], reduction="none")


TEXT = torch.randint(0, 256, (2, 4 * CTX + 1), generator=torch.Generator().manual_seed(0))
ROTARY = ("llama", "mistral", "qwen3", "gpt_neox", "phi", "phi3", "gemma2", "gemma3", "cohere")


@pytest.mark.parametrize("name", ["gpt2", "opt", "mpt", "bloom"])
def test_a_checkpoint_without_rotation_is_scored_as_transformers_does(
    name: str, saved: Callable[[str], Path], place: Place
) -> None:
    def longer(found: Any) -> None:
        if name == "mpt":  # its biases reach so far
            found.max_seq_len = 4 * CTX

    for ctx, mine in losses(saved(name), None, place, TEXT).items():
        torch.testing.assert_close(mine, native_losses(saved(name), TEXT, ctx, longer), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ROTARY)
def test_scalings_of_a_rotary_checkpoint_are_those_of_transformers(
    name: str, saved: Callable[[str], Path], place: Place
) -> None:
    """None, and each scaling that transformers has too, at 1x, 2x, 4x: the losses of its own parameters."""
    folder = saved(name)
    plain = losses(folder, None, place, TEXT)
    for ctx, mine in plain.items():
        torch.testing.assert_close(mine, native_losses(folder, TEXT, ctx), rtol=0, atol=1e-5)
    pairs = 4
    kinds = ("linear", "dynamic_ntk", "yarn", "llama3", "longrope")
    for kind in kinds if name in ("llama", "gemma3") else ("yarn",):
        settings, parameters = SCALED[kind]
        if kind == "longrope":
            long, short = ([float(x) for x in np.linspace(1, top, pairs)] for top in (4, 1.2))
            settings = [f"scaling.long_factors={long}".replace(" ", ""),
                        f"scaling.short_factors={short}".replace(" ", ""), "scaling.factor=4"]  # fmt: skip
            parameters = {**parameters, "long_factor": long, "short_factor": short}
        for ctx, mine in losses(folder, asked(kind, settings), place, TEXT).items():
            due = native_losses(folder, TEXT, ctx, by_hand(parameters))
            torch.testing.assert_close(mine, due, rtol=0, atol=2e-5, msg=f"{kind} at {ctx}")
            if ctx > CTX:
                assert float((mine - plain[ctx]).abs().max()) > 1e-3, f"{kind} at {ctx} is without effect"


@pytest.mark.parametrize("generation", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("has", ["yarn", "linear", "dynamic_ntk", "llama3", "longrope"])
def test_a_scaling_of_the_checkpoint_is_kept_or_replaced_never_compounded(
    has: str, generation: str, saved: Callable[[str], Path], place: Place, tmp_path: Path
) -> None:
    folder = tmp_path / "scaled"
    shutil.copytree(saved("llama"), folder)
    raw = json.loads((folder / "config.json").read_text())
    theta = raw.pop("rope_parameters")["rope_theta"]
    _, parameters = SCALED[has]
    if generation == "rope_parameters":
        raw["rope_parameters"] = {"rope_theta": theta, **parameters}
    else:
        raw |= {"rope_theta": theta, "rope_scaling": parameters}
    (folder / "config.json").write_text(json.dumps(raw))
    plain = losses(saved("llama"), None, place, TEXT)
    for ctx, mine in losses(folder, None, place, TEXT).items():
        torch.testing.assert_close(mine, native_losses(folder, TEXT, ctx), rtol=0, atol=2e-5)
        torch.testing.assert_close(
            mine, native_losses(saved("llama"), TEXT, ctx, by_hand(parameters)), rtol=0, atol=2e-5
        )
    without = losses(folder, runs.NO_SCALING, place, TEXT)
    other = "linear" if has != "linear" else "yarn"
    settings, theirs = SCALED[other]
    replaced = losses(folder, asked(other, [*settings, f"scaling.original_ctx={CTX}"]), place, TEXT)
    for ctx in plain:
        torch.testing.assert_close(without[ctx], plain[ctx], rtol=0, atol=2e-5)
        due = native_losses(saved("llama"), TEXT, ctx, by_hand(theirs))
        torch.testing.assert_close(replaced[ctx], due, rtol=0, atol=2e-5)


def test_a_temperature_outside_of_the_rotation_goes_with_the_scaling(place: Place, tmp_path: Path) -> None:
    """DeepSeek's YaRN scales the scores in its attention too, when the model is built."""
    small = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
             "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
             "topk_group": 1, "moe_intermediate_size": 32, "num_key_value_heads": 4,
             "rope_interleave": False}  # fmt: skip
    yarn = {**SCALED["yarn"][1], "rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    plain = save(tmp_path / "plain", transformers.DeepseekV3Config(**SMALL, **small))
    scaled = save(tmp_path / "scaled", transformers.DeepseekV3Config(**SMALL, **small, rope_parameters=yarn))
    due, kept = losses(plain, None, place, TEXT), losses(scaled, None, place, TEXT)
    for ctx, mine in losses(scaled, runs.NO_SCALING, place, TEXT).items():
        torch.testing.assert_close(mine, due[ctx], rtol=0, atol=1e-5)
        torch.testing.assert_close(kept[ctx], native_losses(scaled, TEXT, ctx), rtol=0, atol=1e-5)
        assert float((kept[ctx] - mine).abs().max()) > 0.1


@pytest.mark.parametrize("name", ["dynamic_yarn", "dynamic_linear", "ntk", "ntk_by_parts", "proportional", "start"])
def test_scalings_that_transformers_has_not_are_ours(
    name: str, trained: Callable[[str], RunDir], place: Place, tmp_path: Path
) -> None:
    """Any scaling on a checkpoint: an export of a run, against the run."""
    run = trained("rope")
    good("export", run.path, "-o", tmp_path / "out", *place.settings)
    settings = [] if name.startswith("dynamic") else ["scaling.factor=4"]
    if name == "start":
        name, settings = "longrope", [f"scaling.long_factors={LONG}".replace(" ", ""), "scaling.start_tokens=8",
                                      "scaling.factor=4"]  # fmt: skip
    method = asked(name, settings)
    ids = TEXT % (data.load_tokenizer(run.tokenizer_path).n_vocab - 1)
    for ctx, mine in losses(tmp_path / "out", method, place, ids).items():
        logits = ours(run, ids[:, :ctx], number(method))
        due = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1 : ctx + 1], reduction="none")
        torch.testing.assert_close(mine, due, rtol=0, atol=1e-4)


def test_a_scaling_that_does_not_apply_is_an_error(
    saved: Callable[[str], Path], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    yarn = asked("yarn", ["scaling.factor=4"])
    monkeypatch.setattr(rotary.Rotary, "set", lambda self, spectrum, plain: None)
    with pytest.raises(ValueError, match="does not turn as RoPE under scaling=yarn does: its attention factor"):
        losses(saved("llama"), yarn, place, TEXT)
    with pytest.raises(ValueError, match=r"scaling=linear does: pair \d of position 1 is off"):
        losses(saved("llama"), asked("linear", ["scaling.factor=4"]), place, TEXT)
    monkeypatch.undo()

    llama = checkpoint.load(saved("llama"), checkpoint.read_config(saved("llama")), torch.float32)
    watched = rotary.Rotary(llama, {"": {}}).watched()
    with pytest.raises(ValueError, match="without its rotary modules"):
        watched()


def test_a_configuration_that_is_read_otherwise_is_an_error(
    saved: Callable[[str], Path], place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loaded model that turns by something else than its config.json says."""
    folder = tmp_path / "scaled"
    shutil.copytree(saved("llama"), folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["rope_parameters"] |= {"rope_type": "linear", "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(raw))
    right = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda folder, config, dtype: right(saved("llama"), _plain(config), dtype))
    with pytest.raises(ValueError, match="does not turn as RoPE under scaling=linear"):
        losses(folder, None, place, TEXT)


def _plain(found: Any) -> Any:
    found.rope_parameters = {"rope_type": "default", "rope_theta": found.rope_parameters["rope_theta"]}
    return found


def test_eval_of_an_export_is_eval_of_the_run(trained: Callable[[str], RunDir], place: Place, tmp_path: Path) -> None:
    """Rows, targets, interval and bits per byte, with and without a scaling, through the command line."""
    run = trained("rope")
    good("export", run.path, "-o", tmp_path / "out", *place.settings)
    for protocol in ("nonoverlapping", "last"):
        for scaling in ((), ("--scaling", "yarn", "--factor", "4")):
            how = ("--ctx", 4 * CTX, *scaling, "--protocol", protocol, "eval.last=16", "eval.tokens=4096", "--json",
                   *place.settings)  # fmt: skip
            one = json.loads(good("eval", run.path, *how).stdout)
            other = json.loads(good("eval", "--hf", tmp_path / "out", *how).stdout)
            assert other["architecture"] == "GPTNeoXForCausalLM"
            assert {key: other[key] for key in ("pos", "scaling", "factor", "train_ctx", "data", "window")} == {
                key: one[key] for key in ("pos", "scaling", "factor", "train_ctx", "data", "window")
            }
            for mine, theirs in zip(one["rows"], other["rows"], strict=True):
                for key in ("ctx", "tokens", "documents", "targets_digest", "unit", "status", "spectrum_digest"):
                    assert mine[key] == theirs[key]
                for key in ("nll", "bits_per_byte"):
                    assert math.isclose(mine[key], theirs[key], rel_tol=1e-5)
                assert mine["ci95"] == pytest.approx(theirs["ci95"], rel=1e-4)
    both = json.loads(good("eval", run.path, "--hf", tmp_path / "out", *how).stdout)["results"]
    assert [item["run"] for item in both] == [one["run"], other["run"]]
    stored = place.base / "runs" / other["run"]
    assert "memory:" not in good("eval", "--hf", tmp_path / "out", *how).stderr  # what is stored is read
    assert len([*stored.glob("results/*.safetensors")]) == 4
    good("report", other["run"], "-o", tmp_path / "report", *place.settings[:1])
    assert (tmp_path / "report" / "report.html").is_file()
    assert other["run"] in good("runs", *place.settings[:1]).stdout
    assert "evaluate it with --hf" in refused("eval", other["run"], *how)


# --- a checkpoint of others comes in ----------------------------------------------------------------------------------


def foreign(family: str, **changes: Any) -> Any:
    """A configuration of our shape, or one that is not."""
    t = transformers
    none = {"bos_token_id": None, "eos_token_id": None}
    if family == "gpt_neox":
        known = {**SMALL, "intermediate_size": 128, "use_parallel_residual": False, "attention_bias": False,
                 "tie_word_embeddings": True, "rotary_pct": 1.0}  # fmt: skip
        return t.GPTNeoXConfig(**{**known, **changes})
    if family == "mpt":
        return t.MptConfig(**{
            "vocab_size": 256, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 4 * CTX, **none, **changes
        })  # fmt: skip
    return t.GPT2Config(**{
        "vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CTX, "activation_function": "gelu",
        **none, **changes,
    })  # fmt: skip


@pytest.mark.parametrize("family", ["gpt_neox", "mpt", "gpt2"])
def test_a_checkpoint_of_our_shape_becomes_a_run(family: str, place: Place, tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoint", foreign(family))
    settings = ("data=text", f"data.path={place.text}", f"runs_dir={tmp_path / 'runs'}", place.settings[1])
    made = json.loads(good("import", folder, *settings, "--json").stdout)
    run = RunDir(Path(made["run_dir"]))
    for length in (CTX,) if family == "gpt2" else (CTX, 4 * CTX):
        own = ours(run, TEXT[:, :length])
        torch.testing.assert_close(own, native(folder, TEXT[:, :length]), rtol=0, atol=1e-4 * float(own.abs().max()))
    rows = json.loads(good("eval", run.name, "--ctx", CTX, settings[2], settings[3], "device=cpu", "--json").stdout)
    assert rows["rows"][0]["status"] == "ok"
    if family == "gpt_neox":  # it can be gone on from, as any run
        child = good("train", f"parent={run.name}", "train.steps=2", "train.batch_size=2", f"train.ctx={CTX}",
                     "train.lr=1e-3", "device=cpu", settings[2], settings[3], "--json")  # fmt: skip
        assert json.loads(child.stdout)["status"] == "done"


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gpt_neox", {"use_parallel_residual": True}, "use_parallel_residual=True"),
        ("gpt_neox", {"hidden_act": "gelu_new"}, "hidden_act=gelu_new"),
        ("gpt_neox", {"intermediate_size": 64}, "intermediate_size=64"),
        ("gpt_neox", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ("mpt", {"attn_config": {"clip_qkv": 6.0}}, "attn_config.clip_qkv=6.0"),
        ("gpt2", {"activation_function": "gelu_new"}, "activation_function=gelu_new"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(
    family: str, changes: dict[str, Any], reason: str, place: Place, tmp_path: Path
) -> None:
    folder = save(tmp_path / "checkpoint", foreign(family, **changes))
    line = refused("import", folder, f"runs_dir={tmp_path / 'runs'}", place.settings[1])
    assert reason in line
    assert not (tmp_path / "runs").exists()


def test_a_bias_or_a_trained_table_is_refused(
    saved: Callable[[str], Path], trained: Callable[[str], RunDir], place: Place, tmp_path: Path
) -> None:
    folder = save(tmp_path / "checkpoint", foreign("gpt2"))
    state = load_file(folder / "model.safetensors")
    state["transformer.h.1.mlp.c_fc.bias"][3] = 0.5
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    settings = (f"runs_dir={tmp_path / 'runs'}", place.settings[1])
    assert "transformer.h.1.mlp.c_fc.bias of the checkpoint is not zero" in refused("import", folder, *settings)
    assert "llama checkpoint has no counterpart" in refused("import", saved("llama"), *settings)
    good("export", trained("sinusoidal").path, "-o", tmp_path / "out", *place.settings)
    state = load_file(tmp_path / "out" / "model.safetensors")
    state["transformer.wpe.weight"][1] += 1
    save_file(state, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    assert "position table" in refused("import", tmp_path / "out", *settings)
    assert not (tmp_path / "runs").exists()
    shutil.rmtree(tmp_path / "out" / "ropelab")
    learned = json.loads(good(
        "import", tmp_path / "out", "data=text", f"data.path={place.text}", *settings, "--json"
    ).stdout)  # fmt: skip
    assert learned["run"].startswith("learned-")


def test_a_configuration_changed_since_the_export_is_believed(
    trained: Callable[[str], RunDir], place: Place, tmp_path: Path
) -> None:
    """Somebody adds a scaling to an exported config.json: it counts, in an import as in an evaluation."""
    good("export", trained("rope").path, "-o", tmp_path / "out", *place.settings)
    path = tmp_path / "out" / "config.json"
    raw = json.loads(path.read_text())
    raw["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
    path.write_text(json.dumps(raw))
    run, known = import_checkpoint.bring_in(
        str(tmp_path / "out"), config.load([f"runs_dir={tmp_path / 'runs'}", place.settings[1]]), text=None
    )
    assert not known
    assert run.manifest()["config"]["scaling"] == {"name": "linear", "factor": 4.0, "original_ctx": None}
    source = huggingface.Checkpoint(str(tmp_path / "out"), config.load(place.settings), None)
    assert source.trained.scaling.name == "linear"


# --- tokenisers -------------------------------------------------------------------------------------------------------


def sentencepiece_like() -> dict[str, Any]:
    """A tokenizer.json in the form of Llama's: U+2581 for a space, one put before the text, bytes for the unknown."""
    from tokenizers import Tokenizer, decoders, normalizers, trainers
    from tokenizers.models import BPE

    made = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    made.train_from_iterator(["for x in range(10): return x\n"] * 3, trainer)
    source: dict[str, Any] = json.loads(made.to_str())
    source["added_tokens"] = [token for token in source["added_tokens"] if token["content"] in ("<unk>", "<s>")]
    return source


def test_bytes_of_tokens_of_another_tokeniser_are_known(place: Place, tmp_path: Path) -> None:
    """Bits per byte from the bytes of the text itself, whatever the tokens are."""
    source = sentencepiece_like()
    tokenizer = data.from_json(source, 512)
    text = "for é in 東京: return  x🙂\n"
    tokens = tokenizer.encode(text)
    lengths = tokenizer.byte_lengths[tokens]
    assert lengths.sum() == len(text.encode()) + 1  # the space before it
    assert tokenizer.decode(tokens) == text
    folder = save(tmp_path / "checkpoint", transformers.LlamaConfig(**{**GROUPED, "vocab_size": 512}), tokenizer=source)
    result = json.loads(good(
        "eval", "--hf", folder, "--ctx", f"{CTX},", "--protocol", "prefix", "data=text", f"data.path={place.text}",
        "--json", *place.settings,
    ).stdout)  # fmt: skip
    row = result["rows"][0]
    documents = sorted((place.text / "test").iterdir())
    encoded = [tokenizer.encode(path.read_text(encoding="utf-8"))[1 : CTX + 1] for path in documents]
    n_bytes = sum(len(tokenizer.decode(tokens).encode()) for tokens in encoded)
    # a decoder takes one space off the beginning of what it is given
    n_bytes += sum(source_of(tokenizer, tokens[0]).startswith("▁") for tokens in encoded)
    assert row["bits_per_byte"] == pytest.approx(row["nll"] * row["tokens"] / math.log(2) / n_bytes, rel=1e-6)


def source_of(tokenizer: data.Tokenizer, token: int) -> str:
    vocabulary: dict[str, int] = tokenizer.definition()["source"]["model"]["vocab"]
    return next(word for word, index in vocabulary.items() if index == token)


def test_bits_per_byte_are_left_out_where_bytes_are_lost(place: Place, tmp_path: Path) -> None:
    """A tokeniser that writes small letters only: the bytes of its tokens are not those of the text."""
    source = sentencepiece_like()
    source["normalizer"]["normalizers"].insert(0, {"type": "StripAccents"})
    source["normalizer"]["normalizers"].insert(0, {"type": "NFKD"})
    source["normalizer"]["normalizers"].insert(0, {"type": "Replace", "pattern": {"String": "  "}, "content": " "})
    folder = save(tmp_path / "checkpoint", transformers.LlamaConfig(**{**GROUPED, "vocab_size": 512}), tokenizer=source)
    result = json.loads(good(
        "eval", "--hf", folder, "--ctx", f"{CTX},", "data=text", f"data.path={place.text}", "--json", *place.settings
    ).stdout)  # fmt: skip
    assert result["rows"][0]["bits_per_byte"] is None
    assert result["rows"][0]["ppl"] > 0


# --- bad input --------------------------------------------------------------------------------------------------------


def broken(kind: str, saved: Callable[[str], Path], tmp_path: Path) -> tuple[Path, str]:
    """A folder that cannot be evaluated, and what its line has to say."""
    folder = tmp_path / kind
    if kind == "nothing":
        return folder, "does not exist"
    if kind == "bert":
        found = transformers.BertConfig(**SMALL)
        transformers.BertForMaskedLM(found).save_pretrained(folder)
        (folder / "tokenizer.json").write_text(json.dumps(data.to_json(data.Bytes())))
        return folder, "no causal language model"
    if kind == "t5":
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=256, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
        ).save_pretrained(folder)
        return folder, "no causal language model"
    if kind == "no vocabulary":
        save(folder, transformers.Qwen2Config(**GROUPED))
        (folder / "tokenizer.json").unlink()
        return folder, "has no tokenizer.json"
    shutil.copytree(saved("llama"), folder)
    raw = json.loads((folder / "config.json").read_text())
    if kind == "no config":
        (folder / "config.json").unlink()
        return folder, "has no config.json"
    if kind == "no weights":
        (folder / "model.safetensors").unlink()
        return folder, "model.safetensors is missing"
    if kind == "pickle":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        return folder, "as a pickle (pytorch_model.bin)"
    if kind == "own code":
        raw |= {"model_type": "novel", "auto_map": {"AutoModelForCausalLM": "modeling_novel.Novel"}}
        (folder / "modeling_novel.py").write_text("raise SystemExit('executed')\n")
        (folder / "config.json").write_text(json.dumps(raw))
        return folder, "own code, which is never run"
    if kind == "unknown model":
        (folder / "config.json").write_text(json.dumps({**raw, "model_type": "novel"}))
        return folder, "is not a model that it knows"
    if kind == "other vocabulary":
        (folder / "tokenizer.json").write_text(json.dumps(sentencepiece_like()))
        return folder, "they do not belong together"
    if kind == "no tokeniser":
        (folder / "tokenizer.json").unlink()
        return folder, "has no tokenizer.json"
    if kind == "damaged weights":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        return folder, "cannot be loaded"
    if kind == "missing weight":
        state = load_file(folder / "model.safetensors")
        del state["model.layers.1.mlp.up_proj.weight"]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder, "lacks model.layers.1.mlp.up_proj.weight"
    if kind == "no numbers":
        state = load_file(folder / "model.safetensors")
        state["model.norm.weight"][3] = math.nan
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder, "numbers that are not finite"
    if kind == "other shapes":
        (folder / "config.json").write_text(json.dumps({**raw, "intermediate_size": 48}))
        return folder, "has another shape for model.layers.0.mlp.down_proj.weight"
    if kind == "a base below 1":
        (folder / "config.json").write_text(
            json.dumps({**raw, "rope_parameters": {**raw["rope_parameters"], "rope_theta": -1.0}})
        )
        return folder, "rope_theta in config.json must be above 1, not -1"
    if kind == "lost shard":
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder, "names model-00002-of-00002.safetensors, which is not there"
    assert kind == "damaged config"
    (folder / "config.json").write_text("{")
    return folder, "cannot be read"


KINDS = ("nothing", "bert", "t5", "no config", "no weights", "pickle", "own code", "unknown model", "other vocabulary",
         "no tokeniser", "no vocabulary", "damaged weights", "missing weight", "no numbers", "other shapes",
         "a base below 1", "lost shard", "damaged config")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_no_checkpoint_is_refused_in_one_line(
    kind: str, saved: Callable[[str], Path], place: Place, tmp_path: Path
) -> None:
    folder, reason = broken(kind, saved, tmp_path)
    before = sorted(place.base.glob("runs/*"))
    done = invoke("eval", "--hf", folder, "--ctx", CTX, "data=text", f"data.path={place.text}", *place.settings)
    assert done.exit_code == 2, f"{done.output} {done.exception!r}"
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("memory:")]
    assert len(lines) == 1
    assert reason in lines[0]
    assert sorted(place.base.glob("runs/*")) == before


def test_the_hub_is_asked_without_code_and_its_silence_is_one_line(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked_for: dict[str, Any] = {}

    def unreachable(name: str, **options: Any) -> str:
        asked_for.update(options, name=name)
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    line = refused("eval", "--hf", "someone/model", "--ctx", CTX, *place.settings)
    assert "the hub does not give it (ConnectionError)" in line
    assert asked_for["name"] == "someone/model"
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked_for["allow_patterns"])


def test_what_a_checkpoint_cannot_have_is_refused(saved: Callable[[str], Path], place: Place, tmp_path: Path) -> None:
    text = ("data=text", f"data.path={place.text}", *place.settings)
    gpt2, llama = saved("gpt2"), saved("llama")
    assert "needs a rotary model" in refused("eval", "--hf", gpt2, "--ctx", CTX, "--scaling", "yarn", *text)
    assert f"end at {4 * CTX}" in refused("eval", "--hf", gpt2, "--ctx", 8 * CTX, *text)
    assert f"end at {4 * CTX}" in refused("eval", "--hf", saved("opt"), "--ctx", 8 * CTX, *text)
    assert "not for a checkpoint" in refused("eval", "--hf", llama, "--ctx", CTX, "--scaling", "clamp", *text)
    for family in ("mpt", "bloom"):
        line = refused("eval", "--hf", saved(family), "--ctx", CTX, "eval.window=8", *text)
        assert "eval.window changes attention" in line
        line = refused("eval", "--hf", saved(family), "--ctx", CTX, "--scaling", "block_causal", *text)
        assert "scaling=block_causal changes attention" in line
    assert "applies to pos=rope" in refused("eval", "--hf", gpt2, "--ctx", CTX, "--scaling", "rerope", *text)
    assert "eval.baseline" in refused("eval", "--hf", llama, "--ctx", CTX, "eval.baseline=unigram", *text)
    assert "belongs to the text" in refused("eval", "--hf", llama, "--ctx", CTX, "eval.split=validation", *text)
    odd = tmp_path / "odd"
    shutil.copytree(llama, odd)
    raw = json.loads((odd / "config.json").read_text())
    raw["rope_parameters"] |= {"rope_type": "axial"}
    (odd / "config.json").write_text(json.dumps(raw))
    assert "does not know the rope_type 'axial' of config.json" in refused("eval", "--hf", odd, "--ctx", CTX, *text)
    with pytest.raises(ValueError, match="'axial' is none that ropelab knows"):
        rotary.scaling_of({"rope_type": "axial", "rope_theta": 10000.0}, CTX)


def test_export_and_import_say_what_they_take(
    trained: Callable[[str], RunDir], saved: Callable[[str], Path], place: Place, tmp_path: Path
) -> None:
    run = trained("rope").path
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "is there already" in refused("export", run, "-o", tmp_path / "full", *place.settings)
    assert "export needs -o DIR" in refused("export", run, *place.settings)
    assert "export takes" in refused("export", run, "-o", tmp_path / "a", "train.lr=1", *place.settings)
    assert "--max-ctx must be at least 2" in refused("export", run, "-o", tmp_path / "a", "--max-ctx", 1)
    assert "there is no run" in refused("export", "nothing", "-o", tmp_path / "a", *place.settings)
    assert "auto-row" in refused(
        "export", run, "-o", tmp_path / "a", "--scaling", "yarn", "--factor", "auto-row", *place.settings
    )
    assert "original length" in refused(
        "export", run, "-o", tmp_path / "a", "--scaling", "dynamic_ntk", "--max-ctx", 99, *place.settings
    )
    assert "import takes" in refused("import", saved("llama"), "train.lr=1")
    assert "the checkpoint's own" in refused("import", saved("llama"), "data.tokenizer=bpe")
    assert not (tmp_path / "a").exists()


def test_a_run_and_a_checkpoint_are_told_apart(
    saved: Callable[[str], Path], trained: Callable[[str], RunDir], place: Place, tmp_path: Path
) -> None:
    run = trained("alibi")
    for name in (run.name, run.path):
        assert f"{name} is a run of ropelab: leave out --hf" in refused("eval", "--hf", name, *place.settings)
    assert f"`ropelab eval --hf {saved('llama')}`" in refused("eval", saved("llama"), *place.settings)
    line = refused("export", run.path, "-o", tmp_path / "out", "--max-ctx", CTX - 1, *place.settings)
    assert f"--max-ctx {CTX - 1} is below the {CTX} tokens" in line


def test_without_transformers_there_is_a_line(monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers" or ".huggingface" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("ropelab.huggingface")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'ropelab[hf]'" in refused("import", "anything", *place.settings[:2])


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_is_planned_for_the_model_at_hand(saved: Callable[[str], Path], place: Place) -> None:
    """MPT holds the scores of all pairs, Llama does not; weights that do not fit are refused before they are read."""
    text = ("data=text", f"data.path={place.text}", *place.settings)
    base = config.load(place.settings)
    own = config.load(["data=text", f"data.path={place.text}"]).data
    taken = {}
    for name in ("mpt", "llama"):
        source = huggingface.Checkpoint(str(saved(name)), base, own)
        plain = runs.encoding_of(source.trained, runs.NO_SCALING, source.original_ctx)
        one, two = (source._pass_bytes(ctx, CPU, plain)(ctx) for ctx in (8192, 16384))
        taken[name] = two - one
    assert taken["mpt"] > 4 * 4 * (16384**2 - 8192**2)
    assert taken["llama"] < 8 * (16384**2 - 8192**2)
    assert "use more eval.memory_gb" in refused(
        "eval", "--hf", saved("llama"), "--ctx", CTX, "eval.memory_gb=1e-6", *text
    )


# --- others score it --------------------------------------------------------------------------------------------------

TASK = """task: local_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
metadata:
  version: 1.0
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
@pytest.mark.filterwarnings("ignore")
def test_lm_evaluation_harness_gets_the_same_number(
    trained: Callable[[str], RunDir], place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`nonoverlapping` on texts that begin with the harness's prefix token and hold a multiple of ctx targets."""
    run = trained("alibi")
    out = tmp_path / "out"
    good("export", run.path, "-o", out, *place.settings)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    bodies = [path.read_text(encoding="ascii")[: 8 * CTX] for path in sorted((place.text / "test").iterdir())]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": body}) + "\n" for body in bodies))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(path=tmp_path / "docs.jsonl"))
    (tmp_path / "same").mkdir()
    for number, body in enumerate(bodies):
        (tmp_path / "same" / f"{number}.txt").write_text("\n" + body)

    import lm_eval
    from lm_eval.tasks import TaskManager

    ctx = 2 * CTX
    found = lm_eval.simple_evaluate(
        model="hf", tasks=["local_text"], device="cpu", batch_size=4, bootstrap_iters=0,
        model_args={"pretrained": str(out), "prefix_token_id": ord("\n"), "max_length": ctx, "dtype": "float32"},
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )  # fmt: skip
    theirs = found["results"]["local_text"]["bits_per_byte,none"] * math.log(2)  # a byte is a token here
    mine = json.loads(good(
        "eval", "--hf", out, "--ctx", f"{ctx},", "data=text", f"data.path={tmp_path / 'same'}", "--json",
        *place.settings,
    ).stdout)["rows"][0]  # fmt: skip
    assert mine["tokens"] == 4 * 8 * CTX
    assert abs(mine["nll"] - theirs) < 1e-5


# --- the hub ----------------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """One model, by the part of the hub's protocol that a download takes."""

    NAME, COMMIT = "someone/tiny", "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.asked: list[str] = []

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HUB_OFFLINE": "0"}


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.server
        hub.asked.append(path)
        name = path.removeprefix(f"/{hub.NAME}/resolve/{hub.COMMIT}/")
        files = [{"type": "file", "path": one.name, "size": one.stat().st_size, "oid": one.name}
                 for one in sorted(hub.folder.iterdir())]  # fmt: skip
        if path.startswith(f"/api/models/{hub.NAME}/tree"):
            content = json.dumps(files).encode()
        elif path.startswith(f"/api/models/{hub.NAME}"):
            siblings = [{"rfilename": one["path"]} for one in files]
            content = json.dumps({"id": hub.NAME, "sha": hub.COMMIT, "siblings": siblings}).encode()
        elif name != path and (hub.folder / name).is_file():
            content = (hub.folder / name).read_bytes()
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if name != path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/octet-stream" if name != path else "application/json")
        self.send_header("X-Repo-Commit", hub.COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(saved: Callable[[str], Path], tmp_path: Path) -> Iterator[Hub]:
    """A checkpoint with code and a pickle beside its weights, served on this machine."""
    folder = tmp_path / "served"
    shutil.copytree(saved("llama"), folder)
    for name in ("modeling_own.py", "pytorch_model.bin"):
        (folder / name).write_text("raise SystemExit('never read')")
    with Hub(folder) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_name_on_the_hub_is_fetched_without_code_and_pickles(
    hub: Hub, saved: Callable[[str], Path], place: Place, tmp_path: Path
) -> None:
    """The library that talks to the hub, talking to one; another time nothing is fetched again."""
    settings = ("--ctx", str(2 * CTX), "--scaling", "linear", "eval.tokens=2048", "--json", "data=text",
                f"data.path={place.text}", *place.settings)  # fmt: skip

    def asked_of(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ropelab", "eval", "--hf", name, *settings], capture_output=True, text=True,
            check=False, env={**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "home")},
        )  # fmt: skip

    done = asked_of(hub.NAME)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["source"] == hub.NAME
    due = json.loads(good("eval", "--hf", saved("llama"), *settings).stdout)
    assert found["rows"] == due["rows"]
    fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not [name for name in fetched if name.endswith((".py", ".bin"))]
    hub.asked.clear()
    assert json.loads(asked_of(hub.NAME).stdout)["rows"] == due["rows"]
    assert not [path for path in hub.asked if path.endswith(".safetensors")]
    wrong = asked_of("someone/else")
    assert wrong.returncode == 2
    (line,) = wrong.stderr.strip().splitlines()
    assert "the hub does not give it (RepositoryNotFoundError)" in line
