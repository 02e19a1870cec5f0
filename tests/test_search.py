"""The evolutionary search itself: what its children are, that it never loses, and that it can be cut short anywhere."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropelab.search.evolution import Candidate, Found, SearchConfig, Space, evolve, planned, random_search

CONFIG = SearchConfig(
    population=12, mutations=5, crossovers=5, iterations=4, parents=6, mutation_probability=0.3, step=0.01, bound=1.25,
    start_tokens=(0, 4, 16), samples=1, targets=0.5, short_iterations=1, short_bound=0.5,
)  # fmt: skip


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    scale = draw(st.floats(1.5, 40))
    return Space(
        draw(st.integers(1, 24)), 1.25 * scale, draw(st.sampled_from([0.01, 0.05, 0.25])), (0, 4, 16), (1.0, 1.1, 1.2)
    )


@st.composite
def parents(draw: st.DrawFn, space: Space) -> Candidate:
    """A candidate as a search may begin with: never falling, but between the steps, or above the bound."""
    numbers = st.floats(1, 1.3 * space.bound)
    factors = sorted(draw(st.lists(numbers, min_size=space.pairs, max_size=space.pairs)))
    return Candidate(tuple(factors), draw(st.sampled_from([0, 4, 16])), draw(st.sampled_from([1.0, 1.1, 1.2])))


def check_inside(space: Space, child: Candidate) -> None:
    """The definition of the space, without its arithmetic of steps."""
    assert len(child.factors) == space.pairs
    assert all(1 <= value <= space.bound + 1e-9 for value in child.factors)
    assert all(before <= after for before, after in itertools.pairwise(child.factors))
    for value in child.factors:
        steps = (value - 1) / space.step
        assert abs(steps - round(steps)) < 1e-6
    assert child.start_tokens in space.start_tokens
    assert child.attention_factor in space.attention_factors


@settings(max_examples=150)
@given(st.data(), spaces(), st.integers(0, 10**6), st.sampled_from([0.05, 0.3, 1.0]))
def test_children_are_in_the_space(data: st.DataObject, space: Space, seed: int, probability: float) -> None:
    """Mutants, crossings and uniform draws never fall, keep the bounds and the steps, whatever their parents."""
    one, other = data.draw(parents(space)), data.draw(parents(space))
    draws = random.Random(seed)
    check_inside(space, space.mutant(one, draws, probability))
    check_inside(space, space.uniform(draws))
    crossed = space.cross(one, other, draws, probability)
    if crossed is not None:
        check_inside(space, crossed)


@settings(max_examples=60)
@given(st.data(), spaces(), st.integers(0, 10**6))
def test_a_crossing_takes_every_part_from_a_parent(data: st.DataObject, space: Space, seed: int) -> None:
    """Each factor is that of one parent at the same pair, to the nearest step inside the bound."""
    one, other = data.draw(parents(space)), data.draw(parents(space))
    crossed = space.cross(one, other, random.Random(seed), 1.0)
    if crossed is None:
        return
    for mine, a, b in zip(crossed.factors, one.factors, other.factors, strict=True):
        assert min(abs(mine - min(a, space.bound)), abs(mine - min(b, space.bound))) <= space.step + 1e-9
    assert crossed.start_tokens in (one.start_tokens, other.start_tokens)
    assert crossed.attention_factor in (one.attention_factor, other.attention_factor)


def test_a_mutation_redraws_the_share_it_says() -> None:
    """Of 16 well-spread factors, n-hat and attention factor, about 30% change (a redraw may hit the old value)."""
    space = Space(16, 10.0, 0.01, (0, 1, 2, 4, 8, 12, 16, 20), (1.0, 1.1, 1.2, 1.3))
    parent = space.candidate([50 * (i + 1) for i in range(16)], 0, 1.0)
    changed: list[int] = []
    for seed in range(400):
        child = space.mutant(parent, random.Random(seed), 0.3)
        changed += [int(a != b) for a, b in zip(parent.factors, child.factors, strict=True)]
    assert abs(sum(changed) / len(changed) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / len(changed)) + 0.01


def test_all_lists_are_equally_likely_at_random() -> None:
    """Pairs 3, five factors: the 35 never-falling lists by counting, each within 5 standard deviations of 1/35."""
    space = Space(3, 2.0, 0.25, (0,), (1.0,))
    every = set(itertools.combinations_with_replacement([1.0, 1.25, 1.5, 1.75, 2.0], 3))
    draws = random.Random(0)
    counts = Counter(space.uniform(draws).factors for _ in range(20000))
    assert set(counts) == every
    p = 1 / len(every)
    assert all(abs(n - 20000 * p) < 5 * math.sqrt(20000 * p * (1 - p)) for n in counts.values())


# --- the search on a function with a known minimum ------------------------------------------------------------------

SPACE = Space(8, 10.0, 0.01, (0, 4, 16), (1.0, 1.2))
SEEDS = {
    "linear": Candidate((8.0,) * 8, 0, 1.0),
    "ntk": Candidate(tuple(8 ** (i / 7) for i in range(8)), 0, 1.0),
    "yarn": Candidate((1.0, 1.0, 1.3333, 2.0, 4.0, 8.0, 8.0, 8.0), 0, 1.2),
}
TARGET = (1.0, 1.2, 1.9, 2.4, 5.1, 7.3, 9.0, 9.9)


def bowl(candidate: Candidate) -> float:
    """Least at TARGET with n-hat 4 and attention factor 1.2."""
    return (
        sum((math.log(a) - math.log(b)) ** 2 for a, b in zip(candidate.factors, TARGET, strict=True))
        + 0.3 * abs(candidate.start_tokens - 4)
        + abs(candidate.attention_factor - 1.2)
    )


def search(seed: int, fitness: object = bowl, config: SearchConfig = CONFIG) -> Found:
    assert callable(fitness)
    return evolve(SPACE, SEEDS, config, iterations=config.iterations, seed=seed, fitness=fitness)


class Asked:
    """A fitness that remembers what it was asked, and may be killed at the n-th new candidate."""

    def __init__(self, known: dict[Candidate, float] | None = None, die_at: int | None = None) -> None:
        self.known = {} if known is None else known
        self.order: list[Candidate] = []
        self.die_at = die_at

    def __call__(self, candidate: Candidate) -> float:
        self.order.append(candidate)
        if candidate not in self.known:
            if len(self.known) == self.die_at:
                raise KeyboardInterrupt
            self.known[candidate] = bowl(candidate)
        return self.known[candidate]


@settings(max_examples=40)
@given(st.integers(0, 10**9))
def test_the_best_never_gets_worse_and_never_loses_to_a_seed(seed: int) -> None:
    """The history falls or stays, ends with the best of all that was asked, and no seed is better. Each is asked once,
    children are in the space, and there are as many evaluations as planned."""
    asked = Asked()
    found = search(seed, asked)
    assert len(asked.order) == len(set(asked.order)) == found.evaluations == planned(CONFIG, CONFIG.iterations)
    assert set(SEEDS.values()) <= set(asked.order[:3])
    for child in asked.order[3:]:
        check_inside(SPACE, child)
    bests = [line["best"] for line in found.history]
    assert bests == sorted(bests, reverse=True)
    assert [line["evaluations"] for line in found.history] == [12, 22, 32, 42, 52]
    assert found.score == bowl(found.best) == min(map(bowl, asked.order)) == bests[-1]
    assert all(found.score <= bowl(candidate) for candidate in SEEDS.values())


@settings(max_examples=40)
@given(st.integers(0, 10**9), st.integers(0, 51))
def test_a_resumed_search_is_the_uninterrupted_one(seed: int, die_at: int) -> None:
    """Killed at any candidate and run again with the scores so far: the same questions in the same order, the same end.

    So for the random search."""
    whole = Asked()
    expected = search(seed, whole)
    cut = Asked(die_at=die_at)
    with pytest.raises(KeyboardInterrupt):
        search(seed, cut)
    again = Asked(known=cut.known)
    assert search(seed, again) == expected
    assert again.order == whole.order

    drawn = random_search(SPACE, evaluations=52, seed=seed, fitness=whole)
    cut = Asked(die_at=die_at)
    with pytest.raises(KeyboardInterrupt):
        random_search(SPACE, evaluations=52, seed=seed, fitness=cut)
    assert random_search(SPACE, evaluations=52, seed=seed, fitness=Asked(known=cut.known)) == drawn


@pytest.mark.parametrize("seed", range(5))
def test_evolution_beats_the_seeds_and_a_random_search_of_equal_budget(seed: int) -> None:
    config = dataclasses.replace(CONFIG, population=32, mutations=12, crossovers=12, parents=16, iterations=10)
    found = search(seed, config=config)
    asked = Asked()
    drawn = random_search(SPACE, evaluations=found.evaluations, seed=seed, fitness=asked)
    assert drawn.evaluations == found.evaluations == len(set(asked.order)) == 272
    assert drawn.score == min(map(bowl, asked.order)) == bowl(drawn.best)
    for candidate in asked.order:
        check_inside(SPACE, candidate)
    assert found.score < 0.75 * drawn.score
    assert found.score < 0.75 * min(map(bowl, SEEDS.values()))


def test_seeds_draw_other_candidates() -> None:
    one, other = Asked(), Asked()
    search(0, one)
    search(1, other)
    assert set(one.order) & set(other.order) == set(SEEDS.values())


class Watched(Space):
    """A space that tells who was mutated or crossed, and how many candidates had been asked for by then."""

    def mutant(self, parent: Candidate, draws: random.Random, probability: float) -> Candidate:
        SEEN.append((len(ASKED.order), (parent,)))
        return super().mutant(parent, draws, probability)

    def cross(self, one: Candidate, other: Candidate, draws: random.Random, probability: float) -> Candidate | None:
        SEEN.append((len(ASKED.order), (one, other)))
        return super().cross(one, other, draws, probability)


ASKED = Asked()
SEEN: list[tuple[int, tuple[Candidate, ...]]] = []


def test_parents_are_the_best_of_all_before_their_generation() -> None:
    """Algorithm 1: top-k over everything scored so far; the first population's parents are the seeds, in turn; the
    better of a couple comes first, because it is the one that is mutated where a crossing fails."""
    evolve(Watched(*dataclasses.astuple(SPACE)), SEEDS, CONFIG, iterations=CONFIG.iterations, seed=0, fitness=ASKED)
    used: set[tuple[int, Candidate]] = set()
    for asked, parents_used in SEEN:
        if asked < 12:
            assert parents_used == (list(SEEDS.values())[asked % 3],)
            continue
        generation = (asked - 12) // 10
        best = sorted(ASKED.order[: 12 + 10 * generation], key=bowl)[: CONFIG.parents]
        ranks = [best.index(parent) for parent in parents_used]
        assert ranks == sorted(set(ranks))
        used |= {(generation, parent) for parent in parents_used}
    assert len(used) > 4 * 3  # not always the same one


def test_a_space_with_few_candidates_ends() -> None:
    """One pair, two factors, one n-hat: two candidates, each asked once by either search."""
    space = Space(1, 1.01, 0.01, (0,), (1.0,))
    asked: list[Candidate] = []

    def fitness(candidate: Candidate) -> float:
        asked.append(candidate)
        return -candidate.factors[0]

    found = evolve(space, {"ones": Candidate((1.0,), 0, 1.0)}, CONFIG, iterations=2, seed=0, fitness=fitness)
    assert (found.best.factors, found.evaluations, len(asked)) == ((1.01,), 2, 2)
    assert random_search(space, evaluations=50, seed=0, fitness=fitness).evaluations == 2


def test_a_score_that_is_no_number_is_the_worst() -> None:
    def fitness(candidate: Candidate) -> float:
        return math.nan if candidate.start_tokens == 0 else bowl(candidate)

    found = search(0, fitness)
    assert found.best.start_tokens != 0
    assert math.isfinite(found.score)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"population": 1}, "search.population must be from 2 to 1000000, not 1"),
        ({"parents": 1}, "search.parents"),
        ({"iterations": -1}, "search.iterations"),
        ({"mutation_probability": 0.0}, "search.mutation_probability"),
        ({"step": 0.0}, "search.step"),
        ({"bound": 0.9}, "search.bound"),
        ({"bound": math.inf}, "search.bound"),
        ({"start_tokens": (4,)}, "search.start_tokens"),
        ({"start_tokens": (0, -1)}, "search.start_tokens"),
        ({"samples": 0}, "search.samples"),
        ({"targets": 0.6}, "search.targets"),
        ({"short_bound": 1.5}, "search.short_bound"),
    ],
)
def test_sizes_out_of_range_name_their_key(change: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(CONFIG, **change)
