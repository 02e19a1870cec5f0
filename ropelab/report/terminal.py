"""Tables for the terminal: perplexities, and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ropelab.evaluation import EvalResult
from ropelab.report.figures import CAP, Point, number, panels, protocol_facts, protocol_words
from ropelab.report.verdicts import SIGN, check_numbers

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

CAPTION = 100  # columns at most; a caption wrapped to the width of a narrow table is hard to read


def terminal_table(evals: Sequence[EvalResult]) -> Group:
    """Perplexities for the terminal: methods down, context lengths across.

    ± half of the 95% interval, of one run over texts, of several over seeds; of two runs the two. The captions below
    say so, what was scored, and why a number is missing.
    """
    from rich.console import Group
    from rich.constrain import Constrain
    from rich.table import Table
    from rich.text import Text

    drawn = panels(evals)
    ctxs = sorted({ctx for panel in drawn for ctx in panel.ctxs})
    trained = {length for panel in drawn for length in panel.train_ctxs}
    table = Table(title="Perplexity by context length", title_justify="left")
    table.add_column("method")
    for ctx in ctxs:
        table.add_column(Text(str(ctx) + (" (trained)" if ctx in trained else "")), justify="right")
    captions = []
    for panel in drawn:
        if len(drawn) > 1:
            table.add_section()
            table.add_row(Text(str(panel.protocol.name), style="bold"))
        for line in panel.lines:
            points = {point.ctx: point for point in line.points}
            cells = [Text(_terminal_cell(points.get(ctx))) for ctx in ctxs]
            table.add_row(Text(line.name), *cells)
        captions.append(f"{panel.protocol.name}: {protocol_words(panel.protocol)}. {protocol_facts(panel)}")
        captions += [
            f"{line.name} {gap[1]}: {line.reason}" for line in panel.lines if (gap := line.gap) and line.reason
        ]
    captions += _around([point for panel in drawn for line in panel.lines for point in line.points])
    below = [Constrain(Text(caption, style="table.caption"), CAPTION) for caption in dict.fromkeys(captions)]
    return Group(table, *below)


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
            claim.append(f"{check['statement']}: {check_numbers(check)}", style="not bold dim")
        claim.append(f"\n{item['reason']}", style="not bold")
        table.add_row(Text(word, style=f"bold {colour.get(item['verdict'], '')}"), claim, end_section=True)
    return table


def _around(points: Sequence[Point]) -> list[str]:
    """What stands beside the perplexities where a line has several seeds, in a sentence."""
    words = []
    if any(point.spread is not None and point.low is not None for point in points):
        words.append("± half of the 95% interval over seeds")
    if any(point.spread is not None and point.low is None for point in points):
        words.append("in brackets the two seeds")
    if words and any(point.spread is None and point.low is not None for point in points):
        words.append("± of a single run is half of its 95% interval over texts")
    return ["; ".join(words)] if words else []


def _terminal_cell(point: Point | None) -> str:
    if point is None:
        return "–"
    if point.ppl is None:
        return point.status
    text = number(point.ppl)
    if point.ppl >= CAP:
        return text
    if point.low is None or point.high is None:
        return text if point.spread is None else f"{text} ({number(point.spread[0])}, {number(point.spread[1])})"
    places = len(text.partition(".")[2])  # as many as the perplexity itself shows
    return f"{text} ±{(point.high - point.low) / 2:.{places}f}"
