"""Why the curves bend: what each scaling asks of rotary pairs, predicted and observed breakdown, loss by position."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ropelab.report.figures import method_name, observed_words, spread
from ropelab.report.markup import esc, section

Entry = tuple[Mapping[str, Any], Mapping[str, Any]]
"""(diagnosis of a run, one of what was evaluated of it)."""

WIDTH, HEIGHT, RIGHT = 560, 190, 190  # of a chart, and of the names beside it, in pixels
COLOURS = ("#0072b2", "#d55e00", "#00835f", "#aa4499", "#a87400", "#1390a5", "#8c3b1e", "#882255")
TALLEST = 3.0  # nats above the lowest loss at which a chart is cut


def bend_section(diagnoses: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> str:
    """The section; nothing without evaluations. Seeds of a method share a row."""
    methods: dict[tuple[Any, ...], list[Entry]] = {}
    for run in diagnoses:
        for one in run["evaluated"]:
            asked = json.dumps([run["pos_changed"], one["changed"], run["recipe"]], sort_keys=True)
            lengths_of = (run["train_ctx"], run["trained_length"], one["ctx"])
            key = (run["pos"], one["scaling"], one["factor"], asked, *lengths_of)
            methods.setdefault(key, []).append((run, one))
    if not methods:
        return ""
    threshold = next(iter(methods.values()))[0][1]["observed"]["threshold"]
    lengths = {run["train_ctx"] for run in diagnoses}
    rows = "".join(_row(entries, several=len(lengths) > 1) for entries in methods.values())
    intro = (
        "<p>A rotary pair turns by a fixed angle per token. In training it met the angles from 0 up to the training "
        "length; a pair that completed a full turn there met them all, a slower one did not. A longer text, or a "
        "scaling, that asks a slow pair for an angle outside its trained range asks for something new: the first "
        "length at which that happens is the <em>predicted</em> breakdown (for a learned table, its end; for a bias "
        "or no positions at all theory names none). The <em>observed</em> breakdown lies between the last length "
        f"whose loss is within {threshold:g} nats of that of the model as trained at its training length, on the same "
        "targets, and the first beyond; marked (own) where only the scaled model's own loss there is known. A curve "
        "that bends elsewhere than predicted bends for another reason.</p>"
    )
    table = f"""<div class="scroll" tabindex="0" role="region" aria-label="Predicted and observed breakdown">
<table><caption>Breakdown, in tokens</caption><thead><tr><th scope="col">Method</th>
<th scope="col">Longest</th><th scope="col">Pairs with new angles<small>at the longest</small></th>
<th scope="col">Predicted from</th><th scope="col">Observed</th>
<th scope="col" class="text">Prediction</th></tr></thead>
<tbody>{rows}</tbody></table></div>
"""
    return section("bends", "Why the curves bend", intro + table + _charts(methods, colours))


def _name(entries: Sequence[Entry], *, several: bool) -> str:
    run, one = entries[0]
    changed = {"pos_changed": run["pos_changed"], "scaling_changed": one["changed"]}
    name = method_name(run["pos"], one["scaling"], one["factor"], None, **changed)
    return f"{name}, trained at {run['train_ctx']}" if several else name


def _row(entries: Sequence[Entry], *, several: bool) -> str:
    run, one = entries[0]
    seen = list(dict.fromkeys(observed_words(each["observed"]) for _, each in entries))
    pairs = "–" if one["new_pairs"] is None else f"{one['new_pairs']} of {run['pairs']}"
    seeds = f"<small>{len(entries)} runs</small>" if len(entries) > 1 else ""
    protocols = ", ".join(sorted({each["observed"]["protocol"] for _, each in entries}))
    cells = (
        esc(one["ctx"]),
        esc(pairs),
        esc(one["predicted"]["breaks_from"] or "none"),
        f"{esc(' / '.join(seen))}<small>{esc(protocols)}</small>",
    )
    numbers = "".join(f"<td>{cell}</td>" for cell in cells)
    return (
        f'<tr><th scope="row">{esc(_name(entries, several=several))}{seeds}</th>{numbers}'
        f'<td class="text">{esc(one["predicted"]["why"])}</td></tr>'
    )


# --- loss by position -----------------------------------------------------------------------------------------------


def _charts(methods: Mapping[tuple[Any, ...], list[Entry]], colours: Mapping[str, str]) -> str:
    """One chart of losses by position for each protocol and length that curves were stored for."""
    lengths = {run["train_ctx"] for entries in methods.values() for run, _ in entries}
    charts: dict[tuple[str, int, tuple[float, ...]], list[tuple[str, int, list[float | None]]]] = {}
    for entries in methods.values():
        by_axis: dict[tuple[str, int, tuple[float, ...]], list[list[float | None]]] = {}
        for _, one in entries:
            curve = one["by_position"]
            if curve is not None and len(curve["nll"]) > 1:
                axis = (curve["protocol"], curve["ctx"], tuple(curve["edges"]))
                by_axis.setdefault(axis, []).append(curve["nll"])
        for axis, curves in by_axis.items():
            mean = [
                None
                if any(nll is None for nll in bucket)
                else sum(nll for nll in bucket if nll is not None) / len(bucket)
                for bucket in zip(*curves, strict=True)
            ]
            name = _name(entries, several=len(lengths) > 1)
            charts.setdefault(axis, []).append((name, entries[0][0]["train_ctx"], mean))
    found = "".join(_chart(axis, lines, colours) for axis, lines in charts.items())
    if not found:
        return ""
    intro = (
        "<p>The same losses by position: the mean loss of a token by how many tokens stand before it in the window, "
        "at the longest context. A method that makes use of a longer context goes down and stays down; one that "
        "breaks rises from some position on, though every token there has more to go by. Dashed: the training "
        "length.</p>"
    )
    return intro + found


def _chart(
    axis: tuple[str, int, tuple[float, ...]],
    lines: Sequence[tuple[str, int, Sequence[float | None]]],
    colours: Mapping[str, str],
) -> str:
    protocol, ctx, edges = axis
    values = [nll for _, _, curve in lines for nll in curve if nll is not None]
    if not values:
        return ""
    low, high = min(values), min(max(values), min(values) + TALLEST)
    low, high = low - 0.05 * (high - low + 0.02), high + 0.05 * (high - low + 0.02)

    def x(tokens: float) -> float:
        return (tokens - edges[0]) / (edges[-1] - edges[0]) * WIDTH

    def y(nll: float) -> float:
        return (high - min(nll, high)) / (high - low) * HEIGHT

    drawn = []
    lasts: list[tuple[float, str, str]] = []
    for place, (name, _, curve) in enumerate(lines):
        colour = colours.get(name) or COLOURS[place % len(COLOURS)]  # as the method has it in the curves
        path, pen = "", "M"
        for left, right, nll in zip(edges[:-1], edges[1:], curve, strict=True):
            path += "" if nll is None else f"{pen}{x(left):.1f} {y(nll):.1f}H{x(right):.1f}"
            pen = "M" if nll is None else "L"
        drawn.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        last = next((nll for nll in reversed(curve) if nll is not None), None)
        if last is not None:
            lasts.append((y(last) / HEIGHT, name, colour))
    for train_ctx in sorted({train_ctx for _, train_ctx, _ in lines}):
        if edges[0] < train_ctx < edges[-1]:
            drawn.append(
                f'<line x1="{x(train_ctx):.1f}" x2="{x(train_ctx):.1f}" y1="0" y2="{HEIGHT}" class="tau" '
                'stroke-dasharray="4 3"/>'
            )
    lasts.sort()
    gap = min(0.08, 1 / max(1, len(lasts)))
    for (_, name, colour), at in zip(lasts, spread([end[0] for end in lasts], gap), strict=True):
        drawn.append(f'<text x="{WIDTH + 6}" y="{at * HEIGHT + 4:.1f}" style="fill:{colour}">{esc(name)}</text>')
    for nll in (low + 0.1 * (high - low), (low + high) / 2, high - 0.1 * (high - low)):
        drawn.append(f'<text x="-6" y="{y(nll) + 4:.1f}" text-anchor="end">{nll:.2f}</text>')
    for tokens in (edges[0], (edges[0] + edges[-1]) / 2, edges[-1]):
        drawn.append(f'<text x="{x(tokens):.1f}" y="{HEIGHT + 18}" text-anchor="middle">{tokens:.0f}</text>')
    frame = f'<path class="axis" fill="none" d="M0 0V{HEIGHT}H{WIDTH}"/>'
    spoken = "; ".join(f"{name} {_spoken(curve)}" for name, _, curve in lines)
    return f"""<figure><figcaption><strong>Loss by position at {ctx} tokens</strong>, by the protocol
“{esc(protocol)}”: nats per token against tokens before it in the window.</figcaption>
<svg viewBox="-48 -8 {WIDTH + 48 + RIGHT} {HEIGHT + 34}" role="img"
style="width:100%;height:auto;font-size:11px;fill:var(--soft)"
aria-label="Loss by position: {esc(spoken)}">{frame}{"".join(drawn)}</svg></figure>
"""


def _spoken(curve: Sequence[float | None]) -> str:
    known = [nll for nll in curve if nll is not None]
    return f"from {known[0]:.2f} to {known[-1]:.2f}" if known else "has no loss"
