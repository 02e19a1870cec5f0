"""p-RoPE and xPos against transformers, x-transformers, RoPE itself and the papers' definitions in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ropelab.errors import ContextLengthError
from ropelab.positions import Geometry, PositionEncoding, Rope, Rotation, Xpos
from ropelab.positions.p_rope import PRope
from ropelab.scalings import build
from tests.test_positions import NONE, method, rope

# --- p-RoPE ---------------------------------------------------------------------------------------------------------


def p_rope(p: float, d_head: int = 32, **changes: object) -> PRope:
    encoding = build(method("pos", "p_rope", p=p, **changes), NONE, Geometry(2 * d_head, 2, 64))
    assert isinstance(encoding, PRope)
    return encoding


@pytest.mark.parametrize("p", [0.0, 0.1, 0.25, 1 / 3, 0.75, 0.99, 1.0])
@pytest.mark.parametrize("d_head", [32, 64, 128])
def test_p_rope_equals_proportional_of_transformers(p: float, d_head: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": p}
    config = LlamaConfig(
        hidden_size=2 * d_head, num_attention_heads=2, head_dim=d_head, max_position_embeddings=512,
        rope_parameters=parameters,
    )  # fmt: skip
    theirs, factor = ROPE_INIT_FUNCTIONS["proportional"](config, torch.device("cpu"))
    ours = p_rope(p, d_head).spectrum(512)
    assert ours.attention_factor == factor == 1
    torch.testing.assert_close(ours.inv_freq, theirs.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_p_rope_ends_at_rope_and_at_no_positions(layout: str) -> None:
    at = torch.arange(100)
    whole, plain = p_rope(1.0, layout=layout)(at, ctx=100), rope(32, 64, layout=layout)(at, ctx=100)
    assert whole.rotation is not None
    assert plain.rotation is not None
    assert whole.rotation.interleaved == plain.rotation.interleaved
    for a, b in zip(whole.rotation[:4], plain.rotation[:4], strict=True):
        assert torch.equal(a, b)
    nothing = p_rope(0.0, layout=layout)(at, ctx=100).rotation
    assert nothing is not None
    assert nothing.cos_q.eq(1).all()
    assert nothing.sin_q.eq(0).all()


@settings(max_examples=40)
@given(p=st.floats(0.1, 1), pairs=st.integers(10, 64))
def test_p_rope_keeps_the_fastest_pairs_of_the_full_spectrum(p: float, pairs: int) -> None:
    """int(p d/2) pairs turn as in RoPE, and they are its fastest; the rest stand still."""
    ours, full = p_rope(p, 2 * pairs).inv_freq(), rope(2 * pairs, 64).inv_freq()
    turning = int(ours.ne(0).sum())
    assert turning == math.floor(p * 2 * pairs / 2)
    assert torch.equal(ours[:turning], full[:turning])


# --- xPos -----------------------------------------------------------------------------------------------------------


def xpos(d_head: int = 32, **changes: object) -> Xpos:
    encoding = build(method("pos", "xpos", **changes), NONE, Geometry(2 * d_head, 2, 64))
    assert isinstance(encoding, Xpos)
    return encoding


def rotation(encoding: PositionEncoding, length: int) -> Rotation:
    said = encoding(torch.arange(length), ctx=length).rotation
    assert said is not None
    return said


def pair_scores(said: Rotation, q: Tensor, k: Tensor, at: list[int]) -> Tensor:
    """Per pair, the products of complex q and k (P, R/2), placed at every position of `at`: (P, P, R/2) in fp64.

    What each side is multiplied by is rounded to fp32, as the model does it.
    """
    turn_q = torch.complex(said.cos_q[at], said.sin_q[at])  # (P, R/2)
    turn_k = torch.complex(said.cos_k[at], said.sin_k[at])
    return ((q * turn_q)[:, None].to(torch.complex128) * (k * turn_k)[None].to(torch.complex128).conj()).real


def direct(q: Tensor, k: Tensor, at: list[int], *, base: float, gamma: float, scale_base: float) -> Tensor:
    """The paper's definition: RoPE's score at each distance times zeta^(distance/scale_base); (P, P, R/2) fp64."""
    pairs = q.shape[1]
    out = torch.empty(len(at), len(at), pairs, dtype=torch.float64)
    for a, m in enumerate(at):
        for b, n in enumerate(at):
            for i in range(pairs):
                turned = complex(q[a, i]) * complex(k[b, i]).conjugate() * complex(
                    math.cos((m - n) * base ** (-i / pairs)), math.sin((m - n) * base ** (-i / pairs))
                )  # fmt: skip
                zeta = (2 * i / (2 * pairs) + gamma) / (1 + gamma)
                out[a, b, i] = turned.real * zeta ** ((m - n) / scale_base)
    return out


def complex_normal(*shape: int) -> Tensor:
    return torch.complex(torch.randn(shape), torch.randn(shape))


@pytest.mark.parametrize("length", [64, 1001, 16384])
@pytest.mark.parametrize("scale_base", [512.0, 300.0])
def test_xpos_score_is_ropes_score_times_the_decay(length: int, scale_base: float) -> None:
    """Pair by pair, past and future, to fp32's rounding of the four factors (and of fp32 angles at long lengths)."""
    torch.manual_seed(0)
    at = [0, 1, length // 3, length // 2, length - 2, length - 1]
    q, k = complex_normal(6, 16), complex_normal(6, 16)
    encoding = xpos(scale_base=scale_base)
    found = pair_scores(rotation(encoding, length), q, k, at)
    due = direct(q, k, at, base=1e4, gamma=0.4, scale_base=scale_base)
    distance = torch.tensor(at)[:, None] - torch.tensor(at)
    size = (q.abs()[:, None] * k.abs()[None]).double() * encoding.zeta() ** (distance[..., None] / scale_base)
    assert ((found - due).abs() / size).max() < 1e-6


def test_xpos_scores_equal_x_transformers(x_transformers: Any) -> None:
    """Its module in the interleaved layout; queries by the scale, keys by the inverse, as its attention does."""
    length, d_head = 700, 32
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, length, d_head), torch.randn(1, 1, length, d_head)
    turn = x_transformers.apply_rotary_pos_emb
    angles, scale = x_transformers.RotaryEmbedding(d_head, use_xpos=True, scale_base=512).forward_from_seq_len(length)
    theirs = turn(q, angles, scale) @ turn(k, angles, scale**-1).transpose(-1, -2)
    said = rotation(xpos(d_head), length)
    assert said.interleaved
    turned = [
        torch.view_as_real(torch.view_as_complex(x.reshape(1, 1, length, -1, 2)) * torch.complex(cos, sin)).flatten(-2)
        for x, cos, sin in ((q, said.cos_q, said.sin_q), (k, said.cos_k, said.sin_k))
    ]
    # theirs has fp32 angles: 6e-5 radians off at position 700
    torch.testing.assert_close(turned[0] @ turned[1].transpose(-1, -2), theirs, rtol=1e-3, atol=1e-3)


def test_xpos_centre_is_half_the_sequence_as_in_torchscale() -> None:
    """torchscale counts from -(T // 2) for even T: there both factors are 1, elsewhere one is the other's inverse."""
    said = rotation(xpos(), 100)
    zeta = xpos().zeta()
    for p in (0, 49, 50, 99):
        size_q, size_k = said.cos_q[p].hypot(said.sin_q[p]), said.cos_k[p].hypot(said.sin_k[p])
        torch.testing.assert_close(size_q.double(), zeta ** ((p - 50) / 512), rtol=1e-6, atol=0)
        torch.testing.assert_close(size_k.double(), zeta ** ((50 - p) / 512), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("gamma", "scale_base"), [(0.4, 512.0), (0.4, 64.0), (0.05, 512.0), (2.0, 100.0)])
def test_xpos_is_finite_and_exact_to_its_longest_context_and_refused_beyond(gamma: float, scale_base: float) -> None:
    """At the bound, scores of standard normal vectors stay finite in fp32 even against the masked future.

    Without the headroom that is left for larger vectors they would not: a context a fifth longer overflows.
    """
    torch.manual_seed(0)
    encoding = xpos(gamma=gamma, scale_base=scale_base)
    longest = encoding.longest
    said = rotation(encoding, longest)
    assert all(torch.isfinite(part).all() for part in said[:4])
    first_and_last = torch.cat((torch.arange(64), torch.arange(longest - 64, longest)))
    q, k = complex_normal(128, 16), complex_normal(128, 16)
    turned_q = q * torch.complex(said.cos_q, said.sin_q)[first_and_last]
    turned_k = k * torch.complex(said.cos_k, said.sin_k)[first_and_last]
    scores = torch.view_as_real(turned_q).flatten(1) @ torch.view_as_real(turned_k).flatten(1).t()  # (128, 128) fp32
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    at = [0, 1, longest // 2, longest - 2, longest - 1]
    found = pair_scores(said, q[:5], k[:5], at)
    due = direct(q[:5], k[:5], at, base=1e4, gamma=gamma, scale_base=scale_base)
    distance = torch.tensor(at)[:, None] - torch.tensor(at)
    size = (q[:5].abs()[:, None] * k[:5].abs()[None]).double() * encoding.zeta() ** (distance[..., None] / scale_base)
    assert ((found - due).abs() / size).max() < 1e-6
    assert encoding.zeta().min().item() ** (-1.2 * longest / scale_base) > torch.finfo(torch.float32).max
    with pytest.raises(ContextLengthError, match=f"ctx {longest} is the longest"):
        encoding(torch.arange(longest + 1), ctx=longest + 1)


def test_xpos_as_published_reaches_32768() -> None:
    assert xpos(64).longest >= 32768


def test_xpos_takes_no_rotary_scaling_and_no_other_positions() -> None:
    assert isinstance(xpos(), Rope)
    assert not xpos().any_positions
    with pytest.raises(ValueError, match="not to pos=xpos"):
        build(method("pos", "xpos"), method("scaling", "yarn", factor=2.0), Geometry(64, 2, 64))


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("p_rope", {"p": -0.1}, "pos.p "),
        ("p_rope", {"p": 1.1}, "pos.p "),
        ("p_rope", {"p": 0.01}, "turns no pair"),
        ("xpos", {"gamma": 0.0}, "pos.gamma"),
        ("xpos", {"scale_base": 0.0}, "pos.scale_base"),
        ("xpos", {"layout": "neox"}, "half or interleaved"),
    ],
)
def test_values_out_of_range_are_refused_with_their_key(name: str, changes: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        build(method("pos", name, **changes), NONE, Geometry(64, 2, 64))
