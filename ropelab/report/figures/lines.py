"""Evaluations to lines: one method under one protocol, its seeds joined; how a line looks, and how it is named.

The curves, the report's page and tables and the terminal all read these lines, so that a number has one origin.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ropelab.evaluation import EvalResult, ProtocolRecord, Row
from ropelab.report.figures.names import changed_words, method_name

CAP = 1e4  # perplexities above are drawn at this height, with an arrow and the value beside it


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


@dataclass(frozen=True)
class Point:
    """A perplexity at one context length; `ppl` is None exactly where there is no finite number.

    `low`, `high`: the 95% interval, of a single run over texts, of three seeds or more over seeds; else None.
    `spread`: lowest and highest seed, or None.
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
    """One method (encoding, scaling, parameters, window) under one protocol, its seeds joined by the geometric mean."""

    name: str
    pos: str
    scaling: str
    factor: float | None
    changed: str  # parameters that are not the defaults, in words
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
        first = self._first_missing
        if first is None:
            return None
        word = first.status if first.status != "ok" else "non-finite"
        before = [point.ctx for point in self.defined if point.ctx < first.ctx]
        return first.ctx, f"{word} past {before[-1]}" if before else f"{word} at {first.ctx}"

    @property
    def reason(self) -> str:
        """Why the first ctx without a number has none; empty where nobody said, or where every ctx has one."""
        first = self._first_missing
        return (first.reason or "") if first else ""

    @property
    def _first_missing(self) -> Point | None:
        return next((point for point in self.points if point.ppl is None), None)


@dataclass(frozen=True)
class Panel:
    """All lines that one protocol measured on the same targets: the only ones that may be compared."""

    protocol: ProtocolRecord
    data: str
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


def panels(evals: Iterable[EvalResult]) -> list[Panel]:
    """Group evaluations by what may be compared, and join the seeds of a method.

    Runs of one method with different seeds become one line: the geometric mean of their perplexities. Two runs with the
    same seed are different experiments and stay apart, told by the run's name.
    """
    evals = list(evals)
    digests: dict[str, str] = {}  # of a method without any defined row the digest is unknown: it joins the others
    for item in evals:
        if (digest := item.protocol.targets_digest) is not None:
            digests.setdefault(_scoring(item), digest)
    grouped: dict[str, dict[str, list[EvalResult]]] = {}
    for item in evals:
        scoring = _scoring(item)
        targets = item.protocol.targets_digest or digests.get(scoring)
        methods = grouped.setdefault(f"{scoring} {targets}", {})
        methods.setdefault(json.dumps(_method(item)), []).append(item)
    return [_panel(list(methods.values())) for methods in grouped.values()]


def styles(drawn: Sequence[Panel]) -> dict[Line, Style]:
    """A style for each line, the same for a method in every panel."""
    lines = [line for panel in drawn for line in panel.lines]
    colours = list(dict.fromkeys(map(_coloured, lines)))
    dashes = ["none", *dict.fromkeys(line.scaling for line in lines if line.scaling != "none")]
    factors = sorted({line.factor for line in lines if line.scaling != "none" and line.factor is not None})
    result = {}
    for line in lines:
        scaled = line.factor if line.scaling != "none" else None
        marker = 0 if scaled is None else factors.index(scaled) % len(MARKERS)
        result[line] = Style(
            colour=PALETTE[colours.index(_coloured(line)) % len(PALETTE)],
            dash=dashes.index(line.scaling) % len(DASHES),
            marker=None if line.window is not None else marker,
            width=1.0 if line.window is not None else 1.9,
        )
    return result


def _coloured(line: Line) -> tuple[str, str, str]:
    """What a line's colour tells apart."""
    return line.pos, line.scaling, line.changed


def protocol_words(protocol: ProtocolRecord) -> str:
    """What a protocol scores, in one clause."""
    return protocol.kind.words(protocol.scored)


def protocol_facts(panel: Panel) -> str:
    """Documents, data, precision and targets of a panel, in one line."""
    protocol = panel.protocol
    facts = []
    if protocol.documents is not None:
        out = protocol.left_out
        facts.append(
            f"{protocol.documents} document{'' if protocol.documents == 1 else 's'}"
            + (f", {out} left out as too short" if out else "")
        )
    facts.append(f"data {panel.data}")
    if protocol.tokenizer is not None:
        facts.append(f"tokeniser {protocol.tokenizer}")
    if protocol.dtype is not None:
        facts.append(protocol.dtype)
    if protocol.bos is not None:
        facts.append(f"every window begins with token {protocol.bos}")
    if protocol.targets_digest is not None:
        facts.append(f"targets {protocol.targets_digest[:8]}")
    return " · ".join(facts)


def number(value: float) -> str:
    """A perplexity in three significant digits: 4.94, 29.6, 2.30e+06."""
    return f"{value:#.3g}" if value < 100 else f"{value:.0f}" if value < CAP else f"{value:.1e}"


def around(point: Point) -> str:
    """What surrounds a perplexity: its interval, or the spread of the seeds; empty where neither is known."""
    if point.low is not None and point.high is not None:
        return f"{number(point.low)} to {number(point.high)}"
    if point.spread is not None:
        return f"seeds {number(point.spread[0])} to {number(point.spread[1])}"
    return ""


def ctx_label(ctx: int) -> str:
    """A context length as it is spoken of: 128, 4096, 16k."""
    return f"{ctx // 1024}k" if ctx >= 8192 and ctx % 1024 == 0 else str(ctx)


def ppl_ticks(low: float, high: float) -> list[float]:
    """Round tick values for a logarithmic axis from low to high, at most about ten of them."""
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 3), (1,)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) <= 11:
            return ticks if len(ticks) > 1 else _even_ticks(low, high)
    return ticks


def _even_ticks(low: float, high: float) -> list[float]:
    """Two to six even values from low to high, for an axis on which no two round ones lie."""
    step = 10.0 ** math.floor(math.log10(high - low))
    for part in (1, 0.5, 0.2, 0.1):
        first = math.ceil(low / (step * part))
        ticks = [float(f"{number * step * part:.6g}") for number in range(first, math.floor(high / (step * part)) + 1)]
        if len(ticks) > 1:
            break
    return ticks


def ppl_limits(drawn: Panel) -> tuple[float, float]:
    """Lower and upper end of the perplexity axis of a panel, whiskers and every seed included, cut at CAP."""
    points = [point for line in drawn.lines for group in (line.points, *line.members) for point in group]
    values = [value for point in points for value in (point.ppl, point.low, point.high) if value is not None]
    values = [min(value, CAP) for value in values] or [1.0, 10.0]
    return min(values) / 1.12, max(values) * 1.15


def _scoring(item: EvalResult) -> str:
    """How an evaluation scored which text; with the targets digest it says what may be compared."""
    protocol = item.protocol
    what = (protocol.split, protocol.data_digest, protocol.span, protocol.documents, protocol.left_out)
    return json.dumps([item.data, protocol.name, protocol.scored, *what, protocol.bos, protocol.dtype])


def _panel(methods: Sequence[Sequence[EvalResult]]) -> Panel:
    several_lengths = len({item.train_ctx for items in methods for item in items}) > 1
    lines: list[Line] = []
    names = [_name(items[0], several_lengths) for items in methods]
    for items, name in zip(methods, names, strict=True):
        latest = {item.run: item for item in items}  # a run evaluated twice: the later one counts
        seeds = {item.seed for item in latest.values()}
        if len(seeds) == len(latest) and names.count(name) == 1:
            lines.append(_line(list(latest.values()), name))
        elif len(seeds) == len(latest):  # another recipe under the same name: its runs tell them apart
            lines.append(_line(list(latest.values()), f"{name} ({', '.join(latest)})"))
        else:
            lines.extend(_line([item], f"{name} ({item.run})") for item in latest.values())
    known = [item for items in methods for item in items if item.protocol.targets_digest is not None]
    first = known[0] if known else methods[0][0]
    return Panel(first.protocol, first.data, tuple(lines))


def _method(item: EvalResult) -> list[Any]:
    """What makes evaluations repetitions of one another: all but the seed."""
    changed = item.changed
    of_scaling = (item.scaling, item.factor, changed["pos_changed"], changed["scaling_changed"])
    return [item.pos, *of_scaling, item.window, item.train_ctx, item.recipe]


def _name(item: EvalResult, several_lengths: bool) -> str:
    name = method_name(item.pos, item.scaling, item.factor, item.window, **item.changed)
    return f"{name}, trained at {item.train_ctx}" if several_lengths else name


def _line(items: list[EvalResult], name: str) -> Line:
    first = items[0]
    changed = " ".join(changed_words(parameters) for parameters in first.changed.values() if parameters)
    members = tuple(tuple(sorted(map(_point, item.rows), key=lambda point: point.ctx)) for item in items)
    by_ctx: dict[int, list[Point]] = {}
    for member in members:
        for point in member:
            by_ctx.setdefault(point.ctx, []).append(point)
    points = tuple(_joined(by_ctx[ctx]) for ctx in sorted(by_ctx))
    runs = tuple(item.run for item in items)
    return Line(
        name, first.pos, first.scaling, first.factor, changed, first.window, first.train_ctx, runs, points, members
    )


def _point(row: Row) -> Point:
    has_number = row.ok and row.ppl is not None and math.isfinite(row.ppl) and row.ppl > 0
    low, high = row.ci95 if has_number and row.ci95 is not None else (None, None)
    if low is None or high is None:
        low = high = None
    return Point(
        ctx=row.ctx,
        ppl=row.ppl if has_number else None,
        nll=row.nll if has_number else None,
        low=low,
        high=high,
        spread=None,
        bits_per_byte=row.bits_per_byte if has_number else None,
        factor=row.factor,
        tokens=row.tokens,
        documents=row.documents,
        unit=row.unit,
        status=row.status if not row.ok or has_number else "non-finite",
        reason=row.reason,
    )


def _joined(points: list[Point]) -> Point:
    """The same ctx over seeds: geometric mean, which is the mean of the nll, and Student's t interval of that.

    One seed without a number: none. Two seeds have no interval: with one degree of freedom it would say nothing.
    """
    missing = next((point for point in points if point.ppl is None), None)
    if missing is not None or len(points) == 1:
        return missing or points[0]
    values = [point.ppl for point in points if point.ppl is not None]
    logs = [math.log(value) for value in values]
    nll = sum(logs) / len(logs)
    low = high = None
    if len(logs) > 2:
        from scipy.stats import t

        half = float(t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
        low, high = math.exp(nll - half), math.exp(nll + half)
    bits = [point.bits_per_byte for point in points if point.bits_per_byte is not None]
    first = points[0]
    return Point(
        ctx=first.ctx,
        ppl=math.exp(nll),
        nll=nll,
        low=low,
        high=high,
        spread=(min(values), max(values)),
        bits_per_byte=sum(bits) / len(bits) if bits else None,
        factor=first.factor,
        tokens=first.tokens,
        documents=first.documents,
        unit=None,
        status="ok",
        reason=None,
    )
