"""Statistics of comparisons between language models: intervals over seeds and texts, verdicts, looks, power.

Two questions, two intervals:

- "This model, other texts?" is `interval` (and `row_interval` over per-token losses): one model, a sample of texts.
- "These methods, trained again, on other texts?" is `two_way`: seeds and texts are both random. A bootstrap over
  documents alone answers the first question only; as an interval for the second it covers far too rarely.

A text is a *cluster* of documents that have something in common beside the language: an author's books, a package's
modules. Where the data names none, each document is its own.

Losses are natural-log likelihoods per target ("nats"), negated. Perplexity (PPL) is exp(mean loss).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats would cost a second of import

FloatArray = NDArray[np.float64]
Decision = Literal["PASS", "FAIL", "INCONCLUSIVE"]

ALPHA = 0.025  # one-sided error rate of a verdict: the two bounds together are a 95% interval
FOREIGN_SD = 3.0  # a seed SD from another recipe, text or dtype is widened: the truth may be so many times as large
POWER = 0.8  # "needs about N seeds": the chance of the verdict with N
MOST_SEEDS = 1000  # more are never proposed


# --- the sum of two t variables ---


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
_NEGLIGIBLE = 1e-11  # probability


def _density(t: FloatArray, df: float) -> FloatArray:
    """Student's density at (n,) points."""
    log_norm = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    density: FloatArray = np.exp(log_norm - (df + 1) / 2 * np.log1p(t**2 / df))
    return density


@functools.lru_cache(maxsize=256)
def _furthest(df: float) -> float:
    """The t beyond which nothing counts."""
    return float(stdtrit(df, 1 - _NEGLIGIBLE))


def _points(centre: float, width: float, low: float, high: float) -> tuple[FloatArray, FloatArray]:
    """Gauss-Legendre points and weights (n,) on [low, high], as dense around the centre as the width asks for."""
    v_low, v_high = (math.asinh((end - centre) / width) for end in (low, high))
    v = (v_low + v_high) / 2 + (v_high - v_low) / 2 * _NODES
    return centre + width * np.sinh(v), (v_high - v_low) / 2 * _WEIGHTS * width * np.cosh(v)


@functools.lru_cache(maxsize=1024)
def _beyond(x: float, one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """P(s1 T1 + s2 T2 > x) and its density there, x >= 0.

    The integral over the narrower variable of its density and the wider one's tail. The first changes around 0, the
    second around x / scale: each half of the way to there has points of its own.
    """
    (small, df_small), (large, df_large) = sorted([one, other])
    if small < 1e-9 * large:
        return float(stdtr(df_large, -x / large)), float(_density(np.array(x / large), df_large)) / large
    furthest = _furthest(df_small)
    turn = x / small
    half = min(turn / 2, furthest)
    points, weights = _points(0.0, 1.0, -furthest, half)
    last = turn + max(furthest, large / small * _furthest(df_large))
    if turn / 2 < furthest:
        more = _points(turn, max(1.0, min(large / small, half)), half, last)
        points, weights = np.concatenate([points, more[0]]), np.concatenate([weights, more[1]])
    weights = weights * _density(points, df_small)
    left = (x - small * points) / large
    return float(weights @ stdtr(df_large, -left)), float(weights @ _density(left, df_large)) / large


@dataclass(frozen=True)
class _SumOfT:
    """s1 T1 + s2 T2 of two independent Student's t variables, given as (scale, df) each; one scale is above 0."""

    one: tuple[float, float]
    other: tuple[float, float]

    def tail(self, x: float) -> float:
        """P(sum > x), right to six digits."""
        return 1.0 - _beyond(-x, self.one, self.other)[0] if x < 0 else _beyond(x, self.one, self.other)[0]

    def quantile(self, alpha: float) -> float:
        """The x that the sum exceeds with probability alpha, in (0, 0.5]."""
        terms = (self.one, self.other)
        x = math.hypot(*(scale * float(stdtrit(df, 1 - alpha)) for scale, df in terms))  # near it
        # each exceeds its own quantile of alpha / 2 at most that often, so beyond their sum it is not
        low, high = 0.0, sum(scale * float(stdtrit(df, 1 - alpha / 2)) for scale, df in terms)
        for _ in range(100):  # Newton's steps on log P, halving where one leaves the bracket
            p, density = _beyond(x, self.one, self.other)
            error = math.log(p / alpha)
            if abs(error) < 1e-9:
                break
            low, high = (x, high) if error > 0 else (low, x)
            x += error * p / density
            if not low < x < high:
                x = (low + high) / 2
        return x


# --- contrasts ---


@dataclass(frozen=True)
class SeedSpread:
    """The standard deviation of a contrast over seeds, measured elsewhere from `n` seeds (nats).

    `same_cell`: with the same recipe, text and dtype, so that it estimates what the seeds at hand do.
    """

    sd: float
    n: int
    same_cell: bool


@dataclass(frozen=True)
class Contrast:
    """The estimate of one contrast `theta` (nats) and its uncertainty over seeds and texts.

    `seed_sd` is the standard deviation of a seed's mean, known with `seed_df` degrees of freedom, and `text_sd` that of
    a text's mean (nats), with one less than `n_texts`; infinite where the sample cannot tell.

    `theta` less its truth is taken to be distributed as the sum of two independent Student's t variables, scaled by
    seed_sd / sqrt(n_seeds) and text_sd / sqrt(n_texts): the solution of Behrens (1929) and Fisher (1935) for two
    variances that are unknown. It errs on the wide side (Robinson 1976), in the far tails too, where Welch's and
    Satterthwaite's single t with estimated degrees of freedom is too light by a factor with few seeds.
    """

    theta: float
    seed_sd: float
    seed_df: int
    n_seeds: int
    text_sd: float
    n_texts: int
    planned_sd: float  # `seed_sd` as it is to be expected with more seeds
    lasting_df: int  # degrees of freedom that come on top of those of more seeds

    @property
    def known(self) -> bool:
        """Whether both variances are."""
        return math.isfinite(self.seed_sd) and math.isfinite(self.text_sd)

    @property
    def exact(self) -> bool:
        """Whether neither seeds nor texts differ."""
        return self.seed_sd == 0 and self.text_sd == 0

    def _error(self) -> _SumOfT:
        return _SumOfT(
            (self.seed_sd / math.sqrt(self.n_seeds), self.seed_df),
            (self.text_sd / math.sqrt(self.n_texts), self.n_texts - 1),
        )

    def with_seeds(self, n: int) -> Contrast:
        """What is to be expected of `n` seeds, more than these."""
        return replace(self, n_seeds=n, seed_sd=self.planned_sd, seed_df=n - 1 + self.lasting_df)

    def bound(self, alpha: float = ALPHA) -> tuple[float, float]:
        """Lower and upper confidence bound (nats), each one-sided at error rate `alpha` in (0, 0.5].

        Without variance both are `theta`; with an unknown variance they are infinite.
        """
        assert 0 < alpha <= 0.5, alpha
        half = 0.0 if self.exact else math.inf
        if self.known and not self.exact:
            half = self._error().quantile(alpha)
        return self.theta - half, self.theta + half

    def p_greater(self, tau: float) -> float:
        """One-sided p of the hypothesis "the contrast is at most `tau`": below alpha exactly where lower > tau.

        Without variance it is 0 or 1; with an unknown variance 0.5, no evidence either way.
        """
        return self._p(self.theta - tau)

    def p_less(self, tau: float) -> float:
        """One-sided p of the hypothesis "the contrast is at least `tau`": below alpha exactly where upper < tau."""
        return self._p(tau - self.theta)

    def _p(self, distance: float) -> float:
        if self.exact:
            return 0.0 if distance > 0 else 1.0
        return self._error().tail(distance) if self.known else 0.5


def cluster_means(theta: FloatArray, clusters: Sequence[str]) -> FloatArray:
    """(n_seeds, n_documents) to (n_seeds, n_clusters): the mean over each cluster's documents, clusters by name.

    Clusters then count alike, however many documents each has: the mean over books would be the mean over the author
    who wrote most of them. `clusters`: one name per document.
    """
    assert theta.shape[1] == len(clusters), (theta.shape, len(clusters))
    if len(set(clusters)) == len(clusters):
        return theta
    names, index = np.unique(np.array(clusters), return_inverse=True)
    member = (index[:, None] == np.arange(len(names))).astype(np.float64)  # (n_documents, n_clusters)
    means: FloatArray = theta @ (member / member.sum(axis=0))
    return means


def two_way(theta: FloatArray, *, spread: SeedSpread | None = None) -> Contrast:
    """Mean of a paired contrast with its variances over seeds *and* texts, both drawn at random.

    The variances are those of the seed means and of the text means. The text-by-seed residual enters both, which errs
    on the wide side.

    Args:
        theta: (n_seeds, n_texts) nats; one row per seed, one column per text, finite.
        spread: the spread over seeds as measured elsewhere. From the same cell it is pooled with what these seeds show,
            each weighted by its degrees of freedom. From another it is used for one seed only, `FOREIGN_SD` times as
            wide; two or more seeds speak for themselves.

    One seed without `spread`, or one text, leaves a variance unknown: the interval is the whole line. Identical means
    leave both 0: the interval is a point.
    """
    assert theta.ndim == 2, theta.shape
    assert theta.size, theta.shape
    assert np.isfinite(theta).all(), theta
    n_seeds, n_texts = theta.shape
    text_sd = float(theta.mean(axis=0).std(ddof=1)) if n_texts > 1 else math.inf  # (n_texts,) means
    df = n_seeds - 1
    sd = float(theta.mean(axis=1).std(ddof=1)) if n_seeds > 1 else math.inf  # (n_seeds,) means
    planned, lasting = sd, 0
    if spread is not None:
        assert spread.sd >= 0, spread
        assert spread.n >= 2, spread
        if spread.same_cell:
            lasting = spread.n - 1
            squares = lasting * spread.sd**2 + (df * sd**2 if df else 0.0)
            df += lasting
            planned = sd = math.sqrt(squares / df)
        elif n_seeds == 1:
            sd, df, planned = FOREIGN_SD * spread.sd, spread.n - 1, spread.sd
    return Contrast(float(theta.mean()), sd, df, n_seeds, text_sd, n_texts, planned, lasting)


# --- verdicts ---


def decide(contrast: Contrast, tau: float, *, alpha: float = ALPHA, n_checks: int = 1) -> Decision:
    """The verdict of the check "the contrast exceeds `tau`", one of `n_checks` of a claim.

    PASS: the lower bound at `alpha` exceeds tau. FAIL: the upper bound at `alpha / n_checks` is below tau, because one
    failing check fails the claim, so the chances of a false FAIL add up. Else open: INCONCLUSIVE.
    """
    if contrast.p_greater(tau) < alpha:
        return "PASS"
    if contrast.p_less(tau) < alpha / n_checks:
        return "FAIL"
    return "INCONCLUSIVE"


def combine(decisions: Sequence[Decision]) -> Decision:
    """A claim from its checks: all must pass, one failure is enough.

    "All pass" is an intersection-union test (Berger 1982): the claim keeps the checks' error rate without a correction.
    """
    assert decisions, "a claim has at least one check"
    if "FAIL" in decisions:
        return "FAIL"
    return "PASS" if all(decision == "PASS" for decision in decisions) else "INCONCLUSIVE"


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p of each of several claims tested together, in the order given (Holm 1979).

    Rejecting where the adjusted p is below alpha holds the chance of any false rejection below alpha. The smallest p is
    multiplied by the number of claims, the next by one less, and so on, never falling and at most 1.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def look_share(earlier: Sequence[float], *, last: bool = False) -> float:
    """The share of the error rate that the next look at growing data may spend.

    The k-th look spends 1 / (k (k + 1)), which sums to 1 over however many looks; never more than the `earlier` ones
    have left. `last`: no look is to follow, so that it spends all that is left.
    """
    left = max(0.0, 1.0 - sum(earlier))
    k = len(earlier) + 1
    return left if last else min(left, 1 / (k * (k + 1)))


def needed_seeds(contrast: Contrast, tau: float, *, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Seeds, those at hand included, that would decide a check at `alpha` with probability `power`.

    The estimate moves as seeds are added: with N of them it will lie around today's with the standard deviation
    seed_sd * sqrt(1/n - 1/N), a t variable as far as seed_sd is known. N is the smallest at which it stays beyond the
    bound of that day with probability `power`; the texts are the same again. None where no number up to `MOST_SEEDS`
    does: the texts leave too much open, or the estimate is too near tau to say.
    """
    if not contrast.known or contrast.theta == tau:
        return None
    distance = abs(contrast.theta - tau)
    moves = float(stdtrit(contrast.seed_df, power)) * contrast.planned_sd

    def enough(n: int) -> bool:
        left = distance - moves * math.sqrt(1 / contrast.n_seeds - 1 / n)
        future = contrast if n == contrast.n_seeds else contrast.with_seeds(n)
        return left > 0 and future.p_greater(contrast.theta - left) < alpha

    if enough(contrast.n_seeds):
        return contrast.n_seeds
    # bound and movement together are concave in 1/N: what is enough is so for every larger N
    low, high = contrast.n_seeds, MOST_SEEDS
    if high <= low or not enough(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
