"""Encodings and scalings against things we did not write: transformers, and the papers' formulas as slow fp64 loops."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropelab.config import Method, choices, load
from ropelab.errors import ContextLengthError
from ropelab.positions import ENCODINGS, Far, Geometry, PositionEncoding, Positions, Rope, Rotation, bucket
from ropelab.scalings import SCALINGS, build, make_scaling, resolve_factor

_spec = importlib.util.spec_from_file_location(
    "make_goldens", Path(__file__).parent.parent / "scripts" / "make_goldens.py"
)
assert _spec is not None
assert _spec.loader is not None
make_goldens = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_goldens)

NONE = Method("none", {})
GOLDENS = Path(__file__).parent / "goldens"
SPECTRAL = [name for name, scaling in SCALINGS.items() if scaling.spectral]


def method(group: str, name: str, /, **changes: object) -> Method:
    config = load([f"{group}={name}", *(["pos=rope"] if group == "scaling" else [])])
    base: Method = getattr(config, group)
    return Method(base.name, {**base.parameters, **changes})


def rope(d_head: int, train_ctx: int, scaling: Method = NONE, **changes: object) -> Rope:
    encoding = build(method("pos", "rope", **changes), scaling, Geometry(d_head * 2, 2, train_ctx))
    assert isinstance(encoding, Rope)
    return encoding


def usable(name: str, *, factor: float, pairs: int) -> Method:
    """The scaling with its defaults, a factor where it has one, and rescale factors where it needs them."""
    scaling = method("scaling", name)
    changes: dict[str, object] = {"factor": factor} if "factor" in scaling.parameters else {}
    if name == "longrope":
        changes["long_factors"] = [1 + (factor - 1) * i / (pairs - 1) for i in range(pairs)]
    return Method(name, {**scaling.parameters, **changes})


def drawn(name: str, scaling: Method, geometry: Geometry, seed: int = 0) -> PositionEncoding:
    """An encoding as a model would start it, at the end of its training."""
    encoding = build(method("pos", name), scaling, geometry)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in encoding.named_parameters():
            start = encoding.init_parameter(parameter_name, parameter.shape, generator)
            if start is not None:
                parameter.copy_(start)
    encoding.set_training_fraction(1.0)
    return encoding


def said(encoding: PositionEncoding, ctx: int) -> list[Tensor] | None:
    """All that an encoding says at a length, as tensors; None where it is undefined."""
    try:
        with torch.no_grad():
            record = encoding(torch.arange(ctx), ctx=ctx)
    except ContextLengthError:
        return None
    parts: list[Tensor] = []
    for field, value in zip(Positions._fields, record, strict=True):
        if value is None:
            continue
        parts.append(torch.tensor([Positions._fields.index(field)]))
        if isinstance(value, Rotation):
            parts += value[:4]
        elif isinstance(value, Far):
            parts += [*value.rotation[:4], torch.tensor([value.window])]
        elif isinstance(value, int):
            parts.append(torch.tensor([value]))
        elif callable(value):
            i = torch.arange(ctx, dtype=torch.float32)
            parts.append(value(i[:, None], (i[:, None] - i).clamp(min=0)).detach())
        else:
            parts.append(value)
    return parts


def same(one: list[Tensor] | None, other: list[Tensor] | None) -> bool:
    if one is None or other is None:
        return one is other
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_tables_of_names_are_the_shipped_files() -> None:
    assert sorted(ENCODINGS) == sorted(choices("pos"))
    assert sorted([*SCALINGS, "none"]) == sorted(choices("scaling"))


def test_parameters_are_the_keys_of_the_shipped_files() -> None:
    """Keywords of an encoding and fields of a scaling, which has an original_ctx even where no formula refers to it."""
    for name, encoding in ENCODINGS.items():
        keywords = set(inspect.signature(encoding.__init__).parameters) - {"self", "geometry"}
        assert keywords == set(method("pos", name).parameters), name
    for name, scaling in SCALINGS.items():
        fields = {field.name for field in dataclasses.fields(scaling)}
        assert fields == {*method("scaling", name).parameters, "original_ctx"}, name


def check_rotation(rotation: Rotation, rows: int, d_head: int) -> None:
    for part in rotation[:4]:
        assert part.dim() == 2
        assert part.shape[0] == rows
        assert 0 < 2 * part.shape[1] <= d_head
        assert part.shape == rotation.cos_q.shape
        assert part.dtype == torch.float32
        assert part.isfinite().all()
    assert isinstance(rotation.interleaved, bool)


def check_record(record: Positions, ctx: int, geometry: Geometry) -> None:
    """The documented shapes and types of every field."""
    width, heads = geometry.d_model, geometry.n_head
    for table in (record.embedding, record.qk_embedding):
        if table is not None:
            assert table.shape == (ctx, width)
            assert table.dtype == torch.float32
    if record.rotation is not None:
        check_rotation(record.rotation, ctx, geometry.d_head)
    if record.bias is not None:
        assert record.bias.shape == (heads, ctx)
        assert record.bias.dtype == torch.float32
        assert record.bias.isfinite().all()
    if record.far is not None:
        assert record.rotation is not None
        check_rotation(record.far.rotation, ctx, geometry.d_head)
        assert record.far.rotation.cos_q.shape == record.rotation.cos_q.shape
        assert record.far.rotation.interleaved == record.rotation.interleaved
        assert 1 <= record.far.window < ctx
    if record.logit_scale is not None:
        assert record.logit_scale.shape == (ctx,)
        assert record.logit_scale.dtype == torch.float32
        assert record.logit_scale.min() > 0
    if record.query_bias is not None:
        i = torch.arange(ctx // 2, ctx, dtype=torch.float32)[:, None]  # a block of queries, not from the start
        bias = record.query_bias(i, (i - torch.arange(5)).clamp(min=0))
        assert bias.shape == (heads, len(i), 5)
        assert bias.dtype == torch.float32
    if record.block is not None:
        assert isinstance(record.block, int)
        assert record.block >= 1


@pytest.mark.parametrize("name", choices("pos"))
def test_contract_of_every_encoding(name: str) -> None:
    """The record has the documented shapes and types; an encoding owns no buffers."""
    geometry = Geometry(32, 4, 16, n_layer=2)
    encoding = drawn(name, NONE, geometry)
    check_record(encoding(torch.arange(16), ctx=16), 16, geometry)
    assert not list(encoding.buffers())
    assert set(encoding.state_dict()) == {parameter for parameter, _ in encoding.named_parameters()}
    decay = encoding.content_bias(1, torch.randn(3, 16, 32))
    assert (decay is not None) == encoding.content_dependent
    if decay is not None:
        assert decay.cumsum.shape == (3, 4, 16)
        assert decay.cumsum.dtype == torch.float64
        assert (decay.cumsum.diff(dim=-1) >= 0).all()
        if decay.gate is not None:
            assert decay.gate.shape == (3, 4, 16)
            assert (decay.gate >= 0).all()


APPLICABLE = [
    (pos, scaling)
    for pos in ENCODINGS
    for scaling in ["none", *SCALINGS]
    if scaling == "none" or SCALINGS[scaling].applies_to is None or pos in (SCALINGS[scaling].applies_to or ())
]
PARAMETER_FREE = [name for name in ENCODINGS if not build(method("pos", name), NONE, Geometry(32, 4, 16)).state_dict()]


@pytest.mark.parametrize(("name", "scaling"), [pair for pair in APPLICABLE if pair[0] in PARAMETER_FREE])
def test_the_default_type_of_torch_touches_no_position(name: str, scaling: str) -> None:
    """Under a default type of bf16, and after a cast of the module to bf16, the record is the same to the bit."""
    chosen = NONE if scaling == "none" else usable(scaling, factor=4.0, pairs=4)
    geometry = Geometry(32, 4, 16)
    expected = said(drawn(name, chosen, geometry), 64)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = said(drawn(name, chosen, geometry).to(torch.bfloat16), 64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert expected is not None
    assert same(found, expected)


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (T, D) fp64 with its pairs turned as complex numbers by cosines and sines (T, R/2)."""
    pairs = cos.shape[1]
    first, second = (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (
        slice(0, pairs), slice(pairs, 2 * pairs)
    )  # fmt: skip
    numbers = torch.complex(x[:, first], x[:, second]) * torch.complex(cos.double(), sin.double())
    out = x.clone()
    out[:, first], out[:, second] = numbers.real, numbers.imag
    return out


def scores(encoding: PositionEncoding, ctx: int, q: Tensor, k: Tensor) -> Tensor:
    """What a record makes of queries and keys (T, D) fp64: (H, T, T) scores without 1/sqrt(D), -inf where unseen."""
    with torch.no_grad():
        record = encoding(torch.arange(ctx), ctx=ctx)
    i, j = torch.arange(ctx)[:, None], torch.arange(ctx)
    distance = i - j

    def product(rotation: Rotation | None) -> Tensor:
        if rotation is None:
            return q @ k.T
        cos_q, sin_q, cos_k, sin_k, interleaved = rotation
        return turned(q, cos_q, sin_q, interleaved) @ turned(k, cos_k, sin_k, interleaved).T

    out = product(record.rotation)
    if record.far is not None:
        out = torch.where(distance < record.far.window, out, product(record.far.rotation))
    if record.logit_scale is not None:
        out = out * record.logit_scale[:, None].double()
    if record.bias is not None:
        out = out + record.bias[:, distance.clamp(min=0)].double()  # (H, T, T)
    if record.query_bias is not None:
        out = out + record.query_bias(i.float(), distance.clamp(min=0).float()).detach().double()
    hidden = distance < 0
    if record.block is not None:
        hidden = hidden | (i // record.block - j // record.block > 1)
    return out.masked_fill(hidden, -math.inf).expand(1 if out.dim() == 2 else out.shape[0], ctx, ctx)


def queries_and_keys(ctx: int, d_head: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, ctx, d_head, dtype=torch.float64, generator=generator)
    return q, k


@pytest.mark.parametrize(("pos", "scaling"), [(p, s) for p, s in APPLICABLE if p != "learned"])
def test_only_what_is_declared_dependent_on_the_length_says_otherwise_of_a_prefix(pos: str, scaling: str) -> None:
    """Scores and tables of the first 16 positions at ctx 16 and 64: equal, or declared length_dependent."""
    chosen = NONE if scaling == "none" else usable(scaling, factor=4.0, pairs=4)
    geometry = Geometry(32, 4, 16)
    encoding = drawn(pos, chosen, geometry)
    q, k = queries_and_keys(64, geometry.d_head)
    short, long = scores(encoding, 16, q[:16], k[:16]), scores(encoding, 64, q, k)[:, :16, :16]
    tables = [encoding(torch.arange(n), ctx=n) for n in (16, 64)]
    for field in ("embedding", "qk_embedding"):
        before, after = (getattr(record, field) for record in tables)
        assert before is None or torch.equal(before, after[:16])
    if encoding.length_dependent:
        # xpos depends on it in the size of queries and keys, which cancels in the score
        rotations = [record.rotation.cos_q[:16] for record in tables]
        assert not torch.equal(*rotations)
    else:
        torch.testing.assert_close(short, long, rtol=1e-6, atol=1e-6)


def test_learned_positions_are_undefined_past_their_table() -> None:
    encoding = build(method("pos", "learned"), NONE, Geometry(8, 2, 16))
    encoding(torch.arange(16), ctx=16)
    with pytest.raises(ContextLengthError, match="16"):
        encoding(torch.arange(17), ctx=17)


def test_no_positions_are_said_by_none_and_by_drope_once_it_has_dropped_them() -> None:
    geometry = Geometry(32, 4, 16)
    empty = Positions()
    assert build(method("pos", "none"), NONE, geometry)(torch.arange(40), ctx=40) == empty
    drope = build(method("pos", "drope", drop_after=0.75), NONE, geometry)
    trained = build(method("pos", "rope"), NONE, geometry)
    assert not drope.set_training_fraction(0.0)
    assert not drope.set_training_fraction(0.74)
    assert same(said(drope, 40), said(trained, 40))
    assert drope.set_training_fraction(0.75)
    assert drope(torch.arange(40), ctx=40) == empty
    assert not drope.set_training_fraction(1.0)


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


# --- goldens: numbers of transformers and x-transformers, written by scripts/make_goldens.py -------------------------


def golden(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))
    assert found["version"]
    return found


OURS: dict[str, tuple[str, dict[str, str]]] = {  # transformers' type: (our name, its parameters by ours)
    "linear": ("linear", {}),
    "dynamic": ("dynamic_ntk", {}),
    "yarn": ("yarn", {}),
    "llama3": ("llama3", {}),
    "longrope": ("longrope", {"long_factor": "long_factors", "short_factor": "short_factors"}),
    "proportional": ("proportional", {"partial_rotary_factor": "p"}),
}


def ours(kind: str, d_head: int, base: float, original_ctx: int, parameters: dict[str, Any], **changes: Any) -> Rope:
    name, renamed = OURS[kind]
    parameters = {renamed.get(key, key): value for key, value in parameters.items()}
    return rope(d_head, original_ctx, method("scaling", name, **parameters), base=base, **changes)


def test_scalings_equal_the_golden_numbers() -> None:
    """Of every type of transformers, to ten digits."""
    rows = golden("scalings")["rows"]
    assert {row["type"] for row in rows} == set(OURS)
    for row in rows:
        encoding = ours(row["type"], row["d_head"], row["base"], row["original_ctx"], row["parameters"])
        used = encoding.spectrum(row["ctx"])
        assert used.inv_freq.tolist() == pytest.approx(row["inv_freq"], rel=1e-9, abs=0)
        assert used.attention_factor == pytest.approx(row["attention_factor"], rel=1e-12)


def test_t5_buckets_are_the_golden_ones() -> None:
    found = golden("t5_buckets")
    assert len(set(found["buckets"])) == 32
    assert bucket(torch.tensor(found["distances"]), 32, 128).tolist() == found["buckets"]


@pytest.mark.parametrize("heads", range(1, 17))
def test_alibi_slopes_are_the_golden_ones(heads: int) -> None:
    expected = golden("alibi_slopes")["slopes"][str(heads)]
    bias = build(method("pos", "alibi"), NONE, Geometry(heads * 8, heads, 16))(torch.arange(8), ctx=8).bias
    torch.testing.assert_close(bias[:, 7], -7 * torch.tensor(expected), rtol=1e-6, atol=0)


def test_xpos_scores_are_the_golden_ones() -> None:
    """x-transformers: cosine of the angle times zeta^((m - n)/512), for every pair of dimensions."""
    found = golden("xpos")
    ctx = 1 + max(m for m, _ in found["positions"])
    xpos = method("pos", "xpos", base=found["base"], gamma=0.4, scale_base=float(found["scale_base"]))
    cos_q, sin_q, cos_k, sin_k, _ = build(xpos, NONE, Geometry(found["d_head"], 1, 64))(
        torch.arange(ctx), ctx=ctx
    ).rotation
    for (m, n), expected in zip(found["positions"], found["products"], strict=True):
        product = cos_q[m].double() * cos_k[n] + sin_q[m].double() * sin_k[n]
        assert product.tolist() == pytest.approx(expected, abs=2e-7)


# --- transformers, live -----------------------------------------------------------------------------------------------


def from_transformers(
    kind: str, d_head: int, base: float, train_ctx: int, ctx: int, *, exact: bool, **keys: object
) -> tuple[Tensor, float]:
    """(inv_freq, attention factor) of transformers' own function: as it is, in fp32, or `exact`, in fp64."""
    if kind in ("yarn", "llama3", "longrope"):
        keys["original_max_position_embeddings"] = train_ctx
    arguments = make_goldens.llama(kind, d_head, base, train_ctx, **keys), torch.device("cpu")
    function = ROPE_INIT_FUNCTIONS[kind]
    run = make_goldens.in_double if exact else lambda f, *args, **more: f(*args, **more)
    inv_freq, attention = run(function, *arguments, seq_len=ctx)
    assert inv_freq.dtype == (torch.float64 if exact else torch.float32)
    return inv_freq, attention


@st.composite
def rotary_settings(draw: st.DrawFn) -> dict[str, Any]:
    """Head dimension, share of it that is rotated, base, L, a ctx below, at or above it, and a factor."""
    d_head, fraction = draw(st.sampled_from([(8, 1.0), (16, 0.5), (32, 1.0), (64, 0.25), (96, 1.0), (128, 0.5)]))
    original_ctx = draw(st.integers(64, 131072))
    ctx = draw(st.one_of(st.integers(1, original_ctx), st.just(original_ctx), st.integers(original_ctx + 1, 2**22)))
    base = draw(st.floats(50, 1e6))
    factor = draw(st.one_of(st.just(1.0), st.floats(1.001, 64)))
    return {"d_head": d_head, "fraction": fraction, "base": base, "L": original_ctx, "ctx": ctx, "factor": factor}


def parameters_of(kind: str, case: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """Random parameters of a type, by transformers' names."""
    if kind in ("linear", "dynamic"):
        return {}
    if kind == "yarn":
        return {
            "truncate": data.draw(st.booleans()),
            "beta_fast": data.draw(st.sampled_from([32.0, 16.0])),
            "beta_slow": data.draw(st.sampled_from([1.0, 2.5])),
            "attention_factor": data.draw(st.sampled_from([None, 0.7, 1.3])),
        }
    if kind == "llama3":
        return {"low_freq_factor": data.draw(st.floats(0.5, 2)), "high_freq_factor": data.draw(st.floats(2.5, 32))}
    if kind == "longrope":
        pairs = int(case["d_head"] * case["fraction"]) // 2
        rescale = st.lists(st.floats(1, 64), min_size=pairs, max_size=pairs).map(sorted)
        attention = data.draw(st.sampled_from([None, 0.7, 1.3]))
        return {"long_factor": data.draw(rescale), "short_factor": data.draw(rescale), "attention_factor": attention}
    if kind == "proportional":
        return {"partial_rotary_factor": data.draw(st.floats(0, 1))}
    raise AssertionError(f"transformers has a rotary type that ropelab has not: {kind}")


@pytest.mark.integration
# the parameters come from the dict itself: a type that is new in transformers fails here
@pytest.mark.parametrize("kind", ROPE_INIT_FUNCTIONS)
def test_every_type_of_transformers_is_covered_and_equal(kind: str) -> None:
    """transformers' own functions: run in fp64 to 1e-12, as they are (fp32) to the rounding of fp32.

    That is 2e-6, but for yarn and llama3, where the rounding of their ramp comes out up to `factor` times as large.
    Attention factors are Python numbers there and equal to 1e-12. Prints the largest errors (pytest -s).
    """
    largest = {True: 0.0, False: 0.0}

    @settings(max_examples=100)
    @given(rotary_settings(), st.data())
    def compare(case: dict[str, Any], data: st.DataObject) -> None:
        parameters = {"factor": case["factor"], **parameters_of(kind, case, data)}
        share = 1.0 if kind == "proportional" else case["fraction"]  # its own share takes the place of partial rotary
        theirs = parameters if kind == "proportional" else {**parameters, "partial_rotary_factor": share}
        rounding = 4e-6 * case["factor"] if kind in ("yarn", "llama3") else 2e-6
        for exact, tolerance in ((True, 1e-12), (False, rounding)):
            inv_freq, attention = from_transformers(
                kind, case["d_head"], case["base"], case["L"], case["ctx"], exact=exact, **theirs
            )
            try:
                encoding = ours(kind, case["d_head"], case["base"], case["L"], parameters, fraction=share)
            except ValueError as refusal:
                if "changes no pair" not in str(refusal):
                    raise
                # all pairs are kept, and so they are in theirs
                plain = rope(case["d_head"], case["L"], base=case["base"], fraction=share).inv_freq()
                torch.testing.assert_close(inv_freq.double(), plain, rtol=tolerance, atol=0)
                continue
            used = encoding.spectrum(case["ctx"])
            assert torch.equal(used.inv_freq == 0, inv_freq == 0)
            error = ((used.inv_freq - inv_freq).abs() / inv_freq.double().clamp(min=1e-300)).max().item()
            largest[exact] = max(largest[exact], error)
            assert error <= tolerance
            assert used.attention_factor == pytest.approx(attention, rel=1e-12)

    compare()
    print(f"\n{kind}: largest relative error {largest[True]:.1e} in fp64, {largest[False]:.1e} in fp32")


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_partial_rotary_equals_transformers(fraction: float) -> None:
    """GPT-NeoX's own rotary module: the frequencies are spread over the rotated dimensions."""
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

    parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": fraction}
    config = GPTNeoXConfig(hidden_size=128, num_attention_heads=2, rope_parameters=parameters)
    theirs = GPTNeoXRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(rope(64, 128, fraction=fraction).inv_freq().float(), theirs, rtol=1e-6, atol=0)


@settings(max_examples=60)
@given(rotary_settings())
def test_dynamic_forms_and_fixed_ntk_equal_transformers_with_the_factor_of_the_length(case: dict[str, Any]) -> None:
    """dynamic_linear and dynamic_yarn are transformers' linear and yarn at s = max(1, ctx/L), to 1e-12; and ntk at
    s = ctx/L is transformers' dynamic with factor 1."""
    d_head, length = case["d_head"], case["L"]
    case["ctx"] = max(case["ctx"], length + 1)
    s = case["ctx"] / length
    share = case["fraction"]
    for name, kind, factor, mine in (
        ("dynamic_linear", "linear", s, 1.0),
        ("dynamic_yarn", "yarn", s, 1.0),
        ("ntk", "dynamic", 1.0, s),
    ):
        theirs, attention = from_transformers(
            kind, d_head, case["base"], length, case["ctx"], exact=True, factor=factor, partial_rotary_factor=share
        )
        scaling = method("scaling", name, factor=mine)
        used = rope(d_head, length, scaling, base=case["base"], fraction=case["fraction"]).spectrum(case["ctx"])
        torch.testing.assert_close(used.inv_freq, theirs, rtol=1e-12, atol=0)
        assert used.attention_factor == pytest.approx(attention, rel=1e-12)


# --- the papers' formulas, as loops -----------------------------------------------------------------------------------


def test_ntk_bases_are_the_published_ones() -> None:
    """d = 64: bases 20452, 41829, 85550 for s = 2, 4, 8; the first pair stays, the last is that of interpolation."""
    plain = rope(64, 512).inv_freq()
    for factor, base in ((2.0, 20452), (4.0, 41829), (8.0, 85550)):
        used = rope(64, 512, method("scaling", "ntk", factor=factor)).spectrum(4096)
        assert used.inv_freq[1].item() ** (-32) == pytest.approx(base, rel=1e-4)
        assert used.inv_freq[0].item() == 1.0
        assert used.inv_freq[-1].item() == pytest.approx(plain[-1].item() / factor, rel=1e-12)
        assert used.attention_factor == 1.0


def test_yarn_ramps_are_the_published_ones() -> None:
    """Pair 10 of d = 64, L = 512: kept by 0.4615 in the released code and by 0.1156 in the paper."""
    plain = rope(64, 512).inv_freq()
    for ramp, keep in (("index", 0.4615), ("rotations", 0.1156)):
        used = rope(64, 512, method("scaling", "yarn", factor=8.0, ramp=ramp)).spectrum(4096)
        # inv_freq' = inv_freq (keep + (1 - keep) / s)
        ratio = (used.inv_freq[10] / plain[10]).item()
        assert (ratio - 1 / 8) / (1 - 1 / 8) == pytest.approx(keep, abs=2e-4)
        assert used.attention_factor == pytest.approx(1.2079, abs=1e-4)


@pytest.mark.parametrize(("length", "factor"), [(128, 2.0), (2048, 4.0), (32768, 32.0)])
def test_yarn_by_rotations_is_the_formula_of_the_paper(length: int, factor: float) -> None:
    """Definition 2 of the paper, pair by pair; dynamic_yarn at ctx = s L and ntk_by_parts are the same spectrum."""
    by = {
        name: rope(64, length, method("scaling", name, factor=f, ramp="rotations")).spectrum(int(factor) * length)
        for name, f in (("yarn", factor), ("ntk_by_parts", factor), ("dynamic_yarn", 1.0))
    }
    for i in range(32):
        theta = 10000 ** (-2 * i / 64)
        turns = length * theta / (2 * math.pi)
        gamma = 0.0 if turns < 1 else 1.0 if turns > 32 else (turns - 1) / 31
        for used in by.values():
            assert used.inv_freq[i].item() == pytest.approx((1 - gamma) * theta / factor + gamma * theta, rel=1e-12)
    assert by["ntk_by_parts"].attention_factor == 1
    for name in ("yarn", "dynamic_yarn"):
        assert by[name].attention_factor == pytest.approx(0.1 * math.log(factor) + 1, rel=1e-15)


@pytest.mark.parametrize(("length", "base"), [(8192, 5e5), (64, 1e4), (131072, 1e5)])
def test_llama3_is_the_code_of_llama(length: int, base: float) -> None:
    """meta-llama/llama-models, `apply_scaling`, pair by pair: by the wavelength."""
    used = rope(128, length, method("scaling", "llama3", factor=8.0), base=base).spectrum(length)
    for i in range(64):
        theta = base ** (-2 * i / 128)
        wavelength = 2 * math.pi / theta
        if wavelength < length / 4:
            expected = theta
        elif wavelength > length / 1:
            expected = theta / 8
        else:
            smooth = (length / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * theta / 8 + smooth * theta
        assert used.inv_freq[i].item() == pytest.approx(expected, rel=1e-12)


def test_longrope_chooses_its_list_by_the_length_and_spares_the_first_tokens() -> None:
    """Ding et al., eq. 4: angle n theta_i up to start_tokens, n theta_i / lambda_i from there on; long past L."""
    long, short = [1.0, 2.0, 4.0, 8.0], [1.0, 1.1, 1.2, 1.3]
    scaling = method("scaling", "longrope", factor=8.0, long_factors=long, short_factors=short, start_tokens=3)
    encoding = rope(8, 16, scaling)
    assert encoding.length_dependent
    for ctx, factors in ((16, short), (17, long), (128, long)):
        angles = encoding.angles(torch.arange(ctx), encoding.spectrum(ctx))
        for n in (0, 2, 3, ctx - 1):
            for i in range(4):
                expected = n * 10000 ** (-i / 4) / (1 if n < 3 else factors[i])
                assert angles[n, i].item() == pytest.approx(expected, rel=1e-14)
        attention = math.sqrt(1 + math.log(8) / math.log(16))
        assert encoding.spectrum(ctx).attention_factor == pytest.approx(attention, rel=1e-15)
        cos_q = encoding(torch.arange(ctx), ctx=ctx).rotation.cos_q
        torch.testing.assert_close(cos_q, (angles.cos() * attention).float(), rtol=0, atol=1e-7)
    assert not rope(8, 16, method("scaling", "longrope", factor=8.0, long_factors=long)).length_dependent


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "give scaling.factors=FILE"),
        ({"long_factors": [1.0, 2.0]}, r"scaling.factors: long_factors must hold 4 numbers.*not 2"),
        ({"long_factors": [1.0, 2.0, 3.0, math.inf]}, "finite numbers >= 1; number 4 of 4 is inf"),
        ({"long_factors": [1.0, 2.0, 3.0, math.nan]}, "number 4 of 4 is nan"),
        ({"long_factors": [0.5, 2.0, 3.0, 4.0]}, "number 1 of 4 is 0.5"),
        ({"long_factors": [1.0, 3.0, 2.0, 4.0]}, "must never fall; number 3 of 4 is 2.0 after 3.0"),
        ({"long_factors": [1.0, 2.0, 3.0, "4"]}, "number 4 of 4 is 4"),
        ({"short_factors": [1.0]}, "give scaling.factors=FILE"),
        ({"long_factors": [1.0] * 3 + [2.0], "short_factors": [1.0]}, "scaling.factors: short_factors must hold 4"),
        ({"long_factors": [1.0] * 3 + [2.0], "start_tokens": -1}, "scaling.start_tokens must be >= 0"),
        ({"long_factors": [1.0] * 3 + [2.0], "attention_factor": 0.0}, "scaling.attention_factor"),
        ({"long_factors": [1.0] * 3 + [2.0], "original_ctx": 1}, "scaling.original_ctx must be >= 2"),
    ],
)  # fmt: skip
def test_rescale_factors_are_checked(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        rope(8, 16, method("scaling", "longrope", factor=2.0, **changes))
    assert "\n" not in str(error.value)


def angle_scores(q: Tensor, k: Tensor, distance: Callable[[int, int], float], layout: str) -> Tensor:
    """(T, T): scores of RoPE where query m and key n stand `distance(m, n)` apart; scalar, fp64, -inf in the future."""
    length, d = q.shape
    out = torch.full((length, length), -math.inf, dtype=torch.float64)
    for m in range(length):
        for n in range(m + 1):
            total = 0.0
            for i in range(d // 2):
                a, b = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + d // 2)
                turn = distance(m, n) * 10000 ** (-2 * i / d)
                qa, qb, ka, kb = (float(x) for x in (q[m, a], q[m, b], k[n, a], k[n, b]))
                total += (qa * ka + qb * kb) * math.cos(turn) + (qa * kb - qb * ka) * math.sin(turn)
            out[m, n] = total
    return out


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_the_scores_of_this_file_are_those_of_rope(layout: str) -> None:
    q, k = queries_and_keys(24, 8)
    found = scores(rope(8, 8, layout=layout), 24, q, k)[0]
    torch.testing.assert_close(found, angle_scores(q, k, lambda m, n: m - n, layout), rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("window", [1, 3, 8, 23, 24, 40, None])
def test_rerope_is_its_definition(window: int | None, layout: str) -> None:
    """Su: RoPE's score at distance min(m - n, w), the query times max(1, ln(m + 1) / ln L); within 2e-6 of fp64."""
    q, k = queries_and_keys(24, 8)
    w = 2 if window is None else window  # L/4 of L = 8
    plain = angle_scores(q, k, lambda m, n: min(m - n, w), layout)
    for log_scaling in (False, True):
        scaling = method("scaling", "rerope", window=window, log_scaling=log_scaling)
        encoding = rope(8, 8, scaling, layout=layout)
        scale = [max(1.0, math.log(m + 1) / math.log(8)) if log_scaling else 1.0 for m in range(24)]
        expected = plain * torch.tensor(scale, dtype=torch.float64)[:, None]
        torch.testing.assert_close(scores(encoding, 24, q, k)[0], expected, rtol=0, atol=2e-6)
        assert (encoding(torch.arange(24), ctx=24).far is None) == (w >= 24)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(("group", "window"), [(2, 4), (3, 7), (8, 2), (4, 24), (1, 4), (5, None)])
def test_self_extend_is_its_definition(group: int, window: int | None, layout: str) -> None:
    """Jin et al., eq. 4: the distance is m - n below W, else floor(m/G) + W - floor(W/G) - floor(n/G)."""
    q, k = queries_and_keys(24, 8)
    w = 2 if window is None else window

    def distance(m: int, n: int) -> float:
        return m - n if m - n < w else m // group + w - w // group - n // group

    encoding = rope(8, 8, method("scaling", "self_extend", window=window, group=group), layout=layout)
    expected = angle_scores(q, k, distance, layout)
    torch.testing.assert_close(scores(encoding, 24, q, k)[0], expected, rtol=0, atol=2e-6)
    assert (encoding(torch.arange(24), ctx=24).far is None) == (w >= 24 or group == 1)


@pytest.mark.parametrize("pos", ["none", "drope"])
def test_temperature_is_one_plus_a_log_of_the_factor(pos: str) -> None:
    """DroPE: 1.2856 at s = 2 and 1.8567 at s = 8 with a = 0.412."""
    for factor, expected in ((2.0, 1.28558), (8.0, 1.85673)):
        encoding = drawn(pos, method("scaling", "temperature", factor=factor), Geometry(32, 4, 16))
        scale = encoding(torch.arange(64), ctx=64).logit_scale
        assert scale.tolist() == pytest.approx([expected] * 64, abs=5e-6)


def test_interpolated_slopes_are_the_bias_at_positions_divided_by_the_factor() -> None:
    encoding = build(method("pos", "alibi"), method("scaling", "interpolated_slopes", factor=4.0), Geometry(64, 8, 16))
    bias = encoding(torch.arange(64), ctx=64).bias
    for h, slope in enumerate(PUBLISHED_SLOPES[8]):
        assert bias[h].tolist() == pytest.approx([-slope * (distance / 4) for distance in range(64)], rel=1e-6)


@pytest.mark.parametrize("block", [1, 3, 8, None])
def test_blocks_are_said_where_they_hide_a_key(block: int | None) -> None:
    """Sun et al., section 3.2: a query sees its own and the last block; the record says so iff a key is hidden."""
    size = 8 if block is None else block  # L/2 of L = 16
    for pos in ENCODINGS:
        encoding = drawn(pos, method("scaling", "block_causal", block=block), Geometry(32, 4, 16))
        for ctx in (1, 2, 6, 7, 16):
            hides = any(i // size - j // size > 1 for i in range(ctx) for j in range(i + 1))
            assert encoding(torch.arange(ctx), ctx=ctx).block == (size if hides else None)


def test_a_learned_table_past_its_end_is_held_or_stretched() -> None:
    """clamp: the last row from there on. interpolate: numpy.interp at p/s, column by column; undefined beyond s L."""
    geometry = Geometry(8, 2, 16)
    plain = drawn("learned", NONE, geometry)
    table = plain.state_dict()["table"]
    held = drawn("learned", method("scaling", "clamp"), geometry)(torch.arange(40), ctx=40).embedding
    for p in range(40):
        assert torch.equal(held[p], table[min(p, 15)])
    for factor, ctx in ((2.0, 32), (2.5, 40), (3.0, 20), (1.0, 16)):
        stretched = drawn("learned", method("scaling", "interpolate", factor=factor), geometry)
        found = stretched(torch.arange(ctx), ctx=ctx).embedding
        for column in range(8):
            expected = np.interp(np.arange(ctx) / factor, np.arange(16), table[:, column].double().numpy())
            assert found[:, column].tolist() == pytest.approx(expected.tolist(), abs=1e-8)
        with pytest.raises(ContextLengthError, match=f"interpolated by {factor:g} at {int(16 * factor)}"):
            stretched(torch.arange(ctx), ctx=int(16 * factor) + 1)
    stretched(torch.arange(16), ctx=16).embedding.sum().backward()
    gradient = dict(stretched.named_parameters())["table"].grad
    assert gradient is not None
    assert gradient[:16].ne(0).all()


# --- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCALINGS)
def test_a_factor_of_one_is_the_identity(name: str) -> None:
    """Every scaling with a factor, at factor 1 and L tokens and with nothing else set: the record to the bit."""
    scaling = method("scaling", name)
    if "factor" not in scaling.parameters:
        assert name in ("rerope", "self_extend", "block_causal", "clamp")
        return
    neutral: dict[str, dict[str, Any]] = {"longrope": {"long_factors": [1.0] * 4}, "proportional": {"p": 1.0}}
    chosen = Method(name, {**scaling.parameters, "factor": 1.0, **neutral.get(name, {})})
    geometry = Geometry(32, 4, 16)
    for pos in SCALINGS[name].applies_to or ENCODINGS:
        for ctx in (2, 15, 16, 17, 100):
            if SCALINGS[name].dynamic and ctx > 16:
                continue
            assert same(said(drawn(pos, chosen, geometry), ctx), said(drawn(pos, NONE, geometry), ctx))


@pytest.mark.parametrize("name", [name for name in SCALINGS if SCALINGS[name].dynamic])
@pytest.mark.parametrize("factor", [1.0, 2.0, 7.5])
def test_dynamic_scalings_are_rope_up_to_the_original_length(name: str, factor: float) -> None:
    dynamic, plain = rope(64, 512, method("scaling", name, factor=factor)), rope(64, 512)
    for ctx in (1, 2, 511, 512):
        assert same(said(dynamic, ctx), said(plain, ctx))
    assert not same(said(dynamic, 513), said(plain, 513))


@settings(max_examples=50)
@given(rotary_settings())
def test_ntk_keeps_the_first_pair_and_interpolates_the_last(case: dict[str, Any]) -> None:
    """NTK's first pair is RoPE's to the bit, its last is linear interpolation's to 1e-12, and between it falls."""
    plain, used, linear = (
        rope(case["d_head"], case["L"], scaling, base=case["base"]).spectrum(case["ctx"]).inv_freq
        for scaling in (NONE, *(method("scaling", name, factor=case["factor"]) for name in ("ntk", "linear")))
    )
    assert used[0] == plain[0]
    assert used[-1].item() == pytest.approx(linear[-1].item(), rel=1e-12)
    assert (used.diff() < 0).all()
    assert ((used <= plain) & (used >= linear * (1 - 1e-12))).all()


@pytest.mark.parametrize(("p", "is_rope"), [(0.0, False), (1.0, True)])
def test_the_ends_of_p_rope_are_nope_and_rope(p: float, is_rope: bool) -> None:
    """Scores of proportional and of p_rope at p = 0 are those without positions, at p = 1 those of RoPE."""
    q, k = queries_and_keys(32, 8)
    expected = scores(rope(8, 16) if is_rope else drawn("none", NONE, Geometry(16, 2, 16)), 32, q, k)[0]
    stopped = rope(8, 16, method("scaling", "proportional", factor=1.0, p=p))
    trained = build(method("pos", "p_rope", p=p), NONE, Geometry(16, 2, 16))
    for encoding in (stopped, trained):
        torch.testing.assert_close(scores(encoding, 32, q, k)[0], expected, rtol=0, atol=0)


def test_proportional_is_what_p_rope_trains_with() -> None:
    for p in (0.1, 0.25, 0.5, 0.75, 0.99):
        stopped = rope(64, 16, method("scaling", "proportional", factor=1.0, p=p))
        trained = build(method("pos", "p_rope", p=p), NONE, Geometry(128, 2, 16))
        assert same(said(stopped, 40), said(trained, 40))


@pytest.mark.parametrize("name", SPECTRAL)
def test_a_pair_that_does_not_turn_never_starts_to(name: str) -> None:
    encoding = build(method("pos", "p_rope", p=0.5), usable(name, factor=4.0, pairs=16), Geometry(64, 2, 512))
    assert isinstance(encoding, Rope)
    inv_freq = encoding.spectrum(2048).inv_freq
    assert inv_freq[:8].gt(0).all()
    assert inv_freq[8:].eq(0).all()


@pytest.mark.parametrize("name", ["llama3", "ntk_by_parts"])
def test_a_scaling_that_keeps_every_pair_is_refused(name: str) -> None:
    """A row of its own for what is plain RoPE would be a false comparison."""
    with pytest.raises(ValueError, match=f"scaling={name} changes no pair"):
        build(method("pos", "p_rope", p=0.1), method("scaling", name, factor=8.0), Geometry(128, 2, 8192))
    build(method("pos", "p_rope", p=0.1), method("scaling", "yarn", factor=8.0), Geometry(128, 2, 8192))  # temperature


@settings(max_examples=30)
@given(st.sampled_from([2.0, 4.0, 8.0, 32.0]), st.sampled_from(["index", "rotations"]), st.integers(0, 1000))
def test_yarn_scores_are_those_of_ntk_by_parts_times_mscale_squared(factor: float, ramp: str, seed: int) -> None:
    """On the rotated dimensions; with full rotary that is the whole score."""
    q, k = queries_and_keys(40, 16, seed)
    yarn, parts = (rope(16, 16, method("scaling", n, factor=factor, ramp=ramp)) for n in ("yarn", "ntk_by_parts"))
    mscale = 0.1 * math.log(factor) + 1
    torch.testing.assert_close(scores(yarn, 40, q, k), scores(parts, 40, q, k) * mscale**2, rtol=1e-5, atol=1e-5)


def test_the_temperature_of_yarn_leaves_unrotated_dimensions_alone() -> None:
    q, k = queries_and_keys(40, 16)
    scaling = [method("scaling", name, factor=8.0) for name in ("yarn", "ntk_by_parts")]
    yarn, parts = (scores(rope(16, 16, s, fraction=0.5), 40, q, k) for s in scaling)
    rest = (q[:, 8:] @ k[:, 8:].T).masked_fill(torch.ones(40, 40).triu(1).bool(), -math.inf)
    mscale = 0.1 * math.log(8) + 1
    seen = rest.isfinite()
    torch.testing.assert_close(
        (yarn[0] - rest)[seen], (parts[0] - rest)[seen] * mscale**2, rtol=1e-5, atol=1e-5
    )  # fmt: skip


RELATIVE = [
    (pos, scaling) for pos, scaling in APPLICABLE if pos not in ("fire", "learned") and scaling != "self_extend"
]


@pytest.mark.parametrize(("pos", "scaling"), RELATIVE)
@pytest.mark.parametrize("ctx", [24, 100])
def test_scores_depend_on_the_distance_only(pos: str, scaling: str, ctx: int) -> None:
    """The same query and the same key everywhere: every diagonal is constant, to the rounding of fp32 tables.

    Exempt: FIRE (the query's index), Self-Extend (groups), ReRoPE's factor on the query, LongRoPE's start tokens.
    """
    chosen = NONE if scaling == "none" else usable(scaling, factor=4.0, pairs=4)
    if scaling == "rerope":
        chosen = Method("rerope", {**chosen.parameters, "log_scaling": False})
    geometry = Geometry(32, 4, 16)
    q, k = (x[:1].expand(ctx, -1) for x in queries_and_keys(1, geometry.d_head))
    found = scores(drawn(pos, chosen, geometry), ctx, q, k)
    for distance in range(ctx):
        diagonal = found.diagonal(-distance, 1, 2)  # (H, ctx - distance)
        for head in diagonal:
            seen = head[head.isfinite()]
            if len(seen):
                torch.testing.assert_close(seen, seen[:1].expand_as(seen), rtol=1e-5, atol=5e-6)


def test_the_exempt_ones_do_depend_on_more_than_the_distance() -> None:
    q, k = (x[:1].expand(64, -1) for x in queries_and_keys(1, 8))
    long = {"factor": 4.0, "long_factors": [1.0, 2.0, 3.0, 4.0]}
    for name, changes in (
        ("self_extend", {}),
        ("rerope", {}),
        ("longrope", {**long, "start_tokens": 8}),
    ):
        diagonal = scores(rope(8, 16, method("scaling", name, **changes)), 64, q, k)[0].diagonal(-20)
        assert diagonal.max() - diagonal.min() > 1e-2


@pytest.mark.parametrize("name", ["none", *SPECTRAL])
def test_tables_stay_exact_at_long_lengths(name: str) -> None:
    """fp32 cosines and sines within 1e-6 of fp64 up to position 131071, where an fp32 product would be off by 5e-3."""
    encoding = rope(64, 4096, NONE if name == "none" else usable(name, factor=32.0, pairs=32))
    at = torch.tensor([0, 1, 4095, 4096, 65537, 100003, 131071])
    rotation = encoding(at, ctx=131072).rotation
    used = encoding.spectrum(131072)
    for row, position in enumerate(at.tolist()):
        for i, inv_freq in enumerate(used.inv_freq.tolist()):
            angle = math.fmod(position * inv_freq, 2 * math.pi)
            assert rotation.cos_q[row, i].item() == pytest.approx(used.attention_factor * math.cos(angle), abs=1e-6)
            assert rotation.sin_k[row, i].item() == pytest.approx(used.attention_factor * math.sin(angle), abs=1e-6)


# --- every scaling on every encoding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pos", ENCODINGS)
@pytest.mark.parametrize("name", SCALINGS)
def test_every_scaling_applies_to_an_encoding_or_is_refused(name: str, pos: str) -> None:
    """It builds, owns the same parameters, keeps the contract of the record, and changes it exactly where it is not
    declared idle; or it is refused in one line that says what it applies to."""
    geometry = Geometry(32, 4, 64)
    scaling, chosen = SCALINGS[name], usable(name, factor=4.0, pairs=4)
    if scaling.applies_to is not None and pos not in scaling.applies_to:
        with pytest.raises(ValueError, match=f"scaling={name} applies to pos=") as error:
            build(method("pos", pos), chosen, geometry)
        assert "\n" not in str(error.value)
        return
    plain, scaled = drawn(pos, NONE, geometry), drawn(pos, chosen, geometry, seed=1)
    scaled.load_state_dict(plain.state_dict(), strict=True)
    assert not list(scaled.buffers())
    idle = []
    for ctx in (2, 16, 17, 63, 64, 65, 128, 129, 256):
        before, after = said(plain, ctx), said(scaled, ctx)
        idle.append(make_scaling(chosen, geometry.ctx).is_identity(ctx))
        # an undefined length stays one, for scalings that do not define it
        undefined = before is None and after is None
        assert same(before, after) == (idle[-1] or undefined), ctx
        if after is not None:
            check_record(scaled(torch.arange(ctx), ctx=ctx), ctx, geometry)
    assert not idle[-1]


def test_what_scalings_declare() -> None:
    """Names that exist; only spectral scalings follow the length; what is for evaluation only."""
    for name, scaling in SCALINGS.items():
        assert scaling.applies_to is None or set(scaling.applies_to) <= set(ENCODINGS)
        assert not scaling.spectral or scaling.applies_to == ("rope", "p_rope")
        assert scaling.dynamic == name.startswith("dynamic_")
        assert scaling.evaluation_only == (name in ("rerope", "self_extend"))


def test_auto_factor_covers_the_ladder_with_a_power_of_two() -> None:
    def factor(name: str, *, longest: int, **changes: object) -> object:
        scaling = resolve_factor(
            method("scaling", name, factor="auto", **changes), longest=longest, original_ctx=512
        )  # fmt: skip
        return scaling.parameters["factor"]

    for longest, expected in ((512, 1.0), (513, 2.0), (1024, 2.0), (3000, 8.0), (8192, 16.0)):
        assert factor("yarn", longest=longest) == expected
    for name in SCALINGS:
        if SCALINGS[name].dynamic:
            assert factor(name, longest=8192) == 1.0
    assert factor("ntk", longest=1024, original_ctx=256) == 4.0
    without = method("scaling", "rerope")
    assert resolve_factor(without, longest=8192, original_ctx=512) == without


@pytest.mark.parametrize(
    ("name", "changes", "geometry", "word"),
    [
        ("rope", {}, Geometry(33, 11, 16), "even head dimension"),
        ("rope", {"base": 1.0}, Geometry(32, 4, 16), "pos.base"),
        ("rope", {"layout": "neox"}, Geometry(32, 4, 16), "half or interleaved"),
        ("rope", {"fraction": 0.0}, Geometry(32, 4, 16), "fraction"),
        ("rope", {"fraction": 0.1}, Geometry(32, 4, 16), "rotates no pair"),
        ("sinusoidal", {}, Geometry(33, 11, 16), "even model.d_model"),
    ],
)
def test_an_encoding_that_cannot_be_built_is_refused_with_a_reason(
    name: str, changes: dict[str, Any], geometry: Geometry, word: str
) -> None:
    with pytest.raises(ValueError, match=word) as error:
        build(method("pos", name, **changes), NONE, geometry)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("yarn", {"beta_fast": 1.0}, "scaling.beta_fast must be above scaling.beta_slow"),
        ("yarn", {"beta_slow": -1.0}, "scaling.beta_slow > 0"),
        ("yarn", {"ramp": "paper"}, "scaling.ramp must be index or rotations"),
        ("yarn", {"attention_factor": -1.0}, "scaling.attention_factor must be > 0"),
        ("dynamic_yarn", {"ramp": "rotations", "truncate": False}, "scaling.truncate"),
        ("ntk_by_parts", {"beta_fast": 1.0}, "scaling.beta_fast"),
        ("llama3", {"low_freq_factor": 4.0}, "scaling.high_freq_factor must be above scaling.low_freq_factor"),
        ("proportional", {"p": 1.5}, r"scaling.p must be in \[0, 1\]"),
        ("rerope", {"window": 0}, "scaling.window must be >= 1"),
        ("rerope", {"original_ctx": 1}, "scaling.original_ctx >= 2"),
        ("self_extend", {"window": -1}, "scaling.window must be >= 1"),
        ("self_extend", {"group": 0}, "scaling.group must be >= 1"),
        ("temperature", {"a": -1.0}, "scaling.a must be >= 0"),
        ("block_causal", {"block": 0}, "scaling.block must be >= 1"),
    ],
)
def test_a_scaling_out_of_range_is_refused_with_a_reason(name: str, changes: dict[str, Any], word: str) -> None:
    pos = (SCALINGS[name].applies_to or ("alibi",))[0]
    scaling = usable(name, factor=2.0, pairs=4)
    with pytest.raises(ValueError, match=word) as error:
        build(method("pos", pos), Method(name, {**scaling.parameters, **changes}), Geometry(32, 4, 16))
    assert "\n" not in str(error.value)


def test_ntk_needs_two_pairs() -> None:
    with pytest.raises(ValueError, match="two rotary pairs"):
        rope(2, 16, method("scaling", "ntk", factor=2.0))
