"""Pictures made of panels one below the other, each with a caption for a reader who meets it for the first time."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ropelab.report.figures.theme import GREY, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Part:
    """One panel: how to draw it, its title, its caption; `bar` says what the colour bar reads."""

    draw: Any  # (Axes) -> artist for the colour bar | None
    title: str
    caption: str
    height: float = 2.7
    bar: str | None = None
    below: float = 0.62  # inches for the labels of the horizontal axis


def stack(title: str, parts: Sequence[Part], notes: Sequence[str] = ()) -> Figure:
    """Panels one below the other, each caption to the right of its panel; notes below the title."""
    width, left, plot, text = 11.0, 0.95, 5.65, 7.62
    said = [line for note in notes for line in textwrap.wrap(f"{note[0].upper()}{note[1:]}.", 128)]
    top, above = 0.55 + 0.17 * len(said), 0.42
    # a caption may be taller than its panel: a line of it is 8.8 x 1.42 points
    room = [max(part.height + part.below, 0.3 + 0.174 * len(_lines(part)) + 0.3) for part in parts]
    tall = top + sum(above + high for high in room)
    figure = new_figure(width, tall)
    figure.text(0.14 / width, 1 - 0.3 / tall, title, size=13, weight="bold", va="top")
    if said:
        figure.text(0.14 / width, 1 - 0.6 / tall, "\n".join(said), size=8.8, va="top", color=GREY)
    edge = tall - top
    for part, high in zip(parts, room, strict=True):
        edge -= above + part.height
        axes = figure.add_axes((left / width, edge / tall, plot / width, part.height / tall))
        artist = part.draw(axes)
        if part.bar is not None:
            where = ((left + plot + 0.1) / width, edge / tall, 0.11 / width, part.height / tall)
            bar = figure.colorbar(artist, cax=figure.add_axes(where))
            bar.outline.set_visible(False)
            bar.ax.tick_params(labelsize=7.5, length=2)
            bar.set_label(part.bar, size=7.5, color=GREY, labelpad=2)
        head = (edge + part.height) / tall
        figure.text(text / width, head, part.title, size=10.5, weight="bold", va="top")
        body = "\n".join(_lines(part))
        figure.text(text / width, head - 0.27 / tall, body, size=8.8, va="top", linespacing=1.42, color="#3a4048")
        edge -= high - part.height
    return figure


def _lines(part: Part) -> list[str]:
    return textwrap.wrap(part.caption, 50)
