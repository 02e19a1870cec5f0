"""Pictures of results and of encodings, drawn with matplotlib from the JSON objects of `eval` and `show`.

No pyplot and no global state: every function returns a `Figure`, `save` writes it. matplotlib is imported on use.

`panels` is where evaluations become lines (one method under one protocol, seeds joined); the report's page and
tables and the terminal read the same lines, so that a number has one origin.
"""

from __future__ import annotations

import io
import json
import math
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ropelab import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAP = 1e4  # perplexities above are drawn at this height, with an arrow and the value beside it

NAMES = {
    "none": "NoPE",
    "learned": "learned",
    "sinusoidal": "sinusoidal",
    "sinusoidal_fairseq": "sinusoidal (fairseq)",
    "rope": "RoPE",
    "alibi": "ALiBi",
    "t5": "T5 bias",
    "kerple_log": "KERPLE-log",
    "kerple_power": "KERPLE-power",
    "sandwich": "Sandwich",
    "xpos": "xPos",
    "fire": "FIRE",
    "cable": "CABLE",
    "fox": "FoX",
    "linear": "PI",
    "ntk": "NTK-aware",
    "dynamic_ntk": "dynamic NTK",
    "dynamic_linear": "dynamic PI",
    "dynamic_yarn": "dynamic YaRN",
    "by_parts": "NTK-by-parts",
    "yarn": "YaRN",
    "longrope": "LongRoPE",
    "llama3": "Llama 3",
    "rerope": "ReRoPE",
    "self_extend": "Self-Extend",
}

# Okabe and Ito's colours and two of Tol's, darkened until each has a contrast of at least 3 on white.
PALETTE = (
    "#0072b2",
    "#d55e00",
    "#00835f",
    "#aa4499",
    "#a87400",
    "#1390a5",
    "#8c3b1e",
    "#3d434b",
    "#882255",
    "#6b7a00",
)
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.8), (1.4, 1.4), (6, 1.6, 1.4, 1.6), (9, 2), (9, 2, 1.4, 2, 1.4, 2))
MARKERS = ("o", "s", "^", "D", "v", "P")

INK, GREY, FAINT = "#1d2126", "#5c6470", "#d9dce1"
SEEN, NEW = "#0072b2", "#d55e00"  # angles met in training, and angles that were not


@dataclass(frozen=True)
class Point:
    """A perplexity at one context length; `ppl` is None exactly where there is no finite number.

    `low`, `high`: the 95% interval over texts of a single run, or None. `spread`: lowest and highest seed, or None.
    """

    ctx: int
    ppl: float | None
    nll: float | None
    low: float | None
    high: float | None
    spread: tuple[float, float] | None
    bits_per_byte: float | None
    factor: float | None
    tokens: int | None
    documents: int | None
    unit: str | None
    status: str
    reason: str | None


@dataclass(frozen=True)
class Line:
    """One method (encoding, scaling, factor, window) under one protocol, its seeds joined by the geometric mean."""

    name: str
    pos: str
    scaling: str
    factor: float | None
    window: int | None
    train_ctx: int
    runs: tuple[str, ...]
    points: tuple[Point, ...]
    members: tuple[tuple[Point, ...], ...]  # the same, run by run

    @property
    def defined(self) -> tuple[Point, ...]:
        """The points that hold a number."""
        return tuple(point for point in self.points if point.ppl is not None)

    @property
    def gap(self) -> tuple[int, str] | None:
        """The first ctx without a number and what to say of it ("undefined past 128"), or None."""
        first = next((point for point in self.points if point.ppl is None), None)
        if first is None:
            return None
        word = first.status if first.status != "ok" else "non-finite"
        before = [point.ctx for point in self.defined if point.ctx < first.ctx]
        return first.ctx, f"{word} past {before[-1]}" if before else f"{word} at {first.ctx}"


@dataclass(frozen=True)
class Panel:
    """All lines that one protocol measured on the same targets: the only ones that may be compared."""

    protocol: Mapping[str, Any]
    lines: tuple[Line, ...]

    @property
    def ctxs(self) -> list[int]:
        return sorted({point.ctx for line in self.lines for point in line.points})

    @property
    def train_ctxs(self) -> list[int]:
        return sorted({line.train_ctx for line in self.lines})


@dataclass(frozen=True)
class Style:
    """How a line is drawn: colour by method, dash by scaling, marker by factor, thin under a window."""

    colour: str
    dash: int  # index into DASHES
    marker: int | None  # index into MARKERS
    width: float


def panels(evals: Iterable[Mapping[str, Any]]) -> list[Panel]:
    """Group `eval` objects by what may be compared, and join the seeds of a method.

    Runs of one method with different seeds become one line: the geometric mean of their perplexities. Two runs with the
    same seed are different experiments and stay apart, told by the run's name.
    """
    evals = list(evals)
    digests: dict[str, Any] = {}  # of a method without any defined row the digest is unknown: it joins the others
    for item in evals:
        if (digest := item["protocol"].get("targets_digest")) is not None:
            digests.setdefault(_scoring(item), digest)
    grouped: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for item in evals:
        scoring = _scoring(item)
        targets = item["protocol"].get("targets_digest") or digests.get(scoring)
        methods = grouped.setdefault(f"{scoring} {targets}", {})
        methods.setdefault(json.dumps(_method(item)), []).append(item)
    return [_panel(list(methods.values())) for methods in grouped.values()]


def styles(drawn: Sequence[Panel]) -> dict[Line, Style]:
    """A style for each line, the same for a method in every panel."""
    lines = [line for panel in drawn for line in panel.lines]
    colours = list(dict.fromkeys((line.pos, line.scaling) for line in lines))
    dashes = ["none", *dict.fromkeys(line.scaling for line in lines if line.scaling != "none")]
    factors = sorted({line.factor for line in lines if line.scaling != "none" and line.factor is not None})
    result = {}
    for line in lines:
        scaled = line.factor if line.scaling != "none" else None
        marker = 0 if scaled is None else factors.index(scaled) % len(MARKERS)
        result[line] = Style(
            colour=PALETTE[colours.index((line.pos, line.scaling)) % len(PALETTE)],
            dash=dashes.index(line.scaling) % len(DASHES),
            marker=None if line.window is not None else marker,
            width=1.0 if line.window is not None else 1.9,
        )
    return result


def method_name(pos: str, scaling: str, factor: float | None, window: int | None) -> str:
    """A method as a reader knows it: "RoPE + YaRN ×8", "ALiBi, window 128"."""
    name = NAMES.get(pos, pos)
    if scaling != "none":
        name += f" + {NAMES.get(scaling, scaling)}"
        if factor is None:
            name += ", factor per ctx"
        elif not (scaling.startswith("dynamic") and factor == 1):  # dynamic methods find their own factor
            name += f" ×{factor:g}"
    return name if window is None else f"{name}, window {window}"


def protocol_words(protocol: Mapping[str, Any]) -> str:
    """What a protocol scores, in one clause."""
    name = str(protocol["name"])
    words = {
        "nonoverlapping": "windows of ctx tokens side by side; the same targets at every ctx, "
        "each with 1 to ctx tokens before it",
        "sliding": f"{protocol.get('stride')} targets a window, each with at least ctx − {protocol.get('stride')} "
        "tokens before it; the same targets at every ctx",
        "last": f"the final {protocol.get('last')} targets of each block; the targets stay, only the context grows",
        "prefix": "one pass over the first ctx tokens of each document; the targets change with ctx",
    }
    return words.get(name, "a protocol of its own")


def protocol_facts(protocol: Mapping[str, Any]) -> str:
    """Documents, data, precision and targets of a protocol, in one line."""
    facts = []
    if protocol.get("documents") is not None:
        out = protocol.get("left_out")
        facts.append(f"{protocol['documents']} documents" + (f", {out} left out as too short" if out else ""))
    if protocol.get("data") is not None:
        facts.append(f"data {protocol['data']}")
    if protocol.get("dtype") is not None:
        facts.append(str(protocol["dtype"]))
    if protocol.get("targets_digest") is not None:
        facts.append(f"targets {str(protocol['targets_digest'])[:8]}")
    return " · ".join(facts)


def number(value: float) -> str:
    """A perplexity in three significant digits: 4.94, 29.6, 2.30e+06."""
    return f"{value:#.3g}" if value < 100 else f"{value:.0f}" if value < CAP else f"{value:.1e}"


def ctx_label(ctx: int) -> str:
    """A context length as it is spoken of: 128, 4096, 16k."""
    return f"{ctx // 1024}k" if ctx >= 8192 and ctx % 1024 == 0 else str(ctx)


def ppl_ticks(low: float, high: float) -> list[float]:
    """Round tick values for a logarithmic axis from low to high, at most about ten of them."""
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 3), (1,)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) <= 11:
            return ticks
    return ticks


def ppl_limits(drawn: Panel) -> tuple[float, float]:
    """Lower and upper end of the perplexity axis of a panel, whiskers and every seed included, cut at CAP."""
    points = [point for line in drawn.lines for group in (line.points, *line.members) for point in group]
    values = [value for point in points for value in (point.ppl, point.low, point.high) if value is not None]
    values = [min(value, CAP) for value in values] or [1.0, 10.0]
    return min(values) / 1.12, max(values) * 1.15


def curves(evals: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """Perplexity against context length, both logarithmic: one panel a protocol, one line a method.

    Whiskers are the 95% interval over texts of a single run; several seeds are thin lines under their geometric mean.
    A cross at the top edge marks the first ctx at which a method is undefined, an arrow a value above CAP.
    """
    drawn = panels(evals)
    if not drawn:
        return _text_figure(title, "There is no evaluation to draw yet.")
    looks = styles(drawn)
    labels = [f"{line.name}  {number(line.defined[-1].ppl or 0)}" for p in drawn for line in p.lines if line.defined]
    right = 0.55 + 0.077 * max((len(label) for label in labels), default=10)
    heights = [max(3.5, 0.4 + 0.205 * len(panel.lines)) for panel in drawn]
    width, top, above, below = 6.3 + right, 0.4, 0.92, 0.6  # inches
    with _look():
        figure = _figure(width, top + sum(above + height + below for height in heights))
        tall = figure.get_figheight()
        figure.text(0.14 / width, 1 - 0.22 / tall, _wrapped(title, width, 12.5), size=12.5, weight="bold", va="top")
        edge = tall - top
        for panel, height in zip(drawn, heights, strict=True):
            edge -= above + height
            axes = figure.add_axes((0.75 / width, edge / tall, (width - 0.75 - right) / width, height / tall))
            _curves_panel(axes, panel, looks, height)
            head = (edge + height) / tall
            figure.text(0.14 / width, head + 0.58 / tall, _protocol_title(panel.protocol), size=10.5, weight="bold")
            facts = [protocol_words(panel.protocol), protocol_facts(panel.protocol)]
            lines = "\n".join(_wrapped(fact, width, 8.3) for fact in facts)
            figure.text(0.14 / width, head + 0.5 / tall, lines, size=8.3, color=GREY, va="top", linespacing=1.3)
            edge -= below
    return figure


def explain(shown: Mapping[str, Any]) -> Figure:
    """What an encoding tells the model, as pictures with captions for a reader who meets it for the first time.

    `shown` is a `show` object. Its coverage holds the turns of training as trained and those at ctx as scaled, so that
    the picture of a scaling shows both spectra.
    """
    title = method_name(shown["pos"], shown["scaling"], shown["factor"], None)
    title += f" at ctx {shown['ctx']}, trained at {shown['train_ctx']}"
    parts: list[_Part] = []
    if shown.get("rotation"):
        parts.append(_rotation_part(shown))
    if shown.get("coverage"):
        parts += [_wavelength_part(shown), _turns_part(shown)]
    if shown.get("bias"):
        parts += [_bias_part(shown), _reach_part(shown)]
    if shown.get("embedding"):
        parts += [_embedding_part(shown), _similarity_part(shown)]
    if not parts:
        return _text_figure(title, _nothing_to_draw(shown))
    with _look():
        return _stack(title, parts)


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


# Evaluations to lines ------------------------------------------------------------------------------------------------


def _scoring(item: Mapping[str, Any]) -> str:
    """How an evaluation scored which text; with the targets digest it says what may be compared."""
    protocol = item["protocol"]
    own = {"sliding": "stride", "last": "last"}.get(protocol["name"], "name")
    keys = ("name", own, "split", "data_digest", "span", "documents", "left_out", "bos", "dtype")
    return json.dumps([item.get("data"), *(protocol.get(key) for key in keys)])


def _panel(methods: Sequence[Sequence[Mapping[str, Any]]]) -> Panel:
    several_lengths = len({item["train_ctx"] for items in methods for item in items}) > 1
    lines: list[Line] = []
    for items in methods:
        latest = {item["run"]: item for item in items}  # a run evaluated twice: the later one counts
        seeds = {item.get("seed") for item in latest.values()}
        if len(seeds) == len(latest):
            lines.append(_line(list(latest.values()), several_lengths, apart=False))
        else:
            lines.extend(_line([item], several_lengths, apart=True) for item in latest.values())
    known = [item for items in methods for item in items if item["protocol"].get("targets_digest") is not None]
    first = known[0] if known else methods[0][0]
    return Panel({"data": first.get("data"), **first["protocol"]}, tuple(lines))


def _method(item: Mapping[str, Any]) -> list[Any]:
    return [item["pos"], item["scaling"], item.get("factor"), item.get("window"), item["train_ctx"]]


def _line(items: list[Mapping[str, Any]], several_lengths: bool, *, apart: bool) -> Line:
    pos, scaling, factor, window, train_ctx = _method(items[0])
    name = method_name(pos, scaling, factor, window)
    if several_lengths:
        name += f", trained at {train_ctx}"
    if apart:
        name += f" ({items[0]['run']})"
    members = tuple(tuple(sorted(map(_point, item["rows"]), key=lambda point: point.ctx)) for item in items)
    by_ctx: dict[int, list[Point]] = {}
    for member in members:
        for point in member:
            by_ctx.setdefault(point.ctx, []).append(point)
    points = tuple(_joined(by_ctx[ctx]) for ctx in sorted(by_ctx))
    runs = tuple(item["run"] for item in items)
    return Line(name, pos, scaling, factor, window, train_ctx, runs, points, members)


def _point(row: Mapping[str, Any]) -> Point:
    ppl = row.get("ppl")
    number_of = row["status"] == "ok" and ppl is not None and math.isfinite(ppl) and ppl > 0
    interval = row.get("ci95") if number_of else None
    if interval is not None and not all(end is not None and math.isfinite(end) for end in interval):
        interval = None
    return Point(
        ctx=row["ctx"],
        ppl=ppl if number_of else None,
        nll=row.get("nll") if number_of else None,
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        spread=None,
        bits_per_byte=row.get("bits_per_byte") if number_of else None,
        factor=row.get("factor"),
        tokens=row.get("tokens"),
        documents=row.get("documents"),
        unit=row.get("unit"),
        status=row["status"] if row["status"] != "ok" or number_of else "non-finite",
        reason=row.get("reason"),
    )


def _joined(points: list[Point]) -> Point:
    """The same ctx over seeds: geometric mean, which is the mean of the nll. One seed without a number: none."""
    missing = next((point for point in points if point.ppl is None), None)
    if missing is not None or len(points) == 1:
        return missing or points[0]
    values = [point.ppl for point in points if point.ppl is not None]
    nll = sum(math.log(value) for value in values) / len(values)
    bits = [point.bits_per_byte for point in points if point.bits_per_byte is not None]
    first = points[0]
    return Point(
        ctx=first.ctx,
        ppl=math.exp(nll),
        nll=nll,
        low=None,
        high=None,
        spread=(min(values), max(values)),
        bits_per_byte=sum(bits) / len(bits) if bits else None,
        factor=first.factor,
        tokens=first.tokens,
        documents=first.documents,
        unit=None,
        status="ok",
        reason=None,
    )


# Perplexity curves ---------------------------------------------------------------------------------------------------


def _protocol_title(protocol: Mapping[str, Any]) -> str:
    return f"Perplexity by the protocol “{protocol['name']}”"


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


# What an encoding does -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """One panel of `explain`: how to draw it, its title, its caption; `bar` says what the colour bar reads."""

    draw: Any  # (Axes) -> artist for the colour bar | None
    title: str
    caption: str
    height: float = 2.7
    bar: str | None = None


def _stack(title: str, parts: Sequence[_Part]) -> Figure:
    """Panels one below the other, each caption to the right of its panel."""
    width, left, plot, text = 11.0, 0.85, 5.75, 7.62
    top, above, below = 0.55, 0.42, 0.62
    tall = top + sum(above + part.height + below for part in parts)
    figure = _figure(width, tall)
    figure.text(0.14 / width, 1 - 0.3 / tall, title, size=13, weight="bold", va="top")
    edge = tall - top
    for part in parts:
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
        body = "\n".join(textwrap.wrap(part.caption, 50))
        figure.text(text / width, head - 0.27 / tall, body, size=8.8, va="top", linespacing=1.42, color="#3a4048")
        edge -= below
    return figure


def _nothing_to_draw(shown: Mapping[str, Any]) -> str:
    if shown["pos"] == "none":
        return (
            "NoPE adds nothing: no vector to the tokens, no rotation of queries and keys, no bias to the scores. "
            "Order comes in through the causal mask alone. Each token sees only the tokens before it, so the first "
            "token averages over one token, the second over two, and a trained model can learn to count from that."
        )
    if shown["pos"] == "learned":
        return (
            f"A learned table gives each of the {shown['train_ctx']} training positions a vector of its own, which is "
            "added to the token there. The vectors start as noise and get their meaning in training, so there is "
            f"nothing to draw before. Position {shown['train_ctx']} and later ones have no vector: the method is "
            "undefined there."
        )
    return (
        f"{NAMES.get(shown['pos'], shown['pos'])} computes its position signal from the text itself, layer by layer. "
        "There is nothing to draw before a text is given."
    )


def _mark_training(axes: Axes, train_ctx: int, ctx: int) -> None:
    """A vertical dashed line at the training length of an axis in tokens from 0 to ctx."""
    if train_ctx >= ctx:
        return
    axes.axvline(train_ctx, color="white", linewidth=2.2, alpha=0.75)  # visible on a dark picture too
    axes.axvline(train_ctx, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.text(train_ctx, 1.02, f"trained to {train_ctx}", transform=axes.get_xaxis_transform(), size=8, ha="center")


def _beyond(shown: Mapping[str, Any]) -> str:
    """The sentence about positions past the training length, where there are any."""
    if shown["ctx"] <= shown["train_ctx"]:
        return f"All {shown['ctx']} positions lie within the training length."
    return "Right of the dashed line are positions that training never showed."


def _inv_freq(shown: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(shown["rotation"]["inv_freq"], dtype=np.float64)


def _rotation_part(shown: Mapping[str, Any]) -> _Part:
    inv_freq, ctx = _inv_freq(shown), int(shown["ctx"])
    factor = shown["rotation"].get("attention_factor") or 1.0
    columns = min(ctx, 920)  # the pixels of the panel
    caption = (
        f"The {2 * len(inv_freq)} rotated dimensions of a query or key form {len(inv_freq)} pairs; each pair is turned "
        "like a clock hand, by a fixed angle per token. Colour is the cosine of the angle, so one period of colours is "
        "one full turn. A score sees only the difference of two angles, and therefore the distance of two tokens. "
    )
    if ctx / columns * inv_freq.max() > math.pi:
        caption += "Pairs that look white turn too fast to be drawn at this width. "
    caption += _beyond(shown)
    if abs(factor - 1) > 1e-9:
        caption += f" Queries and keys are also multiplied by {factor:.4g}, attention scores thus by {factor**2:.4g}."

    def draw(axes: Axes) -> Any:
        step = ctx / columns
        start = np.arange(columns) * step  # (columns,)
        image = mean_cosine(inv_freq, start, step)  # (pairs, columns)
        extent = (0, ctx, len(inv_freq) - 0.5, -0.5)
        artist = axes.imshow(
            image, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1, extent=extent, interpolation="nearest"
        )
        axes.set_xlabel("position (tokens)")
        axes.set_ylabel("pair (0 turns fastest)")
        _mark_training(axes, shown["train_ctx"], ctx)
        return artist

    return _Part(draw, "The angle of each pair", caption, 2.9, "cosine of the angle")


def mean_cosine(inv_freq: np.ndarray, start: np.ndarray, step: float) -> np.ndarray:
    """cos(inv_freq * position), averaged over the positions from start to start + step.

    inv_freq (P,) radians per token, start (N,) tokens; result (P, N). With step 1 or less, the cosine at start itself:
    a mean over many turns is 0, where a sample would draw stripes that are not there.
    """
    angle = inv_freq[:, None] * start[None, :]  # (P, N)
    if step <= 1:
        return np.asarray(np.cos(angle))
    half = inv_freq[:, None] * step / 2  # (P, 1)
    # mean of cos over [a, a + 2h] = cos(a + h) sin(h) / h; np.sinc(x) is sin(pi x) / (pi x)
    mean: np.ndarray = np.cos(angle + half) * np.sinc(half / math.pi)
    return mean


def _turns(shown: Mapping[str, Any], length: str) -> np.ndarray:
    """Full turns of each pair, (pairs,): "train" within train_ctx as trained, "ctx" within ctx as scaled."""
    return np.asarray([pair[f"turns_{length}"] for pair in shown["coverage"]], dtype=np.float64)


def _wavelength_part(shown: Mapping[str, Any]) -> _Part:
    train_ctx, ctx = shown["train_ctx"], shown["ctx"]
    with np.errstate(divide="ignore"):  # a pair that does not turn has no wavelength
        trained: np.ndarray = train_ctx / _turns(shown, "train")  # (pairs,) tokens per full turn
        scaled: np.ndarray = ctx / _turns(shown, "ctx")  # (pairs,)
    turned = trained <= train_ctx
    moved = ~np.isclose(trained, scaled, rtol=1e-6)
    still = int(np.isinf(scaled).sum())
    caption = (
        f"Tokens until a pair is back where it started. Filled, {int(turned.sum())} of {len(turned)} pairs: at least "
        f"one full turn within the {train_ctx} training tokens, so every angle was met in training. Open: less than "
        "one turn, "
    )
    if moved.any():
        caption += f"so that some angles were not. Grey: as trained. {_scaling_name(shown)} moves grey to colour."
    else:
        caption += "so that longer texts bring angles which the model never met."
    if still:
        caption += f" {still} pairs do not turn at all and are not drawn."

    def draw(axes: Axes) -> None:
        pairs = np.arange(len(scaled))
        axes.set_yscale("log")
        for pair in pairs[moved & np.isfinite(trained)]:
            axes.plot([pair], [trained[pair]], "o", color="#b3b8c0", markersize=4, zorder=2)
            if np.isfinite(scaled[pair]):
                axes.plot([pair, pair], [trained[pair], scaled[pair]], color="#b3b8c0", linewidth=0.9, zorder=1)
        for chosen, face, colour in ((turned, SEEN, SEEN), (~turned, "white", NEW)):
            chosen = chosen & np.isfinite(scaled)
            axes.plot(pairs[chosen], scaled[chosen], "o", color=colour, markerfacecolor=face, markersize=5, zorder=3)
        marks = {train_ctx: "trained and evaluated at" if ctx == train_ctx else "trained at"}
        marks.setdefault(ctx, "evaluated at")
        for length, words in marks.items():
            axes.axhline(length, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            below = length < max(marks)
            place: dict[str, Any] = {"textcoords": "offset points", "size": 8, "va": "top" if below else "bottom"}
            where = axes.get_yaxis_transform()
            axes.annotate(f"{words} {length}", (0, length), (3, -3 if below else 2), xycoords=where, **place)
        axes.set_xlabel("pair")
        axes.set_ylabel("wavelength (tokens)")
        _plain_log(axes)

    return _Part(draw, "Wavelengths", caption)


def _turns_part(shown: Mapping[str, Any]) -> _Part:
    ctx, train_ctx = shown["ctx"], shown["train_ctx"]
    met, reached = _turns(shown, "train"), _turns(shown, "ctx")  # (pairs,)
    new = (met < 1) & (reached > met * (1 + 1e-6))
    caption = (
        f"From the turns a pair makes within the {train_ctx} training tokens (dot) to the turns it makes within {ctx} "
        "(triangle). "
    )
    if new.any():
        caption += (
            f"Orange, {int(new.sum())} of {len(new)} pairs: the triangle passes angles below one full turn that were "
            "never trained, the reason why rotary encodings break on longer texts. "
        )
    caption += (
        "Blue: nothing new, because the circle was complete already or because the pair is no further than in training."
    )

    def draw(axes: Axes) -> None:
        pairs = np.arange(len(met))
        axes.set_yscale("log")
        for chosen, colour in ((~new, SEEN), (new, NEW)):
            turning = chosen & (met > 0) & (reached > 0)
            at = pairs[turning]
            axes.vlines(at, met[turning], reached[turning], color=colour, linewidth=2, alpha=0.45)
            axes.plot(at, met[turning], "o", color=colour, markersize=3.6)
            axes.plot(at, reached[turning], "^", color=colour, markersize=5)
        axes.axhline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        place: dict[str, Any] = {"textcoords": "offset points", "size": 8, "va": "bottom", "ha": "right"}
        axes.annotate("one full turn", (1, 1), (-3, 2), xycoords=axes.get_yaxis_transform(), **place)
        axes.set_xlabel("pair")
        axes.set_ylabel("full turns")
        _plain_log(axes)

    return _Part(draw, "Which angles are new", caption)


def _bias(shown: Mapping[str, Any]) -> np.ndarray:
    """(heads, distances); a distance that is cut off (null) is -inf."""
    rows = shown["bias"]["by_distance"]
    return np.asarray([[-math.inf if value is None else value for value in row] for row in rows], dtype=np.float64)


def _bias_part(shown: Mapping[str, Any]) -> _Part:
    bias = _bias(shown)
    floor = -10.0
    caption = (
        "Before the softmax, each head adds this number to the score of a token, by nothing but its distance back. "
        "Lower means less attention: −1 divides a token's weight by 2.7, −10 by 22,000. "
    )
    if bias.min() < floor:
        caption += "The axis is cut at −10, below which a token hardly counts. "
    caption += "Heads differ so that some look near and some far. " + _beyond(shown).replace("positions", "distances")

    def draw(axes: Axes) -> None:
        import matplotlib

        heads, ctx = bias.shape
        top = max(float(bias.max()), 0.0)
        bottom = max(float(bias[np.isfinite(bias)].min()), floor)
        margin = 0.05 * max(top - bottom, 1e-6)
        colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.75, heads))
        ends = []
        for head in range(heads):
            axes.plot(np.arange(ctx), bias[head], color=colours[head], linewidth=1.4)
            inside = np.flatnonzero(bias[head] >= bottom)
            last = int(inside[-1]) if len(inside) else 0
            ends.append((head, last, float(max(bias[head, last], bottom))))
        axes.set_xlim(0, max(ctx - 1, 1))
        axes.set_ylim(bottom - margin, top + margin)
        axes.set_xlabel("distance back (tokens)")
        axes.set_ylabel("added to the score")
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        _mark_training(axes, shown["train_ctx"], ctx)
        named = ends if heads <= 12 else [ends[0], ends[heads // 2], ends[-1]]
        named = sorted(named, key=lambda end: (end[2], end[1]))  # those that leave below: the steepest lowest
        low, high = axes.get_ylim()
        places = spread([(value - low) / (high - low) for _, _, value in named], 0.066)
        for (head, _, _), y in zip(named, places, strict=True):
            axes.text(1.012, y, f"head {head + 1}", transform=axes.transAxes, size=8, va="center", color=colours[head])

    return _Part(draw, "Bias by distance", caption)


def _reach_part(shown: Mapping[str, Any]) -> _Part:
    bias = _bias(shown)
    caption = (
        "The same bias as a weight: how much a token at that distance counts in a head, against the distance that "
        "counts most, if both tokens match equally well. Dark heads look far back, heads that fade at once only at "
        "their neighbours."
    )

    def draw(axes: Axes) -> Any:
        heads, ctx = bias.shape
        weight = np.exp(bias - bias.max(axis=1, keepdims=True))  # (heads, ctx)
        extent = (0, ctx, heads + 0.5, 0.5)
        artist = axes.imshow(
            weight, aspect="auto", cmap="Blues", vmin=0, vmax=1, extent=extent, interpolation="nearest"
        )
        axes.set_xlabel("distance back (tokens)")
        axes.set_ylabel("head")
        axes.set_yticks(range(1, heads + 1) if heads <= 16 else [1, heads // 2, heads])
        _mark_training(axes, shown["train_ctx"], ctx)
        return artist

    return _Part(draw, "How far each head looks", caption, 2.2, "relative weight")


def _table(shown: Mapping[str, Any]) -> np.ndarray:
    """(positions, dimensions)"""
    return np.asarray(shown["embedding"], dtype=np.float64)


def _embedding_part(shown: Mapping[str, Any]) -> _Part:
    table = _table(shown)
    sinusoidal = str(shown["pos"]).startswith("sinusoidal")
    caption = (
        "One column is the vector that is added to the token at that position; it is all the model is told of order. "
    )
    if sinusoidal:
        caption += (
            "Every row is a sine or cosine of the position, fast waves in some dimensions and slow ones in others. "
        )
    else:
        caption += "The vectors are parameters: before training they are noise, and training gives them their meaning. "
    caption += _beyond(shown)

    def draw(axes: Axes) -> Any:
        reach = float(np.abs(table).max()) or 1.0
        extent = (0, table.shape[0], table.shape[1] - 0.5, -0.5)
        artist = axes.imshow(table.T, aspect="auto", cmap="RdBu_r", vmin=-reach, vmax=reach, extent=extent)
        axes.set_xlabel("position (tokens)")
        axes.set_ylabel("dimension")
        _mark_training(axes, shown["train_ctx"], table.shape[0])
        return artist

    return _Part(draw, "The table of positions", caption, 3.1, "value")


def _similarity_part(shown: Mapping[str, Any]) -> _Part:
    table = _table(shown)
    caption = (
        "Cosine similarity of the vectors of three positions with those of all others. A peak that falls to both sides "
        "means that near positions get similar vectors, from which a model can read who is close; a flat line means "
        "that nothing tells near from far yet."
    )

    def draw(axes: Axes) -> None:
        positions = len(table)
        unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)  # (T, C)
        chosen = sorted({positions // 8, positions // 2, positions - 1 - positions // 8})
        for index, position in enumerate(chosen):
            colour = PALETTE[index]
            axes.plot(np.arange(positions), unit @ unit[position], color=colour, linewidth=1.1)
            place: dict[str, Any] = {"textcoords": "offset points", "size": 8, "color": colour, "ha": "center"}
            axes.annotate(f"position {position}", (position, 1), (0, 4), **place)
        axes.set_xlim(0, max(positions - 1, 1))
        axes.set_ylim(top=1.14)
        axes.set_xlabel("position (tokens)")
        axes.set_ylabel("similarity")
        axes.grid(axis="y", color=FAINT, linewidth=0.6)

    return _Part(draw, "Who is similar to whom", caption, 2.2)


def _scaling_name(shown: Mapping[str, Any]) -> str:
    name = NAMES.get(shown["scaling"], shown["scaling"])
    return name if shown["factor"] is None else f"{name} ×{shown['factor']:g}"


# Drawing, in general -------------------------------------------------------------------------------------------------


def _look() -> AbstractContextManager[None]:
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


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white")


def _text_figure(title: str, text: str) -> Figure:
    with _look():
        figure = _figure(8, 2.1)
        figure.text(0.05, 0.88, title, size=13, weight="bold", va="top")
        figure.text(0.05, 0.7, "\n".join(textwrap.wrap(text, 88)), size=10, va="top", linespacing=1.5)
    return figure


def _wrapped(text: str, width: float, size: float) -> str:
    """Break a text for a width in inches; a glyph is about 0.55 of its size (72 points an inch) wide."""
    return "\n".join(textwrap.wrap(text, int((width - 0.3) * 72 / (0.55 * size))))


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def _plain_log(axes: Axes) -> None:
    """Powers of ten of a logarithmic y axis in plain digits."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
