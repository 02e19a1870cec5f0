"""What an encoding tells the model, drawn from a `show` object: rotation, wavelengths, bias, table, with captions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ropelab.report.figures.breakdown import diagnosis_parts
from ropelab.report.figures.grid import Part, stack
from ropelab.report.figures.lines import PALETTE
from ropelab.report.figures.names import label, method_name, scaling_name
from ropelab.report.figures.theme import FAINT, INK, spread, text_figure, theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEEN, NEW = "#0072b2", "#d55e00"  # angles met in training, and angles that were not


def explain(shown: Mapping[str, Any]) -> Figure:
    """What an encoding tells the model, as pictures with captions for a reader who meets it for the first time.

    `shown` is a `show` object. Its coverage holds the turns of training and those at ctx as scaled, so that the picture
    of a scaling shows both spectra. Of a run it shows where its curves bend too, and where it looks if that was
    measured.
    """
    changed = {key: shown.get(key) for key in ("pos_changed", "scaling_changed")}
    title = method_name(shown["pos"], shown["scaling"], shown["factor"], None, **changed)
    title += f" at ctx {shown['ctx']}, trained at {shown['train_ctx']}"
    parts: list[Part] = []
    if shown.get("rotation"):
        parts.append(_rotation_part(shown))
    if shown.get("coverage"):
        parts += [_wavelength_part(shown), _turns_part(shown)]
    if shown.get("rotation") and shown["rotation"].get("decay"):
        parts.append(_decay_part(shown))
    if shown.get("bias"):
        parts += [_bias_part(shown), _reach_part(shown)]
    if shown.get("embedding"):
        parts += [_embedding_part(shown), _similarity_part(shown)]
    if shown.get("logit_scale") and len(set(shown["logit_scale"])) > 1:
        parts.append(_scale_part(shown))
    parts += diagnosis_parts(shown)
    notes = shown.get("notes") or []
    if not parts:
        return text_figure(title, _nothing_to_draw(shown))
    with theme():
        return stack(title, parts, notes)


def _nothing_to_draw(shown: Mapping[str, Any]) -> str:
    if shown["pos"] == "none":
        return (
            "NoPE adds nothing: no vector to the tokens, no rotation of queries and keys, no bias to the scores. "
            "Order comes in through the causal mask alone. Each token sees only the tokens before it, so the first "
            "token averages over one token, the second over two, and a trained model can learn to count from that."
        )
    if shown["pos"] == "learned":
        past = {
            "clamp": "all read the last row of the table.",
            "interpolate": "find one between two rows: the table is stretched.",
        }.get(shown["scaling"], "have no vector: the method is undefined there.")
        return (
            f"A learned table gives each of the {shown['train_ctx']} training positions a vector of its own, which is "
            "added to the token there. The vectors start as noise and get their meaning in training, so a method "
            f"alone has nothing to draw: name a trained run. Position {shown['train_ctx']} and later ones {past}"
        )
    if shown["pos"] == "drope":
        return (
            "DroPE trains with a rotation and drops it before the training ends: in evaluation there are no positions, "
            "as in NoPE, and the causal mask alone tells of order."
        )
    return (
        f"{label('pos', shown['pos'])} computes its position signal from the text itself, layer by layer. "
        "There is nothing to draw before a text is given: name a trained run with --attention to see where it looks."
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


def _rotation_part(shown: Mapping[str, Any]) -> Part:
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

    return Part(draw, "The angle of each pair", caption, 2.9, "cosine of the angle")


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


def _column(shown: Mapping[str, Any], name: str) -> np.ndarray:
    """A field of every pair, (pairs,); null, the wavelength of a pair that does not turn, is infinite."""
    values = [pair[name] for pair in shown["coverage"]]
    return np.asarray([math.inf if value is None else value for value in values], dtype=np.float64)


def _wavelength_part(shown: Mapping[str, Any]) -> Part:
    train_ctx, ctx = shown["trained_length"], shown["ctx"]
    trained, scaled = _column(shown, "wavelength_train"), _column(shown, "wavelength")  # (pairs,) tokens per full turn
    turned = _column(shown, "full_period") > 0
    moved = ~np.isclose(trained, scaled, rtol=1e-6)
    still = int(np.isinf(scaled).sum())
    caption = (
        f"Tokens until a pair is back where it started. Filled, {int(turned.sum())} of {len(turned)} pairs: at least "
        f"one full turn within the {train_ctx} training positions, so every angle was met in training. Open: less than "
        "one turn, "
    )
    if moved.any():
        name = scaling_name(shown["scaling"], shown["factor"])
        caption += f"so that some angles were not. Grey: as trained. {name} moves grey to colour."
    else:
        caption += "so that longer distances bring angles which the model never met."
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
        axes.set_xlim(-0.6, len(pairs) - 0.4)
        axes.set_xlabel("pair")
        axes.set_ylabel("wavelength (tokens)")
        _plain_log(axes)

    return Part(draw, "Wavelengths", caption)


def _turns_part(shown: Mapping[str, Any]) -> Part:
    ctx, train_ctx = shown["ctx"], shown["trained_length"]
    met, reached = _column(shown, "trained_to") / (2 * math.pi), _column(shown, "asked_to") / (2 * math.pi)  # (pairs,)
    new = _column(shown, "new") > 0
    caption = (
        f"From the turns a pair makes within the {train_ctx} training positions (dot) to the turns that scores ask of "
        f"it within {ctx} tokens (triangle). "
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
        axes.set_xlim(-0.6, len(pairs) - 0.4)
        axes.set_xlabel("pair")
        axes.set_ylabel("full turns")
        _plain_log(axes)

    return Part(draw, "Which angles are new", caption)


def _decay_part(shown: Mapping[str, Any]) -> Part:
    half_life = np.asarray(shown["rotation"]["decay"]["half_life"], dtype=np.float64)  # (pairs,) tokens
    caption = (
        "xPos also lets what a pair adds to a score fade with distance: the tokens after which half of it is left. "
        "Fast pairs, which tell near tokens apart, fade first; slow ones carry on."
    )

    def draw(axes: Axes) -> None:
        axes.set_yscale("log")
        axes.plot(np.arange(len(half_life)), half_life, "o", color=SEEN, markersize=5)
        axes.axhline(shown["ctx"], color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        where = axes.get_yaxis_transform()
        place: dict[str, Any] = {"textcoords": "offset points", "size": 8, "va": "bottom"}
        axes.annotate(f"ctx {shown['ctx']}", (0, shown["ctx"]), (3, 2), xycoords=where, **place)
        axes.set_xlabel("pair")
        axes.set_ylabel("half-life (tokens)")
        _plain_log(axes)

    return Part(draw, "How fast each pair fades", caption, 2.2)


def _scale_part(shown: Mapping[str, Any]) -> Part:
    scale = np.asarray(shown["logit_scale"], dtype=np.float64)  # (T,)
    caption = (
        "Scores of a query at this position are multiplied by this number before the softmax, so that attention stays "
        "as sharp when it is spread over more keys."
    )

    def draw(axes: Axes) -> None:
        axes.plot(np.arange(len(scale)), scale, color=SEEN, linewidth=1.6)
        axes.set_xlabel("position of the query (tokens)")
        axes.set_ylabel("factor on scores")
        axes.set_xlim(0, max(len(scale) - 1, 1))
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        _mark_training(axes, shown["train_ctx"], len(scale))

    return Part(draw, "The temperature of each query", caption, 1.8)


def _bias(shown: Mapping[str, Any]) -> np.ndarray:
    """(heads, distances); a distance that is cut off (null) is -inf."""
    rows = shown["bias"]["by_distance"]
    return np.asarray([[-math.inf if value is None else value for value in row] for row in rows], dtype=np.float64)


def _bias_part(shown: Mapping[str, Any]) -> Part:
    bias = _bias(shown)
    floor = -10.0
    query = shown["bias"].get("query")
    cause = "nothing but its distance back" if query is None else "its distance back and the query's position"
    caption = (
        f"Before the softmax, each head adds this number to the score of a token, by {cause}. Lower means less "
        "attention: −1 divides a token's weight by 2.7, −10 by 22,000. "
    )
    if query is not None:
        caption += f"Drawn for the last query, at {query}. "
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

    return Part(draw, "Bias by distance", caption)


def _reach_part(shown: Mapping[str, Any]) -> Part:
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

    return Part(draw, "How far each head looks", caption, 2.2, "relative weight")


def _table(shown: Mapping[str, Any]) -> np.ndarray:
    """(positions, dimensions)"""
    return np.asarray(shown["embedding"], dtype=np.float64)


def _embedding_part(shown: Mapping[str, Any]) -> Part:
    table = _table(shown)
    sinusoidal = str(shown["pos"]).startswith("sinusoidal")
    caption = (
        "One column is the vector of that position, which is added to the token there (times one learned scale where "
        "the method has one); it is all the model is told of order. "
        if shown["pos"] != "sinusoidal_qk"
        else "One column is the vector of that position, which is added in every layer to what queries and keys are "
        "made of; it is all the model is told of order. "
    )
    if sinusoidal:
        caption += (
            "Every row is a sine or cosine of the position, fast waves in some dimensions and slow ones in others. "
        )
    else:
        caption += "The vectors are parameters: before training they are noise, and training gave them their meaning. "
    caption += _beyond(shown)

    def draw(axes: Axes) -> Any:
        reach = float(np.abs(table).max()) or 1.0
        extent = (0, table.shape[0], table.shape[1] - 0.5, -0.5)
        artist = axes.imshow(table.T, aspect="auto", cmap="RdBu_r", vmin=-reach, vmax=reach, extent=extent)
        axes.set_xlabel("position (tokens)")
        axes.set_ylabel("dimension")
        _mark_training(axes, shown["train_ctx"], table.shape[0])
        return artist

    return Part(draw, "The table of positions", caption, 3.1, "value")


def _similarity_part(shown: Mapping[str, Any]) -> Part:
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

    return Part(draw, "Who is similar to whom", caption, 2.2)


def _plain_log(axes: Axes) -> None:
    """Powers of ten of a logarithmic y axis in plain digits."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
