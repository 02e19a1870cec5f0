"""Windows and scalings of attention in a checkpoint: against the papers' distances, a pair of tokens at a time.

The attention here is written from the distances that a score sees, in fp64: it takes the turned queries and keys of
transformers, turns them back, and turns every query by the distance to every key. No angle of ropelab's is in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ropelab.huggingface import attention, rotary
from ropelab.runs import RunDir
from tests import test_huggingface
from tests.test_huggingface import CTX, ROTARY, SMALL, TEXT, Place, asked, good, invoke, losses, save

pytestmark = pytest.mark.integration

place, saved, trained = test_huggingface.place, test_huggingface.saved, test_huggingface.trained  # fixtures

W, GROUP = 12, 3  # of ReRoPE and Self-Extend
METHODS = {
    "rerope": ["scaling.window=12", "scaling.log_scaling=false"],
    "rerope with logarithms": ["scaling.window=12", "scaling.log_scaling=true"],
    "self_extend": ["scaling.window=12", "scaling.group=3"],
    "block_causal": ["scaling.block=10"],
}


def turned(x: Tensor, by: Tensor, inv_freq: Tensor, layout: str) -> Tensor:
    """x (..., D) with its rotary pairs turned by `by` (...) positions."""
    size = 2 * len(inv_freq)
    low = x.shape[-1] - size if layout == "last" else 0
    part = x[..., low : low + size]
    first, second = (part[..., 0::2], part[..., 1::2]) if layout == "interleaved" else part.chunk(2, -1)
    cos, sin = (by[..., None] * inv_freq).cos(), (by[..., None] * inv_freq).sin()
    pair = (first * cos - second * sin, first * sin + second * cos)
    new = torch.stack(pair, -1).flatten(-2) if layout == "interleaved" else torch.cat(pair, -1)
    return torch.cat((x[..., :low], new, x[..., low + size :]), -1)


def slow(
    name: str, window: int | None, inv_freq: Tensor, layout: str, own: Callable[[Any], bool]
) -> Callable[..., Any]:
    """An attention function for transformers. `own(module)`: is this a layer that keeps its attention?"""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **given: Any) -> Any:
        q, k, v = query.double(), key.double(), value.double()
        groups = q.shape[1] // k.shape[1]
        k, v = (x[:, torch.arange(q.shape[1]) // groups] for x in (k, v))
        at = torch.arange(q.shape[2], dtype=torch.float64)
        rows = []
        for i in range(q.shape[2]):
            key_rows = k
            scale = 1.0
            if not own(module):
                bare_q = turned(q[:, :, i], -at[i], inv_freq, layout)  # (B, H, D)
                bare_k = turned(k, -at, inv_freq, layout)  # (B, H, T, D)
                distance = at[i] - at
                if name.startswith("rerope"):
                    distance = distance.clamp(max=W)
                    if "logarithms" in name:
                        scale = max(1.0, float(torch.log(at[i] + 1) / torch.log(torch.tensor(float(CTX)))))
                elif name == "self_extend":
                    distance = torch.where(distance < W, distance, i // GROUP + W - W // GROUP - at // GROUP)
                score = (bare_q[:, :, None] * turned(bare_k, -distance, inv_freq, layout)).sum(-1)  # (B, H, T)
            else:
                score = (q[:, :, i, None] * key_rows).sum(-1)
            score = score * scale * given["scaling"]
            if given.get("softcap") is not None:
                score = given["softcap"] * torch.tanh(score / given["softcap"])
            score = score + mask[:, :, i, : q.shape[2]].double().clamp(min=-1e30)
            if name == "block_causal" and not own(module):
                score = score.masked_fill(i // 10 - torch.arange(q.shape[2]) // 10 > 1, -1e30)
            if window is not None:
                score = score.masked_fill(i - torch.arange(q.shape[2]) >= window, -1e30)
            rows.append((score.softmax(-1)[..., None] * v).sum(2))  # (B, H, E)
        return torch.stack(rows, 1).to(value.dtype), None  # (B, T, H, E)

    return attend


@torch.no_grad()
def slow_losses(folder: Path, name: str, ctx: int, window: int | None, layout: str) -> Tensor:
    """Losses (B, T) of transformers' forward with the slow attention."""
    found = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=found, dtype=torch.float32).eval()
    several = len(rotary.declared(found)) > 1
    text = found.get_text_config()
    label = rotary.scaled_label(rotary.declared(found)) if rotary.declared(found) else ""
    given = rotary.declared(found)[label] if label or "" in rotary.declared(found) else {}
    share = given.get("partial_rotary_factor", 1.0)
    size = getattr(text, "qk_rope_head_dim", None) or int(
        (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) * share
    )
    inv_freq = given.get("rope_theta", 1.0) ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    ALL_ATTENTION_FUNCTIONS.register(
        "slow", slow(name, window, inv_freq, layout, lambda m: several and bool(getattr(m, "sliding_window", None)))
    )
    ALL_MASK_ATTENTION_FUNCTIONS.register("slow", eager_mask)
    model.set_attn_implementation("slow")
    logits = model(TEXT[:, :ctx]).logits
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), TEXT[:, 1 : ctx + 1], reduction="none")


def layout_of(name: str) -> str:
    return {"cohere": "interleaved", "deepseek": "last"}.get(name, "half")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ROTARY)
def test_scalings_of_attention_are_those_of_the_papers(
    name: str,
    method: str,
    saved: Callable[[str], Path],
    place: Place,
) -> None:
    check(saved(name), name, method, None, place)


def check(folder: Path, name: str, method: str, window: int | None, place: Place) -> None:
    scaling = asked(method.split()[0], METHODS[method]) if method else None
    found = losses(folder, scaling, place, TEXT, window)
    plain = losses(folder, None, place, TEXT)
    for ctx, mine in found.items():
        if ctx != 2 * CTX and name != "llama":  # the slow one is slow
            continue
        due = slow_losses(folder, method, ctx, window, layout_of(name))
        torch.testing.assert_close(mine, due, rtol=0, atol=2e-5)
        assert float((mine - plain[ctx]).abs().max()) > 0.01


@pytest.mark.parametrize("name", [*ROTARY, "gpt2"])
def test_a_window_hides_far_keys(name: str, saved: Callable[[str], Path], place: Place) -> None:
    check(saved(name), name, "", 9, place)


def test_a_window_and_a_scaling_of_attention_together(
    saved: Callable[[str], Path],
    place: Place,
) -> None:
    for method in ("rerope", "self_extend", "block_causal"):
        check(saved("llama"), "llama", method, 17, place)


@pytest.mark.parametrize("interleaved", [False, True])
def test_latent_attention_turns_a_part_of_the_head(interleaved: bool, place: Place, tmp_path: Path) -> None:
    small = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 6,
             "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
             "topk_group": 1, "moe_intermediate_size": 32, "num_key_value_heads": 4,
             "rope_interleave": interleaved}  # fmt: skip
    folder = save(tmp_path / "latent", transformers.DeepseekV3Config(**SMALL, **small))
    for method in ("rerope", "self_extend"):
        check(folder, "deepseek", method, None, place)


def test_blocks_hide_keys_of_a_model_without_rotation(saved: Callable[[str], Path], place: Place) -> None:
    check(saved("gpt2"), "gpt2", "block_causal", None, place)


# --- through the command line -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("rope", ("--scaling", "rerope")),
        ("rope", ("--scaling", "self_extend", "scaling.group=4")),
        ("rope", ("--scaling", "block_causal")),
        ("rope", ("eval.window=20",)),
        ("rope", ("--scaling", "yarn", "--factor", "4", "eval.window=40")),
        ("none", ("--scaling", "temperature", "--factor", "4")),
        ("learned", ("eval.window=20",)),
    ],
)
def test_of_an_export_they_are_those_of_the_run(
    name: str, how: tuple[str, ...], trained: Callable[[str], RunDir], place: Place, tmp_path: Path
) -> None:
    """Our GPT against transformers' layers: the same rows, and the same digests of what was said of positions."""
    run = trained(name)
    good("export", run.path, "-o", tmp_path / "out", *place.settings)
    last = CTX if name == "learned" else 4 * CTX
    how = ("--ctx", str(last), *how, "eval.tokens=4096", "--json", *place.settings)
    one, other = (json.loads(good("eval", *which, *how).stdout) for which in ((run.path,), ("--hf", tmp_path / "out")))
    assert {key: other[key] for key in ("pos", "scaling", "factor", "window")} == {
        key: one[key] for key in ("pos", "scaling", "factor", "window")
    }
    for mine, theirs in zip(one["rows"], other["rows"], strict=True):
        for key in ("ctx", "tokens", "targets_digest", "idle", *(("spectrum_digest",) if name == "rope" else ())):
            assert mine[key] == theirs[key]
        assert math.isclose(mine["nll"], theirs["nll"], rel_tol=1e-5)
    plain = json.loads(good("eval", "--hf", tmp_path / "out", "--ctx", last, *how[-5:]).stdout)
    assert plain["rows"][-1]["nll"] != other["rows"][-1]["nll"]


def test_bf16_is_close_to_fp32(saved: Callable[[str], Path], place: Place) -> None:
    how = ("--ctx", 4 * CTX, "--scaling", "rerope", "eval.tokens=2048", "--json", "data=text",
           f"data.path={place.text}", *place.settings)  # fmt: skip
    for name in ("llama", "gemma3"):
        exact, rounded = (
            json.loads(good("eval", "--hf", saved(name), *how, f"eval.dtype={dtype}").stdout)["rows"]
            for dtype in ("fp32", "bf16")
        )
        for one, other in zip(exact, rounded, strict=True):
            assert one["nll"] == pytest.approx(other["nll"], rel=0.01)


# --- what is not known is refused -------------------------------------------------------------------------------------


def test_attention_that_is_not_ours_is_refused(place: Place, tmp_path: Path) -> None:
    """Keys hidden in chunks, sinks in the softmax, a model that keeps its attention to itself."""
    t = transformers
    made = {
        "chunks": t.Llama4TextConfig(
            **SMALL, num_key_value_heads=2, head_dim=8, intermediate_size_mlp=64, num_local_experts=2,
            attention_chunk_size=8, pad_token_id=0,
        ),
        "sinks": t.GptOssConfig(**SMALL, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
        "itself": t.GPTJConfig(vocab_size=256, n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=CTX),
    }  # fmt: skip
    lines = {
        "chunks": "hides keys in a way",
        "sinks": "takes s_aux into its softmax",
        "itself": "does not let be replaced",
    }
    text = ("data=text", f"data.path={place.text}", *place.settings)
    for name, found in made.items():
        folder = save(tmp_path / name, found)
        done = invoke("eval", "--hf", folder, "--ctx", CTX, "eval.window=8", *text)
        assert done.exit_code == 2
        assert lines[name] in done.stderr.splitlines()[-1]  # after what memory it takes, or alone


def test_far_keys_that_are_not_turned_are_an_error(
    saved: Callable[[str], Path], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = rotary.angles_at
    monkeypatch.setattr(rotary, "angles_at", lambda module, args, kwargs, at: right(module, args, kwargs, at + 1))
    with pytest.raises(ValueError, match="far keys are not turned as they should be"):
        losses(saved("llama"), asked("rerope", []), place, TEXT)
    monkeypatch.undo()
    monkeypatch.setattr(attention, "_same", lambda near, angles: False)
    for method in ("rerope", "block_causal"):  # of layers of two types, as if all were of the other one
        with pytest.raises(ValueError, match="Gemma3ForCausalLM take their angles in a way that ropelab does not know"):
            losses(saved("gemma3"), asked(method, []), place, TEXT)
    with pytest.raises(ValueError, match="LlamaForCausalLM take their angles in a way that ropelab does not know"):
        losses(saved("llama"), asked("rerope", []), place, TEXT)


def test_an_attention_that_differs_on_a_probe_is_refused(
    saved: Callable[[str], Path], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention.Layers.attend
    monkeypatch.setattr(
        attention.Layers, "attend", lambda *given, scaling, **named: right(*given, scaling=2 * scaling, **named)
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM does more in its attention"):
        losses(saved("llama"), None, place, TEXT, window=9)
