"""Why a curve bends, drawn from the `show` object of a run: losses by ctx and by position, attention by distance."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ropelab.report.figures.grid import Part
from ropelab.report.figures.lines import DASHES, PALETTE, ctx_label
from ropelab.report.figures.names import scaling_name
from ropelab.report.figures.theme import FAINT, INK, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TALLEST = 4.0  # nats above the lowest loss at which the axis of losses is cut


def diagnosis_parts(shown: Mapping[str, Any]) -> list[Part]:
    """The panels of what is known of a run: nothing without evaluations and without measured attention."""
    parts = []
    evaluated = (shown.get("diagnosis") or {}).get("evaluated") or []
    colours = [PALETTE[index % len(PALETTE)] for index in range(len(evaluated))]  # of a scaling in every panel
    if evaluated:
        parts.append(_length_part(evaluated, colours, shown["train_ctx"]))
    by_position = [
        (one, colour)
        for one, colour in zip(evaluated, colours, strict=True)
        if one["by_position"] and len(one["by_position"]["nll"]) > 1
    ]
    axes_of: dict[tuple[Any, ...], list[tuple[Mapping[str, Any], str]]] = {}  # one panel for what has the same targets
    for one, colour in by_position:
        curve = one["by_position"]
        axes_of.setdefault((curve["protocol"], curve["targets"], curve["ctx"]), []).append((one, colour))
    for (protocol, _, _), chosen in axes_of.items():
        parts.append(_position_part(chosen, shown["train_ctx"], protocol))
    if shown.get("attention"):
        parts.append(_attention_part(shown["attention"], shown["train_ctx"]))
    return parts


def observed_words(observed: Mapping[str, Any]) -> str:
    """Where losses begin to rise: "128 to 256", "not up to 1024", "already at 128"."""
    good, bad = observed["good"], observed["bad"]
    if observed["baseline"] is None:
        return "no loss at train_ctx"
    words = f"not up to {good}" if bad is None else f"already at {bad}" if good is None else f"{good} to {bad}"
    return words if observed["baseline"] == "trained" else f"{words} (own)"


def bucket_labels(edges: Sequence[int]) -> list[str]:
    """Names of buckets of distances, for the edges of each: 0, 1, 2-3, 4-7."""
    return [str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in itertools.pairwise(edges)]


def _length_part(evaluated: Sequence[Mapping[str, Any]], colours: Sequence[str], train_ctx: int) -> Part:
    # losses on other targets do not belong on this axis; the run as trained comes first, and decides
    main = next((one["targets"] for one in evaluated if one["losses"]), None)
    drawn = [(one, colours[i]) for i, one in enumerate(evaluated) if one["losses"] and one["targets"] == main]
    others = sum(bool(one["losses"]) for one in evaluated) - len(drawn)
    protocols = sorted({one["observed"]["protocol"] for one, _ in drawn})
    threshold = evaluated[0]["observed"]["threshold"]
    caption = (
        f"Loss against context length, by the protocol {' or '.join(protocols)}, one line a scaling. Filled: no more "
        f"than {threshold:g} nats above the loss of the model as it was trained, at its training length. Open: above "
        "it. The tick on a line is its predicted breakdown: the first length that asks a pair without a full period "
        "for an angle which training did not show. A line without a tick has no such length on this axis. Losses that "
        "rise only later than predicted, or already before, tell what else is at work."
    )
    if others:
        caption += f" Not drawn, because scored on other targets: {others} more, in the table."

    def draw(axes: Axes) -> None:
        points = [one["losses"] for one, _ in drawn]
        losses = [nll for line in points for _, nll in line]
        low = min(losses, default=0.0)
        high = min(max(losses, default=1.0), low + TALLEST)
        ctxs = sorted({ctx for line in points for ctx, _ in line})
        axes.set_xscale("log", base=2)
        ends = []
        for index, (one, colour) in enumerate(drawn):
            x, y = [ctx for ctx, _ in one["losses"]], [min(nll, high) for _, nll in one["losses"]]
            dash = DASHES[0 if one["trained"] else 1 + index % (len(DASHES) - 1)] or (None, None)
            axes.plot(x, y, color=colour, linewidth=1.5, dashes=dash, zorder=2)
            bad = one["observed"]["bad"]
            for ctx, nll in zip(x, y, strict=True):
                face = "white" if bad is not None and ctx >= bad else colour
                axes.plot([ctx], [nll], "o", color=colour, markerfacecolor=face, markersize=5, zorder=3)
            breaks = one["predicted"]["breaks_from"]
            if breaks is not None and x[0] <= breaks <= x[-1]:
                at = float(np.interp(np.log(breaks), np.log(x), y))
                axes.plot([breaks], [at], "|", color=colour, markersize=17, markeredgewidth=2.2, zorder=4)
            ends.append((y[-1], scaling_name(one["scaling"], one["factor"], one["changed"]), colour))
        axes.set_ylim(low - 0.06 * (high - low + 0.1), high + 0.06 * (high - low + 0.1))
        axes.set_xlim(ctxs[0] / 1.08 if ctxs else 1, ctxs[-1] * 1.08 if ctxs else 2)
        _token_axis(axes, ctxs, "context length at evaluation (tokens)")
        _mark_training(axes, train_ctx)
        _end_names(axes, ends)

    return Part(draw, "Predicted and observed breakdown", caption, 3.2)


def _position_part(evaluated: Sequence[tuple[Mapping[str, Any], str]], train_ctx: int, protocol: str) -> Part:
    caption = (
        f"Loss of a token by how many tokens stand before it in the window, by the protocol {protocol}. A model that "
        "makes use of its context falls and stays down; one whose positions break rises from some position on, even "
        "though every token there has more to go by."
    )

    def draw(axes: Axes) -> None:
        losses = [nll for one, _ in evaluated for nll in one["by_position"]["nll"] if nll is not None]
        low = min(losses, default=0.0)
        high = min(max(losses, default=1.0), low + TALLEST)
        ends = []
        for one, colour in evaluated:
            edges = one["by_position"]["edges"]
            y = [np.nan if nll is None else min(nll, high) for nll in one["by_position"]["nll"]]
            axes.stairs(y, edges, baseline=None, color=colour, linewidth=1.6)
            ends.append((float(y[-1]), scaling_name(one["scaling"], one["factor"], one["changed"]), colour))
        axes.set_ylim(low - 0.06 * (high - low + 0.1), high + 0.06 * (high - low + 0.1))
        first = min(one["by_position"]["edges"][0] for one, _ in evaluated)
        last = max(one["by_position"]["edges"][-1] for one, _ in evaluated)
        axes.set_xlim(first, last)
        axes.set_xlabel("tokens before it in the window")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        _mark_training(axes, train_ctx)
        _end_names(axes, [end for end in ends if np.isfinite(end[0])])

    return Part(draw, "Loss by position", caption, 2.7)


def _attention_part(found: Mapping[str, Any], train_ctx: int) -> Part:
    mass = np.asarray(found["mass"], dtype=np.float64)  # (layers, heads, buckets)
    layers, heads, buckets = mass.shape
    uniform = np.asarray(found["uniform"], dtype=np.float64)  # (buckets,)
    beyond = np.asarray(found["beyond"], dtype=np.float64)  # (layers, heads)
    caption = (
        f"Measured on text: where the last {found['queries'] // found['documents']} positions of {found['ctx']} tokens "
        f"look, mean of {found['documents']} document{'' if found['documents'] == 1 else 's'} of {found['text']} "
        f"({found['split']} split). One row a head, one column a range of distances, each twice "
        "as wide as the one before; a row sums to 100%. The bottom row is attention that sees all tokens "
        "alike. "
    )
    if found["ctx"] > train_ctx:
        caption += (
            f"Distances of {train_ctx} and more, right of the dashed line, were never trained: "
            f"{100 * beyond.mean():.0f}% of all attention goes there, from {100 * beyond.min():.0f}% to "
            f"{100 * beyond.max():.0f}% of a head's."
        )

    def draw(axes: Axes) -> Any:
        image = np.concatenate((mass.reshape(layers * heads, buckets), uniform[None]))  # (rows, buckets)
        artist = axes.imshow(
            100 * image, aspect="auto", cmap="Blues", vmin=0, vmax=100 * max(float(image.max()), 1e-9),
            interpolation="nearest",
        )  # fmt: skip
        axes.set_xticks(range(buckets), bucket_labels(found["edges"]), rotation=40, ha="right", rotation_mode="anchor")
        axes.tick_params(axis="x", labelsize=7.5)
        rows = [f"layer {layer + 1}, head {head + 1}" for layer in range(layers) for head in range(heads)]
        step = max(1, -(-len(rows) // 36))
        axes.set_yticks([*range(0, len(rows), step), len(rows)], [*rows[::step], "all alike"])
        axes.tick_params(axis="y", labelsize=6.5)
        for layer in range(1, layers + 1):
            axes.axhline(layer * heads - 0.5, color="white", linewidth=1.5)
        axes.set_xlabel("distance back (tokens)")
        edges = found["edges"]
        if train_ctx < found["ctx"] and train_ctx in edges:
            axes.axvline(edges.index(train_ctx) - 0.5, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        return artist

    height = min(6.0, max(2.4, 0.16 * (layers * heads + 1)))
    return Part(draw, "Where each head looks", caption, height, "% of attention", below=0.95)


def _token_axis(axes: Axes, ctxs: Sequence[int], label: str) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axes.xaxis.set_major_locator(FixedLocator(list(ctxs)))
    axes.xaxis.set_major_formatter(FixedFormatter([ctx_label(ctx) for ctx in ctxs]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
    axes.set_ylabel("loss (nats per token)")
    axes.grid(axis="y", color=FAINT, linewidth=0.6)


def _mark_training(axes: Axes, train_ctx: int) -> None:
    low, high = axes.get_xlim()
    if not low <= train_ctx <= high:
        return
    axes.axvline(train_ctx, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    place: dict[str, Any] = {"size": 8, "va": "bottom", "transform": axes.get_xaxis_transform()}
    axes.text(train_ctx, 1.015, f"trained at {train_ctx}", ha="left", **place)


def _end_names(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """(last value, name, colour) of each line, written right of the axes at its height, moved apart."""
    ends = sorted(ends)
    low, high = axes.get_ylim()
    gap = min(0.075, 1 / max(len(ends), 1))
    for (_, name, colour), y in zip(ends, spread([(end[0] - low) / (high - low) for end in ends], gap), strict=True):
        axes.text(1.015, y, name, transform=axes.transAxes, size=8, va="center", color=colour)
