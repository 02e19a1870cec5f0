"""A candidate of LongRoPE's search on a trained run: as a scaling, as an encoding, and its score, which is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ropelab import data, files
from ropelab.config import Config, Method
from ropelab.evaluation import TargetPlan, Windows, pass_tokens, score, scorer_of
from ropelab.model import GPT
from ropelab.positions import PositionEncoding, Rope
from ropelab.progress import tell
from ropelab.runs import encoding_of, set_encoding
from ropelab.search.evolution import Candidate

SAVE_EVERY = 1.0  # seconds of work that a kill may lose


class Question(NamedTuple):
    """What is searched: a run, and scalings of it to `ctx` by `factor`."""

    trained: Config
    original_ctx: int  # the root's
    ctx: int
    factor: float

    def build(self, method: Method) -> PositionEncoding:
        return encoding_of(self.trained, method, self.original_ctx)

    def method(self, candidate: Candidate, short_factors: Sequence[float] = ()) -> Method:
        """A candidate as `scaling=longrope`."""
        return Method(
            "longrope",
            {
                "factor": self.factor,
                "original_ctx": self.original_ctx,
                "long_factors": list(candidate.factors),
                "short_factors": list(short_factors),
                "start_tokens": candidate.start_tokens,
                "attention_factor": candidate.attention_factor,
            },
        )

    def candidate(self, method: Method) -> Candidate:
        """A scaling of the spectrum as a candidate: its factors are the unscaled frequencies over its own at ctx."""
        encoding = self.build(method)
        assert isinstance(encoding, Rope)
        plain, used = encoding.inv_freq(), encoding.spectrum(self.ctx)
        factors: list[float] = []
        for before, after in zip(plain.tolist(), used.inv_freq.tolist(), strict=True):
            # a pair that does not turn has no factor of its own; rounding must neither fall nor go below 1
            factor = before / after if after > 0 else self.factor
            factors.append(max(factor, factors[-1] if factors else 1.0))
        return Candidate(tuple(factors), used.start_tokens, used.attention_factor)


class SearchSet:
    """Windows of the validation split at one ctx, and the mean loss on them under an encoding."""

    def __init__(self, model: GPT, split: data.Split, layout: TargetPlan, *, samples: int, dtype: torch.dtype) -> None:
        (ctx,) = layout.contexts
        everything = layout.windows(ctx)
        self.windows = Windows(ctx, everything.scored, everything.document[:samples], everything.start[:samples])
        self.digests = [split.digests[index] for index in layout.documents][: int(self.windows.document.max()) + 1]
        self._documents: list[NDArray[np.unsignedinteger]] = [split.document(index) for index in layout.documents]
        self._model = model
        self._dtype = dtype

    def nll(self, encoding: PositionEncoding) -> float:
        """Mean loss in nats per token, summed in fp64."""
        set_encoding(self._model, encoding)
        scorer = scorer_of(self._model, window=None, dtype=self._dtype)
        rows = max(1, pass_tokens(self._model.tokens.weight.device) // self.windows.ctx)
        losses = score(self.windows, self._documents, scorer, rows=rows)
        return float(losses.astype(np.float64).mean())


class Scores:
    """The scores of a search's candidates, kept in a file: what was scored before a kill is not scored again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.new = 0  # scored by this process
        self._saved = time.monotonic()
        self._known: dict[tuple[str, Candidate], float] = {}
        stored = files.read_json(path, limit=2**28)
        if stored is None and path.exists():
            tell(f"{path} is truncated or altered: its candidates are scored again")
        try:
            for kind, entries in (stored or {}).items():
                for factors, start_tokens, attention_factor, nll in entries:
                    candidate = Candidate(tuple(factors), start_tokens, attention_factor)
                    self._known[kind, candidate] = math.inf if nll is None else nll
        except (TypeError, ValueError, AttributeError, KeyError):  # not what was written: it is scored again
            self._known = {}

    def __call__(self, kind: str, candidate: Candidate, fitness: Callable[[Candidate], float]) -> float:
        """The score of a candidate of the `kind` of search at hand."""
        if (kind, candidate) not in self._known:
            self._known[kind, candidate] = fitness(candidate)
            self.new += 1
            if time.monotonic() - self._saved > SAVE_EVERY:
                self.save()
        return self._known[kind, candidate]

    def save(self) -> None:
        tree: dict[str, list[Any]] = {}
        for (kind, candidate), nll in self._known.items():
            tree.setdefault(kind, []).append([list(candidate.factors), *candidate[1:], finite(nll)])
        files.write_sealed(self.path, tree)
        self._saved = time.monotonic()


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
