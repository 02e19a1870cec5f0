"""Every attention kernel against one plain fp64 loop, forward and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ropelab import attention
from ropelab.attention import Attend


def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: int | None) -> Tensor:
    """Causal attention query by query in fp64: q, k, v (B, H, T, D); bias (H, T) by distance."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for i in range(q.shape[2]):
        first = 0 if window is None else max(0, i - window + 1)
        scores = torch.einsum("bhd,bhjd->bhj", q[:, :, i], k[:, :, first : i + 1]) / math.sqrt(q.shape[-1])
        if bias is not None:
            for j in range(first, i + 1):
                scores[:, :, j - first] += bias[:, i - j].double()
        out[:, :, i] = torch.einsum("bhj,bhjd->bhd", scores.softmax(-1), v[:, :, first : i + 1])
    return out


cases = st.fixed_dictionaries(
    {
        "length": st.integers(1, 40),
        "block": st.sampled_from([1, 3, 8, 64]),
        "window": st.one_of(st.none(), st.integers(1, 50)),
        "bias": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


@settings(deadline=None, max_examples=80)
@given(cases, st.sampled_from(["sdpa", "blocks", "materialised"]))
def test_every_kernel_equals_the_plain_loop(case: dict[str, int], kernel: str) -> None:
    """Forward and gradients, over lengths that no block divides, single tokens, windows and biases included."""
    if kernel == "sdpa" and (case["bias"] or case["window"] is not None):
        return
    generator = torch.Generator().manual_seed(case["seed"])
    length = case["length"]
    q, k, v = (torch.randn(2, 3, length, 8, generator=generator).requires_grad_() for _ in range(3))
    bias = -torch.rand(3, length, generator=generator).cumsum(1) if case["bias"] else None
    before = attention.BLOCK
    attention.BLOCK = case["block"]
    try:
        attend = Attend(
            length, bias=bias, window=case["window"], device=torch.device("cpu"), training=False, kernel=kernel
        )
        out = attend(q, k, v)
        with torch.no_grad():
            torch.testing.assert_close(attend(q, k, v), out, rtol=0, atol=1e-6)
    finally:
        attention.BLOCK = before
    weights = torch.randn(out.shape, generator=generator)
    mine = torch.autograd.grad((out * weights).sum(), (q, k, v))
    expected = reference(q, k, v, bias, case["window"])
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for got, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_a_block_mask_on_a_cpu_is_a_view_of_one_vector() -> None:
    """No (rows, keys) tensor is built for a bias: the mask of a block owns rows + keys - 1 numbers a head."""
    attend = Attend(
        4096, bias=-torch.rand(2, 4096), window=None, device=torch.device("cpu"), training=False, kernel="blocks"
    )
    mask = attend._block_mask(2048, 4096, 0)
    assert mask.shape == (1, 2, 2048, 4096)
    assert mask.untyped_storage().nbytes() == 2 * (2048 + 4096 - 1) * 4


@pytest.mark.parametrize(
    ("training", "length", "plain", "kernel"),
    [
        (True, 128, True, "materialised"),
        (True, 128, False, "materialised"),
        (True, 513, True, "sdpa"),
        (True, 513, False, "blocks"),
        (False, 128, True, "sdpa"),
        (False, 128, False, "blocks"),
    ],
)
def test_the_kernel_is_a_fixed_rule(training: bool, length: int, plain: bool, kernel: str) -> None:
    assert attention.choose_kernel(torch.device("cpu"), length, training=training, plain=plain) == kernel


def test_a_window_wider_than_the_sequence_is_no_window() -> None:
    attend = Attend(16, bias=None, window=16, device=torch.device("cpu"), training=False)
    assert attend.kernel == "sdpa"
