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

from ropelab.stats import combine, decide, holm, interval, needed_seeds, row_interval, two_way

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
    assert contrast.variance == pytest.approx(2 / 2 + 4 / 3)
    assert contrast.df == pytest.approx((7 / 3) ** 2 / (1**2 / 1 + (4 / 3) ** 2 / 2))
    assert contrast.seed_sd == pytest.approx(math.sqrt(2))
    assert contrast.doc_sd == pytest.approx(2)
    assert (contrast.n_seeds, contrast.n_docs) == (2, 3)


def test_bounds_and_p_agree_with_scipy():
    contrast = two_way(np.array([[0.1, 0.3, 0.2, 0.5], [0.2, 0.1, 0.4, 0.6], [0.0, 0.3, 0.3, 0.4]]))
    expected = scipy_stats.t.interval(0.95, contrast.df, contrast.theta, math.sqrt(contrast.variance))
    assert contrast.bound(0.025) == pytest.approx(expected, rel=1e-9)
    expected_p = scipy_stats.t.sf((contrast.theta - 0.05) / math.sqrt(contrast.variance), contrast.df)
    assert contrast.p_greater(0.05) == pytest.approx(expected_p, rel=1e-9)


def test_document_variance_alone_is_scipys_one_sample_t():
    # Seeds that agree in their means leave the variance of the documents: the ordinary one-sample t test.
    documents = np.array([0.3, 0.1, 0.5, 0.2, 0.4])
    contrast = two_way(np.stack([documents, documents]))
    result = scipy_stats.ttest_1samp(documents, 0.1, alternative="greater")
    assert contrast.df == pytest.approx(4)
    assert contrast.p_greater(0.1) == pytest.approx(result.pvalue, rel=1e-9)


def test_one_seed_takes_the_known_deviation_half_as_wide_again():
    contrast = two_way(np.array([[1.0, 2.0, 3.0, 6.0]]), seed_sd=0.2, seed_sd_n=6)
    by_seed, by_doc = 0.3**2, statistics.variance([1, 2, 3, 6]) / 4
    assert contrast.seed_sd == pytest.approx(0.3)
    assert contrast.variance == pytest.approx(by_seed + by_doc)
    assert contrast.df == pytest.approx((by_seed + by_doc) ** 2 / (by_seed**2 / 5 + by_doc**2 / 3))


def test_two_seeds_speak_for_themselves():
    theta = np.array([[1.0, 2.0], [2.0, 4.0]])
    assert two_way(theta, seed_sd=99.0) == two_way(theta)


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
    assert other.variance == pytest.approx(one.variance, rel=1e-9, abs=1e-24)


@given(tables, st.floats(-3, 3), st.floats(0.1, 10))
def test_shift_and_scale(theta, shift, scale):
    """theta -> scale * theta + shift moves the interval with it and keeps p."""
    one, other = two_way(theta), two_way(scale * theta + shift)
    if one.variance < 1e-12:  # rounding of the shift would decide
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
    assert two_way(theta * 1e-90).df == pytest.approx(two_way(theta).df)


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
    assert 0.91 <= covered <= 0.97

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


def test_needed_seeds_by_hand():
    contrast = two_way(np.array([[0.0, 0.2, 0.4], [0.2, 0.4, 0.6]]))
    t = scipy_stats.t.ppf(0.975, contrast.df)
    tau = -3.0
    expected = (t * contrast.seed_sd) ** 2 / ((0.3 + 3.0) ** 2 - t**2 * contrast.doc_sd**2 / 3)
    assert needed_seeds(contrast, tau) == math.ceil(expected)
    assert needed_seeds(contrast, 0.25) is None  # the three documents alone leave more open than 0.05


@given(tables, st.floats(-2, 2))
def test_needed_seeds_is_where_the_bound_reaches_tau(theta, tau):
    """With the deviations and df as they are, N seeds suffice and N - 1 do not."""
    contrast = two_way(theta)
    needed = needed_seeds(contrast, tau)
    if needed is None or contrast.variance < 1e-12 or needed < 2:
        return
    t = scipy_stats.t.ppf(0.975, contrast.df)

    def half(n_seeds):
        return t * math.sqrt(contrast.seed_sd**2 / n_seeds + contrast.doc_sd**2 / contrast.n_docs)

    distance = abs(contrast.theta - tau)
    assert half(needed) <= distance * (1 + 1e-9)
    assert half(needed - 1) >= distance * (1 - 1e-9)


# --- intervals of one model's perplexity ---


def test_equal_clusters_give_scipys_t_interval():
    means = np.array([1.0, 1.2, 0.9, 1.1, 1.4])
    result = interval(means * 50, np.full(5, 50.0))
    assert result is not None
    expected = scipy_stats.t.interval(0.95, 4, means.mean(), scipy_stats.sem(means))
    assert (math.log(result.lo), math.log(result.hi)) == pytest.approx(expected)
    assert (result.unit, result.n) == ("document", 5)


def test_ratio_estimator_by_hand():
    # Sums 10 and 60 nats over 10 and 30 targets: mean 70/40 = 1.75, residuals -7.5 and 7.5, variance 2 * 112.5 / 40^2.
    result = interval(np.array([10.0, 60.0]), np.array([10.0, 30.0]))
    assert result is not None
    half = 12.706204736 * math.sqrt(2 * 112.5) / 40
    assert math.log(result.lo) == pytest.approx(1.75 - half)
    assert math.log(result.hi) == pytest.approx(1.75 + half)


def test_bootstrap_from_twenty_clusters_agrees_with_scipys():
    generator = np.random.default_rng(3)
    tokens = generator.integers(50, 150, 30).astype(np.float64)
    nll = tokens * generator.normal(1.5, 0.2, 30)
    result = interval(nll, tokens)
    reference = scipy_stats.bootstrap(
        (nll, tokens),
        lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval
    assert result is not None
    assert result.n == 30
    # Two bootstraps of a mean with a standard error of about 0.035 differ by their own noise.
    assert (math.log(result.lo), math.log(result.hi)) == pytest.approx((reference.low, reference.high), abs=0.005)


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
