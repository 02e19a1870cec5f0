"""Perplexity against context length: one panel a protocol, one line a method."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ropelab.evaluation import EvalResult
from ropelab.report.figures.lines import (
    CAP,
    DASHES,
    MARKERS,
    Line,
    Panel,
    Style,
    ctx_label,
    number,
    panels,
    ppl_limits,
    ppl_ticks,
    protocol_facts,
    protocol_words,
    styles,
)
from ropelab.report.figures.theme import FAINT, GREY, INK, new_figure, spread, text_figure, theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def curves(evals: Sequence[EvalResult], *, title: str) -> Figure:
    """Perplexity against context length, both logarithmic: one panel a protocol, one line a method.

    Whiskers are the 95% interval, of a single run over texts, of three seeds or more over seeds; several seeds are thin
    lines under their geometric mean.
    A cross at the top edge marks the first ctx at which a method is undefined, an arrow a value above CAP.
    """
    drawn = panels(evals)
    if not drawn:
        return text_figure(title, "There is no evaluation to draw yet.")
    looks = styles(drawn)
    labels = [f"{line.name}  {number(line.defined[-1].ppl or 0)}" for p in drawn for line in p.lines if line.defined]
    right = 0.55 + 0.077 * max((len(label) for label in labels), default=10)
    heights = [max(3.5, 0.4 + 0.205 * len(panel.lines)) for panel in drawn]
    width, top, above, below = 6.3 + right, 0.4, 0.92, 0.6  # inches
    with theme():
        figure = new_figure(width, top + sum(above + height + below for height in heights))
        tall = figure.get_figheight()
        figure.text(0.14 / width, 1 - 0.22 / tall, _wrapped(title, width, 12.5), size=12.5, weight="bold", va="top")
        edge = tall - top
        for panel, height in zip(drawn, heights, strict=True):
            edge -= above + height
            axes = figure.add_axes((0.75 / width, edge / tall, (width - 0.75 - right) / width, height / tall))
            _curves_panel(axes, panel, looks, height)
            head = (edge + height) / tall
            figure.text(
                0.14 / width, head + 0.58 / tall, _protocol_title(panel.protocol.name), size=10.5, weight="bold"
            )
            facts = [protocol_words(panel.protocol), protocol_facts(panel)]
            lines = "\n".join(_wrapped(fact, width, 8.3) for fact in facts)
            figure.text(0.14 / width, head + 0.5 / tall, lines, size=8.3, color=GREY, va="top", linespacing=1.3)
            edge -= below
    return figure


def _protocol_title(name: str) -> str:
    return f"Perplexity by the protocol “{name}”"


def _curves_panel(axes: Axes, panel: Panel, looks: Mapping[Line, Style], height: float) -> None:
    low, high = ppl_limits(panel)
    broken = [line for line in panel.lines if line.gap]
    head = 0.19 / height * max(len(broken), 1 if high > CAP else 0)  # share of the axis kept free for crosses
    high = low * (high / low) ** (1 / (1 - head)) if head else high
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ctxs = panel.ctxs
    axes.set_xlim(ctxs[0] / 1.1, ctxs[-1] * 1.1)
    axes.set_ylim(low, high)
    _ticks(axes, ctxs, ppl_ticks(low, min(high, CAP)))
    axes.set_xlabel("context length at evaluation (tokens)")
    axes.set_ylabel("perplexity per token")
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    for length in panel.train_ctxs:
        _training_mark(axes, length, ctxs[0])
    for line in panel.lines:
        _draw_line(axes, line, looks[line])
    for index, line in enumerate(broken):
        _draw_gap(axes, line, looks[line], 1 - (index + 0.55) * 0.19 / height)
    _end_labels(axes, [line for line in panel.lines if line.defined and not line.gap], looks, height)


def _ticks(axes: Axes, ctxs: Sequence[int], ppls: Sequence[float]) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    shown: list[int] = []
    for ctx in ctxs:  # labels that would touch are dropped, the first and the last never
        if not shown or math.log(ctx / shown[-1]) > 0.07 * math.log(ctxs[-1] / ctxs[0]):
            shown.append(ctx)
    if shown[-1] != ctxs[-1]:
        shown[-1] = ctxs[-1]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FixedFormatter([ctx_label(ctx) for ctx in shown]))
    axes.yaxis.set_major_locator(FixedLocator(list(ppls)))
    axes.yaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ppls]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())


def _training_mark(axes: Axes, length: int, first: int) -> None:
    if length < axes.get_xlim()[0] or length > axes.get_xlim()[1]:
        return
    axes.axvline(length, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label="training length")
    side = "left" if length <= first * 1.2 else "center"
    transform = axes.get_xaxis_transform()
    axes.text(length, 1.012, f"trained at {length}", transform=transform, size=8, ha=side, va="bottom", color=INK)


def _draw_line(axes: Axes, line: Line, style: Style) -> None:
    if len(line.members) > 1:
        for member in line.members:
            seed = [(point.ctx, min(point.ppl, CAP)) for point in member if point.ppl is not None]
            axes.plot(*_columns(seed), color=style.colour, linewidth=0.6, alpha=0.6, zorder=2)
    drawn = [(point.ctx, min(point.ppl, CAP)) for point in line.defined if point.ppl is not None]
    axes.plot(
        *_columns(drawn),
        color=style.colour,
        linewidth=style.width,
        dashes=DASHES[style.dash] or (None, None),
        marker="" if style.marker is None else MARKERS[style.marker],
        markersize=4.6,
        markerfacecolor="white" if style.marker else style.colour,
        label=line.name,
        zorder=3,
    )
    for point in line.defined:
        assert point.ppl is not None
        if point.ppl > CAP:
            axes.plot([point.ctx], [CAP], marker="^", markersize=8, color=style.colour, zorder=4)
            note: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "size": 7.5, "color": style.colour}
            axes.annotate(number(point.ppl), (point.ctx, CAP), (0, 6), **note)
        elif point.low is not None and point.high is not None:
            ends = (point.low, min(point.high, CAP))
            axes.vlines(point.ctx, *ends, color=style.colour, linewidth=style.width, alpha=0.45, zorder=2)


def _draw_gap(axes: Axes, line: Line, style: Style, y: float) -> None:
    """A cross at the top edge where a line has no number, tied to the line's last point, with the reason in words."""
    assert line.gap is not None
    ctx, words = line.gap
    across = axes.get_xaxis_transform()
    axes.plot([ctx], [y], "x", transform=across, color=style.colour, markersize=6.5, markeredgewidth=1.8, clip_on=False)
    before = [point for point in line.defined if point.ctx < ctx]
    if before and before[-1].ppl is not None:
        bottom, top = axes.get_ylim()
        height = math.log(min(before[-1].ppl, CAP) / bottom) / math.log(top / bottom)
        path = ([before[-1].ctx, ctx], [height, y])
        axes.plot(*path, transform=across, color=style.colour, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    left, right = axes.get_xlim()
    late = math.log(ctx / left) > 0.6 * math.log(right / left)
    axes.annotate(
        f"{line.name}: {words}",
        (ctx, y),
        (-8 if late else 8, 0),
        xycoords=across,
        textcoords="offset points",
        ha="right" if late else "left",
        va="center_baseline",
        size=8.3,
        color=style.colour,
    )


def _end_labels(axes: Axes, lines: Sequence[Line], looks: Mapping[Line, Style], height: float) -> None:
    """Name and last perplexity of each line right of the axes, at its height, moved apart where they would touch."""
    bottom, top = axes.get_ylim()
    ends = [(line, line.defined[-1]) for line in lines]
    ends.sort(key=lambda end: end[1].ppl or 0)
    wanted = [math.log(min(point.ppl or 1, CAP) / bottom) / math.log(top / bottom) for _, point in ends]
    for (line, point), y in zip(ends, spread(wanted, 0.185 / height), strict=True):
        assert point.ppl is not None
        colour = looks[line].colour
        axes.annotate(
            f"{line.name}  {number(point.ppl)}",
            (point.ctx, min(point.ppl, CAP)),
            (1.035, y),
            textcoords="axes fraction",
            va="center_baseline",
            size=8.6,
            color=colour,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),
                "color": colour,
                "linewidth": 0.5,
                "shrinkA": 1,
                "shrinkB": 4,
            },
        )


def _wrapped(text: str, width: float, size: float) -> str:
    """Break a text for a width in inches; a glyph is about 0.55 of its size (72 points an inch) wide."""
    return "\n".join(textwrap.wrap(text, int((width - 0.3) * 72 / (0.55 * size))))


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]
