"""LongRoPE's search on a trained run: `ropelab.search.evolution` with perplexity as its fitness.

Candidates are scored on windows of the run's validation split, the last `search.targets` of each window counting
(protocol `last`); the methods are then compared on the test split, which the search never sees. Both are evaluations as
`ropelab eval` makes them, so every number can be had again from there.

Progressive extension (Ding et al. 2024, 2402.13753, section 3.3) is three commands: search, fine-tune with the factors,
search the fine-tuned run. Factors always refer to the unscaled spectrum and to the root's original_ctx, so nothing
compounds; what a run was trained with is one of the candidates that its search begins with, as it is and stretched.

    <run>/searches/longrope-<digest>/
        state.json          scores of all candidates so far: an interrupted search goes on from them
        result.json         what `--scaling longrope scaling.factors=FILE` takes; result-short.json with `--short`
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ropelab import config as configs
from ropelab import data, files, runs
from ropelab.config import Config, EvalConfig, Method
from ropelab.devices import DTYPE_NAMES, resolve_device, resolve_dtype
from ropelab.errors import Interrupted, RunError
from ropelab.evaluation import TargetPlan, evaluate, plan_targets
from ropelab.positions import Rope
from ropelab.progress import Progress, silent
from ropelab.runs import NO_SCALING, OpenRun, RunDir
from ropelab.scalings import SCALINGS, resolve_factor
from ropelab.search.evolution import Candidate, Found, SearchConfig, Space, evolve, planned, random_search
from ropelab.search.scores import Question, Scores, SearchSet, finite
from ropelab.training import interrupts

KNOWN = ("linear", "ntk", "yarn")  # the scalings that a search begins with


def settings(overrides: Sequence[str] = ()) -> SearchConfig:
    """`configs/search/longrope.yaml` with overrides such as `search.population=64`. `ValueError` names the key."""
    import yaml

    path = configs.config_dir() / "search" / "longrope.yaml"
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    given: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        name = key.removeprefix("search.")
        if name not in values or not equals:
            raise ValueError(f"unknown key '{key}'{configs.nearest(key, [f'search.{name}' for name in values])}")
        if name in given:
            raise ValueError(f"{key} is given twice; give it once")
        given.add(name)
        values[name] = _typed(key, text, values[name])
    values["start_tokens"] = tuple(values["start_tokens"])
    return SearchConfig(**values)


def _typed(key: str, text: str, default: Any) -> Any:
    """The value that `text` spells, of the type of the default."""
    if isinstance(default, list):
        if not (text.startswith("[") and text.endswith("]")):
            raise ValueError(f"{key} takes a list such as [0,4,16], not '{text}'")
        return [_typed(key, item.strip(), 0) for item in text[1:-1].split(",") if item.strip()]
    try:
        return type(default)(text)
    except ValueError:
        word = "a whole number" if isinstance(default, int) else "a number"
        raise ValueError(f"{key} takes {word}, not '{text}'") from None


def ask(run: OpenRun, *, ctx: int, factor: float | None) -> Question:
    """The question of a search, checked before any text is read.

    `ValueError` for a run without a rotary spectrum, a ctx that is none longer, or a factor that is no extension.
    """
    trained, original_ctx = run.config, run.original_ctx
    if ctx <= original_ctx:
        raise ValueError(
            f"--ctx {ctx} is no extension: {run.name} goes back to training at {original_ctx}; "
            f"give --ctx {8 * original_ctx}, say"
        )
    if factor is None:
        linear = configs.load(["scaling=linear"]).scaling
        factor = resolve_factor(linear, longest=ctx, original_ctx=original_ctx).parameters["factor"]
    if not 1 < factor < math.inf:
        raise ValueError(f"--factor must be a number above 1, not {factor:g}")
    applies_to = SCALINGS["longrope"].applies_to or ()
    if trained.pos.name not in applies_to:
        allowed = ", ".join(f"pos={name}" for name in applies_to)
        raise ValueError(f"search longrope rescales the rotation of {allowed}; {run.name} has pos={trained.pos.name}")
    return Question(trained, original_ctx, ctx, factor)


def search_longrope(
    run: OpenRun,
    question: Question,
    search: SearchConfig,
    config: Config,
    *,
    short: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Search factors, n-hat and attention factor for a finished run, and compare them on its test split.

    `config` says seed, device, cache_dir, eval.tokens and eval.dtype. Returns the content of the result file, its path
    (`path`) and how many candidates this call scored (`scored`): none where the search was finished already.
    `ValueError` for text that cannot fill ctx; `Interrupted` after saving.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.eval.dtype, device)
    weights, manifest, tokenizer = run.weights, run.manifest, run.tokenizer
    corpus = run.corpus(config.cache_dir, progress)
    contexts = (question.ctx, question.original_ctx) if short else (question.ctx,)
    asked = {ctx: _last(config.eval, ctx, search.targets) for ctx in contexts}
    # as much text at original_ctx as at ctx; a document that holds the long windows holds the short ones
    samples = {ctx: search.samples * (question.ctx // ctx) for ctx in contexts}
    layouts = {ctx: _search_layout(corpus.validation, asked[ctx], ctx, samples[ctx]) for ctx in contexts}
    for ctx in contexts:
        _check_length(corpus.test, ctx)  # known before the search, not after it
        plan_targets(_lengths(corpus.test), (ctx,), asked[ctx])

    model = run.model(device)
    sets = {
        ctx: SearchSet(model, corpus.validation, layouts[ctx], samples=samples[ctx], dtype=dtype) for ctx in contexts
    }
    found_on = sets[question.ctx]
    identity = {
        "numerics": runs.NUMERICS_VERSION,
        "run": manifest["digest"],
        "weights": _digest(weights),
        "text": [corpus.digest, tokenizer.digest, found_on.digests, found_on.windows.start.tolist()],
        "original_ctx": question.original_ctx,
        "ctx": question.ctx,
        "factor": question.factor,
        "search": dataclasses.asdict(search),
        "seed": config.seed,
        "dtype": DTYPE_NAMES[dtype],
        "device": device.type,  # its rounding decides between close candidates
    }
    digest = files.digest_of(identity)
    folder = run.folder.searches / f"longrope-{digest[:16]}"
    seeds = _seeds(question)
    _make_folder(folder)
    # the run stays as it is, and nobody else makes the same search
    with run.folder.in_use(), RunDir(folder).locked(), interrupts() as caught:
        searching = _Searching(
            question, search, config.seed, Scores(folder / "state.json"), sets, caught, run.name, progress
        )
        try:
            outcome = searching.long(seeds)
            recovered = searching.short(outcome, seeds) if short else None
        finally:
            if searching.scores.new:
                searching.scores.save()
    best = outcome.evolved.best
    short_factors = recovered.evolved.best.factors if recovered else ()
    names = {
        "longrope": question.method(best, short_factors),
        **{name: _known_method(name, question.factor) for name in KNOWN},
        "random": question.method(outcome.random.best),
        "none": NO_SCALING,
    }
    if question.trained.scaling.name != "none":
        names["trained"] = question.trained.scaling

    def report(ctx: int, methods: Mapping[str, Method]) -> dict[str, Any]:
        rows, protocol = [], None
        for name, method in methods.items():
            evaluated = evaluate(
                run,
                asked[ctx],
                scaling=method,
                device=config.device,
                cache_dir=config.cache_dir,
                progress=progress,
                folder=files.own(folder / "results", folder),
            ).result
            (row,) = (each.to_json() for each in evaluated.rows)
            kept = ("ctx", "nll", "ppl", "bits_per_byte", "ci95", "tokens", "documents", "status")
            searched = finite(sets[ctx].nll(question.build(method)))
            rows.append({"name": name, "search_nll": searched, **{key: row[key] for key in kept}})
            protocol = evaluated.protocol.to_json()
        return {"protocol": protocol, "rows": rows}

    reported = report(question.ctx, names)
    common = set(found_on.digests) & set(reported["protocol"]["document_digests"])
    assert not common, "a document is in the validation and in the test split"
    result: dict[str, Any] = {
        "method": "longrope",
        "run": run.name,
        "original_ctx": question.original_ctx,
        "ctx": question.ctx,
        "factor": question.factor,
        "long_factors": list(best.factors),
        "short_factors": list(short_factors),
        "start_tokens": best.start_tokens,
        "attention_factor": best.attention_factor,
        "search": {
            "digest": digest,
            "identity": identity,
            "nll": finite(outcome.evolved.score),
            "evaluations": outcome.evolved.evaluations,
            "history": _history(outcome.evolved),
            "seeds": {
                name: {**_as_json(seed), "nll": finite(outcome.seed_scores[name])} for name, seed in seeds.items()
            },
            "random": _found_json(outcome.random),
            "documents": {
                "split": "validation", "digests": found_on.digests, "windows": len(found_on.windows.start),
                "targets": found_on.windows.scored * len(found_on.windows.start), "also_in_report": 0,
            },
        },
        "report": {"split": "test", **reported},
    }  # fmt: skip
    if recovered:
        short_names = {"longrope": names["longrope"], "long_factors": question.method(best), "none": NO_SCALING}
        result["search"]["short"] = {
            "ctx": question.original_ctx, **_found_json(recovered.evolved),
            "seeds": {name: finite(nll) for name, nll in recovered.seed_scores.items()},
            "documents": {
                "split": "validation", "digests": sets[question.original_ctx].digests,
                "windows": len(sets[question.original_ctx].windows.start),
            },
        }  # fmt: skip
        result["report"]["short"] = report(question.original_ctx, short_names)
    result = json.loads(json.dumps(result))  # as it is read back: lists for tuples
    path = folder / ("result-short.json" if short else "result.json")
    if files.read_json(path) != result:
        files.write_json(path, result)
    return {**result, "path": str(path), "scored": searching.scores.new}


class Outcome(NamedTuple):
    evolved: Found
    random: Found
    seed_scores: dict[str, float]


@dataclasses.dataclass
class _Searching:
    """The searches of one call, on scores that are kept."""

    question: Question
    config: SearchConfig
    seed: int
    scores: Scores
    sets: Mapping[int, SearchSet]
    caught: list[int]
    run: str
    progress: Progress

    def long(self, seeds: Mapping[str, Candidate]) -> Outcome:
        """The search at ctx, and a random one of as many evaluations."""
        question = self.question
        lengths = tuple(n for n in self.config.start_tokens if n < question.ctx)
        attention = {1.0, _default_attention(question), *(seed.attention_factor for seed in seeds.values())}
        bound = self.config.bound * question.factor
        pairs = len(seeds["linear"].factors)
        space = Space(pairs, bound, self.config.step, lengths, tuple(sorted(attention)))

        def nll(candidate: Candidate) -> float:
            return self.sets[question.ctx].nll(question.build(question.method(candidate)))

        told = self._telling("search", "long", nll, planned(self.config, self.config.iterations))
        evolved = evolve(space, seeds, self.config, iterations=self.config.iterations, seed=self.seed, fitness=told)
        told = self._telling("random search", "long", nll, evolved.evaluations)
        drawn = random_search(space, evaluations=evolved.evaluations, seed=self.seed, fitness=told)
        return Outcome(evolved, drawn, {name: self.scores("long", seed, nll) for name, seed in seeds.items()})

    def short(self, long: Outcome, seeds: Mapping[str, Candidate]) -> Outcome:
        """The search of factors for texts of original_ctx and less: section 3.3, "Shorter context window recovery".

        It begins with ones, the long factors and what the run was trained with. n-hat and attention factor are the
        long search's: a scaling has one of each, at any length.
        """
        question, best = self.question, long.evolved.best
        bound = max(self.config.bound, self.config.bound * question.factor * self.config.short_bound)
        space = Space(len(best.factors), bound, self.config.step, (best.start_tokens,), (best.attention_factor,))
        lists = {"ones": (1.0,) * len(best.factors), "long": best.factors}
        if "trained" in seeds:
            lists["trained"] = seeds["trained"].factors
        begin = {name: Candidate(factors, *best[1:]) for name, factors in lists.items()}

        def nll(candidate: Candidate) -> float:
            return self.sets[question.original_ctx].nll(question.build(question.method(best, candidate.factors)))

        told = self._telling("short search", "short", nll, planned(self.config, self.config.short_iterations))
        evolved = evolve(
            space, begin, self.config, iterations=self.config.short_iterations, seed=self.seed, fitness=told
        )
        return Outcome(evolved, evolved, {name: self.scores("short", seed, nll) for name, seed in begin.items()})

    def _telling(
        self, what: str, kind: str, nll: Callable[[Candidate], float], total: int
    ) -> Callable[[Candidate], float]:
        """The fitness, kept and told of as it goes. `Interrupted` between two candidates."""
        done, best = 0, math.inf

        def fitness(candidate: Candidate) -> float:
            nonlocal done, best
            value = self.scores(kind, candidate, nll)
            done, best = done + 1, min(best, value)
            self.progress(what, min(done, total), total, best=best, run=self.run)
            if self.caught:
                raise Interrupted(self.caught[0], f"the {what} of {self.run}", done)
            return value

        return fitness


def _seeds(question: Question) -> dict[str, Candidate]:
    """The known scalings, and what the run was trained with: as it is, and stretched to the factor of the search.

    The stretch 1 + (lambda - 1) (s - 1) / (s' - 1) is `rescale` of the authors' evolution/search.py.
    """
    seeds = {name: question.candidate(_known_method(name, question.factor)) for name in KNOWN}
    trained = question.trained.scaling
    if trained.name == "none" or not SCALINGS[trained.name].spectral:
        return seeds
    seeds["trained"] = question.candidate(trained)
    factor = trained.parameters.get("factor", 1.0)
    if not SCALINGS[trained.name].dynamic and 1 < factor < question.factor:
        stretch = (question.factor - 1) / (factor - 1)
        factors = tuple(1 + (value - 1) * stretch for value in seeds["trained"].factors)
        seeds["stretched"] = seeds["trained"]._replace(factors=factors)
    return seeds


def _known_method(name: str, factor: float) -> Method:
    return configs.parse_scaling(f"{name}:{factor}")


def _default_attention(question: Question) -> float:
    """LongRoPE's own attention factor."""
    ones = Candidate((1.0,) * len(question.candidate(_known_method("linear", question.factor)).factors), 0, 1.0)
    method = question.method(ones)
    encoding = question.build(Method(method.name, {**method.parameters, "attention_factor": None}))
    assert isinstance(encoding, Rope)
    return encoding.spectrum(question.ctx).attention_factor


def _last(config: EvalConfig, ctx: int, share: float) -> EvalConfig:
    """The evaluation of one ctx by the end of its windows."""
    return dataclasses.replace(
        config, ctx=f"{ctx},", protocol="last", last=max(1, int(ctx * share)), max_ctx=None, window=None, scalings=(),
        split="test",
    )  # fmt: skip


def _lengths(split: data.Split) -> list[int]:
    return [len(split.document(index)) for index in range(len(split))]


def _check_length(split: data.Split, ctx: int) -> None:
    longest = max(_lengths(split), default=0)
    if longest < ctx + 1:
        raise ValueError(
            f"the {split.name} text cannot fill --ctx {ctx}: its longest document has {longest} tokens; "
            f"use --ctx {max(longest - 1, 0)} or less, or a run on longer documents"
        )


def _search_layout(split: data.Split, config: EvalConfig, ctx: int, samples: int) -> TargetPlan:
    """Windows of `ctx` tokens in the validation split, at least `samples`, of as many documents as there are."""
    _check_length(split, ctx)
    lengths = _lengths(split)
    holding = [(length - 1) // ctx for length in lengths if length > ctx]  # windows of each document
    if sum(holding) < samples:
        raise ValueError(
            f"the {split.name} text holds {sum(holding)} windows of {ctx} tokens, not search.samples={samples}; "
            f"use search.samples={sum(holding)}, or a shorter --ctx"
        )
    quota = next(q for q in range(1, samples + 1) if sum(min(q, n) for n in holding) >= samples)
    budget = samples if quota == 1 else quota * len(holding)
    return plan_targets(lengths, (ctx,), dataclasses.replace(config, tokens=budget * ctx))


def _make_folder(folder: Path) -> None:
    """`RunError` where a search could not be kept: known before it begins."""
    try:
        files.own(folder, folder.parent).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written ({error.strerror}); search a copy of the run in another folder"
        ) from None


def _digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 of the names, types, shapes and numbers of tensors."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def _as_json(candidate: Candidate) -> dict[str, Any]:
    return {
        "factors": list(candidate.factors),
        "start_tokens": candidate.start_tokens,
        "attention_factor": candidate.attention_factor,
    }


def _history(found: Found) -> list[dict[str, Any]]:
    return [{"evaluations": line["evaluations"], "nll": finite(line["best"])} for line in found.history]


def _found_json(found: Found) -> dict[str, Any]:
    return {
        **_as_json(found.best), "nll": finite(found.score), "evaluations": found.evaluations,
        "history": _history(found),
    }  # fmt: skip
