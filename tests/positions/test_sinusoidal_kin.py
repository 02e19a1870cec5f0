"""The sinusoidal family beyond the paper's own: x-transformers' scaled one and Shortformer's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ropelab.positions import Geometry, Sinusoidal
from ropelab.positions.sinusoidal import SinusoidalQK, SinusoidalScaled
from ropelab.scalings import build
from tests.test_positions import NONE, method

GEOMETRY = Geometry(48, 4, 16)


def test_scaled_equals_x_transformers(x_transformers: Any) -> None:
    """Same table and same start of the scale; their angles are fp32, hence 1e-4 of an entry at position 999."""
    theirs = x_transformers.ScaledSinusoidalEmbedding(48, theta=10000)
    ours = build(method("pos", "sinusoidal_scaled"), NONE, GEOMETRY)
    assert isinstance(ours, SinusoidalScaled)
    assert ours.scale.item() == pytest.approx(theirs.scale.item(), rel=1e-7)
    embedding = ours(torch.arange(1000), ctx=1000).embedding
    assert embedding is not None
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding, theirs(torch.zeros(1, 1000, 48)), rtol=0, atol=1e-4 * 48**-0.5)


def test_scaled_keeps_its_start_when_a_model_draws_its_weights() -> None:
    encoding = build(method("pos", "sinusoidal_scaled"), NONE, GEOMETRY)
    assert [name for name, _ in encoding.named_parameters()] == ["scale"]
    assert encoding.init_parameter("scale", torch.Size([]), torch.Generator()) is None


def test_scaled_has_the_columns_of_vaswani_in_another_order() -> None:
    scaled, plain = (build(method("pos", n), NONE, GEOMETRY) for n in ("sinusoidal_scaled", "sinusoidal"))
    assert isinstance(scaled, Sinusoidal)
    assert isinstance(plain, Sinusoidal)
    at = torch.arange(131000, 131072)
    a, b = scaled.table(at), plain.table(at)
    assert torch.equal(a[:, :24], b[:, 0::2])
    assert torch.equal(a[:, 24:], b[:, 1::2])


def test_position_infused_attention_is_fairseqs_table_for_queries_and_keys_alone() -> None:
    """Entry by entry, from position 2; nothing is added to the tokens, whose table starts like everyone's."""
    encoding = build(method("pos", "sinusoidal_qk"), NONE, GEOMETRY)
    assert isinstance(encoding, SinusoidalQK)
    record = encoding(torch.arange(40), ctx=40)
    assert record.embedding is None
    assert record.qk_embedding is not None
    assert record.qk_embedding.dtype == torch.float32
    for p in range(40):
        for k in range(24):
            angle = (p + 2) * math.exp(-k * math.log(10000) / 23)
            assert record.qk_embedding[p, k].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert record.qk_embedding[p, 24 + k].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert (encoding.token_scale(), encoding.token_std(48)) == (1.0, 0.02)
    assert not encoding.state_dict()


@pytest.mark.parametrize("name", ["sinusoidal", "sinusoidal_fairseq", "sinusoidal_scaled", "sinusoidal_qk"])
def test_they_may_be_asked_for_any_positions(name: str) -> None:
    """A row depends on its position alone: jumping positions give the rows of a contiguous sequence."""
    encoding = build(method("pos", name), NONE, GEOMETRY)
    assert encoding.any_positions
    at = torch.tensor([0, 3, 4, 900, 131071])
    some, all_of_them = encoding(at, ctx=16), encoding(torch.arange(131072), ctx=131072)
    for a, b in ((some.embedding, all_of_them.embedding), (some.qk_embedding, all_of_them.qk_embedding)):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert torch.equal(a, b[at])


@pytest.mark.parametrize(
    ("name", "geometry", "changes", "word"),
    [
        ("sinusoidal_scaled", Geometry(33, 11, 16), {}, "even model.d_model"),
        ("sinusoidal_qk", Geometry(33, 11, 16), {}, "even model.d_model"),
        ("sinusoidal_qk", Geometry(2, 1, 16), {}, "sinusoidal_qk needs model.d_model >= 4"),
        ("sinusoidal_fairseq", Geometry(2, 1, 16), {}, "sinusoidal_fairseq needs model.d_model >= 4"),
        ("sinusoidal_qk", GEOMETRY, {"base": 1.0}, "pos.base"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, geometry: Geometry, changes: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        build(method("pos", name, **changes), NONE, geometry)
