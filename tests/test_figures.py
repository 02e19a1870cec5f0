"""Pictures: what is drawn where, against numbers worked out by hand; and that no text overlaps or is cut."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from scipy.optimize import minimize

from ropelab import files
from ropelab.report import figures
from tests.records import results

pytestmark = pytest.mark.integration

LADDER = (128, 256, 512, 1024)


def row(ctx: int, ppl: float | None, **more: Any) -> dict[str, Any]:
    ok = ppl is not None
    nll = math.log(ppl) if ppl is not None and math.isfinite(ppl) else None
    return {
        "ctx": ctx,
        "factor": None,
        "ppl": ppl,
        "nll": nll,
        "bits_per_byte": None if nll is None else nll / math.log(2),
        "tokens": 4096 if ok else 0,
        "documents": 64 if ok else 0,
        "ci95": [0.9 * ppl, 1.1 * ppl] if ppl is not None and math.isfinite(ppl) else None,
        "status": "ok" if ok else "undefined",
        "reason": None if ok else "the table ends at 128",
        "unit": "document" if ok else None,
        **more,
    }


def evaluation(pos: str, ppls: list[float | None], protocol: str = "last", **more: Any) -> dict[str, Any]:
    facts = {"name": protocol, "last": 64 if protocol == "last" else None, "stride": None, "documents": 64}
    facts |= {"left_out": 3, "targets_digest": f"{protocol}-targets", "dtype": "fp32"}
    return {
        "run": f"{pos}-stdlib-s0-00000000",
        "pos": pos,
        "scaling": "none",
        "factor": None,
        "train_ctx": 128,
        "protocol": facts,
        "window": None,
        "seed": 0,
        "data": "stdlib",
        "rows": [row(ctx, ppl) for ctx, ppl in zip(LADDER, ppls, strict=False)],
        **more,
    }


def crowded() -> list[dict[str, Any]]:
    """Fifteen lines by `last`, five by `nonoverlapping`, as the demo has them."""
    last = [
        evaluation("sinusoidal", [5.30, 44.4, 47.9, 64.4]),
        evaluation("learned", [5.46, None, None, None]),
        evaluation("rope", [4.43, 9.05, 17.8, 29.6]),
        evaluation("alibi", [4.94, 4.94, 4.96, 4.94]),
        evaluation("none", [9.36, 10.6, 12.9, 12.6]),
        evaluation("rope", [4.43, 4.43, 4.43, 4.43], window=128),
        evaluation("alibi", [4.94, 4.93, 4.92, 4.92], window=128),
        evaluation("rope", [4.43, 5.85, 11.2, 21.9], scaling="dynamic_ntk", factor=1.0),
    ]
    for scaling, at4, at8 in (
        ("linear", [21.6, 22.4, 22.1, 26.8], [33.1, 33.8, 33.2, 32.2]),
        ("ntk", [4.67, 4.73, 9.42, 23.3], [4.9, 4.95, 5.3, 23.1]),
        ("yarn", [5.62, 5.88, 5.95, 13.8], [6.9, 7.1, 7.2, 7.39]),
    ):
        last.append(evaluation("rope", list(at4), scaling=scaling, factor=4.0))
        last.append(evaluation("rope", list(at8), scaling=scaling, factor=8.0))
    other = [
        evaluation("sinusoidal", [6.84, 13.9, 23.6, 35.0], "nonoverlapping"),
        evaluation("learned", [6.98, None, None, None], "nonoverlapping"),
        evaluation("rope", [5.30, 6.52, 10.2, 16.4], "nonoverlapping"),
        evaluation("alibi", [6.20, 6.09, 6.04, 6.03], "nonoverlapping"),
        evaluation("none", [11.5, 12.1, 13.0, 14.3], "nonoverlapping"),
    ]
    return [*other, *last]


def texts(figure: Figure) -> list[Text]:
    """Every text that is seen: tick labels outside an axis's range are objects too, but never drawn."""
    if figure.stale:
        FigureCanvasAgg(figure).draw()
    found = list(figure.texts)
    for axes in figure.axes:
        found += [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [
                label for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high for label in sides(tick)
            ]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def sides(tick: Any) -> tuple[Text, Text]:
    return tick.label1, tick.label2


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in texts(figure))


def assert_readable(figure: Figure) -> None:
    """No text leaves the picture or lies on another text."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    # of the words alone, without the leader of an annotation; two pixels are the blank around a glyph
    known = [(text.get_text(), Text.get_window_extent(text, renderer).padded(-1)) for text in texts(figure)]
    width, height = figure.canvas.get_width_height()
    for name, box in known:
        assert min(box.x0, box.y0) >= 0, f"cut: {name}"
        assert box.x1 <= width, f"cut: {name}"
        assert box.y1 <= height, f"cut: {name}"
    for (name, box), (other, other_box) in itertools.combinations(known, 2):
        assert not box.overlaps(other_box), f"{name!r} on {other!r}"


def lines_named(axes: Axes, label: str) -> list[Any]:
    return [line for line in axes.get_lines() if line.get_label() == label]


def test_axes_are_logarithmic_with_plain_ticks() -> None:
    figure = figures.curves(results(crowded()), title="All")
    assert len(figure.axes) == 2  # one a protocol
    for axes in figure.axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert [label.get_text() for label in axes.get_xticklabels()] == ["128", "256", "512", "1024"]
        assert all("10^" not in label.get_text() and "e+" not in label.get_text() for label in axes.get_yticklabels())
        low, high = axes.get_ylim()
        assert low < 6.03 < 16.4 < high


@pytest.mark.parametrize(("low", "high"), [(105, 136), (4.0, 4.6), (9.1, 9.3), (1.0, 10.0), (2.3, 900.0)])
def test_every_axis_has_two_ticks(low: float, high: float) -> None:
    """Also where no two round numbers lie between its ends."""
    ticks = figures.ppl_ticks(low, high)
    assert 2 <= len(ticks) <= 11
    assert all(low <= tick <= high and float(f"{tick:.3g}") == tick for tick in ticks)
    assert ticks == sorted(set(ticks))


def test_training_length_is_marked() -> None:
    figure = figures.curves(results([evaluation("rope", [4.43, 9.05, 17.8, 29.6])]), title="RoPE")
    (mark,) = lines_named(figure.axes[0], "training length")
    assert list(mark.get_xdata()) == [128, 128]
    assert mark.get_linestyle() != "-"
    assert "trained at 128" in words(figure)


def test_curve_goes_through_the_rows() -> None:
    figure = figures.curves(results([evaluation("rope", [4.43, 9.05, 17.8, 29.6])]), title="RoPE")
    (curve,) = lines_named(figure.axes[0], "RoPE")
    assert list(curve.get_xdata()) == list(LADDER)
    assert list(curve.get_ydata()) == [4.43, 9.05, 17.8, 29.6]
    ends = [segment[:, 1].tolist() for c in figure.axes[0].collections for segment in c.get_segments()]
    assert ends[0] == pytest.approx([0.9 * 4.43, 1.1 * 4.43])


def test_undefined_is_a_cross_at_the_top_with_its_reason() -> None:
    figure = figures.curves(results([evaluation("learned", [5.46, None, None, None])]), title="learned")
    axes = figure.axes[0]
    (cross,) = [line for line in axes.get_lines() if line.get_marker() == "x"]
    assert list(cross.get_xdata()) == [256]
    assert cross.get_transform() == axes.get_xaxis_transform()
    assert 0.9 < cross.get_ydata()[0] < 1
    assert "learned: undefined past 128" in words(figure)


def test_undefined_everywhere_still_draws() -> None:
    figure = figures.curves(results([evaluation("learned", [None, None, None, None])]), title="learned")
    assert "learned: undefined at 128" in words(figure)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_number_that_is_none_breaks_the_line(bad: float | None) -> None:
    (item,) = results([evaluation("rope", [4.43, 9.05])])
    rows = [item.rows[0], dataclasses.replace(item.rows[1], ppl=bad)]
    figure = figures.curves([dataclasses.replace(item, rows=rows)], title="RoPE")
    (curve,) = lines_named(figure.axes[0], "RoPE")
    assert list(curve.get_xdata()) == [128]
    assert "RoPE: non-finite past 128" in words(figure)


def test_huge_perplexity_is_drawn_at_the_cap_with_its_value() -> None:
    figure = figures.curves(results([evaluation("rope", [4.43, 9.05, 2.04e6, 3e9])]), title="RoPE")
    axes = figure.axes[0]
    arrows = [line for line in axes.get_lines() if line.get_marker() == "^"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in arrows] == [(512, 1e4), (1024, 1e4)]
    assert {"2.0e+06", "3.0e+09"} <= set(words(figure).split("\n"))
    assert axes.get_ylim()[1] < 1e5


def test_no_text_overlaps_or_is_cut() -> None:
    assert_readable(figures.curves(results(crowded()), title="Five encodings and RoPE rescaled " * 4))


def test_several_undefined_methods_do_not_overlap() -> None:
    items = [evaluation(pos, [5.0, 5.1, None, None]) for pos in ("learned", "sinusoidal", "t5")]
    assert_readable(figures.curves(results(items), title="three edges"))


def test_seeds_are_joined_by_the_geometric_mean() -> None:
    seeds = [
        evaluation("rope", [4.0, 16.0], run="rope-s0", seed=0),
        evaluation("rope", [9.0, 25.0], run="rope-s1", seed=1),
    ]
    (panel,) = figures.panels(results(seeds))
    (line,) = panel.lines
    assert [point.ppl for point in line.points] == pytest.approx([6.0, 20.0])  # sqrt(4 * 9), sqrt(16 * 25)
    assert line.points[0].spread == (4.0, 9.0)
    assert line.points[0].low is None  # an interval over texts of one run says nothing of the mean of two
    figure = figures.curves(results(seeds), title="two seeds")
    thin = [line for line in figure.axes[0].get_lines() if line.get_linewidth() == 0.6]
    assert sorted(list(line.get_ydata()) for line in thin) == [[4.0, 16.0], [9.0, 25.0]]


def test_one_undefined_seed_makes_the_point_undefined() -> None:
    seeds = [evaluation("rope", [4.0, 16.0], run="a", seed=0), evaluation("rope", [9.0, None], run="b", seed=1)]
    (panel,) = figures.panels(results(seeds))
    assert [point.status for point in panel.lines[0].points] == ["ok", "undefined"]


def test_runs_of_one_seed_stay_apart_under_their_names() -> None:
    same = [evaluation("rope", [4.0], run="rope-a"), evaluation("rope", [9.0], run="rope-b")]
    (panel,) = figures.panels(results(same))
    assert [line.name for line in panel.lines] == ["RoPE (rope-a)", "RoPE (rope-b)"]
    again = [evaluation("rope", [4.0], run="rope-a"), evaluation("rope", [9.0], run="rope-a")]
    (panel,) = figures.panels(results(again))
    assert [point.ppl for line in panel.lines for point in line.points] == [9.0]  # the later evaluation


def test_only_the_same_targets_share_a_panel() -> None:
    one, other = evaluation("rope", [4.0]), evaluation("alibi", [5.0])
    assert len(figures.panels(results([one, other]))) == 1
    other["protocol"]["targets_digest"] = "others"
    assert len(figures.panels(results([one, other]))) == 2
    other["protocol"]["targets_digest"] = None  # undefined at every ctx: no target was scored
    assert len(figures.panels(results([one, other]))) == 1
    assert len(figures.panels(results([other, one]))) == 1
    other["protocol"]["dtype"] = "bf16"
    assert len(figures.panels(results([one, other]))) == 2


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (("rope", "none", None, None), "RoPE"),
        (("rope", "yarn", 8.0, None), "RoPE + YaRN ×8"),
        (("rope", "ntk", 2.5, 128), "RoPE + NTK-aware ×2.5, window 128"),
        (("rope", "linear", None, None), "RoPE + PI, factor per ctx"),
        (("rope", "dynamic_ntk", 1.0, None), "RoPE + dynamic NTK"),
        (("mine", "none", None, None), "mine"),
    ],
)
def test_method_names(method: tuple[str, str, float | None, int | None], name: str) -> None:
    assert figures.method_name(*method) == name


@pytest.mark.parametrize(
    ("value", "text"),
    [(4.9412, "4.94"), (35.0, "35.0"), (99.96, "100."), (118.2, "118"), (0.8521, "0.852"), (2.04e6, "2.0e+06")],
)
def test_numbers_keep_three_digits(value: float, text: str) -> None:
    assert figures.number(value).rstrip(".") == text.rstrip(".")


def test_long_ladders_keep_their_first_and_last_label() -> None:
    ladder = [128 * 2**k for k in range(10)]
    item = evaluation("alibi", [])
    item["rows"] = [row(ctx, 5.0 + 0.01 * k) for k, ctx in enumerate([*ladder, 70000])]
    figure = figures.curves(results([item]), title="ALiBi")
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert (labels[0], labels[-1]) == ("128", "70000")
    assert "16k" in labels
    assert "64k" not in labels  # it would touch 70000
    assert_readable(figure)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.12))
def test_labels_keep_their_distance_and_their_order(wanted: list[float], gap: float) -> None:
    """Positions ascend by at least the gap and stay within [0, 1]; where nothing is too close nothing moves."""
    wanted = sorted(wanted)
    places = figures.spread(wanted, gap)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(places))
    assert -1e-9 <= min(places) <= max(places) <= 1 + 1e-9
    if all(b - a >= gap for a, b in itertools.pairwise(wanted)):
        assert places == pytest.approx(wanted, abs=1e-9)


def test_labels_move_as_little_as_possible() -> None:
    wanted = np.array([0.30, 0.31, 0.33, 0.60, 0.62, 0.90])
    gap = 0.05
    rules = [{"type": "ineq", "fun": lambda y, i=i: y[i + 1] - y[i] - gap} for i in range(len(wanted) - 1)]
    best = minimize(lambda y: ((y - wanted) ** 2).sum(), np.linspace(0, 1, 6), constraints=rules, tol=1e-12)
    assert figures.spread(list(wanted), gap) == pytest.approx(best.x, abs=1e-5)


def test_png_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "curves.png"
    figures.save(figures.curves(results([evaluation("rope", [4.43, 9.05])]), title="RoPE"), path)
    image = imread(path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(image.shape[:2]) > 300
    assert 0.5 < image.mean() < 1  # white with something on it
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        files.write(path, b"half")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_hostile_names_draw_as_they_are() -> None:
    items = [evaluation("rope", [4.0], run="$\\frac{$ 位置 <b>"), evaluation("rope", [9.0], run="$x^{")]
    figure = figures.curves(results(items), title="cost: $5 & more $")
    assert figures.png(figure).startswith(b"\x89PNG")
    assert "RoPE ($x^{)  9.00" in [text.get_text() for text in figure.axes[0].texts]


def test_nothing_to_draw_says_so() -> None:
    assert "no evaluation" in words(figures.curves(results([]), title="Empty"))


def test_pyplot_and_its_global_state_stay_out() -> None:
    code = (
        "import sys; from ropelab.report import figures; assert 'matplotlib' not in sys.modules; "
        "figures.curves([], title='x'); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# What an encoding does


def shown(pos: str, ctx: int, **more: Any) -> dict[str, Any]:
    empty = {"rotation": None, "bias": None, "embedding": None, "coverage": None}
    facts = {"pos": pos, "scaling": "none", "factor": None, "ctx": ctx, "train_ctx": 128, "d_head": 32, "n_head": 4}
    facts["trained_length"] = 128
    return {**facts, **empty, **more}


def rope(ctx: int, stretch: float = 1.0, attention_factor: float = 1.0, **more: Any) -> dict[str, Any]:
    """RoPE with 16 pairs, base 10000, all wavelengths stretched as position interpolation does."""
    trained = [10000.0 ** (-i / 16) for i in range(16)]
    used = [frequency / stretch for frequency in trained]
    turns = [
        {
            "pair": i,
            "wavelength": 2 * math.pi / new,
            "wavelength_train": 2 * math.pi / old,
            "turns_train": 128 * old / (2 * math.pi),
            "turns_ctx": ctx * new / (2 * math.pi),
            "full_period": 128 * old >= 2 * math.pi,
            "trained_to": 128 * old,
            "asked_to": (ctx - 1) * new,
            "new": 128 * old < 2 * math.pi and (ctx - 1) * new >= 128 * old,
        }
        for i, (old, new) in enumerate(zip(trained, used, strict=True))
    ]
    return shown("rope", ctx, rotation={"inv_freq": used, "attention_factor": attention_factor}, coverage=turns, **more)


def flat(figure: Figure) -> str:
    return words(figure).replace("\n", " ")


def test_rotation_is_explained_with_the_right_counts() -> None:
    figure = figures.explain(rope(1024))
    # 2 pi 10000^(i/16) <= 128 for i <= 5 (112 tokens), the next is 199; 1024 passes 128 by a factor of 8
    assert "6 of 16 pairs" in flat(figure)  # filled
    assert "Orange, 10 of 16 pairs" in flat(figure)
    assert_readable(figure)


def test_interpolation_meets_no_new_angle() -> None:
    figure = figures.explain(rope(1024, stretch=8, attention_factor=1.2, scaling="linear", factor=8.0))
    assert "Orange" not in flat(figure)
    assert "multiplied by 1.2, attention scores thus by 1.44" in flat(figure)
    assert "PI ×8" in flat(figure)
    assert_readable(figure)


def test_inside_the_training_length_nothing_is_beyond() -> None:
    figure = figures.explain(rope(128))
    assert "All 128 positions lie within the training length" in flat(figure)
    assert "trained to" not in flat(figure)
    assert_readable(figure)


def test_pairs_that_do_not_turn_are_counted() -> None:
    still = rope(1024)
    for pair in (14, 15):
        still["rotation"]["inv_freq"][pair] = 0.0
        still["coverage"][pair] |= {"wavelength": None, "wavelength_train": None, "trained_to": 0.0, "asked_to": 0.0}
        still["coverage"][pair]["new"] = False
    figure = figures.explain(still)
    assert "2 pairs do not turn" in flat(figure)
    assert_readable(figure)


@given(st.floats(1e-5, 3), st.floats(0, 1e5), st.floats(1.5, 200))
def test_mean_cosine_is_the_mean(frequency: float, start: float, step: float) -> None:
    """Against the literal mean over many points of the span."""
    literal = float(np.cos(frequency * np.linspace(start, start + step, 20001)).mean())
    ours = figures.mean_cosine(np.array([frequency]), np.array([start]), step)
    assert ours.shape == (1, 1)
    assert float(ours[0, 0]) == pytest.approx(literal, abs=2e-3)


def test_cosine_at_every_position_is_exact() -> None:
    image = figures.mean_cosine(np.array([0.5, 0.01]), np.arange(4.0), 1.0)
    literal = [[math.cos(frequency * position) for position in range(4)] for frequency in (0.5, 0.01)]
    assert image.tolist() == literal


def test_bias_lines_are_the_bias_and_heads_are_named() -> None:
    slopes = [2.0 ** -(h + 1) for h in range(8)]
    bias = [[-slope * distance for distance in range(1024)] for slope in slopes]
    figure = figures.explain(shown("alibi", 1024, bias={"by_distance": bias}))
    curves = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 1024]
    assert [list(line.get_ydata()) for line in curves] == bias
    assert all(f"head {head}" in words(figure) for head in range(1, 9))
    weight = figure.axes[1].get_images()[0].get_array()
    assert weight is not None
    assert float(weight[0, 2]) == pytest.approx(math.exp(-1.0))  # head 1, distance 2: e^(-2/2)
    assert_readable(figure)


def test_one_position_is_enough() -> None:
    for one in (
        rope(1),
        shown("mine", 1, bias={"by_distance": [[0.0]]}),
        shown("sinusoidal", 1, embedding=[[0.0, 1.0]]),
    ):
        assert_readable(figures.explain(one))


def test_bias_that_cuts_off_is_drawn() -> None:
    bias = [[0.5, -1.0, None, None], [0.0, 0.0, 0.0, 0.0]]
    assert_readable(figures.explain(shown("mine", 4, bias={"by_distance": bias})))


def test_many_heads_stay_readable() -> None:
    bias = [[-(h + 1) / 50 * math.log1p(distance) for distance in range(300)] for h in range(32)]
    assert_readable(figures.explain(shown("kerple_log", 300, bias={"by_distance": bias})))


def test_table_is_an_image_of_positions_by_dimensions() -> None:
    table = [[math.sin(p / 10 ** (c / 8)) for c in range(32)] for p in range(512)]
    figure = figures.explain(shown("sinusoidal", 512, embedding=table))
    image = figure.axes[0].get_images()[0].get_array()
    assert image is not None
    assert image.shape == (32, 512)
    assert float(image[3, 7]) == table[7][3]
    assert "trained to 128" in words(figure)
    assert_readable(figure)


@pytest.mark.parametrize(
    ("pos", "said"),
    [("none", "causal mask alone"), ("learned", "undefined there"), ("cable", "from the text itself")],
)
def test_encodings_without_a_picture_are_told_in_words(pos: str, said: str) -> None:
    figure = figures.explain(shown(pos, 512))
    assert said in flat(figure)
    assert not figure.axes
    assert_readable(figure)
