"""What a stored evaluation says, by type: whoever wrote it, what is read from it is of these."""

from __future__ import annotations

from typing import Any

from ropelab.config import PROTOCOLS
from ropelab.files import Types, is_of, mistyped

_TEXT, _LENGTH, _NUMBER = (str,), (int,), (int, float)
_NOTHING = (type(None),)
TOP: dict[str, Types] = {
    "run": _TEXT, "pos": _TEXT, "scaling": _TEXT, "data": _TEXT, "train_ctx": _LENGTH, "seed": _LENGTH,
    "factor": _NUMBER + _NOTHING, "window": _LENGTH + _NOTHING, "protocol": (dict,), "rows": (list,),
    "position_curve": (dict, *_NOTHING),
}  # fmt: skip
OPTIONAL: dict[str, Types] = {
    "baseline": _TEXT + _NOTHING, "kept_scaling": (bool,), "scaling_parameters": (dict,), "scaling_changed": (dict,),
    "pos_changed": (dict,), "recipe": _TEXT, "weights": _TEXT, "losses_sha256": _TEXT,
    "warnings": (list,),
}  # fmt: skip
ROW: dict[str, Types] = {
    "ctx": _LENGTH, "status": _TEXT, "factor": _NUMBER + _NOTHING, "ppl": _NUMBER + _NOTHING,
    "nll": _NUMBER + _NOTHING, "bits_per_byte": _NUMBER + _NOTHING, "tokens": _LENGTH, "documents": _LENGTH,
    "ci95": (list, *_NOTHING),
}  # fmt: skip
ROW_OPTIONAL: dict[str, Types] = {
    "targets_digest": _TEXT + _NOTHING, "reason": _TEXT + _NOTHING, "unit": _TEXT + _NOTHING, "idle": (bool,),
    "context_gain": _NUMBER + _NOTHING, "layers": _TEXT + _NOTHING,
}  # fmt: skip
PROTOCOL: dict[str, Types] = {"name": _TEXT}
PROTOCOL_OPTIONAL: dict[str, Types] = {
    "stride": _LENGTH + _NOTHING, "last": _LENGTH + _NOTHING, "span": _LENGTH + _NOTHING, "tokens": _LENGTH + _NOTHING,
    "max_ctx": _LENGTH + _NOTHING, "split": _TEXT, "documents": _LENGTH, "left_out": _LENGTH, "unused": _LENGTH,
    "targets_digest": _TEXT + _NOTHING, "document_digests": (list,), "authors": (list,), "dtype": _TEXT,
    "bos": _LENGTH + _NOTHING,
}  # fmt: skip


def wrong_evaluation(item: Any) -> str | None:
    """What of a JSON value is not as an `eval` object has it; None where all is well."""
    if wrong := mistyped(item, TOP, OPTIONAL) or mistyped(
        item["protocol"], PROTOCOL, PROTOCOL_OPTIONAL, where="protocol."
    ):
        return wrong
    if item["protocol"]["name"] not in PROTOCOLS:
        return f"protocol.name is {item['protocol']['name']!r}"
    if not item["rows"]:
        return "it has no rows"
    for number, row in enumerate(item["rows"]):
        if wrong := mistyped(row, ROW, ROW_OPTIONAL, where=f"rows[{number}]."):
            return wrong
        ends = row["ci95"] or [None, None]
        if row["ctx"] < 1 or len(ends) != 2 or not all(end is None or is_of(end, _NUMBER) for end in ends):
            return f"rows[{number}] has no ctx, or no interval"
    curve = item["position_curve"]
    if curve is not None:
        edges, nll = curve.get("edges"), curve.get("nll")
        numbers = isinstance(edges, list) and isinstance(nll, list) and is_of(curve.get("ctx"), _LENGTH)
        if not numbers or len(edges) != len(nll) + 1 or not all(is_of(edge, _NUMBER) for edge in edges):
            return "position_curve is none"
        if not all(value is None or is_of(value, _NUMBER) for value in nll):
            return "position_curve.nll holds no numbers"
    return None
