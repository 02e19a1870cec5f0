"""Statistics against numbers computed by hand, scipy.stats, the published formulas as literal loops, and simulation."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as scipy_stats

from ropelab.claims.statistics import (
    Contrast,
    SeedSpread,
    cluster_means,
    combine,
    decide,
    holm,
    look_share,
    needed_seeds,
    two_way,
)
from ropelab.evaluation.intervals import interval, row_interval
from tests.sum_of_t import quantile, tail

tables = arrays(
    np.float64,
    st.tuples(st.integers(2, 4), st.integers(2, 8)),
    elements=st.floats(-5, 5, allow_nan=False).map(lambda x: round(x, 3)),
)


# --- two_way ---


def test_two_way_by_hand():
    # Seed means 2 and 4 (variance 2), document means 1, 3, 5 (variance 4).
    contrast = two_way(np.array([[0.0, 2.0, 4.0], [2.0, 4.0, 6.0]]))
    assert contrast.theta == 3
    assert contrast.seed_sd == pytest.approx(math.sqrt(2))
    assert contrast.text_sd == pytest.approx(2)
    assert (contrast.n_seeds, contrast.seed_df, contrast.n_texts) == (2, 1, 3)


@pytest.mark.integration
def test_bounds_and_p_agree_with_a_convolution_by_scipy():
    """theta's error is the sum of two scaled t variables: Behrens' and Fisher's solution, by adaptive quadrature."""
    theta = np.array([[0.1, 0.3, 0.2, 0.5], [0.2, 0.1, 0.4, 0.6], [0.0, 0.3, 0.3, 0.4]])
    contrast = two_way(theta)
    seeds = (statistics.stdev(theta.mean(axis=1)) / math.sqrt(3), 2)
    documents = (statistics.stdev(theta.mean(axis=0)) / math.sqrt(4), 3)
    for alpha in (0.2, 0.025, 0.00125):
        half = quantile(alpha, seeds, documents)
        assert contrast.bound(alpha) == pytest.approx((theta.mean() - half, theta.mean() + half), rel=1e-5)
    for tau in (-3.0, 0.05, 0.3, 0.9):
        assert contrast.p_greater(tau) == pytest.approx(tail(theta.mean() - tau, seeds, documents), rel=1e-5)
        assert contrast.p_less(tau) == pytest.approx(tail(tau - theta.mean(), seeds, documents), rel=1e-5)


@pytest.mark.slow
@settings(max_examples=30)
@given(st.floats(0.001, 10), st.integers(1, 12), st.integers(1, 70), st.sampled_from([0.4, 0.025, 0.0025, 1e-4]))
def test_the_sum_of_t_at_any_scales(scale, n_seeds, n_texts, alpha):
    """The quantile against scipy's convolution, from one variable far below the other to far above."""
    contrast = Contrast(0.0, scale, n_seeds, 1, 1.0, n_texts + 1, scale, 0)
    seeds, texts = (scale, n_seeds), (1 / math.sqrt(n_texts + 1), n_texts)
    assert tail(contrast.bound(alpha)[1], seeds, texts) == pytest.approx(alpha, rel=2e-4)


def test_document_variance_alone_is_scipys_one_sample_t():
    # Seeds that agree in their means leave the variance of the documents: the ordinary one-sample t test.
    documents = np.array([0.3, 0.1, 0.5, 0.2, 0.4])
    contrast = two_way(np.stack([documents, documents]))
    result = scipy_stats.ttest_1samp(documents, 0.1, alternative="greater")
    assert contrast.p_greater(0.1) == pytest.approx(result.pvalue, rel=1e-9)


def test_one_seed_takes_a_deviation_from_elsewhere_three_times_as_wide():
    contrast = two_way(np.array([[1.0, 2.0, 3.0, 6.0]]), spread=SeedSpread(0.2, 6, same_cell=False))
    assert (contrast.seed_sd, contrast.seed_df) == (pytest.approx(0.6), 5)
    assert contrast.text_sd == pytest.approx(statistics.stdev([1, 2, 3, 6]))
    assert (contrast.planned_sd, contrast.lasting_df) == (0.2, 0)  # more seeds will speak for themselves


def test_two_seeds_speak_for_themselves():
    theta = np.array([[1.0, 2.0], [2.0, 4.0]])
    assert two_way(theta, spread=SeedSpread(99.0, 10, same_cell=False)) == two_way(theta)


def test_deviations_of_one_cell_are_pooled_by_their_degrees_of_freedom():
    theta = np.array([[1.0, 2.0], [2.0, 4.0], [0.0, 3.0]])  # seed means 1.5, 3, 1.5: variance 0.75, 2 degrees
    contrast = two_way(theta, spread=SeedSpread(0.5, 10, same_cell=True))
    assert contrast.seed_sd == pytest.approx(math.sqrt((2 * 0.75 + 9 * 0.25) / 11))
    assert contrast.seed_df == 11
    one = two_way(theta[:1], spread=SeedSpread(0.5, 10, same_cell=True))
    assert (one.seed_sd, one.seed_df) == (0.5, 9)


def test_clusters_count_alike():
    """Three books by one author and one by another: the mean of two authors, not of four books."""
    theta = np.array([[1.0, 2.0, 3.0, 10.0], [2.0, 2.0, 2.0, 4.0]])
    means = cluster_means(theta, ["Hardy", "Hardy", "Hardy", "Conrad"])
    assert sorted(means[0]) == [2.0, 10.0]
    assert two_way(means).theta == pytest.approx((6 + 3) / 2)
    assert two_way(means).n_texts == 2
    assert cluster_means(theta, ["a", "b", "c", "d"]).tolist() == theta.tolist()


@pytest.mark.parametrize("theta", [np.array([[1.0, 2.0, 4.0]]), np.array([[5.0], [5.1]]), np.array([[5.0]])])
def test_one_seed_or_one_document_decides_nothing(theta):
    contrast = two_way(theta)
    assert contrast.bound(0.025) == (-math.inf, math.inf)
    assert contrast.p_greater(0) == 0.5
    assert decide(contrast, 0.0) == "INCONCLUSIVE"
    assert needed_seeds(contrast, 0.0) is None


def test_no_variance_is_a_point():
    contrast = two_way(np.full((3, 6), 0.25))
    assert contrast.bound(0.025) == (0.25, 0.25)
    assert (contrast.p_greater(0.24), contrast.p_greater(0.25), contrast.p_greater(0.26)) == (0, 1, 1)
    assert [decide(contrast, tau) for tau in (0.24, 0.25, 0.26)] == ["PASS", "INCONCLUSIVE", "FAIL"]


@given(tables, st.randoms(use_true_random=False))
def test_order_of_documents_and_seeds_does_not_matter(theta, random):
    """Columns and rows may be permuted."""
    rows, columns = list(range(theta.shape[0])), list(range(theta.shape[1]))
    random.shuffle(rows)
    random.shuffle(columns)
    one, other = two_way(theta), two_way(theta[rows][:, columns])
    assert other.theta == pytest.approx(one.theta, abs=1e-12)
    assert (other.seed_sd, other.text_sd) == pytest.approx((one.seed_sd, one.text_sd), rel=1e-9, abs=1e-12)


@given(tables, st.floats(-3, 3), st.floats(0.1, 10))
def test_shift_and_scale(theta, shift, scale):
    """theta -> scale * theta + shift moves the interval with it and keeps p."""
    one, other = two_way(theta), two_way(scale * theta + shift)
    if min(one.seed_sd, one.text_sd) < 1e-6:  # rounding of the shift would decide
        return
    lo, hi = one.bound(0.025)
    assert other.bound(0.025) == pytest.approx((scale * lo + shift, scale * hi + shift), rel=1e-6, abs=1e-9)
    assert other.p_greater(scale * 0.1 + shift) == pytest.approx(one.p_greater(0.1), rel=1e-6, abs=1e-9)


@given(tables, st.floats(-2, 2), st.sampled_from([0.0125, 0.025, 0.1]))
def test_p_below_alpha_exactly_where_the_bound_passes(theta, tau, alpha):
    """The p value and the lower bound are two views of one test."""
    contrast = two_way(theta)
    p = contrast.p_greater(tau)
    if abs(p - alpha) > 1e-9:
        assert (p < alpha) == (contrast.bound(alpha)[0] > tau)


def test_tiny_contrasts_do_not_underflow():
    theta = np.array([[1.0, 2.0, 3.0], [2.0, 5.0, 6.0]])
    assert two_way(theta * 1e-90).p_greater(1e-90) == pytest.approx(two_way(theta).p_greater(1))


# Standard deviation over seeds, documents, residual; nominal coverage is 0.95 with 3 seeds and 14 documents.
@pytest.mark.parametrize(
    ("sds", "bootstrap_at_most", "seeds_alone"),
    [((0.10, 0.10, 0.05), 0.65, None), ((0.02, 0.10, 0.02), 0.92, 0.85), ((0.16, 0.30, 0.10), 0.82, None)],
)
def test_coverage(sds, bootstrap_at_most, seeds_alone):
    """The two-way interval covers the truth about as often as it says; the document bootstrap and, where documents vary
    most, a t interval over seeds do not."""
    draws, n_seeds, n_docs = 3000, 3, 14
    generator = np.random.default_rng(1)
    seed_sd, doc_sd, residual_sd = sds
    theta = (
        generator.normal(0, seed_sd, (draws, n_seeds, 1))
        + generator.normal(0, doc_sd, (draws, 1, n_docs))
        + generator.normal(0, residual_sd, (draws, n_seeds, n_docs))
    )  # (draws, n_seeds, n_docs), truth 0
    bounds = np.array([two_way(sample).bound(0.025) for sample in theta])  # (draws, 2)
    covered = float(((bounds[:, 0] <= 0) & (bounds[:, 1] >= 0)).mean())
    assert 0.94 <= covered <= 0.985

    counts = generator.multinomial(n_docs, np.full(n_docs, 1 / n_docs), size=1000)  # (1000, n_docs)
    resampled = theta.mean(axis=1) @ counts.T / n_docs  # (draws, 1000)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=1)
    assert float(((low <= 0) & (high >= 0)).mean()) < bootstrap_at_most

    if seeds_alone is not None:
        means = theta.mean(axis=2)  # (draws, n_seeds)
        half = scipy_stats.t.ppf(0.975, n_seeds - 1) * means.std(axis=1, ddof=1) / math.sqrt(n_seeds)
        assert float((np.abs(means.mean(axis=1)) <= half).mean()) < seeds_alone


# --- verdicts ---


def test_decide_passes_fails_and_stays_open():
    contrast = two_way(np.array([[0.4, 0.5, 0.6, 0.5], [0.5, 0.6, 0.4, 0.6], [0.5, 0.5, 0.5, 0.6]]))
    lo, hi = contrast.bound(0.025)
    assert decide(contrast, lo - 0.01) == "PASS"
    assert decide(contrast, hi + 0.01) == "FAIL"
    assert decide(contrast, (lo + hi) / 2) == "INCONCLUSIVE"


def test_more_checks_make_failing_harder_but_not_passing():
    contrast = two_way(np.array([[0.4, 0.5, 0.6, 0.5], [0.5, 0.6, 0.4, 0.6], [0.5, 0.5, 0.5, 0.6]]))
    (lo, hi), (_, stricter) = contrast.bound(0.025), contrast.bound(0.005)
    between = (hi + stricter) / 2
    assert hi < between < stricter
    assert decide(contrast, between, n_checks=1) == "FAIL"
    assert decide(contrast, between, n_checks=5) == "INCONCLUSIVE"
    assert decide(contrast, lo - 1e-6, n_checks=5) == "PASS"


def test_combine():
    assert combine(["PASS", "PASS"]) == "PASS"
    assert combine(["PASS", "INCONCLUSIVE"]) == "INCONCLUSIVE"
    assert combine(["INCONCLUSIVE", "FAIL", "PASS"]) == "FAIL"


def test_holm_by_hand():
    # Sorted: 0.005 x 4 = 0.02, 0.01 x 3 = 0.03, 0.03 x 2 = 0.06, then 0.04 x 1 kept at 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.sampled_from([0.0125, 0.025, 0.2]))
def test_holm_is_the_step_down_procedure(p_values, alpha):
    """Adjusted p below alpha exactly for the claims that Holm's sequential rule rejects."""
    rejected: set[int] = set()
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if (len(p_values) - rank) * p_values[index] >= alpha:
            break
        rejected.add(index)
    assert {i for i, p in enumerate(holm(p_values)) if p < alpha} == rejected


def test_looks_spend_the_error_rate_once():
    spent: list[float] = []
    for k in range(1, 9):
        spent.append(look_share(spent))
        assert spent[-1] == pytest.approx(1 / (k * (k + 1)))
    assert sum(spent) < 1
    assert look_share([0.5], last=True) == 0.5
    assert look_share([0.5, 0.5]) == 0


def test_needed_seeds_by_hand():
    """The bound with N seeds, and how far the estimate may move until then."""
    contrast = two_way(np.array([[0.0, 0.2, 0.4, 0.2], [0.2, 0.4, 0.6, 0.4], [0.1, 0.2, 0.6, 0.3]]))
    needed = needed_seeds(contrast, -0.5, alpha=0.0025)

    def surely(n: int) -> bool:
        by_texts = (contrast.text_sd / math.sqrt(4), 3)
        half = quantile(0.0025, (contrast.seed_sd / math.sqrt(n), n - 1), by_texts)
        moves = scipy_stats.t.ppf(0.8, 2) * contrast.seed_sd * math.sqrt(1 / 3 - 1 / n)
        return bool(contrast.theta + 0.5 > half + moves)

    assert needed is not None
    assert needed > 3
    assert surely(needed)
    assert not surely(needed - 1)
    assert needed_seeds(contrast, 0.25) is None  # the four documents alone leave more open than 0.05


@pytest.mark.parametrize("alpha", [0.025, 0.0025])
def test_needed_seeds_decide_in_eight_of_ten(alpha):
    """Simulated: the pilot's seeds stay, the texts too; the truth lies around the estimate as the pilot leaves it."""
    generator = np.random.default_rng(2)
    decided, asked = 0, 0
    for _ in range(500):
        texts = generator.normal(0, 0.2, (1, 20))
        theta = (
            generator.uniform(0, 1) + texts + generator.normal(0, 0.2, (60, 1)) + generator.normal(0, 0.02, (60, 20))
        )
        needed = needed_seeds(two_way(theta[:3]), 0.0, alpha=alpha)
        if needed is not None and 3 < needed <= 60 and theta[:3].mean() > 0:
            asked += 1
            decided += decide(two_way(theta[:needed]), 0.0, alpha=alpha) == "PASS"
    assert asked > 60
    assert decided / asked > 0.8 - 2 * math.sqrt(0.8 * 0.2 / asked)


# --- intervals of one model's perplexity ---


def test_equal_clusters_give_scipys_t_interval():
    means = np.array([1.0, 1.2, 0.9, 1.1, 1.4])
    result = interval(means * 50, np.full(5, 50.0))
    assert result is not None
    expected = scipy_stats.t.interval(0.95, 4, means.mean(), scipy_stats.sem(means))
    assert (math.log(result.lo), math.log(result.hi)) == pytest.approx(expected)
    assert (result.unit, result.n) == ("document", 5)


def test_the_variance_is_the_jackknifes():
    """Leave each cluster out and see how ln PPL moves (Cochran 1977, 6.17), by a literal loop."""
    nll, tokens = np.array([10.0, 14.0, 9.0, 40.0]), np.array([8.0, 10.0, 8.0, 30.0])
    without = [(nll.sum() - nll[i]) / (tokens.sum() - tokens[i]) for i in range(4)]
    variance = 3 / 4 * sum((value - statistics.mean(without)) ** 2 for value in without)
    half = scipy_stats.t.ppf(0.975, 3) * math.sqrt(variance)
    result = interval(nll, tokens)
    assert result is not None
    assert math.log(result.hi) == pytest.approx(73 / 56 + half)
    assert math.log(result.lo) == pytest.approx(73 / 56 - half)


@pytest.mark.parametrize("sizes", [[1] * 20, [1] * 64, [8, 8, 8, 7, 5, 3, 2, *[1] * 23]])
def test_coverage_of_a_row(sizes):
    """At 20 clusters a bootstrap covered 90.5 to 92.6 of 100; 4,000 draws are known to 0.7."""
    generator = np.random.default_rng(3)
    tokens = np.array(sizes) * 64.0
    truth = 1.5
    covered = 0
    for _ in range(4000):
        result = interval(tokens * (truth + 0.2 * generator.normal(size=len(tokens))), tokens)
        assert result is not None
        covered += result.lo <= math.exp(truth) <= result.hi
    assert covered / 4000 > (0.938 if len(set(sizes)) == 1 else 0.90)


@settings(max_examples=20)
@given(st.integers(2, 60), st.randoms(use_true_random=False))
def test_interval_ignores_the_order_of_clusters(n, random):
    """Clusters are exchangeable, also for the seeded bootstrap."""
    generator = np.random.default_rng(n)
    nll, tokens = generator.uniform(50, 150, n), np.full(n, 64.0)
    order = list(range(n))
    random.shuffle(order)
    one, other = interval(nll, tokens), interval(nll[order], tokens[order])
    assert one is not None
    assert other is not None
    assert (one.lo, one.hi) == pytest.approx((other.lo, other.hi), rel=1e-9)
    assert one.lo <= math.exp(nll.sum() / tokens.sum()) <= one.hi


def test_many_clusters_are_resampled_in_pieces():
    generator = np.random.default_rng(5)
    nll = generator.normal(100, 20, 1500)
    result = interval(nll, np.full(1500, 100.0))
    assert result is not None
    half = 1.96 * 0.2 / math.sqrt(1500)
    assert math.log(result.hi) - math.log(result.lo) == pytest.approx(2 * half, rel=0.08)


def test_no_interval_from_one_cluster_or_a_diverged_model():
    assert interval(np.array([3.0]), np.array([2.0])) is None
    assert interval(np.array([3.0, math.inf]), np.array([2.0, 2.0])) is None
    assert row_interval([], max_ctx=8) is None


def test_a_perplexity_past_the_floats_is_infinite():
    result = interval(np.array([800.0, 900.0]), np.array([1.0, 1.0]))
    assert result is not None
    assert result.hi == math.inf


def test_authors_are_the_clusters_where_they_are_named():
    losses = [np.full(4, 1.0), np.full(4, 3.0), np.full(8, 2.5), np.full(4, 1.5)]
    result = row_interval(losses, max_ctx=4, authors=["Hardy", "Hardy", "Conrad", None])
    assert result == interval(np.array([16.0, 20.0, 6.0]), np.array([8.0, 8.0, 4.0]), unit="author")
    assert row_interval(losses, max_ctx=4) == interval(
        np.array([4.0, 12.0, 20.0, 6.0]), np.array([4.0, 4.0, 8.0, 4.0]), unit="document"
    )
    assert row_interval(losses[:2], max_ctx=4, authors=["Hardy", "Hardy"]) is None


def test_an_author_named_like_a_number_is_not_a_document():
    losses = [np.full(4, 1.0), np.full(4, 3.0)]
    result = row_interval(losses, max_ctx=4, authors=[None, "0"])
    assert result is not None
    assert result.n == 2


@pytest.mark.parametrize(("max_ctx", "n_blocks"), [(1024, 3), (8192, 1), (6000, 2)])
def test_one_document_is_cut_into_blocks(max_ctx, n_blocks):
    loss = np.random.default_rng(0).uniform(1, 2, 3 * 4096 + 100)
    result = row_interval([loss], max_ctx=max_ctx)
    if n_blocks == 1:
        assert result is None
        return
    block = max(max_ctx, 4096)
    cuts = [loss[i * block : (i + 1) * block if i + 1 < n_blocks else None] for i in range(n_blocks)]
    sums, counts = np.array([c.sum() for c in cuts]), np.array([float(len(c)) for c in cuts])
    expected = interval(sums, counts, unit="block")
    assert result is not None
    assert expected is not None
    assert (result.lo, result.hi) == pytest.approx((expected.lo, expected.hi))
    assert (result.unit, result.n) == ("block", n_blocks)


def test_blocks_and_documents_sum_in_double():
    # Summed in float32, a million losses of 0.1 keep at most seven digits.
    loss = np.ones(2**20, dtype=np.float32) * np.float32(0.1)
    result = row_interval([loss, loss], max_ctx=8)
    assert result is not None
    assert math.log(result.lo) == pytest.approx(float(np.float32(0.1)), rel=1e-12)
