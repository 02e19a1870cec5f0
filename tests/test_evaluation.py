"""The protocols to the index: against a literal enumeration of their definitions, and models whose losses are known."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ropelab.config import EvalConfig, load
from ropelab.evaluation import TargetPlan, context_lengths, plan_targets, score
from ropelab.evaluation.scoring import position_curve, target_documents, target_tokens

SAME_TARGETS = ("nonoverlapping", "sliding", "last")


def protocol(name: str, **changes: object) -> EvalConfig:
    return load([f"eval.protocol={name}", *(f"eval.{key}={value}" for key, value in changes.items())]).eval


def by_definition(
    name: str, length: int, ctx: int, largest: int, units: int, *, stride: int, last: int
) -> Iterator[tuple[int, int]]:
    """(target t, first token a of its window) of one document, straight from the definitions of the protocols."""
    quota = units * largest
    if name == "nonoverlapping":
        for t in range(1, quota + 1):
            yield t, (t - 1) // ctx * ctx
    elif name == "sliding":
        first = largest - stride + 1
        j = 0
        while first + j * stride + stride - 1 <= quota:
            for t in range(first + j * stride, first + (j + 1) * stride):
                yield t, first + j * stride + stride - 1 - ctx
            j += 1
    elif name == "last":
        for block in range(units):
            end = (block + 1) * largest
            for t in range(end - last + 1, end + 1):
                yield t, end - ctx
    else:
        for t in range(1, ctx + 1):
            yield t, 0


def scored_pairs(layout: TargetPlan, ctx: int) -> list[tuple[int, int, int]]:
    """(document, target, first token) in the order of `score`, recorded by a scorer that sees only token values.

    Token p of every document is p, so inputs and targets say themselves where they come from.
    """
    windows = layout.windows(ctx)
    documents = [np.arange(20_000) for _ in layout.documents]
    seen: list[tuple[int, int]] = []

    def scorer(inputs: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float32]:
        assert inputs.shape[1] == ctx
        for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
            assert row == list(range(row[0], row[0] + ctx))
            assert wanted[-1] == row[-1] + 1
            seen.extend((t, row[0]) for t in wanted)
        return np.zeros(targets.shape, np.float32)

    losses = score(windows, documents, scorer, rows=3)
    assert len(losses) == len(seen)
    owner = target_documents(windows)
    assert target_tokens(windows, documents).tolist() == [t for t, _ in seen]
    return [(int(d), t, a) for d, (t, a) in zip(owner, seen, strict=True)]


ladders = st.sampled_from([(4, 8, 16), (6, 12), (8,), (4, 16), (5, 10, 20)])


@settings(max_examples=120)
@given(
    st.sampled_from([*SAME_TARGETS, "prefix"]),
    ladders,
    st.lists(st.integers(1, 90), min_size=1, max_size=5),
    st.integers(1, 300),
    st.integers(1, 4),
    st.integers(1, 2),
)
def test_windows_are_those_of_the_definitions(
    name: str, contexts: tuple[int, ...], lengths: list[int], tokens: int, stride: int, last: int
) -> None:
    """Targets and the first token of their windows equal the literal definitions, in order, each target once."""
    largest = max(contexts)
    config = protocol(name, tokens=tokens, stride=stride, last=last)
    usable = [i for i, length in enumerate(lengths) if length >= largest + 1]
    if not usable:
        with pytest.raises(ValueError, match=f"the longest has {max(lengths)}"):
            plan_targets(lengths, contexts, config)
        return
    layout = plan_targets(lengths, contexts, config)
    assert layout.left_out == len(lengths) - len(usable)
    budget = tokens // (len(usable) * largest)
    used = usable if budget else usable[: max(1, tokens // largest)]
    assert list(layout.documents) == used
    targets_by_ctx = []
    for ctx in contexts:
        expected = []
        for number, index in enumerate(used):
            units = 1 if name == "prefix" else min(max(1, budget), (lengths[index] - 1) // largest)
            for t, a in by_definition(name, lengths[index], ctx, largest, units, stride=stride, last=last):
                assert 1 <= t <= lengths[index] - 1
                assert a >= 0
                assert 1 <= t - a <= ctx
                expected.append((number, t, a))
        found = scored_pairs(layout, ctx)
        assert found == expected
        targets = [(d, t) for d, t, _ in found]
        assert len(set(targets)) == len(targets)
        targets_by_ctx.append(targets)
        if name == "sliding":
            assert all(ctx - stride + 1 <= t - a <= ctx for _, t, a in found)
        if name == "last":
            assert all(ctx - last + 1 <= t - a <= ctx for _, t, a in found)
        if name == "nonoverlapping":
            assert np.mean([t - a for _, t, a in found]) == (ctx + 1) / 2
    digests = {layout.targets_digest([str(i) for i in range(len(lengths))], ctx) for ctx in contexts}
    if name in SAME_TARGETS:
        assert all(targets == targets_by_ctx[0] for targets in targets_by_ctx)
        assert len(digests) == 1
    else:
        assert len(digests) == len(contexts)


def test_the_smallest_case_by_hand() -> None:
    """A document of 9 tokens, ctx 2, 4, 8: what each protocol scores, written out."""
    contexts = (2, 4, 8)
    by_hand = {
        ("nonoverlapping", 2): [(1, 0), (2, 0), (3, 2), (4, 2), (5, 4), (6, 4), (7, 6), (8, 6)],
        ("nonoverlapping", 4): [(1, 0), (2, 0), (3, 0), (4, 0), (5, 4), (6, 4), (7, 4), (8, 4)],
        ("nonoverlapping", 8): [(t, 0) for t in range(1, 9)],
        ("last", 2): [(8, 6)],
        ("last", 8): [(8, 0)],
        ("sliding", 2): [(7, 6), (8, 6)],
        ("sliding", 4): [(7, 4), (8, 4)],
        ("sliding", 8): [(7, 0), (8, 0)],
        ("prefix", 2): [(1, 0), (2, 0)],
        ("prefix", 8): [(t, 0) for t in range(1, 9)],
    }
    for (name, ctx), expected in by_hand.items():
        layout = plan_targets([9], contexts, protocol(name, last=1, stride=2, tokens=8))
        assert [(t, a) for _, t, a in scored_pairs(layout, ctx)] == expected


def bigram_losses(document: NDArray[np.int64], table: NDArray[np.float64], targets: list[int]) -> list[float]:
    return [-math.log(table[document[t - 1], document[t]]) for t in targets]


@pytest.mark.parametrize("name", [*SAME_TARGETS, "prefix"])
def test_a_bigram_model_costs_the_same_at_every_ctx(name: str) -> None:
    """Its loss needs one token of context: totals equal the direct sum over the targets, at every ctx alike."""
    rng = np.random.default_rng(5)
    table = rng.dirichlet(np.ones(7), size=7)
    documents = [rng.integers(0, 7, length) for length in (70, 100, 41, 33, 20)]
    contexts = (8, 16, 32)
    layout = plan_targets([len(d) for d in documents], contexts, protocol(name, tokens=400, last=4, stride=8))
    used = [documents[i] for i in layout.documents]
    assert len(used) == 4

    def scorer(inputs: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float32]:
        before = inputs[:, -targets.shape[1] :]
        return (-np.log(table[before, targets])).astype(np.float32)

    totals = {}
    for ctx in contexts:
        losses = score(layout.windows(ctx), used, scorer, rows=max(1, 40 // ctx))
        direct: list[float] = []
        for document, units in zip(used, layout.units, strict=True):
            pairs = by_definition(name, len(document), ctx, 32, units, stride=8, last=4)
            direct += bigram_losses(document, table, [t for t, _ in pairs])
        assert losses.sum(dtype=np.float64) == pytest.approx(sum(direct), rel=1e-6)
        totals[ctx] = float(losses.sum(dtype=np.float64))
    if name == "prefix":
        assert len({round(total, 3) for total in totals.values()}) == 3
    else:
        assert totals[8] == pytest.approx(totals[32], rel=1e-6)
        assert totals[16] == pytest.approx(totals[32], rel=1e-6)


def test_a_larger_max_ctx_makes_two_ladders_comparable() -> None:
    lengths = [90] * 7
    for name in SAME_TARGETS:
        short = plan_targets(lengths, (8, 16), protocol(name, max_ctx=32, last=4, stride=8))
        long = plan_targets(lengths, (8, 32), protocol(name, last=4, stride=8))
        names = [str(i) for i in range(7)]
        assert short.targets_digest(names, 8) == long.targets_digest(names, 32)
        alone = plan_targets(lengths, (8, 16), protocol(name, last=4, stride=8))
        assert alone.targets_digest(names, 8) != long.targets_digest(names, 8)


def test_a_ladder_that_does_not_divide_takes_the_common_multiple_or_is_refused() -> None:
    assert plan_targets([61] * 6, (12, 20), protocol("nonoverlapping")).span == 60
    assert plan_targets([61] * 3, (12, 20), protocol("nonoverlapping")).span == 60
    with pytest.raises(ValueError, match="use 10 instead of 12, or --protocol last"):
        plan_targets([59] * 6, (12, 20), protocol("nonoverlapping"))
    assert plan_targets([59] * 6, (12, 20), protocol("last", last=4)).span == 20
    with pytest.raises(ValueError, match=r"set eval\.tokens=360 or more"):
        plan_targets([61] * 9, (12, 20), protocol("nonoverlapping", tokens=120))
    with pytest.raises(ValueError, match="the longest has 15"):
        plan_targets([15] * 9, (12, 20), protocol("nonoverlapping"))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (protocol("sliding", stride=9), "eval.stride to 8 or less"),
        (protocol("last", last=5), "set it to 4 or less"),
        (protocol("last", last=2, max_ctx=8), "below the largest ctx"),
    ],
)
def test_parameters_that_do_not_fit_the_ladder_are_refused(config: EvalConfig, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        plan_targets([100] * 6, (8, 16), config)


@pytest.mark.parametrize(
    ("text", "train_ctx", "contexts"),
    [
        ("8192", 512, (512, 1024, 2048, 4096, 8192)),
        ("3000", 512, (512, 1024, 2048, 3000)),
        ("512", 512, (512,)),
        ("300", 512, (300,)),
        ("512,8192", 512, (512, 8192)),
        ("8192,", 512, (8192,)),
        (None, 128, (128, 256, 512, 1024)),
    ],
)
def test_the_ladder_that_ctx_names(text: str | None, train_ctx: int, contexts: tuple[int, ...]) -> None:
    assert context_lengths(text, train_ctx) == contexts


@pytest.mark.parametrize("text", ["", "abc", "0", "-5", "512,256", "512,512", "1.5", ",", "512,,1024"])
def test_a_bad_ctx_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--ctx"):
        context_lengths(text, 512)


def test_the_position_curve_averages_buckets() -> None:
    layout = plan_targets([65, 65], (64,), protocol("nonoverlapping"))
    windows = layout.windows(64)
    losses = np.tile(np.arange(1, 65, dtype=np.float32), 2)  # the loss of a target is its context
    curve = position_curve(losses, windows, buckets=4)
    assert curve["edges"] == [0, 16, 32, 48, 64]
    assert curve["nll"] == [8.5, 24.5, 40.5, 56.5]
