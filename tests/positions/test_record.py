"""The fields of the record: a new one has to be read everywhere, or one of these fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ropelab.attention import Bias
from ropelab.config import ModelConfig
from ropelab.model import GPT, bias_of
from ropelab.positions import READ_BY, Far, Geometry, Positions, Reader, Rotation, encoding_digest
from ropelab.positions.none import NoPositions
from ropelab.positions.record import IMPLIED
from ropelab.training.batched import modules

T, C, H, R = 6, 16, 2, 8


def rotation(seed: float) -> Rotation:
    angles = seed + torch.rand(T, R // 2, generator=torch.Generator().manual_seed(1))
    return Rotation(angles.cos(), angles.sin(), angles.cos(), angles.sin())


SLOPES = torch.tensor([0.5, 0.25])
# A record for every field; those that a field does not come without are there too.
SAMPLES = {
    "embedding": Positions(embedding=torch.ones(T, C)),
    "qk_embedding": Positions(qk_embedding=torch.ones(T, C)),
    "bias": Positions(bias=-torch.rand(H, T)),
    "query_bias": Positions(query_bias=lambda i, distance: -SLOPES[:, None, None] * distance),
    "logit_scale": Positions(logit_scale=torch.full((T,), 1.5)),
    "rotation": Positions(rotation=rotation(0.0)),
    "far": Positions(rotation=rotation(0.0), far=Far(rotation(1.0), 2, torch.arange(T), torch.arange(T))),
    "block": Positions(block=2),
    "slopes": Positions(bias=-SLOPES[:, None] * torch.arange(T), slopes=SLOPES),
}


class Saying(nn.Module):
    """An encoding with a given record."""

    def __init__(self, record: Positions) -> None:
        super().__init__()
        self.given = record

    def forward(self, positions: Tensor, *, ctx: int) -> Positions:
        return self.given


def without(name: str) -> Positions:
    return SAMPLES[name]._replace(**{name: None})


def test_every_field_has_a_sample() -> None:
    assert tuple(SAMPLES) == Positions._fields == tuple(READ_BY)
    assert all(getattr(sample, name) is not None for name, sample in SAMPLES.items())


@pytest.mark.parametrize("name", Positions._fields)
def test_a_field_is_in_the_digest(name: str) -> None:
    """Two evaluations whose positions differ have different digests; an implied field is in that of another."""
    one, other = (encoding_digest(Saying(record), T) for record in (SAMPLES[name], without(name)))
    assert (one == other) == (name in IMPLIED)


@pytest.mark.parametrize("name", Positions._fields)
def test_a_field_before_attention_is_restricted_to_rows(name: str) -> None:
    part = getattr(SAMPLES[name].at(slice(2, 5)), name)
    if Reader.HEADS not in READ_BY[name]:
        assert part is getattr(SAMPLES[name], name)
        return

    def lengths(value: Any) -> list[int]:
        if isinstance(value, Tensor):
            return [len(value)]
        return [n for inner in value for n in lengths(inner)] if isinstance(value, tuple) else []

    assert set(lengths(part)) == {3}


@pytest.mark.parametrize("name", Positions._fields)
def test_a_field_of_the_scores_reaches_attention(name: str) -> None:
    def known(bias: Bias) -> list[bool]:
        return [value is not None and value is not False for value in bias]

    changed = known(bias_of(SAMPLES[name], decays=False)) != known(bias_of(without(name), decays=False))
    assert changed == (Reader.SCORES in READ_BY[name])


@pytest.mark.parametrize("name", Positions._fields)
def test_a_field_is_stacked_or_refused(name: str) -> None:
    model = GPT(ModelConfig("test", n_layer=1, d_model=C, n_head=H, qk_norm=False), 20, NoPositions(Geometry(C, H, T)),
                seed=0)  # fmt: skip
    sample = [SAMPLES[name]] * 2
    if name not in modules.JOINED:
        with pytest.raises(ValueError, match="cannot be stacked"):
            modules.join(sample, model, T, torch.float32)
        return

    def held(joined: modules.Joined) -> list[bool]:
        return [*(part is not None for part in joined[:4]), *(part is not None for part in joined.attend.bias)]

    with_it, without_it = (modules.join([one] * 2, model, T, torch.float32) for one in (SAMPLES[name], without(name)))
    assert held(with_it) != held(without_it)


def test_a_value_without_a_digest_is_refused() -> None:
    with pytest.raises(TypeError, match="a record holds a float, which has no digest"):
        encoding_digest(Saying(Positions(block=2.0)), T)  # type: ignore[arg-type]
