"""From the manifest and the stored evaluations of a run to an account of where its curves bend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ropelab import config as configs
from ropelab.analysis import breakdown
from ropelab.analysis.breakdown import At, Trained
from ropelab.config import Config, Method
from ropelab.errors import ContextLengthError
from ropelab.evaluation import EvalResult
from ropelab.positions import PositionEncoding, Rope
from ropelab.protocols import PROTOCOLS
from ropelab.runs import OpenRun, encoding_of, recipe
from ropelab.scalings import resolve_factor


def trained_encoding(run: OpenRun, scaling: Method, *, longest: int) -> tuple[Method, PositionEncoding | None]:
    """A scaling with its factor as a number, as for a ladder up to `longest`, and the encoding of a run under it.

    The encoding has its trained tensors; None where the run has none yet.
    """
    method = resolve_factor(scaling, longest=longest, original_ctx=run.original_ctx)
    encoding = run.encoding(method)
    if next(encoding.parameters(), None) is None:
        return method, encoding
    if run.manifest["status"] != "done":
        return method, None
    prefix = "encoding."
    weights = {name.removeprefix(prefix): w for name, w in run.weights.items() if name.startswith(prefix)}
    encoding.load_state_dict(weights, strict=True)
    return method, encoding


def encodings_at(trained: Config, scaling: Method, original_ctx: int, *, longest: int | None) -> At:
    """The encoding of a finished run under a scaling, by ctx.

    A factor of `auto` is that of a ladder up to `longest`, one of `auto-row` (or without `longest`) that of each ctx.
    """
    per_row = scaling.parameters.get("factor") == "auto-row" or longest is None
    built: dict[float | None, Any] = {}

    def at(ctx: int) -> Any:
        method = resolve_factor(scaling, longest=ctx if per_row else longest or ctx, original_ctx=original_ctx)
        factor = method.parameters.get("factor")
        if factor not in built:
            built[factor] = encoding_of(trained, method, original_ctx), method
        return built[factor]

    return at


def diagnose_run(manifest: Mapping[str, Any], evals: Sequence[EvalResult]) -> dict[str, Any]:
    """What a run's configuration and its evaluations say together; needs neither its weights nor text.

    {"run", "pos", "pos_changed", "recipe", "train_ctx", "trained_length": positions drawn in training, "pairs": rotary
    pairs | None, "full_period": how many of them saw one | None, "evaluated": one object per scaling, factor and
    parameters of `evals`}, which holds {"scaling", "factor", "changed": parameters that are not the defaults,
    "trained": is it the scaling of training?, "ctx": the longest evaluated, "new_pairs": pairs that are asked for new
    angles there | None, "predicted": as `diagnose.predict`, "observed": as `diagnose.observe`, "losses": [[ctx, nll],
    ...] behind it, "targets": the digest of what they are losses on, "by_position": a position curve that begins
    inside the training length, with the protocol, targets and ctx it belongs to | None}.
    """
    trained = configs.from_dict(manifest["config"])
    original_ctx = manifest["original_ctx"]
    met = breakdown.trained_range(trained, original_ctx)
    if met is not None and not breakdown.rotates(
        encoding_of(trained, trained.scaling, original_ctx), trained.train.ctx
    ):
        met = None  # dropped before the end of the training
    own = [
        item
        for item in evals
        if item.run == manifest["run"] and item.pos == trained.pos.name and item.data == manifest["corpus"]["name"]
    ]
    as_trained = [item for item in own if _is_trained(item, trained) and item.window is None]
    # of `last` and `sliding` it is the end of a window only, which shows no bend
    reaching = [item for item in own if (curve := item.position_curve) and curve.edges[0] < trained.train.ctx]
    by_position = tuple(sorted(PROTOCOLS, key=lambda name: PROTOCOLS[name].shows_positions))
    positions = breakdown.by_method(reaching, by_position, _targets(as_trained, by_position))
    evaluated = []
    for key, item in breakdown.by_method(own, breakdown.SHARPEST, _targets(as_trained, breakdown.SHARPEST)).items():
        scaling, factor, _ = key
        longest = max(row.ctx for row in item.rows)
        at = _evaluated_with(item, trained, original_ctx)
        why = "an earlier version made this evaluation and stored no parameters: evaluate it again for a prediction"
        predicted: dict[str, Any] = {"breaks_from": None, "pair": None, "why": why}
        new_pairs = None
        if at is not None:
            length = breakdown.trained_length(trained, original_ctx)
            predicted = breakdown.predict(at, trained=met, length=length, original_ctx=original_ctx)
            new_pairs = _new_pairs(at, met, longest)
        where = positions.get(key)
        evaluated.append(
            {
                "scaling": scaling,
                "factor": factor,
                "changed": item.changed["scaling_changed"],
                "trained": _is_trained(item, trained),
                "ctx": longest,
                "new_pairs": new_pairs,
                "predicted": predicted,
                "observed": breakdown.observe(item, as_trained),
                "targets": item.protocol.targets_digest,
                "losses": [[row.ctx, row.nll] for row in item.rows if row.ok],
                "by_position": None
                if where is None or where.position_curve is None
                else {
                    "protocol": where.protocol.name,
                    "targets": where.protocol.targets_digest,
                    **where.position_curve.to_json(),
                },
            }
        )
    evaluated.sort(key=lambda one: (not one["trained"], one["scaling"], one["factor"] or math.inf, str(one["changed"])))
    return {
        "run": manifest["run"],
        "pos": trained.pos.name,
        "pos_changed": configs.changed("pos", trained.pos),
        "recipe": recipe(manifest),
        "train_ctx": trained.train.ctx,
        "trained_length": breakdown.trained_length(trained, original_ctx),
        "pairs": None if met is None else len(met.inv_freq),
        "full_period": None if met is None else int(met.full.sum()),
        "evaluated": evaluated,
    }


def _targets(as_trained: Sequence[EvalResult], protocols: Sequence[str]) -> str | None:
    """The targets that the run as trained was scored on, which its scalings are compared with."""
    best = next(iter(breakdown.by_method(as_trained, protocols, None).values()), None)
    return None if best is None else best.protocol.targets_digest


def _is_trained(item: EvalResult, trained: Config) -> bool:
    if item.scaling == "none":
        return trained.scaling.name == "none"
    return bool(item.kept_scaling)


def _new_pairs(at: At, met: Trained | None, ctx: int) -> int | None:
    encoding, method = at(ctx)
    if met is None or not isinstance(encoding, Rope):
        return None
    try:
        return int(breakdown.new_angles(encoding, method, met, ctx)[0].sum())
    except ContextLengthError:
        return None


def _evaluated_with(item: EvalResult, trained: Config, original_ctx: int) -> At | None:
    """The encodings that an evaluation used, by ctx; None for one of a version that did not store the parameters."""
    parameters = {} if item.scaling == "none" else item.scaling_parameters
    if parameters is None:
        return None
    scaling = Method(item.scaling, parameters)
    return encodings_at(trained, scaling, original_ctx, longest=max(row.ctx for row in item.rows))
