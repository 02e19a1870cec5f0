"""A checkpoint of transformers under our protocols: the same targets, rows, store and intervals as a run of ours."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch.nn import functional as F

from ropelab import config as configs
from ropelab import data, files
from ropelab.config import Config, DataConfig, EvalConfig, Method
from ropelab.devices import environment, matmul_precision
from ropelab.evaluation import (
    Evaluated,
    EvaluatedModel,
    LoadedModel,
    ModelAtCtx,
    Plan,
    Resources,
    Text,
    execute,
    fit,
    resolve,
    resolve_methods,
    same_text,
)
from ropelab.huggingface import adapter as adapters
from ropelab.huggingface import attention, checkpoint, recorded, rotary
from ropelab.model import logits_held
from ropelab.positions import Geometry, PositionEncoding, Positions, Rope, encoding_digest
from ropelab.progress import Progress
from ropelab.runs import NO_SCALING, check_applied, encoding_of, is_run
from ropelab.scalings import SCALINGS, build, make_scaling

VERSION = 2  # of the evaluation of checkpoints: raised when its numbers change


class Checkpoint(EvaluatedModel):
    """A checkpoint of transformers, before its weights are read.

    name: folder or name on the hub. text: what to score; None: of a folder that was exported, the text that its run
    was trained on, else the default corpus. adapter: the folder of one to add to the weights; what lies beside them is
    left alone. `ValueError` for what cannot be evaluated.
    """

    def __init__(self, name: str, config: Config, text: DataConfig | None, adapter: Path | None = None) -> None:
        self.source = name
        if not Path(name).expanduser().exists() and is_run(Path(config.runs_dir).expanduser() / name):
            raise ValueError(f"{name} is a run of ropelab: leave out --hf")
        self.folder = checkpoint.find(name)
        self.config = checkpoint.read_config(self.folder)
        body = self.config.get_text_config()
        self._skeleton = checkpoint.skeleton(self.config)
        checkpoint.check_fits(self.folder, self._skeleton)
        self._entries: int = self._skeleton.get_input_embeddings().num_embeddings  # type: ignore[operator]
        self.tokenizer = checkpoint.read_tokenizer(self.folder, self._entries)
        self._weights = sum(p.numel() for p in self._skeleton.parameters())
        self._buffers = sum(b.numel() * b.element_size() for b in self._skeleton.buffers())
        self.adapter = None if adapter is None else adapters.read(adapter)
        self.labels = rotary.declared(self.config)
        self._handles = rotary.handles(self._skeleton, self.labels)
        self.raw = checkpoint.read_json(self.folder / "config.json")
        # Falcon builds a rotary module under ALiBi too, and uses neither
        self._alibi = self.config.model_type in ("mpt", "bloom") or bool(getattr(body, "alibi", False))
        self.rotary = bool(self._handles) and not self._alibi
        self._longest = 0  # text that a pass will read
        self._ours = False  # will our attention take the place of the model's?
        self._rows: int | None = None  # of a table of positions
        self.max_ctx = checkpoint.longest_trained(self.config)
        record = recorded.read(self.folder)
        self._own_text = None if record is None else record.trained.data
        self._text = text or self._own_text or config.data
        parameters = self.labels.get(rotary.scaled_label(self.labels), {}) if self.labels else {}
        lasting = self.max_ctx
        if lasting is None:
            raise ValueError(f"{name} does not say its length: config.json has none of {', '.join(checkpoint.LENGTHS)}")
        # Phi-3 says it beside its rotary parameters
        stated: Any = parameters.get("original_max_position_embeddings") or getattr(
            body, "original_max_position_embeddings", None
        )
        self.original_ctx = lasting
        if isinstance(stated, int | float) and 1 <= stated < lasting:
            self.original_ctx = int(stated)
        heads, layers = checkpoint.whole(body, "num_attention_heads"), checkpoint.whole(body, "num_hidden_layers")
        checkpoint.whole(body, "hidden_size")
        self.head_size = self._head_size(body)
        geometry = Geometry(heads * self.head_size, heads, self.original_ctx, layers)
        pos, scaling = self._positions(body, geometry)
        # what an export says of its run holds as long as its configuration says the same
        same = self.own_scaling is None and record is not None
        if record is not None and same and (not self.rotary or recorded.still_turns(record, pos, scaling, geometry)):
            pos, scaling = record.trained.pos, record.scaling
            lasting, self.original_ctx = record.train_ctx, record.original_ctx
        tree = configs.to_dict(config)
        tree["pos"] = {"name": pos.name, **pos.parameters}
        tree["scaling"] = {"name": scaling.name, **scaling.parameters}
        tree["data"] = configs.to_dict(configs.load())["data"] | dataclasses.asdict(self._text)
        tree["model"] = {
            "name": self.config.model_type, "n_layer": layers, "d_model": heads * self.head_size, "n_head": heads,
            "qk_norm": False,
        }  # fmt: skip
        tree["train"] |= {"ctx": int(lasting)}
        tree["seed"] = 0
        self.trained = configs.from_dict(tree)
        self.digest = checkpoint.digest(self.folder)
        if self.adapter is not None:
            self.digest = hashlib.sha256(f"{self.digest} adapter {self.adapter.digest}".encode()).hexdigest()
        self.weights = self.digest
        self.identity = {"checkpoints": VERSION}
        self.name = f"hf-{checkpoint.slug(name)}-{self.digest[:8]}"
        self.results = Path(config.runs_dir).expanduser() / self.name / "results"
        self.facts = {
            "source": name, "architecture": type(self._skeleton).__name__, "checkpoint": self.digest[:16],
            "transformers": transformers.__version__,
            **({} if self.adapter is None else {"adapter": self.adapter.digest[:16]}),
        }  # fmt: skip
        self.manifest = {
            "run": self.name, "digest": self.digest, "identity": {"checkpoint": self.digest},
            "config": configs.to_dict(self.trained), "status": "checkpoint", "train_ctx": int(lasting),
            "original_ctx": self.original_ctx, "parent": None, "corpus": {"name": self._text.name},
            "params": self._weights, "device": None, "environment": environment(), **self.facts,
        }  # fmt: skip

    def _head_size(self, body: Any) -> int:
        stated = getattr(body, "head_dim", None) or body.hidden_size // body.num_attention_heads
        return max(int(stated), 2 * self._pairs())

    def _pairs(self) -> int:
        """R/2 of the layers that a scaling is for; 0 without rotation."""
        if not self.rotary:
            return 0
        label = rotary.scaled_label(self.labels) if self.labels else ""
        handle = next((one for one in self._handles if one.label == label), self._handles[0])
        return len(getattr(self._skeleton.get_submodule(handle.path), f"{handle.prefix}inv_freq"))

    def _positions(self, body: Any, geometry: Geometry) -> tuple[Method, Method]:
        """Encoding and scaling of the checkpoint as it is; sets `own_scaling` where that is none of ours."""
        if self.rotary:
            return self._rotation(geometry)
        if self._alibi:
            return configs.load(["pos=alibi"]).pos, NO_SCALING
        self._rows = checkpoint.table_rows(self._skeleton, self.config)
        return Method("none", {}) if self._rows is None else configs.load(["pos=learned"]).pos, NO_SCALING

    def _rotation(self, geometry: Geometry) -> tuple[Method, Method]:
        parameters = self.labels[rotary.scaled_label(self.labels)] if self.labels else {}
        kind = str(parameters.get("rope_type", "default"))
        rotary.check_base(parameters)
        try:
            pos = rotary.encoding_of(parameters, pairs=self._pairs(), d_head=self.head_size)
            build(pos, NO_SCALING, geometry)
        except (KeyError, TypeError, ValueError, OverflowError):  # transformers may make something of it
            base = rotary.stated_base(parameters)
            pos = configs.load(["pos=rope", "pos.layout=half", *([] if base is None else [f"pos.base={base}"])]).pos
        try:
            scaling = rotary.scaling_of(parameters, self.max_ctx)
            build(pos, scaling, geometry)
        except (KeyError, TypeError, ValueError, OverflowError):
            self.own_scaling, scaling = Method("own", {"rope_type": kind}), NO_SCALING
        return pos, scaling

    def as_transformers_turns(self) -> None:
        """Its own scaling is another one than our formula for its parameters: call it so from now on."""
        kind = str(self.labels[rotary.scaled_label(self.labels)].get("rope_type", "default"))
        self.own_scaling = Method("own", {"rope_type": kind})
        self.trained = dataclasses.replace(self.trained, scaling=NO_SCALING)
        self.manifest = {**self.manifest, "config": configs.to_dict(self.trained)}

    def bos_token(self, asked: str) -> int | None:
        if asked == "false":
            return None
        found = checkpoint.beginning(self.folder, self.tokenizer)
        if asked == "auto" and not found.usual:
            return None
        if found.token is None or found.token >= self._entries:
            raise ValueError(
                f"eval.bos={asked}: {self.source} names no beginning-of-text token that its model has; leave it out"
            )
        return found.token

    def check(self, config: EvalConfig, scaling: Method | None) -> None:
        """`ValueError` for lengths, scalings and controls that the checkpoint cannot have, before any work."""
        scores = scaling is not None and _of_scores(scaling)
        self._ours = config.window is not None or scores
        if self._ours and not attention.handed_over(self._skeleton):
            asked = f"scaling={scaling.name}" if scaling is not None and scores else "eval.window"
            raise ValueError(
                f"{asked} changes attention, which {type(self._skeleton).__name__} does not let be replaced; leave it "
                "out"
            )
        self.bos_token(config.bos)
        if config.baseline is not None:
            raise ValueError("eval.baseline=unigram counts a run's training text; that of a checkpoint is not known")
        if scaling is not None and scaling.name != "none" and not scores:
            if not self.rotary:
                raise ValueError(
                    f"scaling={scaling.name} needs a rotary model; {self.source} ({self.config.model_type}) turns "
                    "nothing that ropelab can reach"
                )
            if not SCALINGS[scaling.name].spectral:
                able = ", ".join(name for name, method in SCALINGS.items() if method.spectral or method.of_scores)
                raise ValueError(f"scaling={scaling.name} is not for a checkpoint; with --hf there are {able}")
        trained = self.trained.scaling
        if scaling is not None and not self.rotary and scaling != trained and not (scores and trained.name == "none"):
            raise ValueError(
                f"the positions of {self.source} are written out under scaling={self.trained.scaling.name}; "
                "leave out --scaling"
            )
        ladder = resolve_methods(self.trained, self.original_ctx, config, scaling=scaling)
        longest = max(ladder.methods)
        if self._rows is not None and longest > self._rows:
            raise ValueError(
                f"--ctx {longest}: the positions of {self.source} end at {self._rows}; use --ctx {self._rows}"
            )

    def text(self, other: DataConfig | None, which: str, cache_dir: str, progress: Progress) -> Text:
        assert other is None  # a checkpoint is made with its text
        cache = Path(cache_dir).expanduser()
        own = self._own_text is not None and same_text(self._text, self._own_text)
        if which != "test" and not own:
            raise ValueError(f"eval.split={which} belongs to the text of a run of ours; other text is all test")
        corpus = data.prepare(
            self._text, cache_dir=cache, evaluate_only=not own, tokenizer=self.tokenizer, progress=progress
        )
        split = corpus.test if which == "test" else corpus.validation
        documents = [split.document(i) for i in range(len(split))]
        for document in documents:
            if len(document) and (token := int(document.max())) >= self._entries:
                raise ValueError(
                    f"the text has the token {self.tokenizer.decode([token])!r}, of id {token}, and the model has rows "
                    f"for {self._entries}: they do not belong together; give the checkpoint its own tokenizer.json"
                )
        return Text(split, corpus.digest, corpus.name, None, data.keeps_bytes(self.tokenizer, documents, split.n_bytes))

    def plan(
        self,
        encodings: Mapping[int, PositionEncoding],
        device: torch.device,
        dtype: torch.dtype,
        *,
        limit_gb: float | None,
    ) -> Plan:
        self._longest = max(encodings)
        weights = self._weights * dtype.itemsize + self._buffers
        needed = {ctx: self._pass_bytes(ctx, device, encoding) for ctx, encoding in encodings.items()}
        return fit(needed, device, limit_gb=limit_gb, weights=weights)

    def _pass_bytes(self, ctx: int, device: torch.device, encoding: PositionEncoding) -> Callable[[int], int]:
        """Bytes of a pass over n tokens in windows of `ctx` beside the weights: an upper bound, in fp32."""
        body = self.config.get_text_config()
        width, heads = int(body.hidden_size), int(body.num_attention_heads)
        keys = int(getattr(body, "num_key_value_heads", None) or heads)
        d_head = self.head_size
        inner = (
            max(
                int(getattr(body, key, None) or 0)
                for key in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "moe_intermediate_size")
            )
            or 4 * width
        )
        inner *= int(getattr(body, "num_experts_per_tok", None) or 1)
        entries = int(body.vocab_size)
        eager = getattr(self._skeleton.config, "_attn_implementation", None) == "eager" or (
            self.config.model_type in ("mpt", "bloom")
        )
        held = logits_held(device, training=False)
        local = int(getattr(body, "sliding_window", None) or ctx)
        far = self._ours and encoding.scaling is not None and encoding(torch.arange(ctx), ctx=ctx).far is not None

        def needed(tokens: int) -> int:
            length = min(tokens, ctx)
            each = 6 * width + 4 * heads * d_head + 3 * keys * d_head + 4 * inner + 4 * self._pairs()
            each += 4 * far * heads * d_head  # queries and keys again, and those of the pass for the other ones
            # bytes of the scores of all pairs, where no kernel avoids them, or of a window's mask
            square = (
                0
                if self._ours
                else length * length * (12 * heads * (tokens // length) if eager else 6 * (length > local))
            )
            head = 3 * min(tokens * entries, max(held, entries))
            blocks = 2**25 if device.type == "cpu" else 2**28
            return 4 * (tokens * each + head + blocks) + square

        return needed

    def load(self, device: torch.device, dtype: torch.dtype, *, window: int | None, kept: bool) -> LoadedModel:
        plain = kept or not self.rotary
        config = self.config if plain else rotary.without_scaling(self.config)
        if self.config.model_type == "mpt":  # its biases are as long as this says
            config.max_seq_len = max(self._longest, config.max_seq_len)
        model = checkpoint.load(self.folder, config, dtype)
        if self.adapter is not None:
            adapters.add(model, self.adapter)
        model = model.to(device)
        return _LoadedCheckpoint(self, model, device, kept, window)

    def make_folder(self) -> None:
        folder = self.results.parent
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "manifest.json", self.manifest)


class _LoadedCheckpoint(LoadedModel):
    def __init__(self, source: Checkpoint, model: Any, device: torch.device, kept: bool, window: int | None) -> None:
        self._source, self._device, self._kept, self._window = source, device, kept, window
        self._model = model
        self._head = checkpoint.Head(model)
        self._rotary = rotary.Rotary(model, source.labels) if source.rotary else None
        self._reached = None if self._rotary is None else self._rotary.reached()  # by layer
        self._layers: attention.Layers | None = None  # from the first length on that needs ours
        trained = source.trained
        self._plain = encoding_of(trained, NO_SCALING, source.original_ctx)
        self.precision = matmul_precision(device, trained.model.d_model)
        self._warnings = self._found()

    def _found(self) -> tuple[str, ...]:
        """What has to be said of this checkpoint beside every number."""
        source, lines = self._source, []
        if source.adapter is None and checkpoint.own_file(source.folder, adapters.CONFIG) is not None:
            lines.append(f"the adapter beside the weights is not applied; --adapter {source.folder} adds it")
        if self._rotary is not None:
            lines += rotary.unheeded(source.raw, source.labels, self._rotary.plain(), source.head_size)
            if self._reached is not None and not any(self._reached):
                lines.append("it declares a rotation, which reaches no layer: it has no positions by rotation")
        return tuple(lines)

    def at(self, ctx: int, method: Method, encoding: PositionEncoding) -> ModelAtCtx:
        if self._rotary is None:
            self._set_scores(ctx, method, encoding)
            idle = _of_scores(method) and make_scaling(method, self._source.original_ctx).is_identity(ctx)
            says = f"{self._source.digest} {self._source.trained.pos.name}"
            if _of_scores(method) and not idle:
                says += f" {method}"
            spectrum = hashlib.sha256(says.encode()).hexdigest()
            return ModelAtCtx(spectrum, idle, False, self._scorer(ctx), warnings=self._warnings)
        assert isinstance(encoding, Rope)
        if method.name in ("none", "own") or self._kept:
            self._rotary.reset()
            found = None if method.name == "own" else self._difference(encoding, ctx, method, of_transformers=True)
            if found is not None and method.name != "none":
                raise _TurnsOtherwise(_otherwise(ctx, method, found))
            if method.name == "own" or found is not None:
                return self._as_transformers_turns(ctx, method, encoding, found)
        else:
            self._set_turns(ctx, method, encoding)
        self._set_scores(ctx, method, encoding)
        spectrum = encoding_digest(encoding, ctx)
        idle = check_applied(method, self._plain, self._source.original_ctx, ctx, spectrum)
        return ModelAtCtx(
            spectrum, idle, encoding.length_dependent, self._scorer(ctx), self._scaled_layers(method), self._warnings
        )

    def _difference(self, encoding: Rope, ctx: int, method: Method, *, of_transformers: bool) -> str | None:
        """How the loaded model turns differently than an encoding; None where it does not."""
        assert self._rotary is not None
        # what fp32 makes of transformers' ramps
        relative = 5e-6 * method.parameters.get("factor", 1.0) if of_transformers else 5e-7
        try:
            return rotary.difference(self._rotary.read(ctx), encoding, ctx, relative=relative)
        except (ValueError, TypeError) as error:  # modules that disagree, or are called in another way
            return str(error)

    def _as_transformers_turns(self, ctx: int, method: Method, encoding: Rope, found: str | None) -> ModelAtCtx:
        """The model as transformers loads it, where that is no encoding of ours."""
        assert self._rotary is not None
        hasher = hashlib.sha256(f"{self._source.digest} {method} {ctx}".encode())
        with contextlib.suppress(ValueError, TypeError):
            for part in self._rotary.read(ctx):
                hasher.update(part.cpu().contiguous().numpy().tobytes())
        line = "its rotation is scored as transformers turns it, which is not by a formula of ropelab"
        if found is not None:
            line += f" (without a scaling: {found})"
        self._set_scores(ctx, method, encoding)
        return ModelAtCtx(
            hasher.hexdigest(), False, True, self._scorer(ctx), self._scaled_layers(method), (line, *self._warnings)
        )

    def _set_turns(self, ctx: int, method: Method, encoding: Rope) -> None:
        """Turn by a scaling that was asked for. `ValueError` where that cannot be said of what the model does."""
        assert self._rotary is not None
        assert isinstance(self._plain, Rope)
        name, asked = self._source.source, f"scaling={method.name}"
        if self._reached is not None and not any(self._reached):
            raise ValueError(f"{asked} needs a rotary model; {name} has a rotary module, and no layer reads it")
        self._rotary.reset()
        if found := self._difference(self._plain, ctx, NO_SCALING, of_transformers=True):
            raise ValueError(f"{asked} changes RoPE, and without a scaling {name} does not turn as RoPE does: {found}")
        self._rotary.set(encoding.spectrum(ctx), self._plain.inv_freq())
        if found := self._difference(encoding, ctx, method, of_transformers=False):
            raise ValueError(_otherwise(ctx, method, found))

    def _scaled_layers(self, method: Method) -> str | None:
        """The layers that a scaling changes, in words; None where it is all of them, or not known."""
        if method.name in ("none", "temperature", "block_causal") or self._reached is None or all(self._reached):
            return None
        text = self._model.config.get_text_config()
        return layer_words(self._reached, getattr(text, "layer_types", None))

    def _set_scores(self, ctx: int, method: Method, encoding: PositionEncoding) -> None:
        """Put our attention where the model's would not do."""
        if self._window is None and not _of_scores(method):
            return
        if self._layers is None:
            self._layers = attention.Layers(self._model, self._rotary)
        said = encoding(torch.arange(ctx), ctx=ctx) if _of_scores(method) else Positions()
        self._layers.set(said, self._window)

    def _scorer(self, ctx: int) -> Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]:
        first = True

        @torch.no_grad()
        def scorer(inputs: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float32]:
            nonlocal first
            watched = [one.watched() for one in (self._rotary, self._layers) if first and one is not None]
            hidden = self._head.hidden(torch.from_numpy(inputs).to(self._device))  # (B, ctx, C)
            for check in watched:
                check()
            first = False
            scored = hidden[:, -targets.shape[1] :].flatten(0, 1)  # (B, scored, C) -> (N, C)
            wanted = torch.from_numpy(targets).to(self._device).flatten()  # (N,)
            rows = max(1, logits_held(self._device, training=False) // self._source.tokenizer.n_vocab)
            parts = [
                F.cross_entropy(self._head.logits(scored[low : low + rows]), wanted[low : low + rows], reduction="none")
                for low in range(0, len(wanted), rows)
            ]
            losses: NDArray[np.float32] = torch.cat(parts).view(targets.shape).cpu().numpy()
            return losses

        return scorer


class _TurnsOtherwise(ValueError):
    """A checkpoint's own scaling, as transformers applies it, is not our formula for it."""


def _otherwise(ctx: int, method: Method, found: str) -> str:
    return (
        f"at {ctx} tokens the loaded model does not turn as RoPE under scaling={method.name} does: {found}; its "
        "numbers would be those of something else"
    )


def _of_scores(method: Method) -> bool:
    """Is it a scaling of scores and masks, which any model can be given?"""
    return method.name in SCALINGS and SCALINGS[method.name].of_scores


def layer_words(reached: Sequence[bool], kinds: Sequence[str] | None) -> str:
    """ "layers 0 to 2, 4 of 6 (sliding_attention)": those that are true; kinds: of all layers."""
    numbers = [layer for layer, there in enumerate(reached) if there]
    parts = []
    for _, group in itertools.groupby(enumerate(numbers), key=lambda item: item[1] - item[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}")
    named = sorted({str(kinds[n]) for n in numbers}) if kinds is not None and len(kinds) == len(reached) else []
    words = f"layers {', '.join(parts) or 'none'} of {len(reached)}"
    return f"{words} ({', '.join(named)})" if named else words


def evaluate(
    source: Checkpoint,
    config: EvalConfig,
    *,
    scaling: Method | None = None,
    resources: Resources,
) -> Evaluated:
    """Perplexity of a checkpoint over a ladder of contexts, as `evaluation.evaluate` of a run.

    `scaling` replaces the checkpoint's own (`none` removes it; None keeps it as transformers applies it, whether or not
    it is a formula of ours). What the loaded model turns by is read back at every length. `ValueError` as
    `Checkpoint.check`, and where that is not the change that was asked for.
    """

    def asked() -> Evaluated:
        source.check(config, scaling)
        return execute(resolve(source, config, resources, scaling=scaling), resources)

    try:
        return asked()
    except _TurnsOtherwise:
        source.as_transformers_turns()
        return asked()
