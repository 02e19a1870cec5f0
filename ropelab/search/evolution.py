"""The evolutionary search of LongRoPE. Knows lists of factors and a fitness function, nothing of models.

Ding et al. 2024 (2402.13753), section 3.2, table 4 and algorithm 1: every rotary pair has a factor lambda_i that
divides its frequency, in [1, 1.25 s] by steps of 0.01, never falling from fast pairs to slow ones; the first n-hat
positions keep their angles. The population begins with known scalings and mutants of them; then, generation by
generation, the best k of all candidates so far have children by mutation and crossover.

Where the text is silent this follows the authors' code (microsoft/LongRoPE, evolution/algorithms/dim_mono.py): a
mutation redraws a factor between its neighbours, left to right; a crossover that fails 20 times becomes a mutation of
the better parent. Where the code differs from the text, this is the text: the bound 1.25 s (code: 1 + s), all known
scalings in the first population (code: one list), n-hat searched with the factors. The code's list of the population is
one generation ahead of the text's; here the children of the last generation are scored as well.

The factor on the attention scores is a part of the candidate, from a short list, because a known scaling is a spectrum
and such a factor: YaRN without its temperature is another method. So the known scalings are candidates exactly as they
are, and a search that keeps its best never loses to them. (The authors' code left searching it for later.)

Every random draw is addressed by (seed, what for, generation, number), so nothing but the scores has to be remembered
to go on: a search run again with the scores of an interrupted one asks for the same candidates in the same order.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

Item = TypeVar("Item")

TRIES = 20  # to find a child that is new and, of a crossover, in the space; as the authors' max_crossover_try


class Candidate(NamedTuple):
    """One scaling to score."""

    factors: tuple[float, ...]  # of each rotary pair, fastest first: its frequency is divided by it
    start_tokens: int  # n-hat: positions below keep the angles of the unscaled spectrum
    attention_factor: float  # multiplies cosines and sines


Maker = Callable[[random.Random], Candidate | None]
Fitness = Callable[[Candidate], float]
"""What is minimised; NaN counts as infinity. Called once for each candidate."""


MOST = 10**6  # of any of a search's counts


@dataclass(frozen=True)
class SearchConfig:
    """Sizes of a search: the values are in `configs/search/longrope.yaml`. Keys are `search.<field>`."""

    population: int
    mutations: int
    crossovers: int
    iterations: int
    parents: int
    mutation_probability: float
    step: float
    bound: float
    start_tokens: tuple[int, ...]
    samples: int
    targets: float
    short_iterations: int
    short_bound: float

    def __post_init__(self) -> None:
        for key, least in {
            "population": 2, "mutations": 0, "crossovers": 0, "iterations": 0, "parents": 2, "samples": 1,
            "short_iterations": 0,
        }.items():  # fmt: skip
            if not least <= getattr(self, key) <= MOST:
                size = getattr(self, key) if abs(getattr(self, key)) < 10**30 else "a number of more than 30 digits"
                raise ValueError(f"search.{key} must be from {least} to {MOST}, not {size}")
        if not 0 < self.mutation_probability <= 1:
            raise ValueError(f"search.mutation_probability must be in (0, 1], not {self.mutation_probability}")
        if not 0 < self.step <= 1:
            raise ValueError(f"search.step must be in (0, 1], not {self.step}")
        if not 1 <= self.bound < math.inf:
            raise ValueError(f"search.bound must be >= 1, so that interpolation by s is inside, not {self.bound}")
        if not 0 < self.targets <= 0.5:
            raise ValueError(f"search.targets must be in (0, 0.5], a share of ctx, not {self.targets}")
        if not 0 < self.short_bound <= 1:
            raise ValueError(f"search.short_bound must be in (0, 1], not {self.short_bound}")
        if 0 not in self.start_tokens or min(self.start_tokens) < 0:
            raise ValueError(f"search.start_tokens must be >= 0 and hold 0, not {list(self.start_tokens)}")


@dataclass(frozen=True)
class Space:
    """What a child can be: factors 1 + k x step up to `bound`, never falling; n-hat and attention factor from lists.

    Only the candidates that a search begins with may lie outside, between the steps or above the bound.
    """

    pairs: int
    bound: float
    step: float
    start_tokens: tuple[int, ...]
    attention_factors: tuple[float, ...]

    @property
    def top(self) -> int:
        """The largest k."""
        return math.floor((self.bound - 1) / self.step + 1e-9)  # (1.25 x 4 - 1) / 0.01 must be 400

    def candidate(self, steps: Sequence[int], start_tokens: int, attention_factor: float) -> Candidate:
        return Candidate(tuple(round(1 + k * self.step, 9) for k in steps), start_tokens, attention_factor)

    def steps(self, factors: Sequence[float]) -> list[int]:
        """The k of the nearest factors in the space."""
        found: list[int] = []
        for factor in factors:
            nearest = min(max(round((factor - 1) / self.step), 0), self.top)
            found.append(max(nearest, found[-1] if found else 0))
        return found

    def __contains__(self, candidate: Candidate) -> bool:
        return (
            len(candidate.factors) == self.pairs
            and candidate == self.candidate(self.steps(candidate.factors), *candidate[1:])
            and candidate.start_tokens in self.start_tokens
            and candidate.attention_factor in self.attention_factors
        )

    def mutant(self, parent: Candidate, draws: random.Random, probability: float) -> Candidate:
        """Each factor redrawn with `probability` between its neighbours, the left one redrawn already; so the rest."""
        steps = self.steps(parent.factors)
        for i in range(self.pairs):
            if draws.random() < probability:
                low = steps[i - 1] if i else 0
                high = steps[i + 1] if i + 1 < self.pairs else self.top
                steps[i] = low + int(draws.random() * (high - low + 1))
        start, attention = parent.start_tokens, parent.attention_factor
        if draws.random() < probability:
            start = _pick(draws, self.start_tokens)
        if draws.random() < probability:
            attention = _pick(draws, self.attention_factors)
        return self.candidate(steps, start, attention)

    def cross(self, one: Candidate, other: Candidate, draws: random.Random, probability: float) -> Candidate | None:
        """`one` with parts of `other`, each taken with half the `probability`; None where the factors then fall.

        Half, as in the authors' code, which looks at a part with 0.3 and takes it with 0.5: of two lists that never
        fall few mixtures do not, and the more is taken the fewer (measured at s = 8: 23% with 0.15, 5% with 0.5).
        """
        probability /= 2
        mine, theirs = self.steps(one.factors), self.steps(other.factors)
        steps = [b if draws.random() < probability else a for a, b in zip(mine, theirs, strict=True)]
        start = other.start_tokens if draws.random() < probability else one.start_tokens
        attention = other.attention_factor if draws.random() < probability else one.attention_factor
        if any(after < before for before, after in itertools.pairwise(steps)):
            return None
        return self.candidate(steps, start, attention)

    def uniform(self, draws: random.Random) -> Candidate:
        """All never-falling lists equally likely: choices with repetition as choices without, shifted by their rank."""
        chosen: set[int] = set()
        while len(chosen) < self.pairs:
            chosen.add(int(draws.random() * (self.top + self.pairs)))
        steps = [number - rank for rank, number in enumerate(sorted(chosen))]
        return self.candidate(steps, _pick(draws, self.start_tokens), _pick(draws, self.attention_factors))


class Found(NamedTuple):
    """What a search came to."""

    best: Candidate
    score: float
    evaluations: int  # distinct candidates scored
    history: list[dict[str, Any]]  # after the first population and each generation: {"evaluations", "best"}


def evolve(
    space: Space, seeds: Mapping[str, Candidate], config: SearchConfig, *, iterations: int, seed: int, fitness: Fitness
) -> Found:
    """Algorithm 1 from named seeds. The best of all that was scored is returned, the seeds among them."""
    p = config.mutation_probability
    scores: dict[Candidate, float] = {}
    origins = list(dict.fromkeys(seeds.values()))
    history = []

    def new(make: Maker, fallback: Candidate, *address: object) -> None:
        """Score what `make` makes; where that is old or impossible, a mutant of `fallback`, else anything new."""
        draws = _draws(seed, *address)
        for maker in (make, mutant(fallback), space.uniform):
            for _ in range(TRIES):
                child = maker(draws)
                if child is not None and child not in scores:
                    scores[child] = _number(fitness(child))
                    return
        # the space is so small that nothing new is found in it: this child stays unborn

    def mutant(parent: Candidate) -> Maker:
        return functools.partial(space.mutant, parent, probability=p)

    for origin in origins:
        scores[origin] = _number(fitness(origin))
    for number in range(config.population - len(origins)):
        origin = origins[number % len(origins)]
        new(mutant(origin), origin, "population", number)
    for generation in range(iterations + 1):
        ranked = sorted(scores, key=lambda candidate: (scores[candidate], candidate))
        history.append({"evaluations": len(scores), "best": scores[ranked[0]]})
        if generation == iterations:
            break
        parents = ranked[: config.parents]
        for number in range(config.mutations):
            parent = _pick(_draws(seed, "parent", generation, number), parents)
            new(mutant(parent), parent, "mutation", generation, number)
        for number in range(config.crossovers):
            draws = _draws(seed, "parents", generation, number)
            first = int(draws.random() * len(parents))
            second = (first + 1 + int(draws.random() * (len(parents) - 1))) % len(parents)
            better, worse = parents[min(first, second)], parents[max(first, second)]
            cross = functools.partial(space.cross, better, worse, probability=p)
            new(cross, better, "crossover", generation, number)
    return Found(ranked[0], scores[ranked[0]], len(scores), history)


def random_search(space: Space, *, evaluations: int, seed: int, fitness: Fitness) -> Found:
    """As many distinct candidates drawn uniformly from the space; fewer only where it does not hold as many."""
    scores: dict[Candidate, float] = {}
    history = []
    for number in range(evaluations):
        draws = _draws(seed, "random", number)
        for _ in range(TRIES):
            candidate = space.uniform(draws)
            if candidate not in scores:
                scores[candidate] = _number(fitness(candidate))
                break
        if number + 1 == evaluations or (number + 1) & number == 0:  # after 1, 2, 4, 8, ...
            history.append({"evaluations": len(scores), "best": min(scores.values())})
    best = min(scores, key=lambda candidate: (scores[candidate], candidate))
    return Found(best, scores[best], len(scores), history)


def planned(config: SearchConfig, iterations: int) -> int:
    """Evaluations of `evolve` in a space that is large enough."""
    return config.population + iterations * (config.mutations + config.crossovers)


def _draws(*address: object) -> random.Random:
    """A generator of an address of its own. Only `random()` is used, which Python keeps the same in all versions."""
    key = hashlib.sha256("/".join(map(str, address)).encode()).digest()
    return random.Random(int.from_bytes(key, "little"))


def _pick(draws: random.Random, items: Sequence[Item]) -> Item:
    return items[int(draws.random() * len(items))]


def _number(score: float) -> float:
    return math.inf if math.isnan(score) else score
