"""Claims: published statements as files, what has to be measured for them, and their verdicts.

A claim file (`configs/claim/*.yaml`, or anyone's own) names runs, and checks on them. A check is a contrast, a weighted
sum of mean losses (nats per target) that has to exceed a threshold `tau`, or an exact statement. Each loss is a *term*:

    RUN[+SCALING[:FACTOR]][/window]@CTX[|PROTOCOL]

    alibi@8L                 the run `alibi` at 8 times its training length
    rope+ntk:4@2L            the run `rope`, its spectrum changed by `ntk` with factor 4, at twice its training length
    rope+dynamic_ntk@256     a dynamic scaling has factor 1 when none is given; a ctx may be a number of tokens
    alibi/window@8L|last     keys further back than the training length masked; under a protocol of its own

`L` is the run's training length. Weights sum to zero within each protocol, so that only differences of losses on the
same targets are ever judged: `{b@8L: 1, a@8L: -1}` is ln(PPL_b / PPL_a) at 8L, `{a@8L: 1, a@L: -1}` the growth of a.

`required` says what to measure, `judge` turns measurements into verdicts. This module runs no model.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped, unused-ignore]

from ropelab.schema import PROTOCOLS
from ropelab.stats import ALPHA, Contrast, Decision, FloatArray, combine, decide, holm, needed_seeds, two_way

TIERS = ("cpu", "gpu")
EXACT = ("defined", "undefined", "identical")
RUN_KEYS = ("pos", "scaling", "positions", "model", "data", "train")  # what a run of a claim may set
MIN_DOCS = 6  # documents, and clusters of documents
MIN_CALIBRATION_SEEDS = 5
DEFAULT_GAP = 0.25  # nats between two runs at their training length that still are comparable beyond it
MAX_OVERFIT = 0.02  # nats of the final above the best validation loss
MAX_GENERALISATION_GAP = 0.25  # nats of the validation above the training loss
LR_TOLERANCE = 0.01  # nats above the best learning rate of the check
SAME_LOSS = 1e-5  # nats; below what float32 arithmetic in another order changes


# --- the data of a claim ---


@dataclass(frozen=True)
class Term:
    """One measured loss: run, scaling, window control, ctx in tokens, protocol. `text` is its spelling in the file."""

    text: str
    run: str
    scaling: str | None  # None: as trained
    factor: float | None
    window: bool
    ctx: int
    protocol: str


@dataclass(frozen=True)
class ContrastCheck:
    """The check `sum of weight * loss of term > tau`, in nats."""

    statement: str
    terms: tuple[tuple[Term, float], ...]
    tau: float
    seed_sd: float | None  # standard deviation of the contrast over calibration seeds, for verdicts from one seed
    seed_sd_n: int
    published: tuple[float, float] | None  # lowest and highest published exp(contrast)
    published_source: str | None


@dataclass(frozen=True)
class ExactCheck:
    """A check without statistics on `terms`, in every seed.

    `defined`, `undefined`: each has, or lacks, a perplexity. `identical`: all have one spectrum and the same losses.
    """

    statement: str
    kind: str  # one of EXACT
    terms: tuple[Term, ...]


Check = ContrastCheck | ExactCheck


@dataclass(frozen=True)
class Cell:
    """The recipe that the runs of several claims share: how they are trained, and on what they are evaluated."""

    name: str
    train: tuple[str, ...]  # overrides of every run
    evaluation: tuple[str, ...]  # overrides of every evaluation
    ctxs: tuple[int, ...]  # the ladder, tokens, ascending
    stride: int
    last: int
    max_bpb: float | None  # validation bits per byte that a trained run reaches
    lr_check: Mapping[str, Mapping[float, float]]  # run -> {multiple of train.lr: validation loss}

    @property
    def max_ctx(self) -> int:
        """The ctx that the evaluated text is laid out for, so that every ctx scores the same targets."""
        return self.ctxs[-1]


@dataclass(frozen=True)
class Claim:
    """A published statement with checks. `runs` holds each run's full overrides, the cell's included, in one order."""

    id: str
    statement: str
    source: str
    tier: str
    cell: Cell
    protocol: str
    runs: Mapping[str, tuple[str, ...]]
    checks: tuple[Check, ...]
    gap: float  # nats; see DEFAULT_GAP
    max_bpb: float | None
    lr_check: Mapping[str, Mapping[float, float]]
    robustness: str | None

    def train_ctx(self, run: str) -> int:
        """L of a run, tokens."""
        return _train_ctx(self.runs[run])

    def evaluation(self, term: Term) -> Evaluation:
        """The evaluation that measures a term, without its ctx: two terms with equal ones differ in ctx only."""
        overrides = [*self.cell.evaluation, f"eval.protocol={term.protocol}"]
        if term.window:
            overrides.append(f"eval.window={self.train_ctx(term.run)}")
        return Evaluation(
            self.runs[term.run], term.scaling, term.factor, term.window, term.protocol, (), tuple(sorted(overrides))
        )


@dataclass(frozen=True)
class Evaluation:
    """Something to measure, once per seed: one trained run under one scaling, window and protocol at some ctxs.

    `run` are the run's overrides (without a seed): equal tuples are one run. `overrides` are those of the evaluation
    but for scaling and ctx: `eval.protocol=last`, `eval.max_ctx=1024`, ... `scaling` None leaves the trained one.
    """

    run: tuple[str, ...]
    scaling: str | None
    factor: float | None
    window: bool
    protocol: str
    ctxs: tuple[int, ...]
    overrides: tuple[str, ...]

    @property
    def key(self) -> Evaluation:
        """The evaluation whatever its ctxs: what a measurement is looked up by."""
        return replace(self, ctxs=())


# --- what the caller supplies ---


@dataclass(frozen=True)
class Row:
    """One evaluation at one ctx.

    `nll` maps a document's digest to its mean loss (nats per target); `targets` is the digest of what was scored, and
    `spectrum` a digest of everything that the encoding under its scaling says at this ctx (None: nothing to digest).
    """

    status: str  # "ok", "undefined", ...
    reason: str | None
    nll: Mapping[str, float]
    targets: str | None
    spectrum: str | None


@dataclass(frozen=True)
class Measurement:
    """The rows (ctx -> Row) of one evaluation of one seed. It may hold more ctxs than were asked for."""

    evaluation: Evaluation
    seed: int
    dtype: str  # of the evaluation's arithmetic
    rows: Mapping[int, Row]
    clusters: Mapping[str, str] = field(default_factory=dict)  # document digest -> its author; absent: itself


@dataclass(frozen=True)
class Training:
    """What the training of one run and seed came to. Losses in nats per token."""

    run: tuple[str, ...]
    seed: int
    val_loss: float
    best_val_loss: float
    train_loss: float  # mean over the last 5% of the steps
    val_bpb: float  # validation bits per byte
    dtype: str  # as resolved on the device


# --- reading claim files ---

_NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?"
_EXPRESSION = re.compile(rf"([+-]?)\s*(ln\()?\s*({_NUMBER})\s*(?:/\s*({_NUMBER})\s*)?(\))?")
_CTX = re.compile(r"(?:(?P<multiple>[1-9]\d*)?(?P<L>L))|(?P<ctx>[1-9]\d*)")
_TERM = re.compile(
    r"(?P<run>[A-Za-z][\w-]*)"
    r"(?:\+(?P<scaling>[A-Za-z]\w*)(?::(?P<factor>[^/@|]+))?)?"
    r"(?P<window>/window)?"
    r"@(?P<ctx>\w+)"
    r"(?:\|(?P<protocol>\w+))?"
)
_OVERRIDE = re.compile(r"[a-z_][\w.]*=.+")


def parse_number(value: object) -> float:
    """A number of a claim file: 0.25, "31.58/18.41", "ln(1.05)", "-ln(31.58/18.41)". Nothing is evaluated as code.

    Raises ValueError for anything else, and for a logarithm or a quotient that is not finite.
    """
    message = f"'{value}' is no number; write one such as 0.25, 31.58/18.41 or -ln(1.05)"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(message)
    match = _EXPRESSION.fullmatch(str(value).strip())
    if match is None or bool(match[2]) != bool(match[5]):
        raise ValueError(message)
    number, divisor = float(match[3]), float(match[4] or 1)
    if divisor == 0 or (match[2] and number == 0) or not math.isfinite(number / divisor):
        raise ValueError(message)
    number /= divisor
    return (-1 if match[1] == "-" else 1) * (math.log(number) if match[2] else number)


def _nearest(name: str, allowed: Iterable[str]) -> str:
    """ "; did you mean X?" or the allowed names."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"one of {', '.join(names) or '(none)'}"


@dataclass(frozen=True)
class _Section:
    """One mapping of a file and its place in it, so that every message names file and key."""

    file: str
    place: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, file: str, place: str, value: object, allowed: Sequence[str] | None) -> _Section:
        if not isinstance(value, dict):
            raise ValueError(f"{file}: {place or 'the file'} must be a mapping, not {_shown(value)}")
        section = cls(file, place, {str(key): item for key, item in value.items()})
        for key in section.values:
            if allowed is not None and key not in allowed:
                raise section.error(key, f"unknown key; {_nearest(key, allowed)}")
        return section

    def error(self, key: str, message: str) -> ValueError:
        return ValueError(f"{self.file}: {f'{self.place}.{key}' if self.place else key}: {message}")

    def section(self, key: str, allowed: Sequence[str] | None) -> _Section:
        place = f"{self.place}.{key}" if self.place else key
        return _Section.of(self.file, place, self.values.get(key), allowed)

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, f"must be a text, not {_shown(value)}")
        return value.strip()

    def choice(self, key: str, allowed: Sequence[str]) -> str:
        value = self.text(key)
        if value not in allowed:
            raise self.error(key, f"'{value}' is unknown; {_nearest(value, allowed)}")
        return value

    def number(self, key: str, low: float = -math.inf) -> float:
        try:
            value = parse_number(self.values.get(key))
        except ValueError as error:
            raise self.error(key, str(error)) from None
        if value < low:
            raise self.error(key, f"must be >= {low:g}, not {value:g}")
        return value

    def optional(self, key: str, low: float = -math.inf) -> float | None:
        return None if self.values.get(key) is None else self.number(key, low)

    def integer(self, key: str, low: int, default: int) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise self.error(key, f"must be a whole number >= {low}, not {_shown(self.values.get(key))}")
        return value

    def items(self, key: str) -> list[Any]:
        value = self.values.get(key)
        if not isinstance(value, list) or not value:
            raise self.error(key, f"must be a list with at least one item, not {_shown(value)}")
        return value

    def overrides(self, key: str) -> list[str]:
        """A list of KEY=VALUE that train a run."""
        overrides = self.items(key)
        for text in overrides:
            if not isinstance(text, str) or not _OVERRIDE.fullmatch(text):
                raise self.error(key, f"{_shown(text)} is no override; write KEY=VALUE, such as pos=rope")
            group = re.split(r"[.=]", text, maxsplit=1)[0]
            if group not in RUN_KEYS:
                raise self.error(key, f"'{text}' does not describe a run; it may set {', '.join(RUN_KEYS)}")
        return overrides


def _shown(value: object) -> str:
    return "nothing" if value is None else f"'{value}'"


def _read(path: Path) -> object:
    """A YAML file. A key given twice is refused: YAML would keep the last and drop, say, a term of a contrast."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    try:
        _refuse_duplicates(path.name, yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: no valid YAML: {' '.join(str(error).split())}") from None


def _refuse_duplicates(file: str, root: Any) -> None:
    nodes, visited = [root], set()  # an anchor may lead back to its own node
    while nodes:
        node = nodes.pop()
        if id(node) in visited or not isinstance(node, yaml.CollectionNode):
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
            continue
        keys: set[str] = set()
        for key, value in node.value:
            if str(key.value) in keys:
                raise ValueError(f"{file}: {key.value}: given twice (line {key.start_mark.line + 1}); keep one")
            keys.add(str(key.value))
            nodes.append(value)


def _merged(*overrides: Sequence[str]) -> tuple[str, ...]:
    """Overrides with the last value of each key, in one order, so that equal runs are equal tuples."""
    last = {text.partition("=")[0]: text for part in overrides for text in part}
    return tuple(last[key] for key in sorted(last))


def _train_ctx(overrides: Sequence[str]) -> int:
    """The value of train.ctx; 0 where it is missing or no positive whole number."""
    values = dict(text.split("=", 1) for text in overrides)
    return int(values["train.ctx"]) if re.fullmatch(r"[1-9]\d*", values.get("train.ctx", "")) else 0


def _ctx(text: str, train_ctx: int) -> int:
    """`L`, `8L` or a number of tokens."""
    match = _CTX.fullmatch(text)
    if match is None:
        raise ValueError(f"ctx '{text}' is not understood; write L, 8L or a number of tokens")
    return int(match["multiple"] or 1) * train_ctx if match["L"] else int(match["ctx"])


def _load_lr_check(parent: _Section) -> dict[str, dict[float, float]]:
    """run -> {multiple of train.lr: validation loss}, with the common rate (1) between two others."""
    if parent.values.get("lr_check") is None:
        return {}
    table: dict[str, dict[float, float]] = {}
    section = parent.section("lr_check", None)
    for run in section.values:
        losses = section.section(run, None)
        unreadable = [multiple for multiple in losses.values if not re.fullmatch(_NUMBER, multiple)]
        table[run] = {float(multiple): losses.number(multiple) for multiple in losses.values if not unreadable}
        if 1 not in table[run] or not min(table[run]) < 1 < max(table[run]):
            raise section.error(run, "needs the losses at 1 and at a smaller and a larger multiple, such as 0.5, 1, 2")
    return table


def load_cell(path: Path) -> Cell:
    """Read a cell file. Raises ValueError with file and key for anything that is not understood."""
    root = _Section.of(path.name, "", _read(path), ("train", "eval", "max_bpb", "lr_check"))
    train = _merged(root.overrides("train"))
    train_ctx = _train_ctx(train)
    if not train_ctx:
        raise root.error("train", "must set train.ctx=TOKENS, the length L that every ctx refers to")
    section = root.section("eval", ("ctx", "tokens", "stride", "last"))
    items = section.items("ctx")
    try:
        ctxs = sorted({_ctx(str(text), train_ctx) for text in items})
    except ValueError as error:
        raise section.error("ctx", str(error)) from None
    tokens = section.integer("tokens", 1, 0)
    stride, last = section.integer("stride", 1, 64), section.integer("last", 1, 64)
    values = {"dtype": "fp32", "last": last, "max_ctx": ctxs[-1], "stride": stride, "tokens": tokens}
    evaluation = tuple(f"eval.{key}={value}" for key, value in values.items())
    max_bpb = root.optional("max_bpb", 0)
    return Cell(path.stem, train, evaluation, tuple(ctxs), stride, last, max_bpb, _load_lr_check(root))


def packaged_claims(config_dir: Path) -> list[str]:
    """The ids of the claims in `config_dir`/claim, sorted."""
    return sorted(path.stem for path in (config_dir / "claim").glob("*.yaml"))


def claim_path(name: str, config_dir: Path) -> Path:
    """The file of a claim given as an id or as FILE.yaml. Raises ValueError with the nearest id."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    ids = packaged_claims(config_dir)
    if name not in ids:
        raise ValueError(f"no claim '{name}'; {_nearest(name, ids)}, or give a FILE.yaml")
    return config_dir / "claim" / f"{name}.yaml"


_CLAIM_KEYS = ("statement", "source", "tier", "cell", "protocol", "runs", "checks", "gates", "robustness")


def load_claim(path: Path, config_dir: Path) -> Claim:
    """Read a claim file; its id is the file's name, its cell is `config_dir`/cell/NAME.yaml or a FILE.yaml beside it.

    Raises ValueError, one line with the file and the key, for anything that is not understood or would compare what
    cannot be compared.
    """
    root = _Section.of(path.name, "", _read(path), _CLAIM_KEYS)
    cell = load_cell(_cell_path(root, path, config_dir))
    names = root.section("runs", None)
    runs = {name: _merged(cell.train, names.overrides(name)) for name in names.values}
    for name, overrides in runs.items():
        if not re.fullmatch(r"[A-Za-z][\w-]*", name):
            raise names.error(name, "a run's name has letters, digits, '-' and '_' only")
        if not _train_ctx(overrides):
            raise names.error(name, "train.ctx must be a whole number of tokens")
    gates = _Section(path.name, "gates", {})
    if root.values.get("gates") is not None:
        gates = root.section("gates", ("gap", "max_bpb", "lr_check"))
    gap, max_bpb = gates.optional("gap", 0), gates.optional("max_bpb", 0)
    claim = Claim(
        id=path.stem,
        statement=root.text("statement"),
        source=root.text("source"),
        tier=root.choice("tier", TIERS),
        cell=cell,
        protocol=root.choice("protocol", PROTOCOLS),
        runs=runs,
        checks=(),
        gap=DEFAULT_GAP if gap is None else gap,
        max_bpb=cell.max_bpb if max_bpb is None else max_bpb,
        lr_check={**cell.lr_check, **_load_lr_check(gates)},
        robustness=root.text("robustness") if root.values.get("robustness") is not None else None,
    )
    scalings = sorted(file.stem for file in (config_dir / "scaling").glob("*.yaml"))
    items = root.items("checks")
    return replace(
        claim,
        checks=tuple(_load_check(claim, path.name, f"checks[{i}]", item, scalings) for i, item in enumerate(items)),
    )


def _cell_path(root: _Section, path: Path, config_dir: Path) -> Path:
    name = root.text("cell")
    if name.endswith((".yaml", ".yml")):
        return path.parent / name
    cells = [file.stem for file in (config_dir / "cell").glob("*.yaml")]
    if name not in cells:
        raise root.error("cell", f"'{name}' is unknown; {_nearest(name, cells)}, or a FILE.yaml beside the claim")
    return config_dir / "cell" / f"{name}.yaml"


def _load_check(claim: Claim, file: str, place: str, value: object, scalings: Sequence[str]) -> Check:
    exact = isinstance(value, dict) and "exact" in value
    statistical = ("statement", "contrast", "tau", "protocol", "seed_sd", "seed_sd_n", "published")
    section = _Section.of(file, place, value, ("statement", "exact", "terms", "protocol") if exact else statistical)
    protocol = section.choice("protocol", PROTOCOLS) if "protocol" in section.values else claim.protocol

    def term(key: str, text: object) -> Term:
        try:
            return _parse_term(claim, str(text), protocol, scalings)
        except ValueError as error:
            raise section.error(key, f"{text}: {error}") from None

    if exact:
        kind = section.choice("exact", EXACT)
        terms = tuple(term("terms", text) for text in section.items("terms"))
        if kind == "identical" and len(terms) < 2:
            raise section.error("terms", "identical needs two terms or more")
        return ExactCheck(section.text("statement"), kind, terms)
    contrast = section.section("contrast", None)
    weighted = tuple((term("contrast", text), contrast.number(text)) for text in contrast.values)
    _check_weights(section, weighted)
    seed_sd = section.optional("seed_sd")
    if seed_sd is not None and seed_sd <= 0:
        raise section.error("seed_sd", f"must be > 0 or null, not {seed_sd:g}")
    published, source = _load_published(section)
    return ContrastCheck(
        section.text("statement"),
        weighted,
        section.number("tau"),
        seed_sd,
        section.integer("seed_sd_n", MIN_CALIBRATION_SEEDS, MIN_CALIBRATION_SEEDS),
        published,
        source,
    )


def _load_published(check: _Section) -> tuple[tuple[float, float] | None, str | None]:
    """The published range of exp(contrast), and the table that it is from."""
    if check.values.get("published") is None:
        return None, None
    section = check.section("published", ("ratio", "source"))
    items = section.items("ratio")
    try:
        ratios = [parse_number(value) for value in items]
    except ValueError as error:
        raise section.error("ratio", str(error)) from None
    if len(ratios) != 2 or not 0 < ratios[0] <= ratios[1]:
        raise section.error("ratio", "must be [lowest, highest], ratios of perplexities > 0")
    return (ratios[0], ratios[1]), section.text("source")


def _parse_term(claim: Claim, text: str, protocol: str, scalings: Sequence[str]) -> Term:
    match = _TERM.fullmatch(text)
    if match is None:
        raise ValueError("is no term; write RUN[+SCALING[:FACTOR]][/window]@CTX[|PROTOCOL], such as rope+ntk:4@2L")
    run, scaling = match["run"], match["scaling"]
    if run not in claim.runs:
        raise ValueError(f"run '{run}' is not in runs; {_nearest(run, claim.runs)}")
    if scaling is not None and scaling not in scalings:
        raise ValueError(f"scaling '{scaling}' is unknown; {_nearest(scaling, scalings)}")
    protocol = match["protocol"] or protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol '{protocol}' is unknown; {_nearest(protocol, PROTOCOLS)}")
    ctx = _ctx(match["ctx"], claim.train_ctx(run))
    _check_ctx(claim.cell, ctx, protocol)
    return Term(text, run, scaling, _factor(scaling, match["factor"]), bool(match["window"]), ctx, protocol)


def _factor(scaling: str | None, text: str | None) -> float | None:
    if scaling is None or scaling == "none":
        if text is not None:
            raise ValueError("scaling none has no factor")
        return None
    if text is None:
        if scaling.startswith("dynamic"):
            return 1.0
        raise ValueError(f"scaling {scaling} needs a factor, such as {scaling}:4")
    factor = parse_number(text)
    if factor < 1:
        raise ValueError(f"factor must be >= 1, not {factor:g}")
    return factor


def _check_ctx(cell: Cell, ctx: int, protocol: str) -> None:
    """Refuse a ctx that the protocol cannot measure on the text that the cell lays out."""
    if ctx > cell.max_ctx:
        raise ValueError(
            f"ctx {ctx} is beyond the cell's longest, {cell.max_ctx}; add it to eval.ctx of {cell.name}.yaml"
        )
    if protocol == "nonoverlapping" and cell.max_ctx % ctx:
        nearest = min((c for c in range(1, cell.max_ctx + 1) if cell.max_ctx % c == 0), key=lambda c: abs(c - ctx))
        raise ValueError(f"nonoverlapping needs a ctx that divides {cell.max_ctx}; nearest {nearest}, or use |last")
    if protocol == "last" and 2 * cell.last > ctx:
        raise ValueError(f"last scores {cell.last} targets and needs a ctx of at least {2 * cell.last}, not {ctx}")
    if protocol == "sliding" and cell.stride > ctx:
        raise ValueError(f"sliding moves by {cell.stride} targets and needs a ctx of at least that, not {ctx}")


def _check_weights(section: _Section, weighted: Sequence[tuple[Term, float]]) -> None:
    """Weights sum to zero wherever targets are the same: within a protocol, for `prefix` within one ctx of it."""
    sums: dict[str, float] = {}
    seen: dict[Term, str] = {}
    for term, weight in weighted:
        if weight == 0:
            raise section.error("contrast", f"{term.text} has weight 0; leave it out")
        same = replace(term, text="")
        if same in seen:
            raise section.error("contrast", f"{term.text} and {seen[same]} are the same; add their weights")
        seen[same] = term.text
        targets = f"prefix at ctx {term.ctx}" if term.protocol == "prefix" else term.protocol
        sums[targets] = sums.get(targets, 0.0) + weight
    for targets, total in sums.items():
        if abs(total) > 1e-9:
            raise section.error("contrast", f"weights must sum to 0 on the same targets, not to {total:g} ({targets})")


# --- what to measure ---


def _terms(check: Check) -> tuple[Term, ...]:
    return check.terms if isinstance(check, ExactCheck) else tuple(term for term, _ in check.terms)


def _in_length_terms(claim: Claim, check: ContrastCheck) -> dict[str, list[Term]]:
    """protocol -> each run of the check as trained, at L; empty unless it compares trained runs beyond L."""
    terms = _terms(check)
    if len({claim.runs[t.run] for t in terms}) < 2 or all(t.ctx <= claim.train_ctx(t.run) for t in terms):
        return {}
    return {
        protocol: [_plain(claim, run, protocol) for run in dict.fromkeys(term.run for term in terms)]
        for protocol in dict.fromkeys(term.protocol for term in terms)
    }


def _plain(claim: Claim, run: str, protocol: str) -> Term:
    return Term(f"{run}@L|{protocol}", run, None, None, False, claim.train_ctx(run), protocol)


def _changes_spectrum(claim: Claim, term: Term) -> bool:
    """Whether a term's scaling must show in its spectrum: a dynamic one is RoPE itself up to L."""
    if term.scaling is None or term.scaling == "none":
        return False
    return not (term.scaling.startswith("dynamic") and term.ctx <= claim.train_ctx(term.run))


def _needed_terms(claim: Claim, check: Check) -> list[Term]:
    """The terms of a check and those that its gates look at."""
    terms = list(_terms(check))
    if isinstance(check, ContrastCheck):
        terms += [term for plain in _in_length_terms(claim, check).values() for term in plain]
        terms += [_plain(claim, t.run, t.protocol) for t in _terms(check) if _changes_spectrum(claim, t)]
    return terms


def required(claims: Sequence[Claim]) -> list[Evaluation]:
    """All that the claims need, each evaluation once, in the order of first use; its `run`s are those to train."""
    ctxs: dict[Evaluation, set[int]] = {}
    for claim in claims:
        for check in claim.checks:
            for term in _needed_terms(claim, check):
                ctxs.setdefault(claim.evaluation(term), set()).add(term.ctx)
    return [replace(evaluation, ctxs=tuple(sorted(values))) for evaluation, values in ctxs.items()]


def evaluations(
    terms: Sequence[str], runs: Mapping[str, Sequence[str]], cell: Cell, scalings: Sequence[str]
) -> list[Evaluation]:
    """What measures terms that no claim asks for, each over the whole ladder of the cell; `runs` are a set's overrides.

    A term names its protocol. Raises ValueError for one that is not understood.
    """
    full = {name: _merged(cell.train, overrides) for name, overrides in runs.items()}
    frame = Claim("", "", "", "cpu", cell, PROTOCOLS[0], full, (), DEFAULT_GAP, None, {}, None)
    parsed = [_parse_term(frame, text, PROTOCOLS[0], scalings) for text in terms]
    return [replace(frame.evaluation(term), ctxs=cell.ctxs) for term in parsed]


# --- verdicts ---


@dataclass(frozen=True)
class CheckResult:
    """What a check came to. Statistics are None where they could not be computed."""

    statement: str
    kind: str  # "contrast" or one of EXACT
    verdict: Decision
    reason: str
    tau: float | None = None
    theta: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    reversed: bool = False  # FAIL: the whole interval lies on the other side of 0 than was published
    size: str | None = None  # exp(interval) beside the published ratios: matches, smaller, larger
    published: tuple[float, float] | None = None
    published_source: str | None = None
    in_length: float | None = None  # largest difference of the compared runs at their training length, nats
    n_seeds: int | None = None
    n_docs: int | None = None
    needs: str | None = None  # what would decide an open check

    def as_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become None."""
        return {
            "statement": self.statement,
            "kind": self.kind,
            "theta": _finite(self.theta),
            "tau": self.tau,
            "interval": None if self.interval is None else [_finite(bound) for bound in self.interval],
            "p": _finite(self.p),
            "verdict": self.verdict,
            "reversed": self.reversed,
            "reason": self.reason,
            "size": self.size,
            "published": None if self.published is None else list(self.published),
            "published_source": self.published_source,
            "in_length": _finite(self.in_length),
            "seeds": self.n_seeds,
            "documents": self.n_docs,
            "needs": self.needs,
        }


@dataclass(frozen=True)
class Verdict:
    """The verdict of a claim: `raw_verdict` alone, `verdict` among all claims judged together (Holm)."""

    claim: str
    statement: str
    source: str
    verdict: Decision
    raw_verdict: Decision
    reason: str
    p: float | None  # the largest of its checks, 1 where a gate forbids a verdict; None for exact claims
    p_adjusted: float | None
    one_seed: bool
    notes: tuple[str, ...]
    checks: tuple[CheckResult, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become None."""
        return {
            "claim": self.claim,
            "statement": self.statement,
            "source": self.source,
            "verdict": self.verdict,
            "raw_verdict": self.raw_verdict,
            "reason": self.reason,
            "p": _finite(self.p),
            "p_adjusted": _finite(self.p_adjusted),
            "one_seed": self.one_seed,
            "notes": list(self.notes),
            "checks": [check.as_json() for check in self.checks],
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


class _Measured:
    """Rows by claim, term and seed."""

    def __init__(self, measurements: Iterable[Measurement]) -> None:
        self._by_key = {(m.evaluation.key, m.seed): m for m in measurements}
        self.seeds = sorted({seed for _, seed in self._by_key})

    def of(self, claim: Claim, term: Term, seed: int) -> Measurement | None:
        measurement = self._by_key.get((claim.evaluation(term), seed))
        return measurement if measurement is not None and term.ctx in measurement.rows else None

    def row(self, claim: Claim, term: Term, seed: int) -> Row:
        measurement = self.of(claim, term, seed)
        assert measurement is not None, (term, seed)
        return measurement.rows[term.ctx]


def judge(
    claims: Sequence[Claim],
    measurements: Iterable[Measurement],
    trainings: Iterable[Training],
    seeds: Sequence[int],
    *,
    alpha: float = ALPHA,
) -> list[Verdict]:
    """The verdicts of claims judged together from the runs with these seeds.

    A claim passes if all checks pass, fails if one fails, and is inconclusive otherwise, or whenever a gate says that
    the numbers cannot carry a verdict: too few seeds or documents, losses that are not finite, different targets, an
    unchanged spectrum, runs that are untrained, overfitted, or too far apart at their training length, mixed dtypes.
    Over the statistical claims, Holm's correction can turn PASS into INCONCLUSIVE, never the other way.

    Args:
        alpha: one-sided error rate of a check. A design with a second look at more seeds halves it at both looks.
    """
    measured = _Measured(measurements)
    trained = {(training.run, training.seed): training for training in trainings}
    raw = [_judge_alone(claim, measured, trained, seeds, alpha) for claim in claims]
    statistical = [i for i, verdict in enumerate(raw) if verdict.p is not None]
    adjusted = dict(zip(statistical, holm([verdict.p for verdict in raw if verdict.p is not None]), strict=True))
    return [_with_holm(verdict, adjusted.get(i), len(statistical), alpha) for i, verdict in enumerate(raw)]


def _with_holm(verdict: Verdict, p_adjusted: float | None, n_claims: int, alpha: float) -> Verdict:
    verdict = replace(verdict, p_adjusted=p_adjusted)
    if verdict.raw_verdict != "PASS" or p_adjusted is None or p_adjusted < alpha:
        return verdict
    reason = f"passes alone (p = {verdict.p:.2g}), not among {n_claims} claims judged together (Holm: {p_adjusted:.2g})"
    return replace(verdict, verdict="INCONCLUSIVE", reason=reason)


def _judge_alone(
    claim: Claim,
    measured: _Measured,
    trained: Mapping[tuple[tuple[str, ...], int], Training],
    seeds: Sequence[int],
    alpha: float,
) -> Verdict:
    statistical = [check for check in claim.checks if isinstance(check, ContrastCheck)]
    results: list[CheckResult] = []
    problems = _training_problems(claim, statistical, trained, seeds) if statistical else []
    for check in claim.checks:
        if isinstance(check, ExactCheck):
            results.append(_judge_exact(claim, check, measured, seeds))
        else:
            result, found = _judge_contrast(claim, check, measured, seeds, alpha, len(statistical))
            results.append(result)
            problems += found
    problems = list(dict.fromkeys(problems))
    exact_failed = any(result.verdict == "FAIL" and result.kind in EXACT for result in results)
    verdict = combine([result.verdict for result in results])
    if problems and not exact_failed:
        verdict, reason = "INCONCLUSIVE", "; ".join(problems)
    else:
        reason = _reason(verdict, results)
    p_values = [result.p if result.p is not None else 1.0 for result in results if result.kind == "contrast"]
    return Verdict(
        claim=claim.id,
        statement=claim.statement,
        source=claim.source,
        verdict=verdict,
        raw_verdict=verdict,
        reason=reason,
        p=None if not statistical else 1.0 if problems else max(p_values),
        p_adjusted=None,
        one_seed=len(seeds) == 1 and bool(statistical),
        notes=_notes(claim, statistical, seeds),
        checks=tuple(results),
    )


def _reason(verdict: Decision, results: Sequence[CheckResult]) -> str:
    if verdict == "PASS":
        return "the check holds" if len(results) == 1 else f"all {len(results)} checks hold"
    first = next(result for result in results if result.verdict == verdict)
    return f"{first.statement}: {first.reason}"


def _runs(checks: Sequence[ContrastCheck]) -> list[str]:
    return list(dict.fromkeys(term.run for check in checks for term in _terms(check)))


def _notes(claim: Claim, statistical: Sequence[ContrastCheck], seeds: Sequence[int]) -> tuple[str, ...]:
    if not statistical:
        return ()
    notes = []
    if len(seeds) == 1:
        notes.append("one seed: the variation over seeds is that of the calibration seeds, widened")
    unchecked = [run for run in _runs(statistical) if run not in claim.lr_check]
    if unchecked:
        notes.append(f"lr unchecked: no learning-rate check for {', '.join(unchecked)}")
    if claim.max_bpb is None:
        notes.append("training level unchecked: no max_bpb")
    return tuple(notes)


# --- gates ---


def _training_problems(
    claim: Claim,
    statistical: Sequence[ContrastCheck],
    trained: Mapping[tuple[tuple[str, ...], int], Training],
    seeds: Sequence[int],
) -> list[str]:
    """Why the runs cannot carry a verdict: one line per run and cause, with the first seed that shows it."""
    problems: list[str] = []
    dtypes: dict[str, str] = {}
    for run in _runs(statistical):
        found: dict[str, str] = {}
        for seed in seeds:
            training = trained.get((claim.runs[run], seed))
            if training is None:
                found.setdefault("missing", f"{run}, seed {seed}: not trained")
                continue
            dtypes.setdefault(training.dtype, f"{run} in {training.dtype}")
            for cause, message in _training_faults(training, claim.max_bpb):
                found.setdefault(cause, f"{run}, seed {seed}: {message}")
        problems += found.values()
        problems += _lr_problems(run, claim.lr_check.get(run))
    if len(dtypes) > 1:
        problems.append(f"trained in different dtypes: {', '.join(dtypes.values())}; set train.dtype")
    return problems


def _training_faults(training: Training, max_bpb: float | None) -> list[tuple[str, str]]:
    losses = (training.val_loss, training.best_val_loss, training.train_loss, training.val_bpb)
    if not all(math.isfinite(loss) for loss in losses):
        return [("finite", "a training or validation loss is not finite")]
    faults: list[tuple[str, str]] = []
    if max_bpb is not None and training.val_bpb > max_bpb:
        faults.append(("untrained", f"untrained, {training.val_bpb:.2f} bits per byte against at most {max_bpb:g}"))
    if training.val_loss > training.best_val_loss + MAX_OVERFIT:
        rise = training.val_loss - training.best_val_loss
        faults.append(("overfitted", f"overfitted, the validation loss rose by {rise:.3f} nats from its best"))
    gap = training.val_loss - training.train_loss
    if gap > MAX_GENERALISATION_GAP:
        faults.append(("memorised", f"overfitted, the validation loss is {gap:.2f} nats above the training loss"))
    return faults


def _lr_problems(run: str, losses: Mapping[float, float] | None) -> list[str]:
    """A rate of the check is better than the common one by more than the tolerance: the comparison favours others."""
    if losses is None:
        return []
    best = min(losses, key=lambda multiple: losses[multiple])
    if losses[1.0] - losses[best] <= LR_TOLERANCE:
        return []
    return [f"{run}: its learning-rate check prefers {best:g} times train.lr by {losses[1.0] - losses[best]:.3f} nats"]


def _row_problems(claim: Claim, terms: Sequence[Term], measured: _Measured, seeds: Sequence[int]) -> list[str]:
    """Why no contrast of these terms can be computed; the first of each kind."""
    documents: set[frozenset[str]] = set()
    for term in terms:
        for seed in seeds:
            if measured.of(claim, term, seed) is None:
                return [f"{term.text}, seed {seed}: not measured"]
            row = measured.row(claim, term, seed)
            if row.status != "ok":
                return [f"{term.text}, seed {seed}: {row.status}{f' ({row.reason})' if row.reason else ''}"]
            if not all(math.isfinite(nll) for nll in row.nll.values()):
                return [f"{term.text}, seed {seed}: a loss is not finite"]
            documents.add(frozenset(row.nll))
    if len(documents) > 1:
        return ["documents differ between the evaluations"]
    return ["no document was scored"] if documents == {frozenset[str]()} else []


def _same_ground_problems(
    claim: Claim, terms: Sequence[Term], measured: _Measured, seeds: Sequence[int], n_docs: int
) -> list[str]:
    """Too few documents, different targets, an evaluation in low precision."""
    problems: list[str] = []
    targets: dict[str, dict[str | None, str]] = {}
    clusters: set[str] = set()
    for term in terms:
        for seed in seeds:
            measurement = measured.of(claim, term, seed)
            assert measurement is not None, term
            if measurement.dtype != "fp32":
                problems.append(f"{term.text} was evaluated in {measurement.dtype}; claims need eval.dtype=fp32")
            row = measurement.rows[term.ctx]
            ground = f"prefix at ctx {term.ctx}" if term.protocol == "prefix" else term.protocol
            targets.setdefault(ground, {}).setdefault(row.targets, f"{term.text}, seed {seed}")
            clusters = {measurement.clusters.get(document, document) for document in row.nll}
            if len(clusters) < MIN_DOCS:
                what = (
                    f"{n_docs} documents"
                    if len(clusters) == n_docs
                    else f"{n_docs} documents by {len(clusters)} authors"
                )
                problems.append(f"{what}: a verdict over texts needs at least {MIN_DOCS}")
    for ground, digests in targets.items():
        if len(digests) > 1 or None in digests:
            problems.append(f"targets differ under {ground}: {' against '.join(digests.values())}")
    return problems


def _spectrum_problems(claim: Claim, terms: Sequence[Term], measured: _Measured, seeds: Sequence[int]) -> list[str]:
    """A scaling was asked for and the encoding says what it said without."""
    for term in terms:
        if not _changes_spectrum(claim, term):
            continue
        plain = _plain(claim, term.run, term.protocol)
        for seed in seeds:
            if measured.of(claim, plain, seed) is None:
                return [f"{plain.text}, seed {seed}: not measured"]
            spectrum = measured.row(claim, term, seed).spectrum
            if spectrum is None:
                return [f"{term.text}: no spectrum was recorded, so the scaling may not have been applied"]
            if spectrum == measured.row(claim, plain, seed).spectrum:
                return [f"{term.text}: spectrum unchanged by the scaling"]
    return []


def _in_length_gap(
    claim: Claim, check: ContrastCheck, measured: _Measured, seeds: Sequence[int]
) -> tuple[float | None, list[str]]:
    """The largest difference (nats) between the compared runs at L, and what is wrong with it."""
    largest: float | None = None
    problems: list[str] = []
    for protocol, plain in _in_length_terms(claim, check).items():
        if missing := _row_problems(claim, plain, measured, seeds):
            return None, missing
        means = {term.run: float(_losses(claim, term, measured, seeds).mean()) for term in plain}
        low, high = min(means, key=lambda r: means[r]), max(means, key=lambda r: means[r])
        difference = means[high] - means[low]
        largest = difference if largest is None else max(largest, difference)
        if difference > claim.gap:
            problems.append(
                f"not comparable in length: {high} is {difference:.2f} nats behind {low} at the training length "
                f"({protocol}; at most {claim.gap:g})"
            )
    return largest, problems


# --- checks ---


def _losses(claim: Claim, term: Term, measured: _Measured, seeds: Sequence[int]) -> FloatArray:
    """(n_seeds, n_docs) mean losses of a term, documents in the order of their digests."""
    rows = [measured.row(claim, term, seed).nll for seed in seeds]
    return np.array([[nll[document] for document in sorted(nll)] for nll in rows], dtype=np.float64)


def _theta(claim: Claim, check: ContrastCheck, measured: _Measured, seeds: Sequence[int]) -> FloatArray:
    """(n_seeds, n_docs) contrast, paired: the same seed and the same document in every term."""
    parts = [weight * _losses(claim, term, measured, seeds) for term, weight in check.terms]
    theta: FloatArray = np.sum(np.stack(parts), axis=0)
    return theta


def _judge_contrast(
    claim: Claim, check: ContrastCheck, measured: _Measured, seeds: Sequence[int], alpha: float, n_checks: int
) -> tuple[CheckResult, list[str]]:
    """The result of a check and the gates that it did not pass."""
    result = CheckResult(
        check.statement,
        "contrast",
        "INCONCLUSIVE",
        "",
        tau=check.tau,
        published=check.published,
        published_source=check.published_source,
    )
    terms = _terms(check)
    problems = [f"{check.statement}: no seed was run"] if not seeds else _row_problems(claim, terms, measured, seeds)
    if problems:
        return replace(result, reason=problems[0]), problems
    contrast = two_way(_theta(claim, check, measured, seeds), seed_sd=check.seed_sd, seed_sd_n=check.seed_sd_n)
    in_length, problems = _in_length_gap(claim, check, measured, seeds)
    if len(seeds) == 1 and check.seed_sd is None:
        problems.append("one seed, and no seed_sd in the claim file: run at least 2 seeds")
    problems += _same_ground_problems(claim, terms, measured, seeds, contrast.n_docs)
    problems += _spectrum_problems(claim, terms, measured, seeds)
    verdict = decide(contrast, check.tau, alpha=alpha, n_checks=n_checks)
    interval = contrast.bound(alpha)
    result = replace(
        result,
        theta=contrast.theta,
        interval=interval if math.isfinite(contrast.variance) else None,
        p=contrast.p_greater(check.tau) if math.isfinite(contrast.variance) else None,
        size=_size(interval, check.published) if math.isfinite(contrast.variance) else None,
        in_length=in_length,
        n_seeds=contrast.n_seeds,
        n_docs=contrast.n_docs,
    )
    if problems:
        return replace(result, reason="; ".join(dict.fromkeys(problems))), problems
    reversed_ = verdict == "FAIL" and interval[1] < 0 <= check.tau
    needs = _needs(contrast, check.tau, alpha, n_checks) if verdict == "INCONCLUSIVE" else None
    reason = _explain(verdict, contrast.theta, interval, check.tau, reversed_, needs)
    return replace(result, verdict=verdict, reason=reason, reversed=reversed_, needs=needs), []


def _size(interval: tuple[float, float], published: tuple[float, float] | None) -> str | None:
    """Whether the measured effect is of the published size. Informative: it never changes a verdict."""
    if published is None:
        return None
    low, high = math.log(published[0]), math.log(published[1])
    if interval[1] < low:
        return "smaller"
    return "larger" if interval[0] > high else "matches"


def _needs(contrast: Contrast, tau: float, alpha: float, n_checks: int) -> str:
    """What would decide an open check if the estimate stayed: a pass above tau, a fail below it."""
    n = needed_seeds(contrast, tau, alpha=alpha if contrast.theta > tau else alpha / n_checks)
    return "more documents" if n is None else f"about {n} seeds"


def _explain(
    verdict: Decision, theta: float, interval: tuple[float, float], tau: float, reversed_: bool, needs: str | None
) -> str:
    numbers = f"{theta:+.3f} nats ({interval[0]:+.3f} to {interval[1]:+.3f}) against {tau:+.3f}"
    if verdict == "PASS":
        return numbers
    if verdict == "INCONCLUSIVE":
        return f"{numbers}; needs {needs}"
    if reversed_:
        return f"{numbers}: reversed"
    return f"{numbers}: {'beyond the margin' if tau < 0 else 'smaller than published'}"


def _judge_exact(claim: Claim, check: ExactCheck, measured: _Measured, seeds: Sequence[int]) -> CheckResult:
    result = CheckResult(check.statement, check.kind, "INCONCLUSIVE", "no seed was run")
    judge_seed: Callable[[Mapping[Term, Row]], tuple[Decision, str]] = {
        "defined": _judge_defined,
        "undefined": _judge_undefined,
        "identical": _judge_identical,
    }[check.kind]
    for seed in seeds:
        for term in check.terms:
            if measured.of(claim, term, seed) is None:
                return replace(result, verdict="INCONCLUSIVE", reason=f"{term.text}, seed {seed}: not measured")
    for seed in seeds:
        verdict, reason = judge_seed({term: measured.row(claim, term, seed) for term in check.terms})
        result = replace(result, verdict=verdict, reason=reason, n_seeds=len(seeds))
        if verdict != "PASS":
            return replace(result, reason=f"seed {seed}: {reason}")
    return result


def _judge_defined(rows: Mapping[Term, Row]) -> tuple[Decision, str]:
    for term, row in rows.items():
        if row.status != "ok" or not all(math.isfinite(nll) for nll in row.nll.values()):
            return "FAIL", f"{term.text} is {row.status if row.status != 'ok' else 'not finite'}"
    return "PASS", "every row has a perplexity"


def _judge_undefined(rows: Mapping[Term, Row]) -> tuple[Decision, str]:
    reasons: list[str] = []
    for term, row in rows.items():
        if row.status != "undefined":
            return "FAIL", f"{term.text} is {row.status}, not undefined"
        if not row.reason:
            return "FAIL", f"{term.text} is undefined without a reason"
        reasons.append(row.reason)
    return "PASS", f"undefined: {reasons[0]}"


def _judge_identical(rows: Mapping[Term, Row]) -> tuple[Decision, str]:
    (first, reference), *others = rows.items()
    if reference.spectrum is None or reference.status != "ok":
        return "INCONCLUSIVE", f"{first.text} has no spectrum to compare"
    for term, row in others:
        if row.spectrum != reference.spectrum:
            return "FAIL", f"{term.text} has another spectrum than {first.text}"
        if row.targets != reference.targets or row.nll.keys() != reference.nll.keys():
            return "INCONCLUSIVE", f"{term.text} and {first.text} score different targets"
        largest = max((abs(row.nll[d] - reference.nll[d]) for d in row.nll), default=0.0)
        if not largest <= SAME_LOSS:
            return "FAIL", f"{term.text} differs from {first.text} by {largest:.2g} nats in a document"
    return "PASS", "one spectrum, the same losses"


# --- calibration ---


def calibration(claim: Claim, measurements: Iterable[Measurement]) -> dict[int, tuple[float, int]]:
    """`seed_sd` and `seed_sd_n` of each check: standard deviation of its contrast over the seeds, and their number.

    Keys are indices into `claim.checks`. A check with fewer than two complete seeds, and an exact one, has no entry.
    Use seeds and documents that the claim itself is never judged on.
    """
    measured = _Measured(measurements)
    table: dict[int, tuple[float, int]] = {}
    for index, check in enumerate(claim.checks):
        if not isinstance(check, ContrastCheck):
            continue
        seeds = [seed for seed in measured.seeds if not _row_problems(claim, _terms(check), measured, [seed])]
        if len(seeds) >= 2 and not _row_problems(claim, _terms(check), measured, seeds):
            means = _theta(claim, check, measured, seeds).mean(axis=1)  # (n_seeds,)
            table[index] = (float(means.std(ddof=1)), len(seeds))
    return table
