"""What an encoding tells the model, drawn from a `show` object: rotation, wavelengths, bias, table, with captions."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ropelab.figures.lines import NAMES, PALETTE, method_name
from ropelab.figures.look import FAINT, GREY, INK, new_figure, spread, text_figure, theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEEN, NEW = "#0072b2", "#d55e00"  # angles met in training, and angles that were not


@dataclass(frozen=True)
class _Part:
    """One panel of `explain`: how to draw it, its title, its caption; `bar` says what the colour bar reads."""

    draw: Any  # (Axes) -> artist for the colour bar | None
    title: str
    caption: str
    height: float = 2.7
    bar: str | None = None


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
        return text_figure(title, _nothing_to_draw(shown))
    with theme():
        return _stack(title, parts)


def _stack(title: str, parts: Sequence[_Part]) -> Figure:
    """Panels one below the other, each caption to the right of its panel."""
    width, left, plot, text = 11.0, 0.95, 5.65, 7.62
    top, above, below = 0.55, 0.42, 0.62
    tall = top + sum(above + part.height + below for part in parts)
    figure = new_figure(width, tall)
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
            "added to the token there. The vectors start as noise and get their meaning in training, so a method "
            f"alone has nothing to draw. Position {shown['train_ctx']} and later ones have no vector: the method is "
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
        "One column is the vector of that position, which is added to the token there (times one learned scale where "
        "the method has one); it is all the model is told of order. "
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


def _plain_log(axes: Axes) -> None:
    """Powers of ten of a logarithmic y axis in plain digits."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
