"""A run of ours as a checkpoint of transformers, and the proof that both compute the same."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

import ropelab
from ropelab import data, files
from ropelab.config import DataConfig, Method
from ropelab.devices import resolve_device
from ropelab.errors import ContextLengthError
from ropelab.evaluation import RunModel, evaluations
from ropelab.huggingface import card, checkpoint, recorded, rotary, weights
from ropelab.model import GPT, logits_held
from ropelab.positions import PositionEncoding, Positions, Rope
from ropelab.progress import Progress, silent
from ropelab.runs import RunDir, open_run, save_tensors, set_encoding
from ropelab.scalings import resolve_factor

# fields of the record -> why they are not exported
UNKNOWN = {
    "query_bias": "a bias of the query's index and the distance",
    "far": "other scores for distant keys",
    "logit_scale": "a factor on the scores that depends on the query",
    "block": "attention in blocks",
    "qk_embedding": "positions added to what queries and keys are made of, in every layer",
}
KNOWN = ("embedding", "bias", "rotation", "slopes")  # fields that a model of transformers has a place for
assert {*UNKNOWN, *KNOWN} == {*Positions._fields}

TOLERANCE = 1e-3  # of the parity report: nats, and of logits the share of the largest


class Target(NamedTuple):
    """What a run comes to in transformers."""

    family: str  # one of weights.FAMILIES
    config: dict[str, Any]  # config.json
    state: dict[str, Tensor]
    holds: int | None  # tokens of the longest text that the model can read; None: any


class Exported(NamedTuple):
    """The outcome: the folder, and the parity report as parity.json holds it."""

    folder: Path
    parity: dict[str, Any]


def export(
    run: RunDir,
    folder: Path,
    *,
    scaling: Method | None = None,
    max_ctx: int | None = None,
    other_text: DataConfig | None = None,
    device: str = "auto",
    cache_dir: str,
    progress: Progress = silent,
) -> Exported:
    """Write a finished run as a folder that transformers loads as it is, if the two agree on real text.

    scaling: replaces the trained one, as in an evaluation (`none` removes it; None keeps it). max_ctx: the longest text
    that the model is for; a table of positions is written out to it. other_text: compare on this instead of the run's
    own test text. `ValueError` with the reason for what transformers cannot express, before anything is written. Where
    the two do not agree the folder is not made, and the report says so: `parity["agree"]`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"-o {folder} is there already; give a new folder")
    opened = open_run(run)
    subject = RunModel(opened)
    trained, original_ctx = subject.trained, subject.original_ctx
    train_ctx = trained.train.ctx
    wanted = trained.scaling if scaling is None else scaling
    if wanted.parameters.get("factor") == "auto-row":
        raise ValueError("scaling.factor=auto-row is a factor for each length; an export has one: give a number")
    if max_ctx is not None and max_ctx < train_ctx:
        raise ValueError(
            f"--max-ctx {max_ctx} is below the {train_ctx} tokens that {run.name} was trained at; give more"
        )
    method = resolve_factor(wanted, longest=max_ctx or 4 * train_ctx, original_ctx=original_ctx)
    model = opened.model(torch.device("cpu"))
    encoding = opened.encoding(method)
    set_encoding(model, encoding)
    target = _target(model, trained.pos, method, original_ctx, train_ctx, max_ctx)
    text = subject.text(other_text, "test", cache_dir, progress)

    with files.new_folder(folder) as temporary:
        save_tensors(target.state, temporary / checkpoint.WEIGHTS, metadata={"format": "pt"})
        files.write_json(temporary / "config.json", target.config)
        files.write_json(temporary / "tokenizer.json", data.to_json(subject.tokenizer))
        files.write_json(temporary / "tokenizer_config.json", _tokenizer_config(target.config))
        rest = {f"encoding.{name}": tensor for name, tensor in encoding.state_dict().items()}
        if method.name == "none":  # it is the table that is written out
            rest.pop("encoding.table", None)
        rest["separator"] = model.tokens.weight[-1].detach().clone()
        (temporary / recorded.FOLDER).mkdir()
        save_tensors(rest, temporary / recorded.REST)
        files.write_json(temporary / recorded.RUN, {
            "ropelab": ropelab.__version__, "run": subject.manifest, "train_ctx": train_ctx,
            "original_ctx": original_ctx, "scaling": {"name": method.name, **method.parameters},
        })  # fmt: skip
        target_device = resolve_device(device)
        tokens = np.asarray(text.split.tokens[: 4 * train_ctx + 1]).astype(np.int64)
        parity = compare(model.to(target_device), temporary, target, tokens, train_ctx, target_device, progress)
        parity["text"] = {"data": text.name, "digest": text.digest[:16], "split": "test"}
        files.write_json(temporary / "parity.json", parity)
        page = card.model_card(run.name, subject.manifest, method, target.config, parity, evaluations(run))
        files.write(temporary / "README.md", page.encode())
        if parity["agree"]:
            if folder.exists():
                folder.rmdir()
            if not files.publish(temporary, folder):
                raise ValueError(f"-o {folder} was made by another process; give a new folder")
    return Exported(folder, parity)


def _target(model: GPT, pos: Method, scaling: Method, original_ctx: int, train_ctx: int, max_ctx: int | None) -> Target:
    """Family, configuration and weights. `ValueError` with what transformers has no place for."""
    encoding = model.encoding
    shape = model.config
    if shape.qk_norm:
        raise ValueError("model.qk_norm: GPT-NeoX, MPT and GPT-2 have no norm of queries and keys; it is not exported")
    record = _record(encoding, pos, scaling, original_ctx)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    entries = model.tokens.num_embeddings - 1  # the separator is never predicted
    known = {"transformers_version": transformers.__version__, "torch_dtype": "float32"}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if record.rotation is not None:
        assert isinstance(encoding, Rope)
        written = rotary.to_hf_rope(encoding, pos, scaling, original_ctx=original_ctx, max_ctx=max_ctx)
        share = encoding.rotated / shape.d_head
        own = {"rope_theta": written.base, "partial_rotary_factor": share, **written.parameters}
        older = None if written.parameters["rope_type"] == "default" else written.parameters
        config = {
            "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "vocab_size": entries,
            "hidden_size": shape.d_model, "num_hidden_layers": shape.n_layer, "num_attention_heads": shape.n_head,
            "intermediate_size": 4 * shape.d_model, "hidden_act": "gelu", "attention_dropout": 0.0,
            "hidden_dropout": 0.0, "layer_norm_eps": 1e-5, "use_parallel_residual": False, "attention_bias": False,
            "tie_word_embeddings": True, "max_position_embeddings": written.max_ctx,
            # transformers 5 reads rope_parameters, 4 the others
            "rope_parameters": own, "rope_scaling": older, "rope_theta": written.base,
            "rotary_emb_base": written.base, "rotary_pct": share, **ids, **known,
        }  # fmt: skip
        if written.parameters["rope_type"] == "longrope":  # where transformers 4 looks for the length of the switch
            config["original_max_position_embeddings"] = written.parameters["original_max_position_embeddings"]
        interleaved = encoding.rotated if encoding.interleaved else 0
        return Target("gpt_neox", config, weights.to_family("gpt_neox", state, shape, interleaved=interleaved), None)
    longest = max_ctx or 8 * train_ctx
    if record.slopes is not None:
        config = {
            "architectures": ["MptForCausalLM"], "model_type": "mpt", "vocab_size": entries,
            "d_model": shape.d_model, "n_layers": shape.n_layer, "n_heads": shape.n_head, "expansion_ratio": 4,
            "max_seq_len": longest, "layer_norm_epsilon": 1e-5, "learned_pos_emb": False, "no_bias": True,
            "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_pdrop": 0, "softmax_scale": None},
            "resid_pdrop": 0.0, "emb_pdrop": 0.0, "tie_word_embeddings": True, **ids, **known,
        }  # fmt: skip
        return Target("mpt", config, weights.to_family("mpt", state, shape), longest)
    table = _table(encoding, original_ctx, max_ctx, longest)
    if table is None:
        table = torch.zeros(longest, shape.d_model)
    scale = encoding.token_scale()
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": entries, "n_embd": shape.d_model,
        "n_layer": shape.n_layer, "n_head": shape.n_head, "n_positions": len(table), "n_inner": None,
        "activation_function": "gelu", "layer_norm_epsilon": 1e-5, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
        "resid_pdrop": 0.0, "tie_word_embeddings": scale == 1, **ids, **known,
    }  # fmt: skip
    theirs = weights.to_family("gpt2", state, shape, table=table, token_scale=scale)
    return Target("gpt2", config, theirs, len(table))


@torch.no_grad()
def _record(encoding: PositionEncoding, pos: Method, scaling: Method, original_ctx: int) -> Positions:
    """What the encoding says of one position; `ValueError` where that has no place in transformers' models."""
    try:
        record: Positions = encoding(torch.arange(1), ctx=4 * original_ctx)  # some speak up past it only
    except ContextLengthError:
        record = encoding(torch.arange(1), ctx=1)
    named = f"pos={pos.name}" if scaling.name == "none" else f"pos={pos.name} under scaling={scaling.name}"
    refused = next((name for name in UNKNOWN if getattr(record, name) is not None), None)
    if encoding.content_dependent:
        why = "a bias that the text decides"
    elif refused is not None:
        why = UNKNOWN[refused]
    elif pos.name == "xpos":
        why = "queries and keys scaled by their position"
    elif record.bias is not None and record.slopes is None:
        why = "a bias by distance that is not ALiBi's"
    elif record.slopes is not None and scaling.name != "none":
        why = "slopes that are not ALiBi's own"
    elif record.slopes is not None and not torch.allclose(_mpt_slopes(len(record.slopes)), record.slopes, rtol=1e-6):
        why = f"{len(record.slopes)} heads with slopes in ALiBi's order"
    else:
        return record
    raise ValueError(f"{named} is not exported: it has {why}, which no GPT-NeoX, MPT or GPT-2 of transformers has")


def _mpt_slopes(heads: int) -> Tensor:
    """The slopes of an MPT of so many heads, (H,): asked of transformers, whose order might be another."""
    bias: Tensor = build_mpt_alibi_tensor(heads, 2)  # (H, 1, 2)
    return -bias[:, 0, 0]


@torch.no_grad()
def _table(encoding: PositionEncoding, original_ctx: int, max_ctx: int | None, longest: int) -> Tensor | None:
    """The vectors of positions 0 .. T-1 that GPT-2 adds to its tokens, (T, C) fp32; None where nothing is added."""
    try:
        record = encoding(torch.arange(longest), ctx=longest)
    except ContextLengthError as error:
        if max_ctx is not None:
            raise ValueError(f"--max-ctx {max_ctx}: {error}") from None
        while longest > original_ctx:  # the longest that there is: a stretched table ends where its factor says
            longest = max(original_ctx, longest // 2)
            with contextlib.suppress(ContextLengthError):
                record = encoding(torch.arange(longest), ctx=longest)
                break
    return None if record.embedding is None else record.embedding.clone()


def _tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    longest = next(config[key] for key in ("max_position_embeddings", "max_seq_len", "n_positions") if key in config)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip


# --- parity ---------------------------------------------------------------------------------------------------------


def compare(
    model: GPT, folder: Path, target: Target, tokens: np.ndarray[Any, Any], train_ctx: int, device: torch.device,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """The parity report: ours and what transformers makes of the folder, on the first tokens (N,) of a text, in fp32.

    At those of 1x, 2x and 4x train_ctx that the exported model can hold and the text has: the largest difference of a
    logit, as it is and as a share of the largest logit, and that of the mean loss in nats.
    """
    held = [ctx for ctx in (train_ctx, 2 * train_ctx, 4 * train_ctx) if target.holds is None or ctx <= target.holds]
    lengths = [ctx for ctx in held if ctx < len(tokens)]
    if not lengths:
        raise ValueError(
            f"the test text has {len(tokens)} tokens, too few to compare the two at {train_ctx}; add data=NAME"
        )
    config = checkpoint.read_config(folder)
    theirs = checkpoint.Head(checkpoint.load(folder, config, torch.float32).to(device))
    rows, total, done = [], sum(lengths), 0
    for ctx in lengths:
        ids = torch.from_numpy(tokens[: ctx + 1])[None].to(device)  # (1, ctx + 1)
        rows.append({"ctx": ctx, "times": ctx // train_ctx, **_differences(model, theirs, ids)})
        done += ctx
        progress("parity", done, total)
    finite = all(math.isfinite(value) for row in rows for value in row.values())
    worst_logit = max(row["logits_relative"] for row in rows) if finite else math.inf
    worst_nll = max(abs(row["nll_difference"]) for row in rows) if finite else math.inf
    return {
        "agree": bool(worst_logit <= TOLERANCE and worst_nll <= TOLERANCE),
        "logits_relative": worst_logit if finite else None, "nll_difference": worst_nll if finite else None,
        "tolerance": TOLERANCE, "dtype": "fp32",
        "architecture": type(theirs.model).__name__, "transformers": transformers.__version__,
        "ropelab": ropelab.__version__,
        "rows": [{key: value if math.isfinite(value) else None for key, value in row.items()} for row in rows],
    }  # fmt: skip


@torch.no_grad()
def _differences(model: GPT, theirs: checkpoint.Head, ids: Tensor) -> dict[str, float]:
    """ids (1, T + 1): both on the first T, a part of the vocabulary's scores at a time."""
    inputs, targets = ids[:, :-1], ids[0, 1:]  # (1, T), (T,)
    ours, other = model(inputs)[0], theirs.hidden(inputs)[0]  # (T, C)
    step = max(1, logits_held(ids.device, training=False) // model.tokens.num_embeddings)
    largest = difference = 0.0
    losses = np.zeros(2)
    for low in range(0, len(targets), step):
        part = slice(low, low + step)
        one, two = model.logits(ours[part]).float(), theirs.logits(other[part])  # (n, V)
        if one.shape != two.shape:
            raise ValueError(f"transformers' model has {two.shape[-1]} tokens where ours has {one.shape[-1]}")
        # numpy's maximum keeps what is no number
        largest = float(np.maximum(largest, float(one.abs().max())))
        difference = float(np.maximum(difference, float((one - two).abs().max())))
        losses += [float(F.cross_entropy(x.double(), targets[part], reduction="sum")) for x in (one, two)]
    nll, their_nll = (losses / len(targets)).tolist()
    return {
        "logits_difference": difference,
        "logits_relative": difference / largest if largest else math.inf,
        "nll": nll,
        "nll_difference": their_nll - nll,
    }


def parity_line(parity: Mapping[str, Any]) -> str:
    """The report in one line."""
    lengths = ", ".join(str(row["ctx"]) for row in parity["rows"])
    verb = "agrees with" if parity["agree"] else "DIFFERS from"
    how = "a number that is not finite"
    if parity["logits_relative"] is not None:
        how = f"logits to {parity['logits_relative']:.1e} of the largest, loss to {parity['nll_difference']:.1e} nats"
    return (
        f"parity: transformers {parity['transformers']} ({parity['architecture']}) {verb} ropelab at {lengths} tokens: "
        f"{how}"
    )
