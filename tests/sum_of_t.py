"""Two scaled t variables added, by scipy's adaptive quadrature: the reference of intervals over seeds and texts."""

from __future__ import annotations

import itertools

from scipy import integrate, optimize, stats

Variable = tuple[float, float]  # scale, degrees of freedom


def tail(x: float, one: Variable, other: Variable) -> float:
    """P(s1 T1 + s2 T2 > x)."""
    (small, df_small), (large, df_large) = sorted([one, other])

    def share(t: float) -> float:
        return float(stats.t.pdf(t, df_small) * stats.t.sf((x - small * t) / large, df_large))

    middle = x / small if small else 0.0  # where the wider one's tail is a half
    edges = sorted({sign * 10.0**k for sign in (-1, 1) for k in range(-1, 9)} | {0.0, middle, middle / 2, middle * 2})
    inner = sum(integrate.quad(share, *ends, limit=200)[0] for ends in itertools.pairwise(edges))
    return float(inner + stats.t.sf(edges[-1], df_small))


def quantile(alpha: float, one: Variable, other: Variable) -> float:
    """Where the tail is alpha."""
    high = sum(scale * float(stats.t.ppf(1 - alpha / 2, df)) for scale, df in (one, other))
    return float(optimize.brentq(lambda x: tail(x, one, other) - alpha, 0, high, xtol=1e-12))
