"""Verdicts on the page: a card a claim, a check with θ, its interval and τ as numbers and as a bar."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ropelab.report.figures import number
from ropelab.report.markup import esc, section

SIGN = {"PASS": "✓", "FAIL": "✗", "INCONCLUSIVE": "?"}


def verdict_section(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """The section of the verdicts, empty without any."""
    if not verdicts:
        return ""
    intro = (
        "<p>A check compares two losses at equal targets: θ is their difference in nats, the logarithm of a ratio of "
        "perplexities. It passes when θ lies right of the threshold τ (the shaded side) by more than its error. The "
        "95% interval is drawn; the level of a look is stricter. A claim passes when all its checks do.</p>"
    )
    return section("verdicts", "Verdicts", intro + "".join(_verdict_card(item) for item in verdicts))


def _verdict_card(item: Mapping[str, Any]) -> str:
    word = str(item["verdict"])
    kind = _kind(word)
    marks = '<span class="mark" title="The seed part of the interval comes from calibration seeds">one seed</span>'
    marks = marks if item.get("one_seed") else ""
    raw = item.get("raw_verdict")
    if raw and raw != word:
        marks += f'<span class="mark">{esc(raw)} before the correction for several claims</span>'
    notes = "".join(f"<li>{esc(note)}</li>" for note in item.get("notes") or [])
    return f"""<article class="verdict {kind}">
<p class="badge"><span aria-hidden="true">{SIGN.get(word, "?")}</span> {esc(word)}</p>
<h3>{esc(item["statement"])}</h3>
<div class="checks">{"".join(_check(check) for check in item["checks"])}</div>
<p class="reason">{esc(item["reason"])}</p>
{f'<ul class="notes">{notes}</ul>' if notes else ""}
<p class="source"><code>{esc(item["claim"])}</code> · {esc(item["source"])} {marks}</p>
</article>
"""


def _kind(word: str) -> str:
    """The class of a verdict in the page's style; never a foreign string."""
    return word.lower() if word in SIGN else "inconclusive"


def _check(check: Mapping[str, Any]) -> str:
    size = {"matches": "size as published", "smaller": "smaller than published", "larger": "larger than published"}
    published = f' <span class="mark">{size[check["size"]]}</span>' if check.get("size") in size else ""
    word = str(check["verdict"])
    kind = _kind(word)
    return f"""<div class="check">
<p class="what"><span class="sign {kind}" role="img" aria-label="{esc(word)}">{SIGN.get(word, "?")}</span>
{esc(check["statement"])}</p>
{_interval_bar(check)}
<p class="numbers">{esc(check_numbers(check))}{published}</p>
{f'<p class="numbers">{esc(check["needs"])}</p>' if check.get("needs") else ""}
</div>"""


def check_numbers(check: Mapping[str, Any]) -> str:
    """θ with its interval and τ, and θ as a ratio of perplexities; "exact" where nothing was estimated."""
    theta, tau = _real(check.get("theta")), _real(check.get("tau"))
    if theta is None:
        return "exact: holds or does not, nothing is estimated" if tau is None else f"no estimate, τ = {nats(tau)}"
    text = f"θ = {nats(theta)}"
    ends = check.get("interval")
    if ends is not None:
        low, high = (_real(end) for end in ends)
        text += f" ({'−∞' if low is None else nats(low)} to {'∞' if high is None else nats(high)})"
    if tau is not None:
        text += f", τ = {nats(tau)}"
    text += f"; perplexity ratio {number(math.exp(min(theta, 700)))}"
    if check.get("published"):
        text += f", published {' to '.join(number(ratio) for ratio in dict.fromkeys(check['published']))}"
    return text


def nats(value: float) -> str:
    """Two decimals, three where the number is small, with a true minus."""
    return f"{value:.{3 if 0 < abs(value) < 0.1 else 2}f}".replace("-", "−")


def _real(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _interval_bar(check: Mapping[str, Any]) -> str:
    """θ, its interval and τ on a line, as a small inline SVG; nothing for an exact check."""
    theta, tau = _real(check.get("theta")), _real(check.get("tau"))
    if theta is None or tau is None:
        return ""
    low, high = (_real(end) for end in check.get("interval") or (None, None))
    known = [value for value in (theta, tau, 0.0, low, high) if value is not None]
    margin = 0.08 * (max(known) - min(known)) or 1.0
    left, right = min(known) - margin, max(known) + margin

    def x(value: float | None, missing: float) -> float:
        return missing if value is None else 300 * (value - left) / (right - left)

    ends = (x(low, 0), x(high, 300)) if check.get("interval") is not None else (x(theta, 0), x(theta, 0))
    at_tau, at_zero = x(tau, 0), x(0.0, 0)
    zero = f'<line class="zero" x1="{at_zero:.1f}" x2="{at_zero:.1f}" y1="6" y2="24"/>'
    if abs(at_tau - at_zero) > 16:
        zero += f'<text x="{at_zero:.1f}" y="36" text-anchor="middle">0</text>'
    word = _kind(str(check["verdict"]))
    return (
        f'<svg viewBox="0 0 300 38" role="img" aria-label="{esc(check_numbers(check))}">'
        f'<rect class="pass-side" x="{at_tau:.1f}" y="2" width="{300 - at_tau:.1f}" height="22"/>'
        f'<line class="axis" x1="0" x2="300" y1="24" y2="24"/>{zero}'
        f'<line class="tau" x1="{at_tau:.1f}" x2="{at_tau:.1f}" y1="2" y2="24"/>'
        f'<text x="{at_tau:.1f}" y="36" text-anchor="middle">τ</text>'
        f'<line class="interval {word}" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="13" y2="13"/>'
        f'<circle class="theta {word}" cx="{x(theta, 0):.1f}" cy="13" r="4.2"/></svg>'
    )
