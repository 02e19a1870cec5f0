"""FoX and CABLE against x-transformers and the papers' sums as fp64 loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ropelab.positions import CumulativeDecay, Geometry, PositionEncoding, slopes
from ropelab.positions.cable import VARIANTS, Cable
from ropelab.positions.content import cumulative_sum
from ropelab.positions.fox import Fox
from ropelab.scalings import build
from tests.test_positions import NONE, method

GEOMETRY = Geometry(16, 4, 32, n_layer=3)
ALL = [("fox", {}), *(("cable", {"variant": variant}) for variant in VARIANTS)]


def make(name: str, seed: int = 0, geometry: Geometry = GEOMETRY, **changes: object) -> PositionEncoding:
    """An encoding with weights large enough to matter."""
    encoding = build(method("pos", name, **changes), NONE, geometry)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoding.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return encoding


def read(encoding: PositionEncoding, layer: int, x: Tensor) -> CumulativeDecay:
    decay = encoding.content_bias(layer, x)
    assert decay is not None
    return decay


def bias(decay: CumulativeDecay) -> Tensor:
    """(B, H, T, T): what is added to the score of query i and key j <= i; 0 in the future."""
    fallen = decay.cumsum[..., :, None] - decay.cumsum[..., None, :]
    return -(fallen if decay.gate is None else decay.gate[..., :, None] * fallen).tril().float()


def softplus(z: float) -> float:
    return math.log1p(math.exp(-abs(z))) + max(z, 0.0)


def test_fox_equals_data_dependent_alibi_of_x_transformers(x_transformers: Any) -> None:
    theirs, ours = x_transformers.DataDependentAlibi(16, 4, causal=True), make("fox")
    assert isinstance(ours, Fox)
    linear = next(m for m in theirs.modules() if isinstance(m, torch.nn.Linear))
    x = torch.randn(2, 60, 16, generator=torch.Generator().manual_seed(1))
    for layer in range(3):
        gate = ours.gates[layer]
        linear.load_state_dict(gate.state_dict())
        torch.testing.assert_close(bias(read(ours, layer, x)), theirs(x).tril(), rtol=1e-5, atol=2e-5)


def test_fox_gates_start_as_in_the_authors_code() -> None:
    """Biases at 0 (or as configured), weights N(0, 0.02) by the model; parameter names are checkpoint keys."""
    encoding = build(method("pos", "fox"), NONE, GEOMETRY)
    names = dict(encoding.named_parameters())
    assert list(names) == [f"gates.{layer}.{kind}" for layer in range(3) for kind in ("weight", "bias")]
    generator = torch.Generator().manual_seed(0)
    for name, parameter in names.items():
        start = encoding.init_parameter(name, parameter.shape, generator)
        if name.endswith("bias"):
            assert start is None
            assert parameter.eq(0).all()
        else:
            assert start is not None
            assert start.std().item() == pytest.approx(0.02, rel=0.3)
    ready = build(method("pos", "fox", bias=5.0), NONE, GEOMETRY)
    assert isinstance(ready, Fox)
    assert ready.get_parameter("gates.2.bias").eq(5).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_cable_is_the_sum_of_the_paper(variant: str) -> None:
    """g_i times the steps of the tokens j+1 .. i, token by token in fp64, for every layer."""
    encoding = make("cable", variant=variant)
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    for layer in range(3):
        found = bias(read(encoding, layer, x))
        w = encoding.get_parameter(f"steps.{layer}.weight").tolist()
        b = encoding.get_parameter(f"steps.{layer}.bias").tolist() if variant == "released" else [0.0] * 4
        v = encoding.get_parameter(f"weights.{layer}.weight").tolist() if variant == "v3" else None
        for n in range(2):
            tokens = x[n].tolist()

            def dot(row: list[float], token: list[float]) -> float:
                return sum(a * c for a, c in zip(row, token, strict=True))

            for h in range(4):
                raw = [dot(w[h], token) + b[h] for token in tokens]
                steps = [softplus(z) if variant == "released" else max(z, 0.0) for z in raw]
                for i in range(9):
                    gain = 1.0 if v is None else softplus(dot(v[h], tokens[i]))
                    for j in range(i + 1):
                        due = -gain * sum(steps[j + 1 : i + 1])
                        assert found[n, h, i, j].item() == pytest.approx(due, rel=1e-5, abs=1e-5)


def test_cable_has_the_parameters_of_its_variant() -> None:
    def names(variant: str) -> set[str]:
        return {name.replace(".0.", ".") for name in make("cable", variant=variant).state_dict() if ".0." in name}

    assert names("v3") == {"steps.weight", "weights.weight"}
    assert names("unweighted") == {"steps.weight"}
    assert names("released") == {"steps.weight", "steps.bias"}


@settings(max_examples=30)
@given(variant=st.sampled_from(VARIANTS), heads=st.sampled_from([1, 2, 4, 8]), length=st.integers(1, 200))
def test_cable_with_constant_steps_is_alibi(variant: str, heads: int, length: int) -> None:
    """Where every token's step is the head's slope and the query's weight 1, the bias is ALiBi's."""
    geometry = Geometry(8, heads, 16)
    encoding = build(method("pos", "cable", variant=variant), NONE, geometry)
    assert isinstance(encoding, Cable)
    x = torch.zeros(1, length, 8)
    x[..., 0] = 1  # the one feature that is read
    with torch.no_grad():
        for parameter in encoding.parameters():
            parameter.zero_()
        if variant == "released":
            encoding.get_parameter("steps.0.bias").copy_(slopes(heads).expm1().log())
        else:
            encoding.get_parameter("steps.0.weight")[:, 0] = slopes(heads)
        if variant == "v3":
            encoding.get_parameter("weights.0.weight")[:, 0] = math.log(math.e - 1)  # softplus of it is 1
    said = build(method("pos", "alibi"), NONE, geometry)(torch.arange(length), ctx=length).bias
    assert said is not None
    i = torch.arange(length)
    due = said[:, (i[:, None] - i).clamp(min=0)]  # (H, T, T)
    torch.testing.assert_close(bias(read(encoding, 0, x))[0], due, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("name", "changes"), ALL)
def test_the_record_is_empty_and_the_decay_has_its_shape(name: str, changes: dict[str, Any]) -> None:
    encoding = make(name, **changes)
    assert encoding.content_dependent
    assert all(part is None for part in encoding(torch.arange(32), ctx=32))
    decay = read(encoding, 1, torch.randn(2, 32, 16))
    for part in decay:
        if part is not None:
            assert part.shape == (2, 4, 32)
            assert part.dtype == (torch.float64 if part is decay.cumsum else torch.float32)
            assert part.ge(0).all()
    assert decay.cumsum.diff(dim=-1).ge(0).all()
    assert (decay.gate is not None) == (changes == {"variant": "v3"})


@pytest.mark.parametrize(("name", "changes"), ALL)
def test_a_token_is_not_moved_by_what_follows_it(name: str, changes: dict[str, Any]) -> None:
    encoding = make(name, **changes)
    x = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(1))
    for whole, start in zip(read(encoding, 0, x), read(encoding, 0, x[:, :20]), strict=True):
        if whole is not None and start is not None:
            torch.testing.assert_close(whole[..., :20], start, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "changes"), ALL)
def test_mixed_precision_does_not_touch_it(name: str, changes: dict[str, Any]) -> None:
    """Under autocast, and from bf16 inputs, it is the fp32 reading of the same numbers."""
    encoding = make(name, **changes)
    x = torch.randn(2, 64, 16).bfloat16()
    plain = read(encoding, 0, x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = read(encoding, 0, x)
    for a, b in zip(plain, mixed, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert b.dtype == (torch.float64 if b is mixed.cumsum else torch.float32)
            assert torch.equal(a, b)


def test_a_long_total_tells_neighbours_apart() -> None:
    """131072 steps: each difference of neighbours is the step that was added, where an fp32 total would lose it."""
    steps = torch.rand(1, 131072, 2, generator=torch.Generator().manual_seed(0))
    found = cumulative_sum(steps)
    torch.testing.assert_close(found.diff(dim=-1), steps[:, 1:].transpose(1, 2).double(), rtol=0, atol=1e-9)
    assert found[0, 0, -1].item() == pytest.approx(math.fsum(steps[0, :, 0].tolist()), rel=1e-12)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pos.variant must be one of v3, released, unweighted, not 'v2'"):
        make("cable", variant="v2")
