"""Encodings and scalings against things we did not write: transformers, and the papers' formulas as slow fp64 loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropelab.config import choices, load
from ropelab.positions import ENCODINGS, SCALINGS, Geometry, build, resolve_factor
from ropelab.positions.rope import Rope
from ropelab.schema import ContextLengthError, Method

NONE = Method("none", {})


def method(group: str, name: str, **changes: object) -> Method:
    config = load([f"{group}={name}", *(["pos=rope"] if group == "scaling" else [])])
    base: Method = getattr(config, group)
    return Method(base.name, {**base.parameters, **changes})


def rope(d_head: int, train_ctx: int, scaling: Method = NONE, **changes: object) -> Rope:
    encoding = build(method("pos", "rope", **changes), scaling, Geometry(d_head * 2, 2, train_ctx))
    assert isinstance(encoding, Rope)
    return encoding


def test_the_tables_of_names_are_the_shipped_files() -> None:
    assert sorted(ENCODINGS) == sorted(choices("pos"))
    assert sorted([*SCALINGS, "none"]) == sorted(choices("scaling"))


@pytest.mark.parametrize("name", choices("pos"))
def test_contract_of_every_encoding(name: str) -> None:
    """The record has the documented shapes and types, and a parameter-free encoding owns no tensors."""
    encoding = build(method("pos", name), NONE, Geometry(32, 4, 16))
    record = encoding(torch.arange(16), ctx=16)
    if record.embedding is not None:
        assert record.embedding.shape == (16, 32)
        assert record.embedding.dtype == torch.float32
    if record.bias is not None:
        assert record.bias.shape == (4, 16)
        assert record.bias.dtype == torch.float32
        assert record.bias[:, 0].eq(0).all()
    if record.rotation is not None:
        for part in record.rotation[:4]:
            assert part.shape == (16, 4)
            assert part.dtype == torch.float32
    assert not list(encoding.buffers())
    trained = {"learned": 1, "sinusoidal": 1}.get(name, 0)
    assert len(encoding.state_dict()) == trained


@pytest.mark.parametrize("name", [n for n in choices("pos") if n != "learned"])
def test_a_longer_sequence_says_the_same_about_its_beginning(name: str) -> None:
    """Encodings that do not depend on the length give a prefix the same record at every ctx."""
    encoding = build(method("pos", name), NONE, Geometry(32, 4, 16))
    short, long = encoding(torch.arange(16), ctx=16), encoding(torch.arange(64), ctx=64)
    if short.embedding is not None and long.embedding is not None:
        torch.testing.assert_close(long.embedding[:16], short.embedding, rtol=0, atol=0)
    if short.bias is not None and long.bias is not None:
        torch.testing.assert_close(long.bias[:, :16], short.bias, rtol=0, atol=0)
    if short.rotation is not None and long.rotation is not None:
        torch.testing.assert_close(long.rotation.cos_q[:16], short.rotation.cos_q, rtol=0, atol=0)


def test_learned_positions_are_undefined_past_their_table() -> None:
    encoding = build(method("pos", "learned"), NONE, Geometry(8, 2, 16))
    encoding(torch.arange(16), ctx=16)
    with pytest.raises(ContextLengthError, match="16"):
        encoding(torch.arange(17), ctx=17)


def test_sinusoidal_is_the_formula_of_the_paper() -> None:
    """Vaswani et al., section 3.5, entry by entry."""
    encoding = build(method("pos", "sinusoidal"), NONE, Geometry(12, 2, 16))
    table = encoding.table(torch.arange(40))  # type: ignore[operator]
    for p in range(40):
        for i in range(6):
            angle = p / 10000 ** (2 * i / 12)
            assert table[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    embedding = encoding(torch.arange(40), ctx=40).embedding
    assert embedding.pow(2).mean().sqrt().item() == pytest.approx(0.02, rel=1e-5)


def test_sinusoidal_fairseq_is_the_formula_of_fairseq() -> None:
    """Sines then cosines, exponents k / (C/2 - 1), first position 2; and the tokens times sqrt(C)."""
    encoding = build(method("pos", "sinusoidal_fairseq"), NONE, Geometry(12, 2, 16))
    table = encoding(torch.arange(40), ctx=40).embedding
    for p in range(40):
        for k in range(6):
            angle = (p + 2) * math.exp(-k * math.log(10000) / 5)
            assert table[p, k].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[p, 6 + k].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert encoding.token_scale() * encoding.token_std(12) == pytest.approx(1)


PUBLISHED_SLOPES = {
    8: [2.0**-h for h in range(1, 9)],
    4: [1 / 4, 1 / 16, 1 / 64, 1 / 256],
    6: [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8],
    12: [*(2.0**-h for h in range(1, 9)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5],
}


@pytest.mark.parametrize("heads", PUBLISHED_SLOPES)
def test_alibi_slopes_are_the_published_ones(heads: int) -> None:
    encoding = build(method("pos", "alibi"), NONE, Geometry(heads * 8, heads, 16))
    bias = encoding(torch.arange(5), ctx=5).bias
    for h, slope in enumerate(PUBLISHED_SLOPES[heads]):
        assert bias[h].tolist() == pytest.approx([-slope * distance for distance in range(5)], rel=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 7, 16, 24])
def test_alibi_slopes_equal_those_of_transformers(heads: int) -> None:
    """BLOOM's alibi in transformers, which is slope x key index: the last row of distances, reversed."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 6), heads, torch.float32)  # (H, 1, 6)
    ours = build(method("pos", "alibi"), NONE, Geometry(heads * 8, heads, 16))(torch.arange(6), ctx=6).bias
    torch.testing.assert_close(theirs[:, 0, :] - theirs[:, 0, -1:], ours.flip(1), rtol=1e-6, atol=1e-6)


def from_transformers(
    kind: str, d_head: int, base: float, train_ctx: int, ctx: int, fraction: float = 1.0, **keys: object
):  # type: ignore[no-untyped-def]
    """(inv_freq, attention factor) of transformers' own function."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": kind, "rope_theta": base, "partial_rotary_factor": fraction, **keys}
    config = LlamaConfig(
        hidden_size=d_head * 2, num_attention_heads=2, head_dim=d_head, max_position_embeddings=train_ctx,
        rope_parameters=parameters,
    )  # fmt: skip
    config.standardize_rope_params()
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=ctx)


settings_of_a_spectrum = st.fixed_dictionaries(
    {
        "d_head": st.sampled_from([16, 32, 64, 128]),
        "base": st.sampled_from([100.0, 1e4, 5e5]),
        "train_ctx": st.sampled_from([64, 128, 512, 2048, 8192]),
        "times": st.sampled_from([1, 2, 3, 8]),
        "factor": st.sampled_from([1.0, 2.0, 4.0, 8.0, 32.0]),
    }
)


@settings(deadline=None, max_examples=60)
@given(settings_of_a_spectrum, st.sampled_from(["linear", "dynamic_ntk", "yarn"]))
def test_scalings_equal_transformers(case: dict[str, float], name: str) -> None:
    """linear, dynamic and yarn give transformers' inverse frequencies (1e-5 relative: theirs are fp32) and factors."""
    d_head, train_ctx = int(case["d_head"]), int(case["train_ctx"])
    ctx = int(case["times"]) * train_ctx
    kind = {"dynamic_ntk": "dynamic"}.get(name, name)
    theirs, attention = from_transformers(
        kind, d_head, case["base"], train_ctx, ctx, factor=case["factor"], original_max_position_embeddings=train_ctx
    )
    ours, mine = rope(d_head, train_ctx, method("scaling", name, factor=case["factor"]), base=case["base"]).spectrum(
        ctx
    )
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=0)
    assert mine == pytest.approx(attention, abs=1e-9)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_partial_rotary_equals_transformers(fraction: float) -> None:
    """GPT-NeoX's own rotary module: the frequencies are spread over the rotated dimensions."""
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

    parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": fraction}
    config = GPTNeoXConfig(hidden_size=128, num_attention_heads=2, rope_parameters=parameters)
    theirs = GPTNeoXRotaryEmbedding(config).inv_freq
    ours, _ = rope(64, 128, fraction=fraction).spectrum(128)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=0)


def test_ntk_bases_are_the_published_ones() -> None:
    """d = 64: bases 20452, 41829, 85550 for s = 2, 4, 8; the first pair stays, the last is that of interpolation."""
    for factor, base in ((2.0, 20452), (4.0, 41829), (8.0, 85550)):
        inv_freq, attention = rope(64, 512, method("scaling", "ntk", factor=factor)).spectrum(4096)
        assert inv_freq[1].item() ** (-32) == pytest.approx(base, rel=1e-4)
        plain, _ = rope(64, 512).spectrum(4096)
        assert inv_freq[0].item() == 1.0
        assert inv_freq[-1].item() == pytest.approx(plain[-1].item() / factor, rel=1e-12)
        assert attention == 1.0


def test_yarn_ramps_are_the_published_ones() -> None:
    """Pair 10 of d = 64, L = 512: kept by 0.4615 in the released code and by 0.1156 in the paper."""
    plain, _ = rope(64, 512).spectrum(512)
    for ramp, keep in (("index", 0.4615), ("rotations", 0.1156)):
        scaled, attention = rope(64, 512, method("scaling", "yarn", factor=8.0, ramp=ramp)).spectrum(4096)
        # inv_freq' = inv_freq (keep + (1 - keep) / s)
        ratio = (scaled[10] / plain[10]).item()
        assert (ratio - 1 / 8) / (1 - 1 / 8) == pytest.approx(keep, abs=2e-4)
        assert attention == pytest.approx(1.2079, abs=1e-4)


def test_yarn_by_rotations_is_the_formula_of_the_paper() -> None:
    """Definition 2 of the paper, pair by pair."""
    length, factor, pairs = 2048, 4.0, 32
    scaled, _ = rope(64, length, method("scaling", "yarn", factor=factor, ramp="rotations")).spectrum(length)
    for i in range(pairs):
        theta = 10000 ** (-2 * i / 64)
        turns = length * theta / (2 * math.pi)
        gamma = 0.0 if turns < 1 else 1.0 if turns > 32 else (turns - 1) / 31
        assert scaled[i].item() == pytest.approx((1 - gamma) * theta / factor + gamma * theta, rel=1e-12)


@pytest.mark.parametrize("name", list(SCALINGS))
def test_factor_one_is_the_identity(name: str) -> None:
    plain, scaled = rope(64, 512), rope(64, 512, method("scaling", name, factor=1.0))
    torch.testing.assert_close(scaled.spectrum(512)[0], plain.spectrum(512)[0], rtol=1e-15, atol=0)
    assert scaled.spectrum(512)[1] == 1.0


def test_dynamic_ntk_is_rope_up_to_its_original_length() -> None:
    dynamic, plain = rope(64, 512, method("scaling", "dynamic_ntk", factor=2.0)), rope(64, 512)
    for ctx in (1, 511, 512):
        assert torch.equal(dynamic.spectrum(ctx)[0], plain.spectrum(ctx)[0])
    assert not torch.equal(dynamic.spectrum(513)[0], plain.spectrum(513)[0])


def test_angles_stay_exact_at_long_lengths() -> None:
    """Angles are formed in fp64: at 131071 an fp32 product would be off by 5e-3 in the cosine."""
    rotation = rope(64, 128)(torch.tensor([131071]), ctx=131072).rotation
    for i in range(32):
        angle = math.fmod(131071 * 10000 ** (-2 * i / 64), 2 * math.pi)
        assert rotation.cos_q[0, i].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_auto_factor_covers_the_ladder_with_a_power_of_two() -> None:
    for longest, factor in ((512, 1.0), (513, 2.0), (1024, 2.0), (3000, 8.0), (8192, 16.0)):
        resolved = resolve_factor(method("scaling", "yarn", factor="auto"), longest=longest, train_ctx=512)
        assert resolved.parameters["factor"] == factor
    assert (
        resolve_factor(method("scaling", "dynamic_ntk", factor="auto"), longest=8192, train_ctx=512).parameters[
            "factor"
        ]
        == 1.0
    )
    halved = resolve_factor(method("scaling", "ntk", factor="auto", original_ctx=256), longest=1024, train_ctx=512)
    assert halved.parameters["factor"] == 4.0


@pytest.mark.parametrize(
    ("pos", "scaling", "geometry", "word"),
    [
        (method("pos", "alibi"), method("scaling", "yarn", factor=2.0), Geometry(32, 4, 16), "rope"),
        (method("pos", "rope"), NONE, Geometry(33, 11, 16), "even head dimension"),
        (method("pos", "rope", base=1.0), NONE, Geometry(32, 4, 16), "pos.base"),
        (method("pos", "rope", layout="neox"), NONE, Geometry(32, 4, 16), "half or interleaved"),
        (method("pos", "rope", fraction=0.0), NONE, Geometry(32, 4, 16), "fraction"),
        (method("pos", "rope", fraction=0.1), NONE, Geometry(32, 4, 16), "rotates no pair"),
        (method("pos", "sinusoidal"), NONE, Geometry(33, 11, 16), "even model.d_model"),
        (method("pos", "rope"), method("scaling", "yarn", factor=2.0, beta_fast=1.0), Geometry(32, 4, 16), "beta_fast"),
        (method("pos", "rope"), method("scaling", "yarn", factor=2.0, ramp="paper"), Geometry(32, 4, 16), "ramp"),
        (method("pos", "rope"), method("scaling", "ntk", factor=2.0), Geometry(8, 4, 16), "two rotary pairs"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused_with_a_reason(
    pos: Method, scaling: Method, geometry: Geometry, word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        build(pos, scaling, geometry)
