"""FIRE without gradients, taken from the pieces of its network, against the paper's formula in fp64."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ropelab.positions import Geometry
from ropelab.positions.fire import ROWS, Fire

HEADS = 3
NAMES = ["c", "threshold_factor", "hidden.weight", "hidden.bias", "output.weight", "output.bias"]


def spread(width: int = 32, *, ctx: int = 512, seed: int = 0) -> Fire:
    """A network whose knots lie all over (0, 1), as a trained one's may."""
    fire = Fire(Geometry(4 * HEADS, HEADS, ctx), width=width, c=0.1, threshold=None, eps=1e-6)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        fire.hidden.weight.normal_(generator=generator)
        knots = torch.rand(width, 1, generator=generator)
        fire.hidden.bias.copy_((-knots * fire.hidden.weight)[:, 0])
        fire.output.weight.normal_(generator=generator)
        fire.output.bias.normal_(generator=generator)
    return fire


def in_fp64(tensors: dict[str, Tensor], threshold: int, eps: float, query: Tensor, distance: Tensor) -> Tensor:
    """The formula with all pairs at once: query (Q, 1), distance (Q, K) -> (H, Q, K) fp64."""
    c, factor, a, b, v, shift = (tensors[name].double() for name in NAMES)
    longest = torch.maximum(query.double(), (factor * threshold).abs())
    x = torch.log((c * distance.double()).abs() + 1) / (torch.log((c * longest).abs() + 1) + eps)
    hidden = torch.relu(x[..., None] * a[:, 0] + b)  # (Q, K, n)
    return (hidden @ v.T + shift).permute(2, 0, 1)


def due(fire: Fire, query: Tensor, distance: Tensor) -> Tensor:
    return in_fp64(fire.state_dict(), fire.threshold, fire.eps, query, distance)


def block(queries: range, keys: range) -> tuple[Tensor, Tensor]:
    """Query index (Q, 1) and distance (Q, K), 0 for keys in the future, as attention asks for them."""
    query = torch.tensor([[float(i)] for i in queries])
    return query, (query - torch.tensor([float(j) for j in keys])).clamp(min=0)


def off(found: Tensor, exact: Tensor) -> float:
    """The largest error relative to max(1, |bias|)."""
    assert found.dtype == torch.float32
    assert found.shape == exact.shape
    return ((found - exact).abs() / exact.abs().clamp(min=1)).max().item()


def without_network() -> Any:
    return mock.patch.object(Fire, "_network", side_effect=AssertionError("the network ran"))


weights = st.floats(-3, 3, width=32) | st.sampled_from([0.0, -0.0, 1.0, -2.0, 1e-30])
units = st.tuples(weights, st.sampled_from([0.0, 0.5, 1.0, None]) | st.floats(-0.25, 1.25, width=32))


@settings(max_examples=200)
@given(
    units=st.lists(units, min_size=1, max_size=8),
    out=st.lists(st.floats(-1, 1, width=32), min_size=8 * HEADS, max_size=8 * HEADS),
    c=st.floats(2**-10, 16, width=32) | st.floats(-16, -(2**-10), width=32) | st.just(0.0),
    factor=st.floats(-3, 3, width=32),
    eps=st.sampled_from([1e-6, 0.01]),
    start=st.integers(0, 40) | st.integers(0, 131071),
    rows=st.integers(1, 12),
    keys=st.integers(1, 30),
    back=st.integers(-5, 131071),
    group=st.integers(1, 13),
)
@example([(1.0, 0.5), (-2.0, 0.5), (0.0, None)], [0.7] * 8 * HEADS, -0.7, 1.0, 1e-6, 0, 1, 1, 0, 1)  # a single pair
@example([(1.0, 0.0), (1.0, 1.0), (-1.0, 1.0)], [0.7] * 8 * HEADS, 0.1, 0.1, 1e-6, 20, 12, 30, 20, 5)
def test_pieces_are_the_formula_of_the_paper(
    units: list[tuple[float, float | None]],
    out: list[float],
    c: float,
    factor: float,
    eps: float,
    start: int,
    rows: int,
    keys: int,
    back: int,
    group: int,
) -> None:
    """Within 1e-5 max(1, |bias|) of f(log(|c d| + 1) / (log(|c max(M, i)| + 1) + eps)) with scalars in fp64.

    Knots of f may lie at 0, at 1, outside and on one another; a unit may have none (a = 0). The keys of the block end
    after, at or before its last query; its rows are cut into groups of any size.
    """
    fire = Fire(Geometry(4 * HEADS, HEADS, 32), width=len(units), c=1.0, threshold=20, eps=eps)
    with torch.no_grad():
        fire.c.fill_(c)
        fire.threshold_factor.fill_(factor)
        for n, (a, knot) in enumerate(units):
            fire.hidden.weight[n] = a
            fire.hidden.bias[n] = 0.3 - 0.2 * n if knot is None else -a * knot
        fire.output.weight.copy_(torch.tensor(out[: HEADS * len(units)]).view(HEADS, -1))
        fire.output.bias.copy_(torch.tensor(out[-HEADS:]))
    first = max(0, start - back)
    queries, columns = range(start, start + rows), range(first, first + keys)
    with torch.no_grad(), without_network(), mock.patch.dict(ROWS, cpu=group):
        found = fire.bias(*block(queries, columns))
    assert found.shape == (HEADS, rows, keys)
    assert found.dtype == torch.float32

    state = {name: value.tolist() for name, value in fire.state_dict().items()}
    threshold = abs(state["threshold_factor"] * fire.threshold)
    for row, i in enumerate(queries):
        divisor = math.log(abs(state["c"] * max(i, threshold)) + 1) + eps
        for column, j in enumerate(columns):
            x = math.log(abs(state["c"] * max(0, i - j)) + 1) / divisor
            hidden = [max(0.0, a * x + b) for (a,), b in zip(state["hidden.weight"], state["hidden.bias"], strict=True)]
            for head in range(HEADS):
                exact = state["output.bias"][head]
                exact += sum(v * h for v, h in zip(state["output.weight"][head], hidden, strict=True))
                assert abs(found[head, row, column].item() - exact) <= 1e-5 * max(1, abs(exact))


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        (range(700), range(700)),  # before, at and beyond M = 256; more than one group of rows
        (range(600, 1200), range(300, 1200)),  # a window: no oldest keys
        (range(131071, 131072), range(131072)),  # one query
        (range(5000, 5600), range(7, 8)),  # one key
        (range(100000, 100003), range(100003)),
    ],
)
def test_pieces_are_the_formula_in_blocks_of_real_size(queries: range, keys: range) -> None:
    for seed in range(3):
        fire = spread(seed=seed)
        query, distance = block(queries, keys)
        with torch.no_grad(), without_network():
            assert off(fire.bias(query, distance), due(fire, query, distance)) < 1e-5


def test_distances_that_are_no_block_are_served_too() -> None:
    """Rising along a row, as for a picture of one query; queries here and there; distances that are not whole."""
    fire = spread()
    some = torch.tensor([[3.0], [900.0], [77.0]])
    cases = [
        (torch.tensor([[499.0]]), torch.arange(500.0)[None]),
        (some, (some - torch.arange(901.0)).clamp(min=0)),
        (some, torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) * 3),
    ]
    for query, distance in cases:
        with torch.no_grad():
            assert off(fire.bias(query, distance), due(fire, query, distance)) < 1e-5


def test_a_block_in_which_one_pair_is_out_of_line_is_no_block() -> None:
    fire = spread()
    query, distance = block(range(300, 310), range(310))
    distance[4, 77] += 50
    with torch.no_grad():
        assert off(fire.bias(query, distance), due(fire, query, distance)) < 1e-5


def test_gradients_are_those_of_the_formula() -> None:
    """In training the network runs, and every parameter gets the gradient that the fp64 formula gives it."""
    fire = spread(8)
    query, distance = block(range(200, 300), range(300))
    out = torch.randn(HEADS, 100, 300, generator=torch.Generator().manual_seed(1))
    with mock.patch.object(Fire, "_by_pieces", side_effect=AssertionError("the pieces were used")):
        (fire.bias(query, distance) * out).sum().backward()
    exact = {name: value.double().requires_grad_() for name, value in fire.state_dict().items()}
    (in_fp64(exact, fire.threshold, fire.eps, query, distance) * out).sum().backward()
    for name in NAMES:
        found, wanted = fire.get_parameter(name).grad, exact[name].grad
        assert found is not None
        assert wanted is not None
        assert wanted.ne(0).any(), name
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max(), name


def test_one_trained_parameter_is_enough_for_the_network() -> None:
    fire = spread(8).requires_grad_(False)
    query, distance = block(range(300, 310), range(310))
    with without_network():
        assert not fire.bias(query, distance).requires_grad
    fire.output.bias.requires_grad_()
    assert fire.bias(query, distance).requires_grad


def test_new_weights_are_seen_at_once() -> None:
    """An optimiser's step in place, an assignment through .data, load_state_dict: no piece of older weights is left."""
    fire = spread(8)
    query, distance = block(range(250, 270), range(270))
    seen: list[Tensor] = []

    def check() -> None:
        with torch.no_grad(), without_network():
            found = fire.bias(query, distance)
        assert off(found, due(fire, query, distance)) < 1e-5
        assert not any(torch.allclose(found, before, atol=1e-3) for before in seen)
        seen.append(found)

    check()
    optimiser = torch.optim.SGD(fire.parameters(), lr=0.01)
    fire.bias(query, distance).mean(dim=(1, 2)).square().sum().backward()
    optimiser.step()
    check()
    for name in NAMES:
        fire.get_parameter(name).data.mul_(1.3)
        check()
    fire.load_state_dict(spread(8, seed=1).state_dict())
    check()


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_not_a_number_stays_visible(name: str) -> None:
    """The same entries of the bias are NaN as in the network's, whichever unit is concerned."""
    for unit in range(4):
        fire = spread(4, seed=2)
        parameter = fire.get_parameter(name)
        parameter.data.view(-1)[unit % parameter.numel()] = math.nan
        query, distance = block(range(250, 270), range(270))
        with torch.no_grad(), without_network():
            found = fire.bias(query, distance)
        assert found.isnan().any()
        assert torch.equal(found.isnan(), due(fire, query, distance).isnan())
