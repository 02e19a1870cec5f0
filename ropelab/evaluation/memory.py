"""How much memory an evaluation or a training takes, known before it starts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ropelab.config import Config, Method, ModelConfig
from ropelab.errors import ContextLengthError
from ropelab.model import logits_held, pass_bytes
from ropelab.positions import Geometry, PositionEncoding, learned_numbers
from ropelab.scalings import build

GB = 10**9
CGROUP = Path("/sys/fs/cgroup")  # of version 2, as seen from inside a container or a job


class Plan(NamedTuple):
    """How an evaluation goes through its windows."""

    windows: dict[int, int]  # ctx -> windows of one pass; nothing for a ctx at which the encoding is undefined
    longest: int  # tokens of the largest pass
    needed: int  # bytes that it takes beside the weights, an upper bound
    free: int | None  # bytes that it may take; None: unknown

    def __str__(self) -> str:
        free = "free memory unknown" if self.free is None else f"{self.free / GB:.3g} GB may be taken"
        return f"memory: up to {self.needed / GB:.2g} GB beside the weights, {self.longest} tokens at a time; {free}"


def plan(
    config: ModelConfig,
    n_vocab: int,
    encodings: Mapping[int, PositionEncoding],
    device: torch.device,
    *,
    limit_gb: float | None,
) -> Plan:
    """The passes of an evaluation of a GPT at the lengths of `encodings`; `ValueError` as `fit`."""
    known: dict[int, Callable[[int], int]] = {}
    for ctx, encoding in encodings.items():
        try:
            with torch.no_grad():
                far = encoding(torch.arange(ctx), ctx=ctx).far is not None
        except ContextLengthError:
            continue

        def needed(tokens: int, far: bool = far) -> int:
            return pass_bytes(config, n_vocab, tokens, device, far=far)

        known[ctx] = needed
    return fit(known, device, limit_gb=limit_gb)


def fit(
    known: Mapping[int, Callable[[int], int]], device: torch.device, *, limit_gb: float | None, weights: int = 0
) -> Plan:
    """Passes within what is free and within `limit_gb`; `known`: by ctx, the bytes that a pass over n tokens takes.

    `weights`: bytes of those that are not on the device yet. `ValueError` where one window does not fit, with the
    length that would: a shorter average is never taken instead.
    """
    free = free_bytes(device)
    if free is not None and weights > free:
        raise ValueError(
            f"the weights take {weights / GB:.3g} GB and {free / GB:.3g} GB are free on {device.type}; use "
            "eval.dtype=bf16, or a machine with more memory"
        )
    free = None if free is None else free - weights
    if limit_gb is not None:
        free = int(limit_gb * GB) if free is None else min(free, int(limit_gb * GB))
    windows: dict[int, int] = {}
    longest, most = 0, 0
    for ctx, needed in known.items():
        rows = max(1, pass_tokens(device) // ctx)
        if free is not None:
            while rows > 1 and needed(rows * ctx) > free:
                rows //= 2
            if needed(rows * ctx) > free:
                fits = next((n for n in (2**k for k in range(ctx.bit_length(), 0, -1)) if needed(n) <= free), None)
                raise ValueError(
                    f"a pass over {ctx} tokens takes {needed(ctx) / GB:.3g} GB beside the weights, and "
                    f"{free / GB:.3g} GB may be taken; use "
                    + (f"--ctx {fits} or less, or " if fits else "")
                    + ("more eval.memory_gb" if limit_gb is not None else "a machine with more memory")
                )
        windows[ctx] = rows
        longest, most = max(longest, rows * ctx), max(most, needed(rows * ctx))
    return Plan(windows, longest, most, free)


ELSEWHERE = 2**44  # bytes: a machine that is not this one is not known, but none has more
VOCABULARIES = {"bytes": 257, "gpt2": 50257}  # entries, before any text is read; of bpe data.vocab_size


def training_bytes(config: Config, n_vocab: int, device: torch.device, *, original_ctx: int) -> int:
    """Memory that a training step of a GPT takes at least, in bytes; counted, nothing is built.

    Weights, their gradients and AdamW's two moments in fp32, the windows of a step, and for one micro-batch what the
    backward pass needs of every layer: of each token eight vectors of the model's width (queries, keys, values, the
    attention's output, and four in the MLP), or with activation checkpointing one. Far more exists for a moment.
    """
    model, train = config.model, config.train
    width, tokens = model.d_model, train.micro * train.ctx
    encoding, pairs = learned_numbers(config.pos, model, original_ctx)
    weights = n_vocab * width + model.n_layer * 12 * width * width + encoding
    size = 4 if train.dtype == "fp32" else 2
    kept = 4 * width if train.activation_checkpointing else 8 * size * width
    head = 4 * min(tokens * n_vocab, logits_held(device, training=True))
    windows = 8 * train.batch_size * (train.ctx + 1)
    if config.positions.name == "randomized":  # a word and a place for each position that could be drawn
        windows += 16 * train.batch_size * (config.positions.parameters["max_ctx"] or 8 * original_ctx)
    in_full = device.type == "cpu" and train.ctx <= 1024  # else the hidden layer exists for a part of the pairs only
    by_pair = 4 * pairs * (train.ctx**2 if in_full else min(train.ctx**2, 2**18))
    return 16 * weights + model.n_layer * kept * tokens + head + windows + by_pair


def check_training(
    config: Config,
    device: torch.device,
    *,
    original_ctx: int,
    n_vocab: int | None = None,
    copies: int = 1,
    elsewhere: bool = False,
) -> None:
    """`ValueError`, with what would fit, for a training that takes more memory than is free on its device.

    copies: so many of it at once. elsewhere: another machine will train it, whose memory is not known here.
    """
    if n_vocab is None:
        n_vocab = VOCABULARIES.get(config.data.tokenizer, config.data.vocab_size)
    free = ELSEWHERE if elsewhere else free_bytes(device)
    if free is None:
        return

    def needed(changed: Config) -> int:
        return copies * training_bytes(changed, n_vocab, device, original_ctx=min(original_ctx, changed.train.ctx))

    most = needed(config)
    if most <= free:
        return
    fits = [f"{key}={value}" for key, value in _smaller(config, lambda other: 2 * needed(other) <= free)]
    fits += ["fewer of them at once"] if copies > 1 else []
    raise ValueError(
        f"training takes at least {_gb(most)}, "
        + ("more than any machine has" if elsewhere else f"and {_gb(free)} are free on {device.type}")
        + f"; use {' or '.join(fits) or 'smaller model.* and train.ctx, all of them'}"
        + (", or less" if fits and copies == 1 else "")
        + ("" if elsewhere else ", or a machine with more memory")
    )


def check_pass(model: ModelConfig, ctx: int, device: torch.device) -> None:
    """`ValueError` for a length at which one pass over random bytes does not fit on the device."""
    fit({ctx: lambda tokens: pass_bytes(model, VOCABULARIES["bytes"], tokens, device)}, device, limit_gb=None)


def check_shown(config: Config, ctx: int) -> None:
    """`ValueError` for an encoding whose numbers at a length are more than fit into memory, as `ropelab show` has them.

    As lists of Python a number takes 40 bytes, and a rotary pair with all that is said of it a thousand.
    """
    free = free_bytes(torch.device("cpu"))
    learned, _ = learned_numbers(config.pos, config.model, config.train.ctx)
    fixed = 4 * learned + 1000 * config.model.d_head
    if free is not None and fixed > free:
        raise ValueError(f"this encoding alone takes {_gb(fixed)}; make model.d_model and its own parameters smaller")
    plain = build(config.pos, Method("none", {}), Geometry.of(config.model, config.train.ctx))
    with torch.no_grad():
        record = plain(torch.arange(2), ctx=2)
    listed = [part for part in (record.embedding, record.qk_embedding, record.bias, *(record.rotation or ())[:4])
              if isinstance(part, torch.Tensor)]  # fmt: skip
    by_token = 40 * sum(part.numel() for part in listed) // 2
    if free is not None and fixed + by_token * ctx > free:
        raise ValueError(
            f"the numbers of {ctx} tokens take {_gb(fixed + by_token * ctx)}, and {_gb(free)} are free; use --ctx "
            f"{max(1, (free - fixed) // by_token // 2)} or less, or a smaller model.d_model"
        )


def _gb(size: int) -> str:
    return f"{min(size / GB, 10**6):,.{1 if size < 100 * GB else 0}f} GB"


def _smaller(config: Config, fits: Callable[[Config], bool]) -> list[tuple[str, int | str]]:
    """The changes of one setting each that make a training fit: the largest power of two below what it is."""
    model, train, found = config.model, config.train, list[tuple[str, int | str]]()

    def largest(key: str, value: int, changed: Callable[[int], Config]) -> None:
        for n in (2**power for power in range(value.bit_length() - (value.bit_count() == 1) - 1, -1, -1)):
            with contextlib.suppress(ValueError):  # a shape that cannot be
                if fits(changed(n)):
                    found.append((key, n))
                    return

    def trained(**values: Any) -> Config:
        return dataclasses.replace(config, train=dataclasses.replace(train, **values))

    def shaped(**values: Any) -> Config:
        return dataclasses.replace(config, model=dataclasses.replace(model, **values))

    def method(group: str, key: str, n: int) -> Config:
        before: Method = getattr(config, group)
        changed: Any = {group: Method(before.name, {**before.parameters, key: n})}
        return dataclasses.replace(config, **changed)

    if train.batch_size & (train.batch_size - 1) == 0:  # which a power of two divides
        largest("train.micro_batch_size", train.micro, lambda n: trained(micro_batch_size=n))
    if not found and not train.activation_checkpointing and fits(trained(activation_checkpointing=True)):
        found.append(("train.activation_checkpointing", "true"))
    if not found:
        largest("train.batch_size", train.batch_size, lambda n: trained(batch_size=n, micro_batch_size=None))
    largest("train.ctx", train.ctx, lambda n: trained(ctx=n))
    largest("model.n_layer", model.n_layer, lambda n: shaped(n_layer=n))
    largest("model.d_model", model.d_model, lambda n: shaped(d_model=n, n_head=min(n, model.n_head)))
    for group in ("pos", "positions"):
        for key, value in getattr(config, group).parameters.items():
            if isinstance(value, int) and value > 1:
                largest(f"{group}.{key}", value, partial(method, group, key))
    return found


def pass_tokens(device: torch.device) -> int:
    """Tokens of one forward pass: enough to fill the device, little enough to stay in cache on a CPU."""
    return 4096 if device.type == "cpu" else 131072


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process can still take on the device; None where nobody says."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    if device.type != "cpu":
        return None
    known: list[int] = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        known.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))))
    with contextlib.suppress(OSError, ValueError, KeyError):  # `max` where there is no limit
        limit = int((CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        # files that were read are kept in memory for as long as nobody wants it
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        known.append(limit - used + int(stat["inactive_file"]) + int(stat["active_file"]))
    return max(0, min(known)) if known else None
