"""A GPT-NeoX, MPT or GPT-2 checkpoint of our shape as a finished run: the inverse of `export`."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ropelab import config as configs
from ropelab import data, files, runs
from ropelab.config import Config, DataConfig, Method, ModelConfig
from ropelab.devices import environment
from ropelab.huggingface import checkpoint, rotary, weights
from ropelab.huggingface.recorded import Recorded, read, still_turns
from ropelab.model import GPT
from ropelab.positions import Geometry, PositionEncoding
from ropelab.progress import Progress, silent
from ropelab.runs import NO_SCALING, RunDir, build_model, encoding_of


def bring_in(name: str, config: Config, *, text: DataConfig | None, progress: Progress = silent) -> tuple[RunDir, bool]:
    """A checkpoint as a run in `config.runs_dir`, and whether it was there already.

    text: what the run counts as its own text, which evaluations and further training read; None: of an export the text
    that its run was trained on, else the default corpus. `ValueError` for a checkpoint that is not of our shape, with
    the first thing that differs, before anything is written.
    """
    folder = checkpoint.find(name)
    found = checkpoint.read_config(folder)
    shape = weights.shape_of(found)
    state: dict[str, Tensor] = {}
    for path in checkpoint.weight_files(folder):
        state |= runs.load_tensors(path)
    state = {_named(key, found.model_type): tensor for key, tensor in state.items()}
    record = read(folder)
    exported = None if record is None else record.manifest
    trained = None if record is None else record.trained
    rest = {} if record is None else record.rest

    pos, scaling, train_ctx, original_ctx = _positions(found, shape, state, record)
    interleaved = 0
    if pos.parameters.get("layout") == "interleaved":
        interleaved = int(shape.d_head * pos.parameters.get("fraction", 1.0)) // 2 * 2
    ours = weights.from_family(found.model_type, state, shape, interleaved=interleaved, tied=found.tie_word_embeddings)
    rows = len(ours["tokens.weight"])
    tokenizer = checkpoint.read_tokenizer(folder, rows)
    if tokenizer.n_vocab != rows + 1:
        raise ValueError(
            f"the tokeniser has {tokenizer.n_vocab - 1} tokens and the model {rows}: a run has a row for each; give "
            "the checkpoint its own tokenizer.json"
        )
    separator = rest.get("separator")
    if separator is None:  # no text has it, and no loss has seen it: the mean token is as neutral as any
        separator = ours["tokens.weight"].mean(0)
    ours["tokens.weight"] = torch.cat((ours["tokens.weight"], separator[None]))
    ours |= {key: tensor for key, tensor in rest.items() if key.startswith("encoding.")}
    if pos.name == "learned":
        ours.setdefault("encoding.table", state[weights.TABLE].float().contiguous())

    own = trained.data if trained is not None and text is None else _text(text or config.data, tokenizer)
    base = trained or dataclasses.replace(
        config, train=dataclasses.replace(config.train, ctx=train_ctx, steps=1, warmup_steps=0, keep=())
    )
    resolved = dataclasses.replace(
        base, pos=pos, scaling=scaling, model=dataclasses.replace(shape, name=base.model.name), data=own, parent=None,
        runs_dir=config.runs_dir, cache_dir=config.cache_dir,
    )  # fmt: skip
    model = build_model(resolved, tokenizer.n_vocab, scaling=NO_SCALING, original_ctx=original_ctx)
    try:
        model.load_state_dict(ours, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{name} is not of our shape: {' '.join(str(error).split())[:200]}") from None
    _check_table(found.model_type, state, model, encoding_of(resolved, scaling, original_ctx))
    corpus = data.prepare(own, cache_dir=Path(config.cache_dir).expanduser(), tokenizer=tokenizer, progress=progress)

    identity = runs.identity_of(resolved, corpus_digest=corpus.digest, tokenizer_digest=tokenizer.digest)
    identity["imported"] = _digest(ours)
    digest = files.digest_of(identity)
    run = RunDir(runs.check_runs_dir(config.runs_dir) / runs.run_name(resolved, digest))
    if run.manifest_path.exists() and run.is_done():
        return run, True
    known = exported or {}
    run.make()
    with run.locked():
        tokenizer.save(run.tokenizer_path)
        files.write(run.metrics_path, b"")
        run.save_step(
            resolved.train.steps, {"model": model.state_dict()}, {"best_val_nll": known.get("best_val_nll")}, last=True
        )
        run.update_manifest(
            run=run.name, digest=digest, identity=identity, config=configs.to_dict(resolved), status="done", error=None,
            train_ctx=train_ctx, original_ctx=original_ctx, first_step=known.get("first_step", 0), parent=None,
            imported={"source": str(folder.resolve()), "checkpoint": checkpoint.digest(folder),
                      "exported": None if exported is None else exported["run"]},
            corpus={"name": corpus.name, "digest": corpus.digest, "joined_share": None, **corpus.details},
            tokenizer={"name": tokenizer.name, "digest": tokenizer.digest, "n_vocab": tokenizer.n_vocab},
            params=model.n_parameters(), dtype=known.get("dtype", "fp32"), device=known.get("device", "imported"),
            device_type=known.get("device_type", "cpu"), matmul_precision=known.get("matmul_precision", "highest"),
            attention_backend=known.get("attention_backend"), environment=environment(), started=time.time(),
            finished=time.time(), step=resolved.train.steps,
            **{key: known[key] for key in
               ("train_loss", "val_nll", "val_bits_per_byte", "best_val_nll", "tokens_per_s") if key in known},
        )  # fmt: skip
    return run, False


def _text(text: DataConfig, tokenizer: data.Tokenizer) -> DataConfig:
    """A text as it would be configured for a tokeniser."""
    if tokenizer.name == "bytes":
        return dataclasses.replace(text, tokenizer="bytes")
    name = "gpt2" if tokenizer.name == "gpt2" else "bpe"
    # a vocabulary of another origin has no size that a configuration would allow
    return dataclasses.replace(text, tokenizer=name, vocab_size=min(max(tokenizer.n_vocab, 258), 2**16))


def _named(key: str, family: str) -> str:
    """A tensor's name as in the whole model: a checkpoint of the body alone has no prefix."""
    prefix = {"gpt_neox": "gpt_neox.", "mpt": "transformer.", "gpt2": "transformer."}[family]
    whole = key.startswith((prefix, "lm_head.", "embed_out."))
    return key if whole else prefix + key


def _positions(
    found: Any, shape: ModelConfig, state: Mapping[str, Tensor], record: Recorded | None
) -> tuple[Method, Method, int, int]:
    """Encoding, scaling, training length and original length of a checkpoint.

    What an export says of its run holds as long as its configuration says the same.
    """
    longest = checkpoint.longest_trained(found)
    assert longest is not None
    if found.model_type == "gpt_neox":
        (parameters,) = rotary.declared(found).values()
        scaling = rotary.scaling_of(parameters, longest)
        pos = rotary.encoding_of(parameters, pairs=_pairs(parameters, shape), d_head=shape.d_head)
        original_ctx = int(parameters.get("original_max_position_embeddings") or longest)
        if record is None or not still_turns(record, pos, scaling, Geometry.of(shape, original_ctx)):
            return pos, scaling, longest, original_ctx
    if record is not None:
        return record.trained.pos, record.scaling, record.train_ctx, record.original_ctx
    if found.model_type == "mpt":
        return configs.load(["pos=alibi"]).pos, NO_SCALING, longest, longest
    if not state[weights.TABLE].any():
        return Method("none", {}), NO_SCALING, longest, longest
    return configs.load(["pos=learned"]).pos, NO_SCALING, longest, longest


def _pairs(parameters: Mapping[str, Any], shape: ModelConfig) -> int:
    if parameters.get("rope_type") == "proportional":
        return shape.d_head // 2
    return (int(shape.d_head * parameters.get("partial_rotary_factor", 1.0)) + 1) // 2


@torch.no_grad()
def _check_table(family: str, state: Mapping[str, Tensor], model: GPT, encoding: PositionEncoding) -> None:
    """What GPT-2 adds to its tokens must be what our encoding says: an export may have been trained since."""
    if family != "gpt2":
        return
    table = state[weights.TABLE].float()
    encoding.load_state_dict(model.encoding.state_dict(), strict=True)
    said = encoding(torch.arange(len(table)), ctx=len(table)).embedding
    same = not table.any() if said is None else torch.equal(table, said)
    scale = encoding.token_scale()
    rows = weights.embeddings(family, state).float()
    if not same or not torch.equal(rows, model.tokens.weight[: len(rows)] * scale):
        raise ValueError(
            "the checkpoint's position table or embeddings are not what its encoding and its head say; if it is an "
            "export that was trained on, remove the folder ropelab/ in it, and the table comes in as pos=learned"
        )


def _digest(state: Mapping[str, Tensor]) -> str:
    hasher = hashlib.sha256()
    for name in sorted(state):
        hasher.update(f"{name} {tuple(state[name].shape)} ".encode())
        hasher.update(state[name].numpy().tobytes())
    return hasher.hexdigest()
