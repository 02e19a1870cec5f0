"""The common look of all pictures, how labels keep apart, and how a picture is saved.

No pyplot and no global state; matplotlib is imported on use.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from ropelab import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GREY, FAINT = "#1d2126", "#5c6470", "#d9dce1"


def theme() -> AbstractContextManager[None]:
    """Within this context, fonts and colours of what is drawn; matplotlib's own settings return after it."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "text.parse_math": False,  # a "$" in a run's name is a "$"
            "font.family": ["DejaVu Sans"],
            "font.size": 8.8,
            "text.color": INK,
            "axes.edgecolor": "#8a919c",
            "axes.labelcolor": GREY,
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": "#8a919c",
            "ytick.color": "#8a919c",
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "axes.unicode_minus": True,
        }
    )


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of a width and height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white")


def text_figure(title: str, text: str) -> Figure:
    """A title and a few sentences, where there is nothing to draw."""
    with theme():
        figure = new_figure(8, 2.1)
        figure.text(0.05, 0.88, title, size=13, weight="bold", va="top")
        figure.text(0.05, 0.7, "\n".join(textwrap.wrap(text, 88)), size=10, va="top", linespacing=1.5)
    return figure


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions in [0, 1] nearest to the wanted ascending ones (least squares) with at least `gap` between neighbours.

    Isotonic regression of wanted[i] - i * gap by pooling adjacent violators; then moved as a whole into the range.
    """
    blocks: list[tuple[float, int]] = []  # mean, size
    for index, value in enumerate(wanted):
        mean, size = value - index * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, size = (mean * size + before * count) / (size + count), size + count
        blocks.append((mean, size))
    flat = [mean for mean, size in blocks for _ in range(size)]
    room = 1 - gap * (len(wanted) - 1)
    return [min(max(value, 0.0), max(room, 0.0)) + index * gap for index, value in enumerate(flat)]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, at once: a reader sees the old file or the whole new one."""
    files.write(path, png(figure))


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file, 160 dots per inch, without a date."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A run may be named in a script that matplotlib's own font lacks: boxes are better than no picture.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()
