"""Why curves bend: angles and lengths against slow loops from the definitions, attention against closed forms and
transformers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ropelab import config, report
from ropelab.analysis import breakdown, diagnose_run, encoding
from ropelab.analysis.attention import attention_weights, bucket_edges, by_distance
from ropelab.analysis.diagnosis import encodings_at
from ropelab.config import Config, Method, ModelConfig
from ropelab.data import drawn_positions
from ropelab.model import GPT
from ropelab.positions import Geometry, Rope
from ropelab.report import figures
from ropelab.scalings import SCALINGS, build
from tests.records import result, results
from tests.test_figures import assert_readable
from tests.test_model import LENGTH, as_gpt_neox, gpt, tokens
from tests.test_positions import method

L, BASE, D_HEAD = 32, 100.0, 16
SHAPE = ("model.n_layer=1", "model.d_model=32", "model.n_head=2", f"train.ctx={L}", "train.steps=2")
THETA = [BASE ** (-2 * i / D_HEAD) for i in range(D_HEAD // 2)]  # Su et al. 2021, section 3.2
TURN = 2 * math.pi


def loaded(*overrides: str) -> Config:
    given = {item.partition("=")[0] for item in overrides}
    return config.load([*(item for item in SHAPE if item.partition("=")[0] not in given), *overrides])


def rope(*overrides: str) -> Config:
    return loaded("pos=rope", f"pos.base={BASE}", *overrides)


def angles_of(scaling: str, ctx: int, factor: float) -> list[list[float]]:
    """By pair, every angle between a query and a key that it sees, from the definitions of the methods."""
    found: list[list[float]] = [[] for _ in THETA]
    for pair, theta in enumerate(THETA):
        for i in range(ctx):
            for j in range(i + 1):
                distance: float = i - j
                if scaling == "linear":  # Chen et al. 2023, section 2.3
                    distance /= factor
                elif scaling == "ntk":  # base' = base s^(d/(d-2))
                    larger = BASE * factor ** (D_HEAD / (D_HEAD - 2))
                    distance *= larger ** (-2 * pair / D_HEAD) / theta
                elif scaling == "rerope":  # Su 2023: min(i - j, w), w = L/4
                    distance = min(distance, L // 4)
                elif scaling == "self_extend" and distance >= L // 4:  # Jin et al. 2024, section 3, W = L/4, G = 8
                    distance = i // 8 + L // 4 - (L // 4) // 8 - j // 8
                elif scaling == "block_causal" and i // (L // 2) - j // (L // 2) > 1:  # Sun et al. 2022, section 3.2
                    continue
                found[pair].append(distance * theta)
    return found


@pytest.mark.parametrize("scaling", ["none", "linear", "ntk", "rerope", "self_extend", "block_causal"])
@pytest.mark.parametrize("ctx", [L // 2, L, L + 1, 2 * L, 5 * L])
def test_coverage_is_what_a_loop_over_all_scores_finds(scaling: str, ctx: int) -> None:
    factor = [] if scaling in ("none", "rerope", "self_extend", "block_causal") else ["scaling.factor=3.0"]
    rows = encoding.describe(rope(f"scaling={scaling}", *factor), ctx=ctx)["coverage"]
    for row, theta, angles in zip(rows, THETA, angles_of(scaling, ctx, 3.0), strict=True):
        assert row["full_period"] == (L * theta >= TURN)
        assert row["trained_to"] == pytest.approx(L * theta)
        assert (row["asked_from"], row["asked_to"]) == (pytest.approx(min(angles)), pytest.approx(max(angles)))
        new = not row["full_period"] and any(angle % TURN >= L * theta * (1 - 1e-12) for angle in angles)
        assert row["new"] == new
        farthest = min(max(angles), TURN)
        assert row["outside"] == pytest.approx(max(0.0, farthest - L * theta) if new else 0.0)


@pytest.mark.parametrize(("ctx", "start"), [(96, 5), (96, 40), (24, 30)])
def test_start_tokens_of_longrope_may_ask_for_angles_below_zero(ctx: int, start: int) -> None:
    factors = [1.0, 1.0, 1.5, 2.0, 3.0, 3.0, 3.0, 3.0]
    scaling = method("scaling", "longrope", factor=3.0, long_factors=factors, start_tokens=start, original_ctx=L)
    encoding = build(method("pos", "rope", base=BASE), scaling, Geometry(32, 2, L))
    assert isinstance(encoding, Rope)
    low, high = breakdown.asked(encoding, scaling, ctx)
    for pair, (theta, s) in enumerate(zip(THETA, factors, strict=True)):
        # Ding et al. 2024, section 3: the first tokens are not interpolated
        at = [p * theta if p < start else p * theta / s for p in range(ctx)]
        differences = [at[i] - at[j] for i in range(ctx) for j in range(i + 1)]
        assert float(high[pair]) == pytest.approx(max(differences))
        assert float(low[pair]) == pytest.approx(min(differences), abs=1e-12)


# --- the predicted breakdown ----------------------------------------------------------------------------------------


def predicted(settings: Config, scaling: str = "none", original_ctx: int = L, **changes: Any) -> Any:
    asked = method("scaling", scaling, **changes) if scaling != "none" else Method("none", {})
    at = encodings_at(settings, asked, original_ctx, longest=None)
    met = breakdown.trained_range(settings, original_ctx)
    length = breakdown.trained_length(settings, original_ctx)
    return breakdown.predict(at, trained=met, length=length, original_ctx=original_ctx)["breaks_from"]


def first_bad(asked: Callable[[int, int], float]) -> int:
    """The first ctx at which a pair that never turned once is asked for more than L theta: asked(pair, ctx)."""
    slow = [pair for pair, theta in enumerate(THETA) if L * theta < TURN]
    assert 0 < len(slow) < len(THETA)
    return next(
        ctx for ctx in range(2, 10**5) if any(asked(pair, ctx) >= L * THETA[pair] * (1 - 1e-12) for pair in slow)
    )


def test_predictions_of_rotary_scalings() -> None:
    assert predicted(rope()) == L + 1
    assert predicted(rope(), "linear", factor=4.0) == 4 * L + 1
    assert predicted(rope(), "yarn", factor=4.0) == 4 * L + 1  # pairs below one turn are interpolated in full
    last = len(THETA) - 1
    ntk = first_bad(lambda pair, ctx: (ctx - 1) * THETA[pair] * 4.0 ** (-pair / last))
    assert predicted(rope(), "ntk", factor=4.0) == ntk
    assert L + 1 < ntk < 4 * L
    dynamic = first_bad(lambda pair, ctx: (ctx - 1) * THETA[pair] * max(1.0, ctx / L) ** (-pair / last))
    assert predicted(rope(), "dynamic_ntk", factor=1.0) == dynamic
    assert predicted(rope(), "dynamic_linear", factor=1.0) is None
    assert predicted(rope(), "linear", factor="auto-row") is None
    assert predicted(rope(), "rerope") is None
    assert predicted(rope(), "block_causal") is None
    # Jin et al. 2024, section 3: L positions reach (L - W) G + W tokens
    assert predicted(rope(), "self_extend", group=8, window=L // 4) == (L - L // 4) * 8 + L // 4 + 1
    # all pairs that turn have turned once: Barbero et al. 2025
    turning = sum(L * theta >= TURN for theta in THETA)
    share = (turning + 0.5) / len(THETA)
    assert predicted(loaded("pos=p_rope", f"pos.base={BASE}", f"pos.p={share}")) is None


def test_predictions_of_other_encodings() -> None:
    assert predicted(loaded("pos=learned")) == L + 1
    assert predicted(loaded("pos=learned"), "interpolate", factor=4.0) == 4 * L + 1
    assert predicted(loaded("pos=learned"), "clamp") is None
    assert predicted(loaded("pos=sinusoidal")) == L + 1
    for pos in ("alibi", "none", "kerple_log", "sandwich", "fire", "fox", "cable", "drope"):
        assert predicted(loaded(f"pos={pos}")) is None, pos
    assert predicted(loaded("pos=t5", "pos.buckets=8", "pos.max_distance=16")) is None  # the last bucket was trained

    def t5_bucket(distance: int) -> int:  # Raffel et al. 2020: 16 exact, then 16 up to 128
        if distance < 16:
            return distance
        return min(31, 16 + int(math.log(distance / 16) / math.log(8) * 16))

    unseen = next(d for d in range(1000) if t5_bucket(d) > t5_bucket(L - 1))
    assert predicted(loaded("pos=t5")) == unseen + 1


def test_xpos_ends_where_its_numbers_do() -> None:
    settings = loaded("pos=xpos", "pos.base=1.0001")  # every pair but few turns often
    encoding = build(settings.pos, Method("none", {}), Geometry(32, 2, L))
    assert predicted(settings) == encoding.longest + 1  # type: ignore[operator]


def test_the_range_of_a_fine_tuned_run_is_its_own() -> None:
    """A child at 4 L under position interpolation met what its root met, and breaks past 4 L; unscaled, past L."""
    child = rope("train.ctx=128", "scaling=linear", "scaling.factor=4.0")
    met = breakdown.trained_range(child, L)
    assert met is not None
    assert met.reach.tolist() == pytest.approx([128 * theta / 4 for theta in THETA])
    assert predicted(child, "linear", factor=4.0) == 129
    assert predicted(child) == L + 1
    assert predicted(child, "linear", factor=8.0) == 257
    longer = rope("train.ctx=128")  # without a scaling it met more than its root
    assert predicted(longer) == 129


@pytest.mark.parametrize("more", [["positions=randomized"], ["positions=pose", "scaling=linear", "scaling.factor=4.0"],
                                  ["positions=randomized", "positions.max_ctx=77"]])  # fmt: skip
def test_drawn_positions_count_as_trained(more: list[str]) -> None:
    settings = rope(*more)
    draw = drawn_positions(settings.positions, ctx=L, original_ctx=L, factor=settings.scaling.parameters.get("factor"))
    assert draw is not None
    seen = max(int(draw(0, step, 64).max()) for step in range(40))
    assert seen + 1 == breakdown.trained_length(settings, L)


# --- the observed breakdown -----------------------------------------------------------------------------------------


def evaluation(nll: dict[int, float | None], **more: Any) -> dict[str, Any]:
    rows = [
        {"ctx": ctx, "nll": x, "status": "undefined" if x is None else "ok", "targets_digest": "t"}
        for ctx, x in nll.items()
    ]
    item: dict[str, Any] = {
        "run": "r",
        "pos": "rope",
        "data": "stdlib",
        "scaling": "none",
        "factor": None,
        "window": None,
    }
    item |= {"train_ctx": 32, "protocol": {"name": "last", "split": "test", "dtype": "fp32"}, "position_curve": None}
    if "scaling" in more:
        given = {"factor": more["factor"]} if more.get("factor") else {}
        item["scaling_parameters"] = {**config.parse_scaling(more["scaling"]).parameters, **given}
    return {"scaling_parameters": {}, **item, "rows": rows, **more}


@pytest.mark.parametrize(
    ("nll", "good", "bad"),
    [
        ({16: 3.0, 32: 2.0, 64: 2.04, 128: 2.06, 256: 1.9}, 64, 128),
        ({32: 2.0, 64: 1.9, 128: 1.8}, 128, None),
        ({32: 2.0, 64: None}, 32, 64),
        ({64: 2.0, 128: 3.0}, None, None),
    ],
)
def test_the_observed_breakdown_is_a_bracket(nll: dict[int, float | None], good: int | None, bad: int | None) -> None:
    found = breakdown.observe(result(evaluation(nll)), [])
    assert (found["good"], found["bad"]) == (good, bad)
    assert found["baseline"] == ("own" if 32 in nll else None)


def test_a_scaling_is_measured_against_the_model_as_trained() -> None:
    plain = evaluation({32: 2.0, 64: 4.0})
    scaled = evaluation({32: 2.6, 64: 2.6}, scaling="linear", factor=8.0)
    assert breakdown.observe(result(scaled), results([]))["bad"] is None
    found = breakdown.observe(result(scaled), results([plain]))
    assert (found["baseline"], found["good"], found["bad"]) == ("trained", None, 32)
    other = evaluation({32: 2.0})
    other["rows"][0]["targets_digest"] = "others"
    assert breakdown.observe(result(scaled), results([other]))["baseline"] == "own"


def manifest(settings: Config) -> dict[str, Any]:
    return {
        "run": "r",
        "config": config.to_dict(settings),
        "original_ctx": L,
        "train_ctx": settings.train.ctx,
        "corpus": {"name": "stdlib"},
        "identity": {"seed": 0},
    }


def test_a_run_is_diagnosed_from_what_it_stores() -> None:
    settings = rope()
    evals = [
        evaluation({32: 2.0, 64: 2.5, 256: 4.0}),
        evaluation({32: 2.0, 64: 2.0}, window=32),
        evaluation({32: 1.0, 256: 1.0}, data="books"),
        evaluation({32: 1.0, 256: 1.0}, pos="unigram"),
        evaluation(
            {32: 2.1, 256: 2.9},
            protocol={"name": "nonoverlapping", "split": "test", "dtype": "fp32"},
            position_curve={"ctx": 256, "edges": [0.0, 128.0, 256.0], "nll": [2.0, 3.5]},
        ),
        evaluation({32: 2.01, 64: 2.02, 256: 2.2}, scaling="linear", factor=8.0),
    ]
    found = diagnose_run(manifest(settings), results(evals))
    assert (found["pairs"], found["full_period"]) == (8, sum(L * theta >= TURN for theta in THETA))
    plain, scaled = found["evaluated"]
    assert (plain["scaling"], plain["trained"], plain["ctx"]) == ("none", True, 256)
    assert plain["new_pairs"] == 8 - found["full_period"]
    assert plain["predicted"]["breaks_from"] == L + 1
    assert (plain["observed"]["protocol"], plain["observed"]["good"], plain["observed"]["bad"]) == ("last", 32, 64)
    assert plain["losses"] == [[32, 2.0], [64, 2.5], [256, 4.0]]
    assert (plain["by_position"]["protocol"], plain["by_position"]["nll"]) == ("nonoverlapping", [2.0, 3.5])
    assert (scaled["scaling"], scaled["new_pairs"], scaled["predicted"]["breaks_from"]) == ("linear", 0, 8 * L + 1)
    assert (scaled["observed"]["good"], scaled["observed"]["bad"], scaled["by_position"]) == (64, 256, None)
    json.dumps(found, allow_nan=False)


def test_a_prediction_is_of_the_parameters_that_were_evaluated() -> None:
    """PI at another original length; and none for an evaluation that stores no parameters."""
    item = evaluation({32: 2.0, 64: 2.0}, scaling="linear", factor=4.0)
    for original_ctx, breaks_from in ((None, 4 * L + 1), (16, 4 * L + 1)):
        item["scaling_parameters"] = {"factor": 4.0, "original_ctx": original_ctx}
        (one,) = diagnose_run(manifest(rope()), results([item]))["evaluated"]
        assert one["predicted"]["breaks_from"] == breaks_from
    item = evaluation({32: 2.0, 128: 2.0}, scaling="dynamic_ntk", factor=1.0)
    found = []
    for original_ctx in (L, 2 * L):
        item["scaling_parameters"] = {"factor": 1.0, "original_ctx": original_ctx}
        (one,) = diagnose_run(manifest(rope()), results([item]))["evaluated"]
        found.append(one["predicted"]["breaks_from"])
    assert found[0] != found[1]
    del item["scaling_parameters"]
    (one,) = diagnose_run(manifest(rope()), results([item]))["evaluated"]
    assert (one["new_pairs"], one["predicted"]["breaks_from"]) == (None, None)
    assert "evaluate it again" in one["predicted"]["why"]


# --- attention by distance ------------------------------------------------------------------------------------------


def test_buckets_of_distances() -> None:
    assert bucket_edges(1) == [0, 1]
    assert bucket_edges(2) == [0, 1, 2]
    assert bucket_edges(8) == [0, 1, 2, 4, 8]
    assert bucket_edges(9) == [0, 1, 2, 4, 8, 9]
    assert figures.bucket_labels([0, 1, 2, 4, 9]) == ["0", "1", "2-3", "4-8"]


def test_attention_of_alibi_without_content_is_a_closed_form() -> None:
    """Queries and keys of zero: the weights are softmax of -slope distance, slopes 2^(-8h/H)."""
    length, queries = 40, 5
    model = GPT(
        ModelConfig("test", n_layer=2, d_model=32, n_head=4, qk_norm=False),
        50,
        build(method("pos", "alibi"), Method("none", {}), Geometry(32, 4, 16)),
        seed=0,
    ).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.qkv.weight[: 2 * 32].zero_()  # type: ignore[index, union-attr]
    edges = bucket_edges(length)
    x = torch.randint(0, 49, (2, length), generator=torch.Generator().manual_seed(0))
    layers = [by_distance(weights, edges) for weights in attention_weights(model, x, queries)]
    assert len(layers) == 2
    for mass in layers:
        torch.testing.assert_close(mass.sum(-1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-6)
        for head in range(4):
            slope = 2.0 ** (-8 * (head + 1) / 4)
            expected = [0.0] * (len(edges) - 1)
            for i in range(length - queries, length):
                total = sum(math.exp(-slope * distance) for distance in range(i + 1))
                for distance in range(i + 1):
                    bucket = max(k for k in range(len(edges) - 1) if edges[k] <= distance)
                    expected[bucket] += math.exp(-slope * distance) / total / queries
            assert mass[head].tolist() == pytest.approx(expected, abs=1e-6)


def test_attention_is_that_of_gpt_neox_of_transformers() -> None:
    length, queries = 3 * LENGTH, 11
    model = gpt("rope", method("scaling", "linear", factor=4.0))
    theirs = as_gpt_neox(model, {"rope_theta": 1e4, "partial_rotary_factor": 1.0, "rope_type": "linear", "factor": 4.0})
    x = tokens(length)
    with torch.no_grad():
        expected = theirs(x, output_attentions=True).attentions  # of each layer (B, H, T, T)
    ours = list(attention_weights(model, x, queries))
    assert len(ours) == len(expected) == 3
    for mine, whole in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, whole[:, :, -queries:], rtol=1e-3, atol=1e-5)
        assert mine.max() > 0.1  # all alike would be 0.014


@pytest.mark.parametrize(("pos", "scaling"), [("fox", "none"), ("cable", "none"), ("fire", "none"), ("rope", "rerope"),
                                              ("rope", "self_extend"), ("sinusoidal_qk", "none"),
                                              ("none", "temperature"), ("alibi", "block_causal")])  # fmt: skip
def test_the_weights_that_are_shown_are_those_the_model_uses(pos: str, scaling: str) -> None:
    """Values weighed by them give what the layer's attention gives, for every kind of record."""
    changes = {"factor": 4.0} if scaling == "temperature" else {}
    chosen = method("scaling", scaling, **changes) if scaling != "none" else Method("none", {})
    encoding = build(method("pos", pos), chosen, Geometry(64, 4, LENGTH, 3))
    model = GPT(ModelConfig("test", n_layer=3, d_model=64, n_head=4, qk_norm=False), 97, encoding, seed=1).eval()
    x = tokens(3 * LENGTH)
    weights = list(attention_weights(model, x, 3 * LENGTH))
    with torch.no_grad():
        prepared = model.prepare(3 * LENGTH)
        hidden = model.embed(x, prepared)
        for layer, (block, shown) in enumerate(zip(model.blocks, weights, strict=True)):
            normed = block.norm_attention(hidden)  # type: ignore[operator]
            _, _, v, _ = block.heads(normed, prepared.record)  # type: ignore[operator]
            mixed = (shown @ v).transpose(1, 2).reshape(hidden.shape)
            middle = hidden + block.attention_out(mixed)  # type: ignore[operator]
            out = middle + block.mlp_out(  # type: ignore[operator]
                torch.nn.functional.gelu(block.mlp_in(block.norm_mlp(middle)))  # type: ignore[operator]
            )
            hidden = block(hidden, prepared, model.content_bias(layer))
            torch.testing.assert_close(out, hidden, rtol=1e-4, atol=1e-5)


# --- what is shown --------------------------------------------------------------------------------------------------


def methods() -> list[list[str]]:
    pairs = [[f"pos={pos}"] for pos in config.choices("pos")]
    for name, scaling in SCALINGS.items():
        if name != "longrope":  # needs a file
            encodings = config.choices("pos") if scaling.applies_to is None else scaling.applies_to
            pairs += [[f"pos={pos}", f"scaling={name}"] for pos in encodings]
    return pairs


def shown(settings: list[str]) -> dict[str, Any]:
    ends = settings in (["pos=learned"], ["pos=learned", "scaling=block_causal"])
    return encoding.describe(loaded(*settings), ctx=L if ends else 3 * L)


def parts(numbers: dict[str, Any]) -> tuple[str, ...]:
    """The kind of a picture: the parts of the numbers that it draws, whatever they are called and come to."""
    there = {key: numbers[key] for key in ("rotation", "bias", "embedding", "logit_scale", "coverage") if numbers[key]}
    inner = {f"{key}.{name}" for key, part in there.items() if isinstance(part, dict) for name in part if part[name]}
    return tuple(sorted({*there, *inner}))


@pytest.mark.integration
@pytest.mark.parametrize("settings", methods(), ids=lambda item: "-".join(part.partition("=")[2] for part in item))
def test_every_method_is_shown_and_drawn(settings: list[str]) -> None:
    """As a figure; one of each kind becomes a file, in the next test."""
    numbers = shown(settings)
    ctx = numbers["ctx"]
    json.dumps(numbers, allow_nan=False)
    if numbers["pos"].startswith("sinusoidal"):
        assert (len(numbers["embedding"]), len(numbers["embedding"][0])) == (ctx, 32)
    known = [numbers[key] for key in ("rotation", "bias", "embedding")]
    assert any(part is not None for part in known) or numbers["notes"]
    figure = figures.explain(numbers)
    assert figure.axes or figure.texts


@pytest.mark.integration
def test_every_kind_of_picture_becomes_a_file() -> None:
    kinds = {parts(numbers): numbers for numbers in map(shown, methods())}
    assert len(kinds) >= 10
    drawn = {part.partition(".")[0] for kind in kinds for part in kind}
    assert drawn == {"rotation", "bias", "embedding", "logit_scale", "coverage"}
    for numbers in kinds.values():
        assert figures.png(figures.explain(numbers)).startswith(b"\x89PNG")


def test_the_picture_of_a_run_is_readable() -> None:
    """Losses by ctx and position, and a heatmap whose cells are the masses; no text overlaps or is cut."""
    numbers = encoding.describe(rope(), ctx=256)
    evals = [
        evaluation({32: 2.0, 64: 2.04, 128: 2.5, 256: 4.0}),
        evaluation({32: 2.2, 64: 2.2, 128: 2.2, 256: 2.3}, scaling="linear", factor=8.0),
        evaluation({32: 2.1, 64: 2.2, 128: 2.2, 256: None}, scaling="rerope"),
        evaluation(
            {32: 2.1, 256: 2.9},
            protocol={"name": "nonoverlapping", "split": "test", "dtype": "fp32"},
            position_curve={"ctx": 256, "edges": [0.0, 128.0, 256.0], "nll": [2.0, 3.5]},
        ),
    ]
    edges = bucket_edges(256)
    mass = torch.softmax(torch.arange(2 * 2 * 9.0).view(2, 2, 9).sin(), -1).tolist()
    measured = {"ctx": 256, "edges": edges, "mass": mass, "uniform": [1 / 9] * 9, "beyond": [[0.5, 0.1], [0.2, 0.3]]}
    measured |= {"queries": 256, "documents": 4, "text": "stdlib", "split": "test"}
    figure = figures.explain(
        numbers | {"diagnosis": diagnose_run(manifest(rope()), results(evals)), "attention": measured}
    )
    assert_readable(figure)
    said = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    for word in (
        "Predicted and observed breakdown",
        "Loss by position",
        "Where each head looks",
        "28% of all attention",
    ):
        assert word in said
    image = figure.axes[6].get_images()[0].get_array()
    assert image is not None
    flat = [share for layer in mass for head in layer for share in head]
    assert (image[:4] / 100).flatten().tolist() == pytest.approx(flat)


def test_pairs_that_do_not_turn_have_no_wavelength() -> None:
    rows = encoding.describe(loaded("pos=p_rope", "pos.p=0.5"), ctx=2 * L)["coverage"]
    assert [row["wavelength"] is None for row in rows] == [False] * 4 + [True] * 4
    assert not any(row["new"] for row in rows[4:])
    stopped = encoding.describe(rope("scaling=proportional", "scaling.p=0.5", "scaling.factor=2.0"), ctx=L)["coverage"]
    assert stopped[-1]["wavelength"] is None
    assert stopped[-1]["wavelength_train"] == pytest.approx(TURN / THETA[-1])


def test_fire_is_shown_at_the_last_query() -> None:
    """Li et al. 2024: f(psi(d) / psi(max(M, i))), computed from the encoding's tensors by a loop."""
    settings = loaded("pos=fire", "pos.width=3")
    fire: Any = encoding.start(settings, Method("none", {}), L).requires_grad_(False)
    shown = encoding.describe(settings, ctx=3 * L)["bias"]
    assert shown["query"] == 3 * L - 1
    c, m = float(fire.c), abs(float(fire.threshold_factor) * fire.threshold)
    for distance in (0, 1, 17, 3 * L - 1):
        share = math.log1p(abs(c * distance)) / (math.log1p(c * max(m, 3 * L - 1)) + fire.eps)
        hidden = [
            max(0.0, float(w) * share + float(b))
            for w, b in zip(fire.hidden.weight[:, 0], fire.hidden.bias, strict=True)
        ]
        for head in range(2):
            total = sum(float(w) * h for w, h in zip(fire.output.weight[head], hidden, strict=True))
            assert shown["by_distance"][head][distance] == pytest.approx(
                total + float(fire.output.bias[head]), abs=1e-5
            )


def test_xpos_shows_how_fast_its_pairs_fade() -> None:
    rotation = encoding.describe(loaded("pos=xpos"), ctx=L)["rotation"]
    for i, (zeta, half) in enumerate(zip(rotation["decay"]["zeta"], rotation["decay"]["half_life"], strict=True)):
        assert zeta == pytest.approx((2 * i / D_HEAD + 0.4) / 1.4)  # Sun et al. 2022
        assert zeta ** (half / 512) == pytest.approx(0.5)


def test_windows_blocks_and_temperatures_are_said() -> None:
    rerope = encoding.describe(rope("scaling=rerope"), ctx=4 * L)
    assert rerope["rotation"]["far"] == {"window": L // 4}
    assert rerope["logit_scale"][-1] == pytest.approx(math.log(4 * L) / math.log(L))
    assert encoding.describe(rope("scaling=block_causal"), ctx=4 * L)["block"] == L // 2
    scale = encoding.describe(loaded("pos=none", "scaling=temperature", "scaling.factor=8.0"), ctx=8)["logit_scale"]
    assert scale == pytest.approx([1 + 0.412 * math.log(8)] * 8)


def test_every_method_has_a_name() -> None:
    for group in ("pos", "scaling"):
        for name in config.choices(group):
            text = (config.config_dir() / group / f"{name}.yaml").read_text(encoding="utf-8")
            assert f"# label: {config.about(group, name).label}\n" in text
    without = [name for name in SCALINGS if "factor" not in config.parse_scaling(name).parameters]
    assert [name for name in SCALINGS if not config.about("scaling", name).has_factor] == without
    assert figures.method_name("rope", "rerope", None, None) == "RoPE + ReRoPE"
    assert figures.method_name("rope", "yarn", None, None) == "RoPE + YaRN, factor per ctx"


# --- in the report --------------------------------------------------------------------------------------------------

HOSTILE = "</script><img src=x onerror=alert(1)>"


def diagnosed(run: str, pos: str, bad: int | None, nll: list[float]) -> dict[str, Any]:
    observed = {"protocol": "last", "threshold": 0.05, "baseline": "trained", "good": 32, "bad": bad}
    one: dict[str, Any] = {
        "scaling": "none",
        "factor": None,
        "changed": {},
        "targets": "t",
        "trained": True,
        "ctx": 256,
        "new_pairs": 5,
        "observed": observed,
    }
    one |= {"predicted": {"breaks_from": 33, "pair": 3, "why": HOSTILE}, "losses": [[32, 2.0], [256, 3.0]]}
    one["by_position"] = {
        "protocol": "nonoverlapping",
        "targets": "t",
        "ctx": 256,
        "edges": [0.0, 128.0, 256.0],
        "nll": nll,
    }
    facts = {"run": run, "pos": pos, "train_ctx": 32, "trained_length": 32, "pairs": 8, "full_period": 3}
    facts |= {"pos_changed": {}, "recipe": "r"}
    return {**facts, "evaluated": [one]}


def test_the_report_has_a_section_of_bends() -> None:
    from ropelab.report.breakdown import bend_section

    page = bend_section([diagnosed("a", "rope", 64, [2.0, 4.0]), diagnosed("b", "rope", 128, [3.0, 5.0]),
                         diagnosed("c", HOSTILE, None, [2.0, 2.0])], {"RoPE": "#123456"})  # fmt: skip
    assert "<img" not in page
    cells = re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", page, re.S)
    assert len(cells) == 2  # the seeds of a method share a row
    assert "RoPE<small>2 runs</small>" in cells[0]
    assert "5 of 8" in cells[0]
    assert "<td>33</td>" in cells[0]
    assert "32 to 64 / 32 to 128" in cells[0]
    assert "not up to 32" in cells[1]
    assert "RoPE from 2.50 to 4.50" in page  # the mean of the seeds
    assert 'stroke="#123456"' in page  # as its curve has it
    assert 'stroke="#d55e00"' in page  # a method without a curve gets one of the section's own
    assert bend_section([], {}) == ""


def test_the_report_keeps_the_diagnoses(tmp_path: Any) -> None:
    item = {**evaluation({32: 2.0, 256: 3.0}), "seed": 0}
    for row in item["rows"]:
        row |= {"ppl": math.exp(row["nll"]), "ci95": None, "tokens": 1, "documents": 1, "factor": None}
    found = [diagnosed("r", "rope", 64, [2.0, 4.0])]
    page = report.write_report(
        tmp_path, evals=results([item]), verdicts=[], title="t", notes=[], manifest={}, diagnoses=found
    )
    assert json.loads((tmp_path / "results.json").read_text())["diagnoses"] == found
    assert "Why the curves bend" in page.read_text(encoding="utf-8")
