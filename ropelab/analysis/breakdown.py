"""Why a curve bends: the rotary angles that training showed, those that a longer text asks for, and where losses rise.

Numbers only. A pair that turns theta radians per token meets, between the tokens of a training window of L, the
distances 0 .. L-1; each of these L tokens stands for one step, so that the pair's trained range is [0, L theta), and
the whole circle once L theta >= 2 pi, when the angles go round without a gap wider than a step. A text of N tokens asks
for angles up to (N-1) theta' in the spectrum of its scaling. What lies outside the trained range is new to the model:
Chen et al. 2023 (2306.15595), section 2.2; Peng et al. 2023 (2309.00071), section 3.2, for the pairs without a period.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ropelab.config import Config, Method
from ropelab.errors import ContextLengthError
from ropelab.evaluation import EvalResult, Row
from ropelab.positions import (
    Geometry,
    PositionEncoding,
    Positions,
    Rope,
)
from ropelab.protocols import PROTOCOLS
from ropelab.scalings import build

THRESHOLD = 0.05  # nats per token above the loss at train_ctx: 5% of a perplexity, more than the noise of 64 documents
LIMIT = 2**20  # tokens: no breakdown is looked for beyond
# the sharpest first
SHARPEST = tuple(sorted(
    (name for name, kind in PROTOCOLS.items() if kind.shows_breakdown is not None),
    key=lambda name: PROTOCOLS[name].shows_breakdown or 0,
))  # fmt: skip
CIRCLE = 2 * math.pi
ROUNDING = 1 - 1e-9  # an angle that reaches the end of a range by the rules is not kept inside by rounding

At = Callable[[int], tuple[PositionEncoding, Method]]
"""ctx -> the encoding in use there, and the scaling that made it, its factor a number."""


# --- what training showed -------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """What the rotary pairs met in the last training of a model."""

    length: int  # L: the distances 0 .. L-1
    inv_freq: Tensor  # (R/2,) fp64, radians per token, as they were in training
    reach: Tensor  # (R/2,) fp64, radians: the angles [0, reach) were met

    @property
    def full(self) -> Tensor:
        """(R/2,) bool: which pairs saw a full period."""
        return self.reach >= CIRCLE * ROUNDING


def trained_length(config: Config, original_ctx: int) -> int:
    """The number of positions that training windows were drawn from: train.ctx, or max_ctx of pose and randomized."""
    drawn = config.positions
    if drawn.name == "contiguous":
        return config.train.ctx
    if drawn.parameters["max_ctx"] is not None:
        return int(drawn.parameters["max_ctx"])
    return round((config.scaling.parameters["factor"] if drawn.name == "pose" else 8) * original_ctx)


def trained_range(config: Config, original_ctx: int) -> Trained | None:
    """The angles of a run's last training; None without a rotation.

    Of a fine-tuned run that is the child's training, in the child's own spectrum: what only its ancestors met is not
    counted, as nothing kept it alive. `config.scaling` has the factor that training used.
    """
    encoding = build(config.pos, config.scaling, Geometry.of(config.model, original_ctx))
    if not isinstance(encoding, Rope):
        return None
    length = trained_length(config, original_ctx)
    used = encoding.spectrum(config.train.ctx)
    start = min(used.start_tokens, length)
    reach = torch.maximum(length * used.inv_freq, start * encoding.inv_freq())
    return Trained(length, used.inv_freq, reach)


# --- what a text asks for -------------------------------------------------------------------------------------------


def farthest(method: Method, said: Positions, ctx: int) -> int:
    """The largest distance that the scores of `ctx` tokens see, in tokens as the rotation counts them."""
    if said.block is not None:
        return min(ctx - 1, 2 * said.block - 1)
    if said.far is None:
        return ctx - 1
    window, group = said.far.window, method.parameters.get("group")
    return window if group is None else (ctx - 1) // group + window - window // group


def asked(encoding: Rope, method: Method, ctx: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest angle of every pair between two of `ctx` tokens: (R/2,) fp64 radians each.

    The smallest is 0, but for LongRoPE's start tokens: a query just after them is at an interpolated angle, which may
    lie before that of the last of them. `ContextLengthError` where the encoding is undefined.
    """
    used, plain = encoding.spectrum(ctx), encoding.inv_freq()
    start = min(used.start_tokens, ctx)
    if start == ctx:
        return torch.zeros_like(plain), (ctx - 1) * plain
    high = farthest(method, encoding(torch.arange(1), ctx=ctx), ctx) * used.inv_freq
    if start == 0:
        return torch.zeros_like(plain), high
    return (start * used.inv_freq - (start - 1) * plain).clamp(max=0), torch.maximum(high, (start - 1) * plain)


def new_angles(encoding: Rope, method: Method, trained: Trained, ctx: int) -> tuple[Tensor, Tensor]:
    """Which pairs are asked for angles that training did not show, (R/2,) bool, and for how many radians, (R/2,)."""
    low, high = asked(encoding, method, ctx)
    reach = trained.reach
    new = ~trained.full & (((high >= reach * ROUNDING) & (high > 0)) | ((low < 0) & (CIRCLE + low >= reach)))
    top = torch.maximum(high.clamp(max=CIRCLE), reach)
    outside = (top - reach) + torch.minimum(-low, CIRCLE - top).clamp(min=0)
    return new, torch.where(new, outside.clamp(max=CIRCLE), 0.0)


def coverage(encoding: Rope, method: Method, trained: Trained, ctx: int) -> list[dict[str, Any]]:
    """One row per pair: `coverage` of the JSON contract, and what is asked of the pair at `ctx`.

    wavelength: tokens per turn in the spectrum in use at ctx, None for a pair that does not turn; wavelength_train: in
    that of training. turns_train: turns
    within the trained positions, in the spectrum of training. turns_ctx: turns within ctx. full_period: did the pair
    complete one in training? trained_to: end of its trained range, asked_from and asked_to: the angles that the scores
    see at ctx, all in radians, not reduced to one turn. new: is one of them new? outside: radians of the circle that
    are asked for and were not met.
    """
    used = encoding.spectrum(ctx).inv_freq
    low, high = asked(encoding, method, ctx)
    new, outside = new_angles(encoding, method, trained, ctx)
    return [
        {
            "pair": pair,
            "wavelength": _wavelength(used[pair]),
            "wavelength_train": _wavelength(trained.inv_freq[pair]),
            "turns_train": float(trained.length * trained.inv_freq[pair]) / CIRCLE,
            "turns_ctx": ctx * float(used[pair]) / CIRCLE,
            "full_period": bool(trained.full[pair]),
            "trained_to": float(trained.reach[pair]),
            "asked_from": float(low[pair]),
            "asked_to": float(high[pair]),
            "new": bool(new[pair]),
            "outside": float(outside[pair]),
        }
        for pair in range(len(used))
    ]


def _wavelength(inv_freq: Tensor) -> float | None:
    return None if inv_freq == 0 else CIRCLE / float(inv_freq)


# --- the predicted breakdown ----------------------------------------------------------------------------------------


def predict(at: At, *, trained: Trained | None, length: int, original_ctx: int) -> dict[str, Any]:
    """The first ctx at which an encoding is undefined or must say what training never showed.

    Of a rotary encoding: at which a pair that never completed a period is asked for an angle outside its trained range.
    `length` is the number of trained positions. Returns {"breaks_from": the first such ctx | None, "pair": the pair
    that meets it first | None, "why": in words}. Looked for up to LIMIT tokens; that a longer text asks for no less
    holds between two lengths original_ctx 2^k.
    """
    encoding, _ = at(original_ctx)
    rotary = isinstance(encoding, Rope) and trained is not None and rotates(encoding, original_ctx)

    def broken(ctx: int) -> tuple[int | None, str] | None:
        encoding, method = at(ctx)
        try:
            encoding(torch.arange(1), ctx=ctx)
            if rotary and trained is not None:
                assert isinstance(encoding, Rope)
                new, _ = new_angles(encoding, method, trained, ctx)
                if new.any():
                    pair = int(new.nonzero()[0])
                    return pair, f"pair {pair} is asked for an angle that training did not show"
                return None
        except ContextLengthError as error:
            return None, str(error)
        why = encoding.unmet(ctx, length)
        return None if why is None else (None, why)

    ladder = sorted({min(LIMIT, max(1, math.ceil(original_ctx * 2.0**k))) for k in range(-20, 21)})
    good = 0
    for ctx in ladder:
        if (found := broken(ctx)) is not None:
            bad = ctx
            break
        good = ctx
    else:
        why = "no pair is asked for an angle that training did not show" if rotary else encoding.unlimited
        return {"breaks_from": None, "pair": None, "why": why}
    while bad - good > 1:
        middle = (good + bad) // 2
        at_middle = broken(middle)
        if at_middle is None:
            good = middle
        else:
            bad, found = middle, at_middle
    return {"breaks_from": bad, "pair": found[0], "why": found[1]}


def rotates(encoding: PositionEncoding, ctx: int) -> bool:
    """DroPE's rotation is dropped at the end of training."""
    return encoding(torch.arange(1), ctx=ctx).rotation is not None


# --- the observed breakdown -----------------------------------------------------------------------------------------


Key = tuple[str, float | None, str]
"""A scaling as evaluated: its name, factor, and the parameters that are not the defaults, as JSON."""


def key_of(item: EvalResult) -> Key:
    return item.scaling, item.factor, json.dumps(item.changed["scaling_changed"], sort_keys=True)


def by_method(evals: Sequence[EvalResult], protocols: Sequence[str], preferred: str | None) -> dict[Key, EvalResult]:
    """The evaluation that says most about each scaling: of the first protocol, on the `preferred` targets (a digest)
    rather than on others, of the longest ladder.

    Left out: window controls, and evaluations of the validation split.
    """
    chosen: dict[Key, EvalResult] = {}
    for item in evals:
        protocol = item.protocol
        if item.window is not None or protocol.name not in protocols or protocol.split not in (None, "test"):
            continue
        key = key_of(item)
        if key not in chosen or _worth(item, protocols, preferred) > _worth(chosen[key], protocols, preferred):
            chosen[key] = item
    return chosen


def _worth(item: EvalResult, protocols: Sequence[str], preferred: str | None) -> tuple[int, bool, int, int]:
    ctxs = [row.ctx for row in item.rows]
    same = preferred is not None and item.protocol.targets_digest == preferred
    return -protocols.index(item.protocol.name), same, max(ctxs), len(ctxs)


def observe(item: EvalResult, as_trained: Sequence[EvalResult], threshold: float = THRESHOLD) -> dict[str, Any]:
    """Where the losses of an evaluation begin to rise: {"protocol", "threshold", "baseline", "good", "bad"}.

    The baseline is the loss at train_ctx of the model as it was trained (one of `as_trained`) on the same targets,
    "trained"; where that was not evaluated the item's own, "own". `bad` is the first ctx of the ladder, from train_ctx
    on, whose loss is more than `threshold` nats above it or that has none; `good` the one before. Between them nothing
    is known. None: `good` is the longest ctx where nothing is bad; both are None without a baseline.
    """
    train_ctx = item.train_ctx
    own = _row(item, train_ctx)
    baseline, said = None, None
    for other in as_trained:
        row = _row(other, train_ctx)
        same = own is not None and row is not None and row.targets_digest == own.targets_digest
        if same and row is not None and other.protocol.dtype == item.protocol.dtype:
            baseline, said = row.nll, "trained"
            break
    else:
        if own is not None:
            baseline, said = own.nll, "own"
    found = {"protocol": item.protocol.name, "threshold": threshold, "baseline": said, "good": None, "bad": None}
    if baseline is None:
        return found
    for row in sorted(item.rows, key=lambda row: row.ctx):
        if row.ctx < train_ctx:
            continue
        if not row.ok or row.nll is None or row.nll > baseline + threshold:
            return {**found, "bad": row.ctx}
        found["good"] = row.ctx
    return found


def _row(item: EvalResult, ctx: int) -> Row | None:
    row = item.row(ctx)
    return row if row is not None and row.ok else None
