"""Claim files: published statements with checks, and what has to be measured for them.

A claim file (`configs/claim/*.yaml`, or anyone's own) names runs, and checks on them. A check is a contrast, a weighted
sum of mean losses (nats per target) that has to exceed a threshold `tau`, or an exact statement. Each loss is a *term*:

    RUN[+SCALING[:FACTOR]][/CONTROL]@CTX[|PROTOCOL]

    alibi@8L                 the run `alibi` at 8 times its training length
    rope+ntk:4@2L            the run `rope`, its spectrum changed by `ntk` with factor 4, at twice its training length
    rope+dynamic_ntk@256     a dynamic scaling has factor 1 when none is given; a ctx may be a number of tokens
    alibi/window@8L|last     keys further back than the training length masked; under a protocol of its own
    none/unigram@L           the same targets by the token frequencies of the training text

`L` is the run's training length. Weights sum to zero within each protocol, so that only differences of losses on the
same targets are ever judged: `{b@8L: 1, a@8L: -1}` is ln(PPL_b / PPL_a) at 8L, `{a@8L: 1, a@L: -1}` the growth of a.

The runs of several claims share a *cell*, and a *set* names the claims that are judged together. `required` says what
to measure; nothing here runs a model.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]

from ropelab import files
from ropelab.config import about
from ropelab.errors import DamagedFileError
from ropelab.protocols import PROTOCOLS

TIERS = ("cpu", "gpu")
CONTROLS = ("window", "unigram")
EXACT = ("defined", "undefined", "identical")
RUN_KEYS = ("pos", "scaling", "positions", "model", "data", "train")  # what a run of a claim may set
MIN_CALIBRATION_SEEDS = 5
DEFAULT_GAP = 0.25  # nats between two runs at their training length that still are comparable beyond it


# --- the data of a claim ---


@dataclass(frozen=True)
class Term:
    """One measured loss: run, scaling, window control, ctx in tokens, protocol. `text` is its spelling in the file."""

    text: str
    run: str
    scaling: str | None  # None: as trained
    factor: float | None
    control: str | None  # one of CONTROLS
    ctx: int
    protocol: str

    @property
    def targets(self) -> str:
        """The targets that are scored, in words: equal for terms whose losses may be subtracted."""
        return self.protocol if PROTOCOLS[self.protocol].same_targets else f"{self.protocol} at ctx {self.ctx}"


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
    calibrated: Mapping[str, str]  # run -> digest of what its seed_sd was measured with; see verdicts.cell_digest

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
    calibrated: Mapping[str, str]
    robustness: str | None

    def train_ctx(self, run: str) -> int:
        """L of a run, tokens."""
        return _train_ctx(self.runs[run])

    def evaluation(self, term: Term) -> Evaluation:
        """The evaluation that measures a term, without its ctx: two terms with equal ones differ in ctx only."""
        return _evaluation(term, self.runs, self.cell)


@dataclass(frozen=True)
class Evaluation:
    """Something to measure, once per seed: one trained run under one scaling, control and protocol at some ctxs.

    `run` are the run's overrides (without a seed): equal tuples are one run. `overrides` are those of the evaluation
    but for scaling and ctx: `eval.protocol=last`, `eval.max_ctx=1024`, ... `scaling` None leaves the trained one.
    """

    run: tuple[str, ...]
    scaling: str | None
    factor: float | None
    control: str | None  # one of CONTROLS
    protocol: str
    ctxs: tuple[int, ...]
    overrides: tuple[str, ...]

    @property
    def key(self) -> Evaluation:
        """The evaluation whatever its ctxs: what a measurement is looked up by."""
        return replace(self, ctxs=())


@dataclass(frozen=True)
class ClaimSet:
    """Claims judged together, and what is evaluated beside them for the figures."""

    title: str
    claims: tuple[Claim, ...]
    evaluations: tuple[Evaluation, ...]  # each once


# --- reading claim files ---

_NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?"
_EXPRESSION = re.compile(rf"([+-]?)\s*(ln\()?\s*({_NUMBER})\s*(?:/\s*({_NUMBER})\s*)?(\))?")
_CTX = re.compile(r"(?:(?P<multiple>[1-9]\d*)?(?P<L>L))|(?P<ctx>[1-9]\d*)")
_TERM = re.compile(
    r"(?P<run>[A-Za-z][\w-]*)"
    r"(?:\+(?P<scaling>[A-Za-z]\w*)(?::(?P<factor>[^/@|]+))?)?"
    r"(?:/(?P<control>window|unigram))?"
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
        if allowed is not None:
            section.refuse_others(allowed)
        return section

    def refuse_others(self, allowed: Sequence[str]) -> None:
        for key in self.values:
            if key not in allowed:
                raise self.error(key, f"unknown key; {_nearest(key, allowed)}")

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
        value, node = files.load_yaml(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    except DamagedFileError as error:
        raise ValueError(f"{path.name}: cannot be read: {error}") from None
    _refuse_duplicates(path.name, node)
    return value


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


def _load_calibrated(parent: _Section) -> dict[str, str]:
    """run -> digest."""
    if parent.values.get("calibrated") is None:
        return {}
    section = parent.section("calibrated", None)
    digests = {run: str(value) for run, value in section.values.items()}
    for run, digest in digests.items():
        if not re.fullmatch(r"[0-9a-f]{16}", digest):
            raise section.error(
                run, f"'{digest}' is no digest of 16 hexadecimal digits; scripts/calibrate.py prints it"
            )
    return digests


def load_cell(path: Path) -> Cell:
    """Read a cell file. Raises ValueError with file and key for anything that is not understood."""
    root = _Section.of(path.name, "", _read(path), ("train", "eval", "max_bpb", "lr_check", "calibrated"))
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
    lr_check, calibrated = _load_lr_check(root), _load_calibrated(root)
    return Cell(path.stem, train, evaluation, tuple(ctxs), stride, last, max_bpb, lr_check, calibrated)


def packaged_claims(config_dir: Path) -> list[str]:
    """The ids of the claims in `config_dir`/claim, sorted."""
    return _names(config_dir / "claim")


def claim_path(name: str, config_dir: Path) -> Path:
    """The file of a claim given as an id or as FILE.yaml. Raises ValueError with the nearest id."""
    return _find(name, config_dir / "claim", Path(), f"no claim '{name}'")


def _find(name: str, folder: Path, beside: Path, unknown: str) -> Path:
    """The file NAME.yaml in `folder`, or FILE.yaml in `beside`; `unknown` begins the message where it is neither."""
    if name.endswith((".yaml", ".yml")):
        return beside / name
    names = _names(folder)
    if name not in names:
        raise ValueError(f"{unknown}; {_nearest(name, names)}, or give a FILE.yaml")
    return folder / f"{name}.yaml"


def _names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


_CONTRAST_KEYS = ("statement", "contrast", "tau", "protocol", "seed_sd", "seed_sd_n", "published")
_CLAIM_KEYS = ("statement", "source", "tier", "cell", "protocol", "runs", "checks", "gates", "calibrated", "robustness")


def load_claim(path: Path, config_dir: Path) -> Claim:
    """Read a claim file; its id is the file's name, its cell is `config_dir`/cell/NAME.yaml or a FILE.yaml beside it.

    Raises ValueError, one line with the file and the key, for anything that is not understood or would compare what
    cannot be compared.
    """
    root = _Section.of(path.name, "", _read(path), _CLAIM_KEYS)
    cell = _load_cell_of(root, path.parent, config_dir)
    runs = _load_runs(root, cell)
    protocol = root.choice("protocol", tuple(PROTOCOLS))
    scalings = _names(config_dir / "scaling")
    checks = [
        _load_check(_Section.of(path.name, f"checks[{i}]", check, None), runs, cell, protocol, scalings)
        for i, check in enumerate(root.items("checks"))
    ]
    gates = _Section(path.name, "gates", {})
    if root.values.get("gates") is not None:
        gates = root.section("gates", ("gap", "max_bpb", "lr_check"))
    gap, max_bpb = gates.optional("gap", 0), gates.optional("max_bpb", 0)
    return Claim(
        id=path.stem,
        statement=root.text("statement"),
        source=root.text("source"),
        tier=root.choice("tier", TIERS),
        cell=cell,
        protocol=protocol,
        runs=runs,
        checks=tuple(checks),
        gap=DEFAULT_GAP if gap is None else gap,
        max_bpb=cell.max_bpb if max_bpb is None else max_bpb,
        lr_check={**cell.lr_check, **_load_lr_check(gates)},
        calibrated={**cell.calibrated, **_load_calibrated(root)},
        robustness=root.text("robustness") if root.values.get("robustness") is not None else None,
    )


def _load_cell_of(root: _Section, beside: Path, config_dir: Path) -> Cell:
    name = root.text("cell")
    return load_cell(_find(name, config_dir / "cell", beside, f"{root.file}: cell: '{name}' is unknown"))


def _load_runs(root: _Section, cell: Cell) -> dict[str, tuple[str, ...]]:
    """The full overrides of each run of a file, the cell's included."""
    names = root.section("runs", None)
    runs = {name: _merged(cell.train, names.overrides(name)) for name in names.values}
    for name, overrides in runs.items():
        if not re.fullmatch(r"[A-Za-z][\w-]*", name):
            raise names.error(name, "a run's name has letters, digits, '-' and '_' only")
        if not _train_ctx(overrides):
            raise names.error(name, "train.ctx must be a whole number of tokens")
    return runs


def _load_check(
    section: _Section, runs: Mapping[str, tuple[str, ...]], cell: Cell, protocol: str, scalings: Sequence[str]
) -> Check:
    """One check of a claim under the claim's protocol, unless it or a term names another."""
    exact = "exact" in section.values
    section.refuse_others(("statement", "exact", "terms", "protocol") if exact else _CONTRAST_KEYS)
    if "protocol" in section.values:
        protocol = section.choice("protocol", tuple(PROTOCOLS))

    def term(key: str, text: object) -> Term:
        try:
            return _parse_term(str(text), protocol, runs, cell, scalings)
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


def _parse_term(
    text: str, protocol: str | None, runs: Mapping[str, tuple[str, ...]], cell: Cell, scalings: Sequence[str]
) -> Term:
    """A term of these runs; `protocol` is that of a term which names none (None: it has to)."""
    match = _TERM.fullmatch(text)
    if match is None:
        raise ValueError("is no term; write RUN[+SCALING[:FACTOR]][/window]@CTX[|PROTOCOL], such as rope+ntk:4@2L")
    run, scaling = match["run"], match["scaling"]
    if run not in runs:
        raise ValueError(f"run '{run}' is not in runs; {_nearest(run, runs)}")
    if scaling is not None and scaling not in scalings:
        raise ValueError(f"scaling '{scaling}' is unknown; {_nearest(scaling, scalings)}")
    protocol = match["protocol"] or protocol
    if protocol is None:
        raise ValueError(f"names no protocol; write {text}|last")
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol '{protocol}' is unknown; {_nearest(protocol, PROTOCOLS)}")
    ctx = _ctx(match["ctx"], _train_ctx(runs[run]))
    _check_ctx(cell, ctx, protocol)
    return Term(text, run, scaling, _factor(scaling, match["factor"]), match["control"], ctx, protocol)


def _factor(scaling: str | None, text: str | None) -> float | None:
    if scaling is None or scaling == "none":
        if text is not None:
            raise ValueError("scaling none has no factor")
        return None
    if text is None:
        if about("scaling", scaling).dynamic:
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
    kind = PROTOCOLS[protocol]
    kind.check_term(ctx, cell.max_ctx, 0 if kind.parameter is None else getattr(cell, kind.parameter))


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
        sums[term.targets] = sums.get(term.targets, 0.0) + weight
    for targets, total in sums.items():
        if abs(total) > 1e-9:
            raise section.error("contrast", f"weights must sum to 0 on the same targets, not to {total:g} ({targets})")


# --- reading set files ---


def load_set(name_or_path: str, config_dir: Path) -> ClaimSet:
    """Read `config_dir`/set/NAME.yaml or a FILE.yaml: a title, claims, and optionally further evaluations.

    The evaluations are terms of the file's own `cell` and `runs`, each with its protocol; each is measured over the
    cell's ladder up to the ctx of its term. Raises ValueError, one line with the file and the key, for anything that is
    not understood.
    """
    path = _find(name_or_path, config_dir / "set", Path(), f"no set '{name_or_path}'")
    root = _Section.of(path.name, "", _read(path), ("title", "claims", "cell", "runs", "evaluations"))
    claims: list[Claim] = []
    for name in root.items("claims"):
        unknown = f"{path.name}: claims: '{name}' is unknown"
        claim = load_claim(_find(str(name), config_dir / "claim", path.parent, unknown), config_dir)
        if claim.id in {other.id for other in claims}:  # it would count twice in the correction for several claims
            raise root.error("claims", f"'{claim.id}' is given twice; keep one")
        claims.append(claim)
    return ClaimSet(root.text("title"), tuple(claims), tuple(_load_evaluations(root, path.parent, config_dir)))


def _load_evaluations(root: _Section, beside: Path, config_dir: Path) -> list[Evaluation]:
    if root.values.get("evaluations") is None:
        for key in ("cell", "runs"):
            if key in root.values:
                raise root.error(key, "is of use to evaluations only, and the file has none; leave it out")
        return []
    cell = _load_cell_of(root, beside, config_dir)
    runs = _load_runs(root, cell)
    scalings = _names(config_dir / "scaling")
    found: list[Evaluation] = []
    for text in root.items("evaluations"):
        try:
            term = _parse_term(str(text), None, runs, cell, scalings)
            ladder = (*(ctx for ctx in cell.ctxs if ctx < term.ctx), term.ctx)
            for ctx in ladder:
                _check_ctx(cell, ctx, term.protocol)
        except ValueError as error:
            raise root.error("evaluations", f"{text}: {error}") from None
        found.append(replace(_evaluation(term, runs, cell), ctxs=ladder))
    return united(found)


# --- what to measure ---


def terms_of(check: Check) -> tuple[Term, ...]:
    """The terms of a check, without their weights."""
    return check.terms if isinstance(check, ExactCheck) else tuple(term for term, _ in check.terms)


def plain_term(claim: Claim, run: str, protocol: str) -> Term:
    """A run as trained, at its training length L."""
    return Term(f"{run}@L|{protocol}", run, None, None, None, claim.train_ctx(run), protocol)


def in_length_terms(claim: Claim, check: ContrastCheck) -> dict[str, list[Term]]:
    """protocol -> each run of the check as trained, at L; empty unless it compares trained runs beyond L."""
    terms = terms_of(check)
    if len({claim.runs[t.run] for t in terms}) < 2 or all(t.ctx <= claim.train_ctx(t.run) for t in terms):
        return {}
    return {
        protocol: [plain_term(claim, run, protocol) for run in dict.fromkeys(term.run for term in terms)]
        for protocol in dict.fromkeys(term.protocol for term in terms)
    }


def changes_spectrum(claim: Claim, term: Term) -> bool:
    """Whether a term's scaling must show in its spectrum: a dynamic one is RoPE itself up to L."""
    if term.scaling is None or term.scaling == "none":
        return False
    return not (about("scaling", term.scaling).dynamic and term.ctx <= claim.train_ctx(term.run))


def _needed_terms(claim: Claim, check: Check) -> list[Term]:
    """The terms of a check and those that its gates look at."""
    terms = list(terms_of(check))
    if isinstance(check, ContrastCheck):
        terms += [term for plain in in_length_terms(claim, check).values() for term in plain]
        terms += [plain_term(claim, t.run, t.protocol) for t in terms_of(check) if changes_spectrum(claim, t)]
    return terms


def required(claims: Sequence[Claim]) -> list[Evaluation]:
    """All that the claims need, each evaluation once, in the order of first use; its `run`s are those to train."""
    return united(
        replace(claim.evaluation(term), ctxs=(term.ctx,))
        for claim in claims
        for check in claim.checks
        for term in _needed_terms(claim, check)
    )


def united(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """Each evaluation once, at all the ctxs asked for, in the order of first use."""
    ctxs: dict[Evaluation, set[int]] = {}
    for evaluation in evaluations:
        ctxs.setdefault(evaluation.key, set()).update(evaluation.ctxs)
    return [replace(key, ctxs=tuple(sorted(values))) for key, values in ctxs.items()]


def _evaluation(term: Term, runs: Mapping[str, tuple[str, ...]], cell: Cell) -> Evaluation:
    """What measures a term of these runs, without its ctx."""
    run = runs[term.run]
    overrides = [*cell.evaluation, f"eval.protocol={term.protocol}"]
    if term.control == "window":
        overrides.append(f"eval.window={_train_ctx(run)}")
    elif term.control == "unigram":
        overrides.append("eval.baseline=unigram")
    return Evaluation(run, term.scaling, term.factor, term.control, term.protocol, (), tuple(sorted(overrides)))
