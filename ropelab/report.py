"""Results for people: one self-contained HTML page, its PNG, CSV and JSON, and tables for the terminal.

Everything is made of the JSON objects of `eval` and of verdicts; nothing is measured or decided here. The page opens
without a network (a content security policy forbids it one) and reads without JavaScript: the interactive curves stand
in for a picture that is there anyway. Every string is escaped, as names come from data files and other people's runs.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropelab import files
from ropelab.figures import (
    CAP,
    Line,
    Panel,
    Point,
    Style,
    ctx_label,
    curves,
    number,
    panels,
    png,
    ppl_limits,
    ppl_ticks,
    protocol_facts,
    protocol_words,
    styles,
)

if TYPE_CHECKING:
    from rich.table import Table

EQUAL = 0.03  # nats; point estimates closer than this are called equal in words (3% of a perplexity)

CSV_COLUMNS = (
    "run", "pos", "scaling", "train_ctx", "window", "seed", "data", "protocol", "stride", "last", "targets_digest",
    "ctx", "factor", "ppl", "ci95_low", "ci95_high", "nll", "bits_per_byte", "tokens", "documents", "unit", "status",
    "reason",
)  # fmt: skip


def write_report(
    folder: Path,
    *,
    evals: list[dict[str, Any]],
    verdicts: list[dict[str, Any]],
    title: str,
    notes: list[str],
    manifest: dict[str, Any],
) -> Path:
    """Write report.html, curves.png, results.json and results.csv into a folder (made if missing), each at once.

    `evals` and `verdicts` are the JSON objects of `eval` and of the claims; `notes` are sentences for the reader;
    `manifest` holds versions and settings of any depth, shown as a table. A list `commands` in it is shown as the way
    to reproduce; without one, the commands follow from the runs and claims. Returns the path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    picture = png(curves(evals, title=title))
    results = _finite({"evals": evals, "verdicts": verdicts})
    page = _page(evals, verdicts, title, notes, manifest, picture)
    files.write(folder / "curves.png", picture)
    files.write(folder / "results.json", (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
    files.write(folder / "results.csv", _csv(evals).encode())
    files.write(folder / "report.html", page.encode())
    return folder / "report.html"


def headline(evals: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]]) -> str:
    """What was found, in one or two sentences: how many statements hold, and the range of perplexities at the end."""
    sentences = []
    if verdicts:
        count = {word: sum(item["verdict"] == word for item in verdicts) for word in ("PASS", "FAIL", "INCONCLUSIVE")}
        noun, verb = "claim" if len(verdicts) == 1 else "claims", "holds" if count["PASS"] == 1 else "hold"
        parts = [f"{count['PASS']} of {len(verdicts)} {noun} {verb} here"]
        if count["FAIL"]:
            parts.append(f"{count['FAIL']} {'does' if count['FAIL'] == 1 else 'do'} not")
        if count["INCONCLUSIVE"]:
            parts.append(f"{count['INCONCLUSIVE']} {'stays' if count['INCONCLUSIVE'] == 1 else 'stay'} open")
        sentences.append(_listed(parts) + ".")
    drawn = panels(evals)
    panel = next((each for each in drawn if each.protocol["name"] == "last"), drawn[0] if drawn else None)
    if panel is not None:
        sentences.append(_range_sentence(panel))
    return " ".join(sentences) or "There is nothing to report yet."


def terminal_table(evals: Sequence[Mapping[str, Any]]) -> Table:
    """Perplexities for the terminal: methods down, context lengths across, ± half of the 95% interval."""
    from rich.table import Table
    from rich.text import Text

    drawn = panels(evals)
    ctxs = sorted({ctx for panel in drawn for ctx in panel.ctxs})
    trained = {length for panel in drawn for length in panel.train_ctxs}
    table = Table(title="Perplexity by context length", title_justify="left", caption_justify="left")
    table.add_column("method")
    for ctx in ctxs:
        table.add_column(Text(str(ctx) + (" (trained)" if ctx in trained else "")), justify="right")
    captions = []
    for panel in drawn:
        if len(drawn) > 1:
            table.add_section()
            table.add_row(Text(str(panel.protocol["name"]), style="bold"))
        for line in panel.lines:
            points = {point.ctx: point for point in line.points}
            cells = [Text(_terminal_cell(points.get(ctx))) for ctx in ctxs]
            table.add_row(Text(line.name), *cells)
        captions.append(f"{panel.protocol['name']}: {protocol_words(panel.protocol)}. {protocol_facts(panel.protocol)}")
        captions += [
            f"{line.name} {line.gap[1]}: {reason}" for line in panel.lines if line.gap and (reason := _why(line))
        ]
    table.caption = Text("\n".join(dict.fromkeys(captions)))
    return table


def verdict_table(verdicts: Sequence[Mapping[str, Any]]) -> Table:
    """Verdicts for the terminal: each claim, its checks with theta (95% interval) and tau in nats, and the reason."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Verdicts", title_justify="left", show_header=False)
    table.add_column("verdict", no_wrap=True)
    table.add_column("claim")
    colour = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow"}
    for item in verdicts:
        word = item["verdict"] + ("\none seed" if item.get("one_seed") else "")
        claim = Text(f"{item['claim']}: ", style="bold").append(str(item["statement"]), style="not bold")
        for check in item["checks"]:
            kind = str(check["verdict"])
            claim.append(f"\n{SIGN.get(kind, '?')} ", style=f"not bold {colour.get(kind, '')}")
            claim.append(f"{check['statement']}: {_check_numbers(check)}", style="not bold dim")
        claim.append(f"\n{item['reason']}", style="not bold")
        table.add_row(Text(word, style=f"bold {colour.get(item['verdict'], '')}"), claim, end_section=True)
    return table


# Files ---------------------------------------------------------------------------------------------------------------


def _finite(value: Any) -> Any:
    """The same JSON with null for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def _csv(evals: Iterable[Mapping[str, Any]]) -> str:
    """One line a row of every evaluation; an empty field is a number that does not exist."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for item in evals:
        protocol = item["protocol"]
        of_run = {key: item.get(key) for key in ("run", "pos", "scaling", "train_ctx", "window", "seed", "data")}
        of_protocol = {key: protocol.get(key) for key in ("stride", "last", "targets_digest")}
        for row in item["rows"]:
            low, high = row.get("ci95") or (None, None)
            ends = {"ci95_low": low, "ci95_high": high, "protocol": protocol["name"]}
            writer.writerow(_finite({**of_run, **of_protocol, **ends, **row}))
    return out.getvalue()


# The page ------------------------------------------------------------------------------------------------------------


def _page(
    evals: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]],
    title: str,
    notes: Sequence[str],
    manifest: Mapping[str, Any],
    picture: bytes,
) -> str:
    drawn = panels(evals)
    looks = styles(drawn)
    scripts = _scripts() if drawn else []
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    allowed = hashes or "'none'"
    policy = (
        f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )
    sections = [
        _verdict_section(verdicts),
        _curve_section(drawn, looks, picture),
        _number_section(drawn),
        _protocol_section(drawn),
        _context_section(drawn),
        _command_section(manifest.get("commands") or _commands(evals, verdicts)),
        _manifest_section(manifest),
    ]
    remarks = "".join(f"<li>{_e(note)}</li>" for note in notes)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_e(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{_e(title)}</h1>
<p class="found">{_e(headline(evals, verdicts))}</p>
{f'<ul class="notes">{remarks}</ul>' if remarks else ""}
</header>
{"".join(sections)}
</main>
<footer><p>Made by ropelab, the referee of position encodings. The numbers of this page are in results.json and
results.csv beside it.</p></footer>
{"".join(f"<script>{script}</script>" for script in scripts)}
</body>
</html>
"""


def _e(text: object) -> str:
    return html.escape(str(text))


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{body}</section>\n'


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _range_sentence(panel: Panel) -> str:
    """The lowest and highest perplexity at the longest ctx, and what has none there."""
    ctx = panel.ctxs[-1]
    plain = [line for line in panel.lines if line.window is None]
    ends = [(line, line.points[-1].ppl) for line in plain if line.points and line.points[-1].ctx == ctx]
    have = sorted(((ppl, line.name) for line, ppl in ends if ppl is not None), key=lambda pair: pair[0])
    times = ctx / panel.train_ctxs[0]
    where = f"At {ctx} tokens"
    if len(panel.train_ctxs) == 1 and times != 1:
        where += f", {times:g} times the training length,"
    gaps = [f"{line.name} is {line.gap[1]}" for line in plain if line.gap]
    if not have:
        return f"{where} no method has a perplexity: {_listed(gaps)}." if gaps else ""
    sentence = f"{where} the perplexity of {have[0][1]} is {number(have[0][0])}"
    if len(have) > 1:
        sentence = (
            f"{where} perplexity runs from {number(have[0][0])} ({have[0][1]}) to {number(have[-1][0])} ({have[-1][1]})"
        )
    sentence += f", by the protocol “{panel.protocol['name']}”"
    return sentence + (f"; {_listed(gaps)}." if gaps else ".")


# Verdicts ------------------------------------------------------------------------------------------------------------


SIGN = {"PASS": "✓", "FAIL": "✗", "INCONCLUSIVE": "?"}


def _verdict_section(verdicts: Sequence[Mapping[str, Any]]) -> str:
    if not verdicts:
        return ""
    intro = (
        "<p>A check compares two losses at equal targets: θ is their difference in nats, the logarithm of a ratio of "
        "perplexities. It passes when the whole 95% interval of θ lies right of the threshold τ (the shaded side). "
        "A claim passes when all its checks do.</p>"
    )
    return _section("verdicts", "Verdicts", intro + "".join(_verdict_card(item) for item in verdicts))


def _verdict_card(item: Mapping[str, Any]) -> str:
    word = str(item["verdict"])
    kind = _kind(word)
    marks = '<span class="mark" title="The seed part of the interval comes from calibration seeds">one seed</span>'
    marks = marks if item.get("one_seed") else ""
    raw = item.get("raw_verdict")
    if raw and raw != word:
        marks += f'<span class="mark">{_e(raw)} before the correction for several claims</span>'
    notes = "".join(f"<li>{_e(note)}</li>" for note in item.get("notes") or [])
    return f"""<article class="verdict {kind}">
<p class="badge"><span aria-hidden="true">{SIGN.get(word, "?")}</span> {_e(word)}</p>
<h3>{_e(item["statement"])}</h3>
<div class="checks">{"".join(_check(check) for check in item["checks"])}</div>
<p class="reason">{_e(item["reason"])}</p>
{f'<ul class="notes">{notes}</ul>' if notes else ""}
<p class="source"><code>{_e(item["claim"])}</code> · {_e(item["source"])} {marks}</p>
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
<p class="what"><span class="sign {kind}" role="img" aria-label="{_e(word)}">{SIGN.get(word, "?")}</span>
{_e(check["statement"])}</p>
{_interval_bar(check)}
<p class="numbers">{_e(_check_numbers(check))}{published}</p>
{f'<p class="numbers">{_e(check["needs"])}</p>' if check.get("needs") else ""}
</div>"""


def _check_numbers(check: Mapping[str, Any]) -> str:
    """θ with its interval and τ, and θ as a ratio of perplexities; "exact" where nothing was estimated."""
    theta, tau = _real(check.get("theta")), _real(check.get("tau"))
    if theta is None:
        return "exact: holds or does not, nothing is estimated" if tau is None else f"no estimate, τ = {_nats(tau)}"
    text = f"θ = {_nats(theta)}"
    ends = check.get("interval")
    if ends is not None:
        low, high = (_real(end) for end in ends)
        text += f" ({'−∞' if low is None else _nats(low)} to {'∞' if high is None else _nats(high)})"
    if tau is not None:
        text += f", τ = {_nats(tau)}"
    text += f"; perplexity ratio {number(math.exp(min(theta, 700)))}"
    if check.get("published"):
        text += f", published {' to '.join(number(ratio) for ratio in dict.fromkeys(check['published']))}"
    return text


def _nats(value: float) -> str:
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
        f'<svg viewBox="0 0 300 38" role="img" aria-label="{_e(_check_numbers(check))}">'
        f'<rect class="pass-side" x="{at_tau:.1f}" y="2" width="{300 - at_tau:.1f}" height="22"/>'
        f'<line class="axis" x1="0" x2="300" y1="24" y2="24"/>{zero}'
        f'<line class="tau" x1="{at_tau:.1f}" x2="{at_tau:.1f}" y1="2" y2="24"/>'
        f'<text x="{at_tau:.1f}" y="36" text-anchor="middle">τ</text>'
        f'<line class="interval {word}" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="13" y2="13"/>'
        f'<circle class="theta {word}" cx="{x(theta, 0):.1f}" cy="13" r="4.2"/></svg>'
    )


# Curves --------------------------------------------------------------------------------------------------------------


PLOTLY_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")  # in the order of figures.DASHES
SWATCH_MARKERS = (
    '<circle cx="13" cy="5" r="2.6"/>',
    '<path d="M10.5 2.5h5v5h-5z"/>',
    '<path d="M13 2l3 5.5h-6z"/>',
    '<path d="M13 1.8l3.2 3.2-3.2 3.2-3.2-3.2z"/>',
    '<path d="M13 8l3-5.5h-6z"/>',
    '<path d="M12 2.5h2v1.5h1.5v2h-1.5v1.5h-2v-1.5h-1.5v-2h1.5z"/>',
)
PLOTLY_MARKERS = ("circle", "square-open", "triangle-up-open", "diamond-open", "triangle-down-open", "cross-open")


def _curve_section(drawn: Sequence[Panel], looks: Mapping[Line, Style], picture: bytes) -> str:
    if not drawn:
        return ""
    words = "; ".join(
        f"{panel.protocol['name']}: " + ", ".join(f"{line.name} {_spoken(line)}" for line in panel.lines)
        for panel in drawn
    )
    figures = "".join(_interactive(index, panel, looks) for index, panel in enumerate(drawn))
    still = base64.b64encode(picture).decode()
    body = (
        f'<div id="interactive" hidden>{figures}</div>'
        f'<figure id="still"><img alt="Perplexity against context length. {_e(words)}" '
        f'src="data:image/png;base64,{still}"></figure>'
        "<p class='caption'>Both axes are logarithmic. Whiskers are the 95% interval for this model on other texts; "
        "where a method has several seeds, the line is their geometric mean. The dashed vertical line is the training "
        "length. A cross at the top marks where a method stops being defined.</p>"
    )
    return _section("curves", "Perplexity against context length", body)


def _spoken(line: Line) -> str:
    if not line.defined:
        return line.gap[1] if line.gap else "has no rows"
    first, last = line.defined[0], line.defined[-1]
    text = f"{number(first.ppl or 0)} at {first.ctx}"
    if last is not first:
        text += f", {number(last.ppl or 0)} at {last.ctx}"
    return text + (f", {line.gap[1]}" if line.gap else "")


def _interactive(index: int, panel: Panel, looks: Mapping[Line, Style]) -> str:
    lines = sorted(
        panel.lines, key=lambda line: -(line.defined[-1].ppl or 0) if line.defined and not line.gap else -math.inf
    )
    legend = "".join(
        f'<li><button type="button" aria-pressed="true" data-line="{place}">'
        f"{_swatch(looks[line])}{_e(line.name)}</button></li>"
        for place, line in enumerate(lines)
    )
    spec = json.dumps(_finite(_plot(panel, lines, looks))).replace("<", "\\u003c")
    name = _e(panel.protocol["name"])
    return f"""<figure>
<figcaption><strong>By the protocol “{name}”</strong>: {_e(protocol_words(panel.protocol))}.
<span class="facts">{_e(protocol_facts(panel.protocol))}</span></figcaption>
<div class="plot" role="img" aria-label="Curves by the protocol {name}; the table below has the numbers"></div>
<script type="application/json">{spec}</script>
<ul class="legend" aria-label="Lines shown">{legend}</ul>
</figure>
"""


def _swatch(style: Style) -> str:
    dashes = ("", "5 2", "1.5 2", "6 2 1.5 2", "8 3", "8 3 1.5 3")
    colours = f"--light:{style.colour};--dark:{_lighter(style.colour)}"
    mark = "" if style.marker is None else SWATCH_MARKERS[style.marker]
    stroke = f'stroke-width="{style.width:.1f}" stroke-dasharray="{dashes[style.dash]}"'
    return (
        f'<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true" style="{colours}">'
        f'<line x1="1" x2="25" y1="5" y2="5" {stroke}/>{mark}</svg>'
    )


def _lighter(colour: str) -> str:
    """The colour for a dark page: mixed with white until it reads there."""
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(part + 0.4 * (255 - part)):02x}" for part in parts)


def _plot(panel: Panel, lines: Sequence[Line], looks: Mapping[Line, Style]) -> dict[str, Any]:
    """A panel as data and layout of plotly.js; `meta` of a trace says which line it belongs to, and its dark colour."""
    low, high = ppl_limits(panel)
    gaps = sum(line.gap is not None for line in lines)
    top = high * (high / low) ** (0.07 * gaps)  # headroom for crosses
    traces: list[dict[str, Any]] = []
    crosses = 0
    for place, line in enumerate(lines):
        style = looks[line]
        meta = {"line": place, "light": style.colour, "dark": _lighter(style.colour)}
        common = {"meta": meta, "name": _plain(line.name), "hovertemplate": "%{hovertext}<extra></extra>"}
        if len(line.members) > 1:
            for run, member in zip(line.runs, line.members, strict=True):
                points = [point for point in member if point.ppl is not None]
                hover = [_hover(line, point, run) for point in points]
                seed = {
                    "mode": "lines",
                    "line": {"width": 0.7, "color": style.colour},
                    "opacity": 0.6,
                    "hovertext": hover,
                }
                traces.append(common | seed | _xy(points))
        points = list(line.defined)
        symbol = PLOTLY_MARKERS[style.marker or 0]
        big = ["triangle-up" if (point.ppl or 0) > CAP else symbol for point in points]
        traces.append(
            common
            | {
                "mode": "lines" if style.marker is None else "lines+markers",
                "line": {"width": style.width, "color": style.colour, "dash": PLOTLY_DASHES[style.dash]},
                "marker": {"size": 7, "color": style.colour, "symbol": big},
                "hovertext": [_hover(line, point) for point in points],
                "error_y": _whiskers(points, style),
            }
            | _xy(points)
        )
        if line.gap:
            height = low * (top / low) ** (1 - 0.06 * (crosses + 0.5))
            traces += [common | trace for trace in _cross(line, style, height, panel.ctxs)]
            crosses += 1
    ticks = ppl_ticks(low, min(high, CAP))
    ctxs = panel.ctxs
    return {
        "data": traces,
        "layout": {
            "xaxis": {
                "type": "log",
                "title": {"text": "context length at evaluation (tokens)"},
                "tickvals": ctxs,
                "ticktext": [ctx_label(ctx) for ctx in ctxs],
                "range": [math.log10(ctxs[0] / 1.1), math.log10(ctxs[-1] * 1.1)],
            },
            "yaxis": {
                "type": "log",
                "title": {"text": "perplexity per token"},
                "tickvals": ticks,
                "ticktext": [f"{tick:g}" for tick in ticks],
                "range": [math.log10(low), math.log10(top)],
            },
            "shapes": [_vertical(length) for length in panel.train_ctxs],
            "annotations": [_vertical_label(length) for length in panel.train_ctxs],
        },
    }


def _cross(line: Line, style: Style, height: float, ctxs: Sequence[int]) -> list[dict[str, Any]]:
    """A cross with the reason where a line has no number, and a dotted way to it from the line's last point."""
    assert line.gap is not None
    ctx, words = line.gap
    late = math.log(ctx / ctxs[0]) > 0.6 * math.log(ctxs[-1] / ctxs[0])
    cross = {
        "mode": "markers+text",
        "x": [ctx],
        "y": [height],
        "marker": {"size": 9, "symbol": "x-thin", "line": {"width": 2.2, "color": style.colour}},
        "text": [_plain(f"{line.name}: {words}   " if late else f"   {line.name}: {words}")],
        "textposition": "middle left" if late else "middle right",
        "textfont": {"color": style.colour},
        "hovertext": [f"<b>{_plain(line.name)}</b><br>{_plain(words)}<br>{_plain(_why(line))}".removesuffix("<br>")],
    }
    before = [point for point in line.defined if point.ctx < ctx]
    if not before:
        return [cross]
    way = {"mode": "lines", "line": {"width": 1, "color": style.colour, "dash": "dot"}, "hoverinfo": "skip"}
    ends = {"x": [before[-1].ctx, ctx], "y": [min(before[-1].ppl or 0, CAP), height], "hovertemplate": None}
    return [way | ends, cross]


def _plain(text: str) -> str:
    """Text for plotly, which reads a few HTML tags in names and hovers."""
    return html.escape(text, quote=False)


def _xy(points: Sequence[Point]) -> dict[str, Any]:
    return {"x": [point.ctx for point in points], "y": [min(point.ppl or 0, CAP) for point in points]}


def _whiskers(points: Sequence[Point], style: Style) -> dict[str, Any]:
    shown = [point.low is not None and point.high is not None and (point.ppl or 0) <= CAP for point in points]
    up = [min(p.high or 0, CAP) - (p.ppl or 0) if ok else 0 for p, ok in zip(points, shown, strict=True)]
    down = [(p.ppl or 0) - (p.low or 0) if ok else 0 for p, ok in zip(points, shown, strict=True)]
    bars = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
    return bars | {"thickness": 1.2, "width": 0, "color": style.colour, "visible": any(shown)}


def _hover(line: Line, point: Point, run: str | None = None) -> str:
    lines = [f"<b>{_plain(line.name if run is None else run)}</b>"]
    lines.append(f"ctx {point.ctx}, {point.ctx / line.train_ctx:g} × training")
    lines.append(f"perplexity {number(point.ppl or 0)}{_plain(_around(point))}")
    if point.bits_per_byte is not None:
        lines.append(f"{point.bits_per_byte:.3f} bits per byte")
    if point.tokens is not None and point.documents is not None:
        lines.append(f"{point.tokens:,} targets of {point.documents} documents")
    return "<br>".join(lines)


def _around(point: Point) -> str:
    """What surrounds a perplexity: its interval, or the spread of the seeds."""
    if point.low is not None and point.high is not None:
        return f" ({number(point.low)} to {number(point.high)})"
    if point.spread is not None:
        return f" (seeds {number(point.spread[0])} to {number(point.spread[1])})"
    return ""


def _vertical(length: int) -> dict[str, Any]:
    ends = {"x0": length, "x1": length, "y0": 0, "y1": 1, "yref": "paper"}
    return {"type": "line", "line": {"width": 1.2, "dash": "dash"}, "layer": "below"} | ends


def _vertical_label(length: int) -> dict[str, Any]:
    where = {"x": math.log10(length), "y": 1, "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
    return {"text": f"trained at {length}", "showarrow": False, "font": {"size": 12}} | where


def _scripts() -> list[str]:
    """plotly.js, with its licence at the top, and the few lines that draw with it."""
    from plotly.offline import get_plotlyjs

    # An HTML parser turns every line end into \n before the policy's digest is taken.
    library = get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")
    assert "</script" not in library.lower()
    return [library, SCRIPT]


# Numbers, protocols, context -----------------------------------------------------------------------------------------


def _number_section(drawn: Sequence[Panel]) -> str:
    if not drawn:
        return ""
    body = "".join(_number_table(panel) for panel in drawn)
    body += (
        '<p class="caption">Small numbers are the 95% interval for this model on other texts, or the lowest and '
        "highest seed where there are several.</p>"
    )
    return _section("numbers", "Perplexities", body)


def _number_table(panel: Panel) -> str:
    ctxs = panel.ctxs
    heads = "".join(
        f'<th scope="col">{ctx}{"<small>trained</small>" if ctx in panel.train_ctxs else ""}</th>' for ctx in ctxs
    )
    reasons: list[str] = []
    rows = []
    for line in panel.lines:
        points = {point.ctx: point for point in line.points}
        reason = _why(line)
        if reason and f"{line.name}: {reason}" not in reasons:
            reasons.append(f"{line.name}: {reason}")
        note = len(reasons) if reason else None
        cells = "".join(_number_cell(points.get(ctx), note) for ctx in ctxs)
        rows.append(f'<tr><th scope="row">{_e(line.name)}</th>{cells}</tr>')
    notes = "".join(f"<li>{_e(reason)}</li>" for reason in reasons)
    name = _e(panel.protocol["name"])
    return f"""<div class="scroll" tabindex="0" role="region" aria-label="Perplexities by the protocol {name}">
<table class="ppl"><caption>Protocol “{name}”: perplexity by context length in tokens</caption>
<thead><tr><th scope="col">Method</th>{heads}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>
{f'<ol class="why">{notes}</ol>' if notes else ""}
"""


def _number_cell(point: Point | None, note: int | None) -> str:
    if point is None:
        return '<td class="gap">not measured</td>'
    if point.ppl is None:
        return f'<td class="gap">{_e(point.status)}{f"<sup>{note}</sup>" if note else ""}</td>'
    around = _around(point).strip(" ()")
    return f"<td>{number(point.ppl)}{f'<small>{_e(around)}</small>' if around else ''}</td>"


PROTOCOL_KEYS = {
    "stride": "targets per window (stride)",
    "last": "targets per block (k)",
    "documents": "documents used",
    "left_out": "documents left out as too short",
    "span": "tokens of a block (span)",
    "max_ctx": "longest context the targets allow",
    "tokens": "budget of spanned targets",
    "unused": "documents beyond the budget",
    "tokenizer": "tokeniser",
    "bos": "begin-of-sequence token",
    "dtype": "precision",
    "data": "data",
    "data_digest": "data digest",
    "targets_digest": "targets digest",
    "document_digests": "document digests",
    "authors": "authors",
    "split": "split",
}
OWNER = {"stride": "sliding", "last": "last"}  # a parameter of one protocol says nothing in another


def _protocol_section(drawn: Sequence[Panel]) -> str:
    if not drawn:
        return ""
    boxes = []
    for panel in drawn:
        protocol = panel.protocol
        keys = [key for key in (*PROTOCOL_KEYS, *sorted(protocol)) if key in protocol and key != "name"]
        keys = [key for key in dict.fromkeys(keys) if OWNER.get(key, protocol["name"]) == protocol["name"]]
        keys = [key for key in keys if _known(protocol[key])]
        words = protocol_words(protocol)
        facts = "".join(
            f"<div><dt>{_e(PROTOCOL_KEYS.get(key, key))}</dt><dd>{_e(_said(protocol[key]))}</dd></div>" for key in keys
        )
        boxes.append(
            f'<div class="protocol"><h3>{_e(protocol["name"])}</h3><p>{_e(words[0].upper() + words[1:])}.</p>'
            f"<dl>{facts}</dl></div>"
        )
    intro = (
        "<p>Perplexity is the exponential of the mean loss over all targets. Documents are never joined, the first "
        "token of a document is never scored, and a document too short for the longest context is left out at every "
        "context. Numbers may be compared only where the targets digest is the same.</p>"
    )
    return _section("protocol", "What was scored", intro + "".join(boxes))


def _known(value: object) -> bool:
    return any(each is not None for each in value) if isinstance(value, list) else value is not None


def _said(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and len(value) > 6:
        return f"{len(value)} entries, listed in results.json"
    return value if isinstance(value, str) else json.dumps(_finite(value))


def _context_section(drawn: Sequence[Panel]) -> str:
    """Tables of context gain and window control, for the protocols that can tell."""
    tables = "".join(_context_table(panel) for panel in drawn)
    if not tables:
        return ""
    intro = (
        "<p>A flat curve can mean that a method uses the longer context, or only that it ignores what it cannot use. "
        "Two numbers tell them apart. The <em>context gain</em> is the loss at the training length minus the loss at "
        "the longest context, on the same targets: positive where more context helps. The <em>window control</em> runs "
        "the same weights but lets every layer see only the last W tokens: a method that does no better than its own "
        f"window shows no use of anything older. Differences up to {EQUAL} nats (3% of a perplexity) are called equal "
        "here; these are readings of single estimates, not tests.</p>"
    )
    return _section("context", "Does it use the context, or only survive it?", intro + tables)


def _context_table(panel: Panel) -> str:
    ctx = panel.ctxs[-1]
    windows = {_family(line): line for line in panel.lines if line.window is not None}
    rows = []
    for line in panel.lines:
        if line.window is not None or line.train_ctx == ctx:
            continue
        end, start = _loss(line, ctx), _loss(line, line.train_ctx)
        control = windows.get(_family(line))
        walled = _loss(control, ctx) if control else None
        gain = None  # only `last` changes nothing but the context
        if panel.protocol["name"] == "last" and start is not None and end is not None:
            gain = start - end
        if end is None or (gain is None and walled is None):
            continue
        cells = (
            _nats(gain) if gain is not None else "–",
            number(math.exp(end)),
            f"{number(math.exp(walled))}<small>W = {control.window}</small>" if control and walled is not None else "–",
        )
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(
            f'<tr><th scope="row">{_e(line.name)}</th>{numbers}<td class="text">{_reading(gain, end, walled)}</td></tr>'
        )
    if not rows:
        return ""
    name = _e(panel.protocol["name"])
    return f"""<div class="scroll" tabindex="0" role="region" aria-label="Use of context by the protocol {name}">
<table><caption>Protocol “{name}”, at {ctx} tokens</caption>
<thead><tr><th scope="col">Method</th><th scope="col">Context gain<small>nats</small></th>
<th scope="col">Perplexity</th><th scope="col">Under its window</th>
<th scope="col" class="text">Reading</th></tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>
"""


def _family(line: Line) -> tuple[object, ...]:
    return line.pos, line.scaling, line.factor, line.train_ctx, line.runs


def _loss(line: Line, ctx: int) -> float | None:
    point = next((point for point in line.points if point.ctx == ctx), None)
    return math.log(point.ppl) if point is not None and point.ppl is not None else None


def _reading(gain: float | None, end: float, walled: float | None) -> str:
    words = []
    if gain is not None:
        words.append("context helps" if gain > EQUAL else "context hurts" if gain < -EQUAL else "flat")
    if walled is not None:
        words.append(
            "worse than its own window"
            if end - walled > EQUAL
            else "better than its own window, so it uses older tokens"
            if end - walled < -EQUAL
            else "equal to its own window: no use of older tokens shows"
        )
    return "; ".join(words)


def _command_section(commands: Sequence[str]) -> str:
    if not commands:
        return ""
    lines = "\n".join(commands)
    return _section("reproduce", "How to reproduce", f"<pre><code>{_e(lines)}</code></pre>")


def _commands(evals: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Commands that give these numbers again, from the runs they name."""
    commands = []
    if verdicts:
        commands.append(shlex.join(["ropelab", "reproduce", *dict.fromkeys(str(item["claim"]) for item in verdicts)]))
    for item in evals:
        protocol = item["protocol"]
        lengths = [str(row["ctx"]) for row in item["rows"]]
        words = ["ropelab", "eval", item["run"], "--ctx", ",".join(lengths) + ("," if len(lengths) == 1 else "")]
        words += ["--protocol", protocol["name"], "--scaling", item["scaling"]]
        if item["scaling"] != "none":
            words += ["--factor", "auto-row" if item.get("factor") is None else f"{item['factor']:g}"]
        own = [key for key in ("stride", "last") if OWNER[key] == protocol["name"]]
        words += [f"eval.{key}={protocol[key]}" for key in (*own, "max_ctx", "tokens") if protocol.get(key) is not None]
        if item.get("window") is not None:
            words.append(f"eval.window={item['window']}")
        commands.append(shlex.join(map(str, words)))
    return list(dict.fromkeys(commands))


def _manifest_section(manifest: Mapping[str, Any]) -> str:
    facts = {key: value for key, value in manifest.items() if key != "commands"}
    rows = "".join(
        f'<tr><th scope="row">{_e(key)}</th><td class="text">{_e(_said(value))}</td></tr>'
        for key, value in _flat(facts)
    )
    if not rows:
        return ""
    table = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Versions and settings"><table>{rows}</table></div>'
    )
    if len(_flat(facts)) > 24:
        table = f"<details><summary>All {len(_flat(facts))} values</summary>{table}</details>"
    return _section("versions", "Versions and settings", table)


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as (dotted key, value)."""
    pairs: list[tuple[str, Any]] = []
    for key, each in value.items():
        pairs += _flat(each, f"{prefix}{key}.") if isinstance(each, Mapping) else [(f"{prefix}{key}", each)]
    return pairs


# The terminal --------------------------------------------------------------------------------------------------------


def _terminal_cell(point: Point | None) -> str:
    if point is None:
        return "–"
    if point.ppl is None:
        return point.status
    text = number(point.ppl)
    ends = (point.low, point.high) if point.spread is None else point.spread
    if ends[0] is None or ends[1] is None or point.ppl >= CAP:
        return text
    places = len(text.partition(".")[2])  # as many as the perplexity itself shows
    return f"{text} ±{(ends[1] - ends[0]) / 2:.{places}f}"


def _why(line: Line) -> str:
    first = next((point for point in line.points if point.ppl is None), None)
    return first.reason or "" if first else ""


# Style and script ----------------------------------------------------------------------------------------------------


SCRIPT = """
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const boxes = [...document.querySelectorAll(".plot")];
  const specs = new Map(boxes.map(box => [box, JSON.parse(box.nextElementSibling.textContent)]));
  const off = new Map(boxes.map(box => [box, new Set()]));

  function draw(box, paper) {
    const { data, layout } = structuredClone(specs.get(box));
    const ink = paper ? "#1d2126" : css("--ink"), rule = paper ? "#d9dce1" : css("--rule");
    const back = paper ? "#ffffff" : css("--page"), soft = paper ? "#5c6470" : css("--soft");
    for (const trace of data) {
      const colour = dark.matches && !paper ? trace.meta.dark : trace.meta.light;
      for (const part of [trace.line, trace.marker, trace.marker && trace.marker.line, trace.error_y, trace.textfont])
        if (part && part.color) part.color = colour;
      trace.visible = !off.get(box).has(trace.meta.line);
    }
    const narrow = box.clientWidth < 560;
    Object.assign(layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
      height: narrow ? 360 : 460, margin: { l: narrow ? 48 : 62, r: 14, t: 26, b: 52 },
      font: { family: css("--sans"), size: narrow ? 11 : 13, color: ink },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink },
      hoverlabel: { bgcolor: back, bordercolor: soft, align: "left", font: { color: ink, family: css("--sans") } },
    });
    for (const axis of [layout.xaxis, layout.yaxis])
      Object.assign(axis, { gridcolor: rule, linecolor: soft, tickcolor: soft, zeroline: false, ticks: "outside" });
    for (const axis of [layout.xaxis, layout.yaxis])
      axis.title.font = { size: narrow ? 11 : 13, color: soft };
    layout.xaxis.showgrid = false;
    layout.xaxis.showline = layout.yaxis.showline = true;
    for (const shape of layout.shapes) shape.line.color = ink;
    return Plotly.react(box, data, layout, {
      responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    });
  }

  const all = paper => Promise.all(boxes.map(box => draw(box, paper)));
  document.getElementById("interactive").hidden = false;
  all(false).then(() => { document.getElementById("still").hidden = true; })
    .catch(() => { document.getElementById("interactive").hidden = true; });
  dark.addEventListener("change", () => all(false));
  addEventListener("beforeprint", () => all(true));
  addEventListener("afterprint", () => all(false));

  for (const box of boxes)
    for (const button of box.parentElement.querySelectorAll("button"))
      button.addEventListener("click", () => {
        const line = Number(button.dataset.line), hidden = off.get(box);
        if (!hidden.delete(line)) hidden.add(line);
        button.setAttribute("aria-pressed", String(!hidden.has(line)));
        draw(box, false);
      });
})();
"""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fdfdfb; --ink: #1d2126; --soft: #5c6470; --rule: #d9dce1; --tint: #f3f3ee;
  --pass: #17703f; --fail: #b3261e; --open: #8a5a00; --side: #17703f1c;
  --sans: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
  --serif: Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, "DejaVu Serif", serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181c; --ink: #e7e8ea; --soft: #a3abb6; --rule: #363c45; --tint: #1d2127;
    --pass: #63c98f; --fail: #ff8a80; --open: #e5b75c; --side: #63c98f26;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 1.0625rem/1.6 var(--serif); }
main, footer { max-width: 54rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding: 3.5rem 0 1rem; }
h1 { font-size: clamp(1.6rem, 4.5vw, 2.3rem); line-height: 1.2; margin: 0 0 1rem; text-wrap: balance; }
h2 {
  font-size: 1.35rem; line-height: 1.3; margin: 3.25rem 0 .75rem; padding-top: 1rem;
  border-top: 1px solid var(--rule);
}
h3 { font-size: 1.08rem; line-height: 1.4; margin: 0; font-weight: 600; text-wrap: pretty; }
p { margin: 0 0 .9rem; max-width: 42rem; text-wrap: pretty; overflow-wrap: anywhere; }
.found { font-size: 1.25rem; line-height: 1.5; max-width: 46rem; }
.notes, .why { color: var(--soft); font-size: .95rem; margin: .25rem 0 .75rem; padding-left: 1.2rem; max-width: 42rem; }
.notes li, .why li { overflow-wrap: anywhere; }
.caption, .facts, .source, .numbers, small, .mark, figcaption, table, .legend, dl, footer, pre, .badge, svg text {
  font-family: var(--sans);
}
.caption, figcaption { font-size: .875rem; line-height: 1.5; color: var(--soft); max-width: 46rem; }
figcaption strong { color: var(--ink); }
.facts { display: block; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }

.verdict { border-left: 3px solid var(--open); padding: .2rem 0 .2rem 1.1rem; margin: 1.9rem 0; break-inside: avoid; }
.verdict.pass { border-color: var(--pass); } .verdict.fail { border-color: var(--fail); }
.badge { font-size: .8rem; font-weight: 700; letter-spacing: .06em; margin: 0 0 .15rem; color: var(--open); }
.pass .badge { color: var(--pass); } .fail .badge { color: var(--fail); }
.reason { margin: .6rem 0 .2rem; }
.source { font-size: .84rem; color: var(--soft); margin: 0; max-width: none; }
.source code { font-size: .95em; color: var(--ink); }
.mark {
  display: inline-block; font-size: .76rem; line-height: 1.3; padding: 0 .4em; white-space: nowrap;
  border: 1px solid var(--rule); border-radius: 3px; color: var(--soft);
}
.check {
  display: grid; grid-template-columns: minmax(0, 1fr) 17rem; column-gap: 1.5rem; align-items: center;
  padding: .55rem 0; border-bottom: 1px solid var(--rule);
}
.check p { margin: 0; }
.what { font-size: .98rem; }
.numbers { font-size: .84rem; line-height: 1.45; color: var(--soft); font-variant-numeric: tabular-nums; }
.numbers { text-wrap: wrap; }
.check .numbers { grid-column: 1; }
.check svg { grid-column: 2; grid-row: 1 / span 3; width: 100%; height: auto; overflow: visible; }
.sign { font-weight: 700; color: var(--open); } .sign.pass { color: var(--pass); } .sign.fail { color: var(--fail); }
.check svg text { font-size: 10.5px; fill: var(--soft); }
.axis, .zero { stroke: var(--soft); stroke-width: .8; } .zero { stroke-dasharray: 2 2; }
.tau { stroke: var(--ink); stroke-width: 1.4; } .pass-side { fill: var(--side); }
.interval { stroke: var(--open); stroke-width: 2.6; } .theta { fill: var(--open); }
.interval.pass { stroke: var(--pass); } .theta.pass { fill: var(--pass); }
.interval.fail { stroke: var(--fail); } .theta.fail { fill: var(--fail); }

figure { margin: 1.25rem 0 1.75rem; break-inside: avoid; }
[hidden] { display: none !important; }
#still img { display: block; max-width: 100%; height: auto; background: #fff; }
.plot { width: 100%; min-height: 360px; }
.legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: .15rem .35rem; margin: .25rem 0 0; padding: 0;
  font-size: .82rem;
}
.legend button {
  font: inherit; color: var(--ink); background: none; border: 1px solid transparent; border-radius: 4px;
  padding: .2rem .45rem; cursor: pointer; display: inline-flex; align-items: center; gap: .4rem; text-align: left;
}
.legend button:hover { border-color: var(--rule); }
.legend button:focus-visible, .scroll:focus-visible { outline: 2px solid var(--soft); outline-offset: 1px; }
.legend button[aria-pressed="false"] { color: var(--soft); text-decoration: line-through; }
.legend button[aria-pressed="false"] svg { opacity: .25; }
.swatch { width: 26px; height: 10px; flex: none; --c: var(--light); }
.swatch line, .swatch path { stroke: var(--c); } .swatch circle { fill: var(--c); } .swatch path { fill: var(--page); }
@media (prefers-color-scheme: dark) { .swatch { --c: var(--dark); } }

.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .89rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
.ppl { min-width: min(100%, 34rem); }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; white-space: nowrap; }
sup { font-size: .72em; line-height: 0; padding-left: .1em; }
header + section h2 { margin-top: 1.5rem; }
th, td { padding: .38rem .9rem .38rem 0; text-align: right; vertical-align: top; white-space: nowrap; }
th:first-child { text-align: left; font-weight: 500; position: sticky; left: 0; background: var(--page); }
thead th { font-weight: 600; border-bottom: 1.5px solid var(--ink); vertical-align: bottom; }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
td.text, th.text { text-align: left; white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
td small, th small { display: block; font-size: .76rem; font-weight: 400; color: var(--soft); }
.gap { color: var(--soft); font-style: italic; }
.protocol { background: var(--tint); padding: .9rem 1.1rem 1rem; margin: 1rem 0; break-inside: avoid; }
.protocol p { margin: .15rem 0 .6rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .45rem 1.5rem; margin: 0; }
dl { font-size: .86rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--tint); padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.6; }
summary { cursor: pointer; font-family: var(--sans); font-size: .89rem; }
footer { color: var(--soft); font-size: .84rem; padding-top: 2rem; padding-bottom: 3rem; }

@media (max-width: 40rem) {
  header { padding-top: 2rem; }
  .check { grid-template-columns: minmax(0, 1fr); }
  .check svg { grid-column: 1; grid-row: auto; max-width: 22rem; }
  .verdict { padding-left: .85rem; }
}
@media print {
  :root {
    --page: #fff; --ink: #000; --soft: #444; --rule: #bbb; --tint: #f4f4f4;
    --pass: #17703f; --fail: #b3261e; --open: #8a5a00; --side: #17703f1c;
  }
  body { font-size: 10pt; } main, footer { max-width: none; padding: 0; }
  h2 { break-after: avoid; } .scroll { overflow: visible; } pre { white-space: pre-wrap; }
  .swatch { --c: var(--light); } .modebar { display: none !important; } tr { break-inside: avoid; }
}
"""
