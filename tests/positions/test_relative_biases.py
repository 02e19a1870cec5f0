"""T5, KERPLE, Sandwich and FIRE against transformers, x-transformers and the papers' formulas as fp64 loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ropelab.config import choices
from ropelab.positions import T5, Geometry, PositionEncoding, bucket
from ropelab.positions.alibi import Alibi
from ropelab.positions.fire import CHUNK, Fire
from ropelab.positions.kerple import KerpleLog, KerplePower
from ropelab.scalings import build
from tests.test_positions import NONE, method

LONG = 131072
SOME = [0, 1, 2, 15, 16, 17, 113, 127, 128, 129, 1000, 8191, 65537, LONG - 1]  # distances that are looked at


def make(name: str, geometry: Geometry = Geometry(32, 4, 16), **changes: object) -> PositionEncoding:
    return build(method("pos", name, **changes), NONE, geometry)


def drawn(encoding: PositionEncoding, seed: int = 0) -> PositionEncoding:
    """The encoding with the parameters that a model would start from."""
    with torch.no_grad():
        for name, parameter in encoding.named_parameters():
            start = encoding.init_parameter(name, parameter.shape, torch.Generator().manual_seed(seed))
            if start is not None:
                assert start.shape == parameter.shape
                parameter.copy_(start)
    return encoding


def bias(encoding: PositionEncoding, length: int) -> Tensor:
    by_distance = encoding(torch.arange(length), ctx=length).bias
    assert by_distance is not None
    assert by_distance.dtype == torch.float32
    return by_distance


def test_alibi_stays_exact_at_long_distances() -> None:
    """-2^(-8h/H) d in fp64 within 1e-6, to distance 131071."""
    found = bias(make("alibi"), LONG)
    for h in range(1, 5):
        for d in SOME:
            assert found[h - 1, d].item() == pytest.approx(-(2 ** (-8 * h / 4)) * d, rel=1e-6, abs=0)


# --- T5 -------------------------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(
    buckets=st.integers(2, 64), beyond=st.integers(1, 2000), distances=st.lists(st.integers(0, LONG - 1), min_size=1)
)
def test_buckets_equal_those_of_two_libraries(
    x_transformers: Any, buckets: int, beyond: int, distances: list[int]
) -> None:
    """At any distance to 131071 the bucket is that of transformers' T5 (decoder) and of x-transformers (causal)."""
    from transformers.models.t5.modeling_t5 import T5Attention

    max_distance = buckets // 2 + beyond
    relative = -torch.tensor([*distances, *range(200)])
    keys = {"num_buckets": buckets, "max_distance": max_distance}
    ours = bucket(-relative, buckets, max_distance)
    assert torch.equal(ours, T5Attention._relative_position_bucket(relative, bidirectional=False, **keys))
    theirs = x_transformers.RelativePositionBias
    assert torch.equal(ours, theirs._relative_position_bucket(relative, causal=True, **keys))


def test_the_last_of_32_buckets_begins_at_distance_113() -> None:
    """The formula in real numbers: 16 + floor(16 ln(d / 16) / ln 8) reaches 31 at d = 16 x 8^(15/16) = 112.4."""
    buckets = bucket(torch.arange(LONG), 32, 128)
    assert buckets[:17].tolist() == list(range(17))
    assert buckets[112:114].tolist() == [30, 31]
    assert buckets[113:].eq(31).all()


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_t5_bias_equals_x_transformers(x_transformers: Any, scale: float) -> None:
    theirs = x_transformers.RelativePositionBias(scale, causal=True, num_buckets=32, max_distance=128, heads=4)
    ours = make("t5", scale=scale)
    assert isinstance(ours, T5)
    with torch.no_grad():
        ours.table.copy_(theirs.relative_attention_bias.weight)
    full = theirs(300, 300)  # (H, T, T)
    # the last row holds the distances 299 .. 0
    torch.testing.assert_close(bias(ours, 300), full[:, -1].flip(1), rtol=0, atol=0)


def test_t5_starts_without_a_preference() -> None:
    assert bias(drawn(make("t5")), 40).eq(0).all()


# --- KERPLE ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kerple_log", "kerple_power"])
@pytest.mark.parametrize("seed", [0, 1])
def test_kerple_is_the_formula_of_the_paper(name: str, seed: int) -> None:
    """-r1 log(1 + r2 d) and -r1 d^r2, in fp64 from the same parameters, within 1e-6 to distance 131071."""
    encoding = drawn(make(name), seed)
    encoding.set_training_fraction(0.0)
    found = bias(encoding, LONG)
    r1s, r2s = encoding.get_parameter("r1").tolist(), encoding.get_parameter("r2").tolist()
    for h, (r1, r2) in enumerate(zip(r1s, r2s, strict=True)):
        for d in SOME:
            due = -r1 * math.log(1 + r2 * d) if name == "kerple_log" else -r1 * d**r2
            assert found[h, d].item() == pytest.approx(due, rel=1e-6, abs=0)


@settings(max_examples=30)
@given(heads=st.integers(1, 24), length=st.integers(1, 3000))
def test_kerple_power_one_with_alibis_slopes_is_alibi(heads: int, length: int) -> None:
    """Where r2 = 1 and r1 = ALiBi's slope (when that is above the bound of 0.01), the two biases are one."""
    geometry = Geometry(8 * heads, heads, 16)
    power, alibi = make("kerple_power", geometry), bias(make("alibi", geometry), length)
    slopes = -bias(Alibi(geometry), 2)[:, 1]
    assert isinstance(power, KerplePower)
    with torch.no_grad():
        power.r1.copy_(slopes)
        power.r2.fill_(1)
    steep = slopes >= 0.01
    torch.testing.assert_close(bias(power, length)[steep], alibi[steep], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "r1", "r2"), [("kerple_log", 2.0, 1.0), ("kerple_power", 1.0, 2.0)])
def test_kerple_starts_in_the_ranges_of_its_code(name: str, r1: float, r2: float) -> None:
    """Uniform on (0, r1) and (0, r2): 4000 draws fill the range, and their mean is its middle to 4 standard errors."""
    encoding = drawn(make(name, Geometry(32000, 4000, 16)))
    for parameter, top in (("r1", r1), ("r2", r2)):
        values = encoding.get_parameter(parameter).detach()
        assert 0 <= values.min() < 0.01 * top
        assert 0.99 * top < values.max() < top
        assert values.mean().item() == pytest.approx(top / 2, abs=4 * top / math.sqrt(12 * 4000))


def test_kerple_parameters_are_moved_back_into_their_bounds_and_can_leave_them() -> None:
    """The authors' code projects before every forward pass: at the bound a gradient still reaches the parameter."""
    encoding = make("kerple_power", Geometry(16, 2, 16))
    assert isinstance(encoding, KerplePower)
    with torch.no_grad():
        encoding.r1.copy_(torch.tensor([-0.3, 0.5]))
        encoding.r2.copy_(torch.tensor([-1.0, 3.0]))
    due = [[-0.01 * d**0.01 for d in range(5)], [-0.5 * d**2 for d in range(5)]]
    torch.testing.assert_close(bias(encoding, 5), torch.tensor(due))  # within the bounds even before the projection
    encoding.set_training_fraction(0.5)
    assert encoding.r1.tolist() == pytest.approx([0.01, 0.5])
    assert encoding.r2.tolist() == pytest.approx([0.01, 2.0])
    bias(encoding, 5).sum().backward()
    for parameter in (encoding.r1, encoding.r2):
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.ne(0).all()


def test_kerple_log_has_no_upper_bound() -> None:
    encoding = make("kerple_log", Geometry(16, 2, 16))
    assert isinstance(encoding, KerpleLog)
    with torch.no_grad():
        encoding.r1.fill_(7)
        encoding.r2.fill_(50)
    encoding.set_training_fraction(0.5)
    assert bias(encoding, 3)[0, 2].item() == pytest.approx(-7 * math.log(101), rel=1e-6)


# --- Sandwich -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "heads"), [(128, 4), (64, 12), (2, 1)])
def test_sandwich_is_the_formula_of_its_code(d: int, heads: int) -> None:
    """NeMo's: (sum over k = 1..d/2 of cos(distance / 10000^(2k/d)) - d/2) / (h 8/H), to distance 131071."""
    found = bias(make("sandwich", Geometry(8 * heads, heads, 16), d=d), LONG)
    for distance in SOME:
        cosines = sum(math.cos(distance / 10000 ** (2 * k / d)) for k in range(1, d // 2 + 1))
        for h in range(1, heads + 1):
            due = (cosines - d / 2) / (h * 8 / heads)
            assert found[h - 1, distance].item() == pytest.approx(due, rel=1e-6, abs=0)


def test_sandwich_prefers_what_is_near() -> None:
    """0 at distance 0, negative beyond; it oscillates, but its mean falls from octave to octave of distance."""
    found = bias(make("sandwich"), 8192)
    assert found[:, 0].eq(0).all()
    assert found[:, 1:].lt(0).all()
    octaves = torch.stack([found[:, 2**n : 2 ** (n + 1)].mean(dim=1) for n in range(13)])
    assert octaves.diff(dim=0).lt(0).all()


# --- FIRE -----------------------------------------------------------------------------------------------------------


def fire_of_the_paper(fire: Fire, i: int, distance: int) -> list[float]:
    """f(log(|c d| + 1) / (log(|c max(L, i)| + 1) + eps)) with scalars in fp64, head by head."""
    c, threshold = fire.c.item(), abs(fire.threshold_factor.item() * fire.threshold)
    x = math.log(abs(c * distance) + 1) / (math.log(abs(c * max(i, threshold)) + 1) + fire.eps)
    state = {name: value.tolist() for name, value in fire.state_dict().items()}
    units = [
        max(0.0, weight[0] * x + shift)
        for weight, shift in zip(state["hidden.weight"], state["hidden.bias"], strict=True)
    ]
    return [
        sum(a * u for a, u in zip(row, units, strict=True)) + shift
        for row, shift in zip(state["output.weight"], state["output.bias"], strict=True)
    ]


@pytest.mark.parametrize(("c", "eps"), [(0.1, 1e-6), (-0.7, 0.01)])
def test_fire_is_the_definition_of_the_paper(c: float, eps: float) -> None:
    """Pairs before, at and beyond the threshold, to 131071; c may turn negative in training."""
    fire = drawn(make("fire", Geometry(32, 4, 512), eps=eps))
    assert isinstance(fire, Fire)
    assert fire.threshold == 256
    with torch.no_grad():
        fire.c.fill_(c)
        fire.threshold_factor.fill_(1.25)
    queries = [0, 7, 319, 320, 321, 5000, LONG - 1]
    query = torch.tensor(queries, dtype=torch.float32)[:, None]
    distance = (query - torch.arange(LONG)).clamp(min=0)  # (Q, K)
    assert distance.numel() * 32 > CHUNK["cpu"]  # more than one piece
    rule = fire(torch.arange(16), ctx=16).query_bias
    assert rule is not None
    with torch.no_grad():
        found = rule(query, distance)
    assert found.shape == (4, len(queries), LONG)
    assert found.dtype == torch.float32
    for row, i in enumerate(queries):
        for key in {0, i // 3, i // 2, max(0, i - 1), i}:
            due = fire_of_the_paper(fire, i, i - key)
            assert found[:, row, key].tolist() == pytest.approx(due, abs=1e-6)


def test_fire_starts_as_torch_starts_a_linear_layer() -> None:
    """U(-1, 1)/sqrt(inputs) for weights and biases, as in the code of DAPE; c and the factor as configured."""
    fire = drawn(make("fire", Geometry(4096, 512, 16), width=1024, c=0.3))
    assert isinstance(fire, Fire)
    assert (fire.c.item(), fire.threshold_factor.item()) == (pytest.approx(0.3), 1.0)
    for name, top in (("hidden.weight", 1.0), ("hidden.bias", 1.0), ("output.weight", 1 / 32), ("output.bias", 1 / 32)):
        values = fire.get_parameter(name).detach()
        assert values.abs().max().item() == pytest.approx(top, rel=0.02)
        assert values.abs().max() <= top
        assert values.std().item() == pytest.approx(top / math.sqrt(3), rel=0.1)


def test_a_threshold_that_is_given_replaces_half_of_the_training_length() -> None:
    fire = make("fire", Geometry(32, 4, 512), threshold=100)
    assert isinstance(fire, Fire)
    assert fire.threshold == 100


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in choices("pos") if n != "learned"])
def test_a_gradient_reaches_every_parameter(name: str) -> None:
    """Whatever an encoding says depends on each of its tensors, and the derivative is finite."""
    torch.manual_seed(0)
    encoding = drawn(build(method("pos", name), NONE, Geometry(32, 4, 16, n_layer=2)))
    record = encoding(torch.arange(12), ctx=12)
    said = [part for part in (record.embedding, record.bias) if part is not None]
    if record.query_bias is not None:
        i = torch.arange(12.0)[:, None]
        said.append(record.query_bias(i, (i - torch.arange(12.0)).clamp(min=0)))
    for layer in range(2):
        decay = encoding.content_bias(layer, torch.randn(3, 12, 32))
        assert (decay is not None) == encoding.content_dependent
        if decay is not None:
            said += [part for part in decay if part is not None]
    parameters = dict(encoding.named_parameters())
    if not parameters:
        return
    sum(((part * torch.randn(part.shape)).sum() for part in said), torch.zeros(())).backward()
    for path, parameter in parameters.items():
        assert parameter.grad is not None, path
        assert torch.isfinite(parameter.grad).all(), path
        # the buckets of T5 beyond distance 11 are not in use
        used = parameter.grad[:12] if name == "t5" else parameter.grad
        assert used.ne(0).any(), path


@pytest.mark.parametrize("name", ["t5", "kerple_log", "kerple_power", "sandwich", "fire"])
def test_mixed_precision_does_not_touch_a_bias(name: str) -> None:
    encoding = drawn(make(name))
    i = torch.arange(40.0)[:, None]

    def said() -> Tensor:
        record = encoding(torch.arange(40), ctx=40)
        if record.query_bias is None:
            assert record.bias is not None
            return record.bias
        return record.query_bias(i, (i - torch.arange(40.0)).clamp(min=0))

    plain = said()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = said()
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, plain)


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("t5", {"buckets": 1}, "pos.buckets"),
        ("t5", {"max_distance": 16}, "pos.max_distance"),
        ("t5", {"scale": 0.0}, "pos.scale"),
        ("sandwich", {"d": 3}, "pos.d "),
        ("sandwich", {"d": 0}, "pos.d "),
        ("fire", {"width": 0}, "pos.width"),
        ("fire", {"c": 0.0}, "pos.c "),
        ("fire", {"threshold": 0}, "pos.threshold"),
        ("fire", {"eps": 0.0}, "pos.eps"),
    ],
)
def test_values_out_of_range_are_refused_with_their_key(name: str, changes: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make(name, **changes)
