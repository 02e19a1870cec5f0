"""The interactive curves of the page, drawn by plotly.js, and the picture that they stand in for."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ropelab.report.assets import SCRIPT
from ropelab.report.figures import (
    CAP,
    Line,
    Panel,
    Point,
    Style,
    around,
    ctx_label,
    number,
    ppl_limits,
    ppl_ticks,
    protocol_facts,
    protocol_words,
)
from ropelab.report.markup import esc, section
from ropelab.report.results import finite

# in the order of DASHES and MARKERS in figures/lines.py
PLOTLY_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
PLOTLY_MARKERS = ("circle", "square-open", "triangle-up-open", "diamond-open", "triangle-down-open", "cross-open")
SWATCH_MARKERS = (
    '<circle cx="13" cy="5" r="2.6"/>',
    '<path d="M10.5 2.5h5v5h-5z"/>',
    '<path d="M13 2l3 5.5h-6z"/>',
    '<path d="M13 1.8l3.2 3.2-3.2 3.2-3.2-3.2z"/>',
    '<path d="M13 8l3-5.5h-6z"/>',
    '<path d="M12 2.5h2v1.5h1.5v2h-1.5v1.5h-2v-1.5h-1.5v-2h1.5z"/>',
)


def curve_section(drawn: Sequence[Panel], looks: Mapping[Line, Style], picture: bytes) -> str:
    """The section of the curves: `picture`, a PNG file, until the interactive curves have replaced it."""
    if not drawn:
        return ""
    words = "; ".join(
        f"{panel.protocol.name}: " + ", ".join(f"{line.name} {_spoken(line)}" for line in panel.lines)
        for panel in drawn
    )
    figures = "".join(_interactive(panel, looks) for panel in drawn)
    still = base64.b64encode(picture).decode()
    body = (
        f'<div id="interactive" hidden>{figures}</div>'
        f'<figure id="still"><img alt="Perplexity against context length. {esc(words)}" '
        f'src="data:image/png;base64,{still}"></figure>'
        "<p class='caption'>Both axes are logarithmic. Whiskers are the 95% interval, of one run on other texts, of "
        "three seeds or more over seeds; the line of several seeds is their geometric mean, the thin ones are the "
        "seeds. The dashed vertical line is the training "
        "length. A cross at the top marks where a method stops being defined.</p>"
    )
    return section("curves", "Perplexity against context length", body)


def plot_scripts() -> list[str]:
    """plotly.js, with its licence at the top, and the few lines that draw with it."""
    from plotly.offline import get_plotlyjs

    # An HTML parser turns every line end into \n before the policy's digest is taken.
    library = get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")
    assert "</script" not in library.lower()
    return [library, SCRIPT]


def _spoken(line: Line) -> str:
    if not line.defined:
        return line.gap[1] if line.gap else "has no rows"
    first, last = line.defined[0], line.defined[-1]
    text = f"{number(first.ppl or 0)} at {first.ctx}"
    if last is not first:
        text += f", {number(last.ppl or 0)} at {last.ctx}"
    return text + (f", {line.gap[1]}" if line.gap else "")


def _interactive(panel: Panel, looks: Mapping[Line, Style]) -> str:
    lines = sorted(
        panel.lines, key=lambda line: -(line.defined[-1].ppl or 0) if line.defined and not line.gap else -math.inf
    )
    legend = "".join(
        f'<li><button type="button" aria-pressed="true" data-line="{place}">'
        f"{_swatch(looks[line])}{esc(line.name)}</button></li>"
        for place, line in enumerate(lines)
    )
    spec = json.dumps(finite(_plot(panel, lines, looks))).replace("<", "\\u003c")
    name = esc(panel.protocol.name)
    return f"""<figure>
<figcaption><strong>By the protocol “{name}”</strong>: {esc(protocol_words(panel.protocol))}.
<span class="facts">{esc(protocol_facts(panel))}</span></figcaption>
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
        "hovertext": [f"<b>{_plain(line.name)}</b><br>{_plain(words)}<br>{_plain(line.reason)}".removesuffix("<br>")],
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
    ends = around(point)
    lines.append(f"perplexity {number(point.ppl or 0)}" + (f" ({ends})" if ends else ""))
    if point.bits_per_byte is not None:
        lines.append(f"{point.bits_per_byte:.3f} bits per byte")
    if point.tokens is not None and point.documents is not None:
        lines.append(f"{point.tokens:,} targets of {point.documents} document{'' if point.documents == 1 else 's'}")
    return "<br>".join(lines)


def _vertical(length: int) -> dict[str, Any]:
    ends = {"x0": length, "x1": length, "y0": 0, "y1": 1, "yref": "paper"}
    return {"type": "line", "line": {"width": 1.2, "dash": "dash"}, "layer": "below"} | ends


def _vertical_label(length: int) -> dict[str, Any]:
    where = {"x": math.log10(length), "y": 1, "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
    return {"text": f"trained at {length}", "showarrow": False, "font": {"size": 12}} | where
