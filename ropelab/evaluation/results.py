"""An evaluation as it is kept and handed on: its fields are those of the JSON contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from ropelab.protocols import PROTOCOLS, Protocol
from ropelab.runs import Stored

LONGEST = 2**40  # tokens of a ctx: no text has so many


@dataclass(frozen=True, kw_only=True)
class Row(Stored):
    """The losses of one ctx. nll: nats per token. ci95: ends of the 95% interval of ppl over `unit`s of text.

    status: ok | undefined | non-finite; only with ok there are numbers, else `reason` may say why not. idle: the
    scaling has no effect at this ctx. layers: those that a scaling reaches, where it is not all. context_min, _mean:
    tokens before a target. context_gain: nats won over train_ctx (protocol last).
    """

    SPARSE: ClassVar[frozenset[str]] = frozenset(
        ("idle", "layers", "context_min", "context_mean", "context_gain", "spectrum_digest", "targets_digest", "reason")
    )

    ctx: int
    factor: float | None
    idle: bool | None = None
    layers: str | None = None
    ppl: float | None
    nll: float | None
    bits_per_byte: float | None
    tokens: int
    ci95: tuple[float | None, float | None] | None
    unit: str | None = None
    status: str
    documents: int
    context_min: int | None = None
    context_mean: float | None = None
    spectrum_digest: str | None = None
    targets_digest: str | None = None
    context_gain: float | None = None
    reason: str | None = None

    @property
    def ok(self) -> bool:
        """Does it hold numbers?"""
        return self.status == "ok"


@dataclass(frozen=True, kw_only=True)
class ProtocolRecord(Stored):
    """How and on which text losses were measured.

    span: the length that the text is laid out for, tokens. left_out: documents too short for it. unused: documents
    beyond the budget `tokens`. bos: the token that begins every window. authors: of the scored documents.
    """

    name: str
    stride: int | None = None
    last: int | None = None
    span: int | None = None
    tokens: int | None = None
    max_ctx: int | None = None
    split: str | None = None
    documents: int | None = None
    left_out: int | None = None
    unused: int | None = None
    bos: int | None = None
    targets_digest: str | None = None
    document_digests: list[str] | None = None
    authors: list[str | None] | None = None
    data_digest: str | None = None
    tokenizer: str | None = None
    dtype: str | None = None

    @property
    def kind(self) -> Protocol:
        return PROTOCOLS[self.name]

    @property
    def scored(self) -> int | None:
        """The value of the protocol's own parameter: targets of a window; None where all of them count."""
        key = self.kind.parameter
        return None if key is None else getattr(self, key, self.extra.get(key))


@dataclass(frozen=True, kw_only=True)
class PositionCurve(Stored):
    """Mean loss (nats) by position in a window of `ctx` tokens; `edges` has one entry more than `nll`."""

    ctx: int
    edges: list[float]
    nll: list[float | None]


@dataclass(frozen=True, kw_only=True)
class EvalResult(Stored):
    """The `eval` object of the JSON contract: one model, one scaling, one protocol, a row for each ctx.

    factor: of the whole ladder; None where there is none, or each row has its own. scaling_parameters: all of them, as
    asked. pos_changed, scaling_changed: those that are not the YAML's. recipe: runs with equal ones are repetitions.
    weights: sha256 of the weights that were evaluated. Of a checkpoint of others `extra` says source and versions.
    """

    SPARSE: ClassVar[frozenset[str]] = frozenset(("weights", "weights_bound", "warnings", "recipe", "kept_scaling"))

    run: str
    pos: str
    baseline: str | None = None
    scaling: str
    factor: float | None
    scaling_parameters: dict[str, Any] | None = None
    pos_changed: dict[str, Any] | None = None
    scaling_changed: dict[str, Any] | None = None
    recipe: str | None = None
    kept_scaling: bool | None = None
    train_ctx: int
    seed: int
    data: str
    window: int | None
    device: str | None = None
    matmul_precision: str | None = None
    memory_planned_mb: float | None = None
    weights: str | None = None
    weights_bound: str | None = None
    protocol: ProtocolRecord
    rows: list[Row]
    position_curve: PositionCurve | None
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, item: Any, where: str = "") -> Self:
        """As `Stored.from_json`, and `ValueError` for a protocol that is unknown, and for rows that are none."""
        result = super().from_json(item, where)
        if result.protocol.name not in PROTOCOLS:
            raise ValueError(f"{where}protocol.name is {result.protocol.name!r}")
        if not result.rows:
            raise ValueError(f"{where}rows is empty")
        for number, row in enumerate(result.rows):
            if not 1 <= row.ctx <= LONGEST:
                raise ValueError(f"{where}rows[{number}].ctx is {row.ctx}")
        if not 1 <= result.train_ctx <= LONGEST:
            raise ValueError(f"{where}train_ctx is {result.train_ctx}")
        curve = result.position_curve
        if curve is not None and len(curve.edges) != len(curve.nll) + 1:
            raise ValueError(f"{where}position_curve has {len(curve.edges)} edges for {len(curve.nll)} losses")
        return result

    @property
    def changed(self) -> dict[str, Mapping[str, Any]]:
        """The parameters of encoding and scaling that are not their YAML's."""
        return {"pos_changed": self.pos_changed or {}, "scaling_changed": self.scaling_changed or {}}

    def row(self, ctx: int) -> Row | None:
        """The row of a ctx; None where it has none."""
        return next((row for row in self.rows if row.ctx == ctx), None)
