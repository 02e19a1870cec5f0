"""Statistics of comparisons between language models: intervals over seeds and documents, verdicts, power.

Two questions, two intervals:

- "This model, other texts?" is `interval` (and `row_interval` over per-token losses): one model, a sample of documents.
- "These methods, trained again, on other texts?" is `two_way`: seeds and documents are both random. A bootstrap over
  documents alone answers the first question only; as an interval for the second it covers far too rarely.

Losses are natural-log likelihoods per target ("nats"), negated. Perplexity (PPL) is exp(mean loss).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats would cost a second of import

FloatArray = NDArray[np.float64]
Decision = Literal["PASS", "FAIL", "INCONCLUSIVE"]

ALPHA = 0.025  # one-sided error rate of a check: the two bounds together are a 95% interval
SEED_SD_INFLATION = 1.5  # a seed SD measured elsewhere is an estimate from few seeds: widen it
BOOTSTRAP_FROM = 20  # clusters; fewer make percentile intervals too narrow
BOOTSTRAP_DRAWS = 10_000
MIN_BLOCK = 4096  # targets; neighbouring losses are correlated over far fewer


@dataclass(frozen=True)
class Contrast:
    """The estimate of one contrast `theta` (nats) and its uncertainty over seeds and documents.

    `seed_sd` is the standard deviation of the seed means and `doc_sd` that of the document means (nats); infinite where
    the sample cannot tell (one seed without a known deviation, one document). `df` are Welch-Satterthwaite degrees of
    freedom of `variance`; infinite where the variance is 0.
    """

    theta: float
    variance: float
    df: float
    seed_sd: float
    doc_sd: float
    n_seeds: int
    n_docs: int

    def bound(self, alpha: float = ALPHA) -> tuple[float, float]:
        """Lower and upper confidence bound (nats), each one-sided at error rate `alpha` in (0, 0.5].

        Without variance both are `theta`; with an unknown variance they are infinite.
        """
        assert 0 < alpha <= 0.5, alpha
        if self.variance == 0:
            return self.theta, self.theta
        if math.isinf(self.variance):
            return -math.inf, math.inf
        half = float(stdtrit(self.df, 1 - alpha)) * math.sqrt(self.variance)
        return self.theta - half, self.theta + half

    def p_greater(self, tau: float) -> float:
        """One-sided p of the hypothesis "the contrast is at most `tau`": below alpha exactly where lower > tau.

        Without variance it is 0 or 1; with an unknown variance 0.5, no evidence either way.
        """
        if self.variance == 0:
            return 0.0 if self.theta > tau else 1.0
        if math.isinf(self.variance):
            return 0.5
        return float(stdtr(self.df, (tau - self.theta) / math.sqrt(self.variance)))


def two_way(theta: FloatArray, *, seed_sd: float | None = None, seed_sd_n: int = 5) -> Contrast:
    """Mean of a paired contrast with its variance over seeds *and* documents, both drawn at random.

    With m_s the seed means, m_d the document means and S2 their sample variances,

        V  = S2(m_s) / n_seeds + S2(m_d) / n_docs
        df = V^2 / ((S2(m_s) / n_seeds)^2 / (n_seeds - 1) + (S2(m_d) / n_docs)^2 / (n_docs - 1))

    (Welch 1947, Satterthwaite 1946). The document-by-seed residual enters both terms, so V errs on the wide side.

    Args:
        theta: (n_seeds, n_docs) nats; one row per seed, one column per document, finite.
        seed_sd: standard deviation of the contrast over seeds, measured elsewhere from `seed_sd_n` seeds (nats). Used
            for one seed only, widened by `SEED_SD_INFLATION`; two or more seeds speak for themselves.
        seed_sd_n: seeds behind `seed_sd`; its degrees of freedom are one less.

    One seed without `seed_sd`, or one document, leaves the variance unknown: the interval is the whole line. Identical
    means leave it 0: the interval is a point.
    """
    assert theta.ndim == 2, theta.shape
    assert theta.size, theta.shape
    assert np.isfinite(theta).all(), theta
    n_seeds, n_docs = theta.shape
    doc_sd = float(theta.mean(axis=0).std(ddof=1)) if n_docs > 1 else math.inf  # (n_docs,) means
    df_seed = n_seeds - 1
    if n_seeds > 1:
        sd = float(theta.mean(axis=1).std(ddof=1))  # (n_seeds,) means
    elif seed_sd is not None:
        assert seed_sd >= 0, seed_sd
        assert seed_sd_n >= 2, seed_sd_n
        sd, df_seed = SEED_SD_INFLATION * seed_sd, seed_sd_n - 1
    else:
        sd = math.inf
    by_seed, by_doc = sd**2 / n_seeds, doc_sd**2 / n_docs
    variance = by_seed + by_doc
    if math.isinf(variance):
        df = 1.0
    elif variance == 0:
        df = math.inf
    else:  # shares instead of V^2, which would underflow for tiny contrasts
        df = 1 / ((by_seed / variance) ** 2 / df_seed + (by_doc / variance) ** 2 / (n_docs - 1))
    return Contrast(float(theta.mean()), variance, df, sd, doc_sd, n_seeds, n_docs)


def decide(contrast: Contrast, tau: float, *, alpha: float = ALPHA, n_checks: int = 1) -> Decision:
    """The verdict of the check "the contrast exceeds `tau`", one of `n_checks` of a claim.

    PASS: the lower bound at `alpha` exceeds tau. FAIL: the upper bound at `alpha / n_checks` is below tau, because one
    failing check fails the claim, so the chances of a false FAIL add up. Else open: INCONCLUSIVE.
    """
    if contrast.bound(alpha)[0] > tau:
        return "PASS"
    if contrast.bound(alpha / n_checks)[1] < tau:
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


def needed_seeds(contrast: Contrast, tau: float, *, alpha: float = ALPHA) -> int | None:
    """Seeds at which the bound at `alpha` would reach `tau`, the estimate and its deviations staying as they are.

    N = (t S_seed)^2 / ((theta - tau)^2 - t^2 S_doc^2 / n_docs), rounded up, t = t(1 - alpha; df). None where no number
    of seeds suffices, because the documents alone leave too much open: more documents are needed.
    """
    if math.isinf(contrast.variance):
        return None
    if contrast.variance == 0:
        return None if contrast.theta == tau else contrast.n_seeds
    t2 = float(stdtrit(contrast.df, 1 - alpha)) ** 2
    room = (contrast.theta - tau) ** 2 - t2 * contrast.doc_sd**2 / contrast.n_docs
    needed = t2 * contrast.seed_sd**2 / room if room > 0 else math.inf
    return math.ceil(needed) if math.isfinite(needed) else None


@dataclass(frozen=True)
class Interval:
    """A 95% confidence interval of PPL over `n` units (`author`, `document`, `block`) of the evaluated text."""

    lo: float
    hi: float
    unit: str
    n: int


def _ppl(nats: float) -> float:
    return math.exp(nats) if nats < 709 else math.inf  # exp(710) overflows


def interval(nll_sum: FloatArray, tokens: FloatArray, *, unit: str = "document") -> Interval | None:
    """95% interval of one model's PPL = exp(sum of losses / sum of targets) over clusters of text.

    Below `BOOTSTRAP_FROM` clusters a t interval on ln PPL with the linearised variance of a ratio (Cochran 1977,
    chapter 6); from there on the percentile bootstrap over clusters (Efron 1979), seeded and blind to their order.

    Args:
        nll_sum: (n,) summed losses of each cluster, nats.
        tokens: (n,) scored targets of each cluster, > 0.
        unit: what a cluster is, for the reader.

    Returns None for fewer than two clusters and for a loss that is not finite.
    """
    n = len(nll_sum)
    assert nll_sum.shape == tokens.shape == (n,), (nll_sum.shape, tokens.shape)
    assert (tokens > 0).all(), tokens
    if n < 2 or not np.isfinite(nll_sum).all():
        return None
    total = float(tokens.sum())
    mean = float(nll_sum.sum()) / total
    if n < BOOTSTRAP_FROM:
        residuals = nll_sum - mean * tokens  # (n,)
        half = float(stdtrit(n - 1, 1 - ALPHA)) * math.sqrt(n / (n - 1) * float(residuals @ residuals)) / total
        return Interval(_ppl(mean - half), _ppl(mean + half), unit, n)
    order = np.lexsort((tokens, nll_sum))
    generator = np.random.default_rng(0)
    draws: list[FloatArray] = []
    chunk = max(1, 4_000_000 // n)  # counts of one chunk: 32 MB
    for start in range(0, BOOTSTRAP_DRAWS, chunk):
        size = min(chunk, BOOTSTRAP_DRAWS - start)
        counts = generator.multinomial(n, np.full(n, 1 / n), size=size)  # (size, n): how often each is drawn
        draws.append((counts @ nll_sum[order]) / (counts @ tokens[order]))  # (size,)
    low, high = np.quantile(np.concatenate(draws), [ALPHA, 1 - ALPHA])
    return Interval(_ppl(float(low)), _ppl(float(high)), unit, n)


def row_interval(
    losses: Sequence[FloatArray], *, max_ctx: int, authors: Sequence[str | None] | None = None
) -> Interval | None:
    """95% interval of the PPL of one evaluated row, with the widest unit that the text offers.

    The unit is the author where the data names one (books by one author are no independent sample; a document without
    an author stands for itself), else the document. One document is cut into blocks of max(max_ctx, `MIN_BLOCK`)
    targets; a shorter rest joins the last block.

    Args:
        losses: one (n_targets,) array per document, nats, in the order of the text.
        max_ctx: the longest context of the ladder, tokens.
        authors: one name (or None) per document.

    Returns None for fewer than two clusters or blocks.
    """
    documents = [loss for loss in losses if len(loss)]
    if len(documents) == 1:
        loss = documents[0].astype(np.float64)
        block = max(max_ctx, MIN_BLOCK)
        starts = np.arange(max(1, len(loss) // block)) * block  # (n_blocks,)
        return interval(
            np.add.reduceat(loss, starts), np.diff(starts, append=len(loss)).astype(np.float64), unit="block"
        )
    names = authors if authors is not None else [None] * len(losses)
    sums: dict[tuple[str, str | int], tuple[float, int]] = {}
    for index, (loss, author) in enumerate(zip(losses, names, strict=True)):
        if len(loss):
            key: tuple[str, str | int] = ("document", index) if author is None else ("author", author)
            total, count = sums.get(key, (0.0, 0))
            sums[key] = (total + float(loss.sum(dtype=np.float64)), count + len(loss))
    table = np.array(list(sums.values()), dtype=np.float64).reshape(-1, 2)  # (n, 2)
    unit = "author" if any(kind == "author" for kind, _ in sums) else "document"
    return interval(table[:, 0], table[:, 1], unit=unit)
