"""`ropelab bench attention`: the kernels beside torch's causal attention, and how exact ALiBi's bias is in each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ropelab import config as configs
from ropelab import experiment
from ropelab.attention import Attend, Bias, choose_kernel
from ropelab.bench.timing import best, machine, synchroniser
from ropelab.positions import Geometry, build
from ropelab.positions.alibi import slopes
from ropelab.schema import Config
from ropelab.training import resolve_dtype

IN_FULL = 2048  # longest ctx at which scores in full are timed
BACKWARD = {"cpu": 4096}  # longest ctx at which gradients are timed; elsewhere 16384
EXACT_AT = {"cpu": (2048, 16384)}  # lengths of the accuracy table; elsewhere to 131072


def attention(config: Config, *, contexts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Seconds of each kernel at each length, forward and with gradients; batch 1, heads and dtype as configured.

    The ratios are to torch's fused causal attention without a bias in the same rounds. `accuracy`: the error of ALiBi's
    attention in each kernel against fp64.
    """
    device = experiment.resolve_device(config.device)
    dtype = resolve_dtype(config.train.dtype, device)
    rows = [row for ctx in contexts for row in _kernels(config, ctx, device, dtype, rounds)]
    lengths = EXACT_AT.get(device.type, (2048, 32768, 131072))
    return {
        **machine(device),
        "dtype": experiment.DTYPE_NAMES[dtype],
        "n_head": config.model.n_head,
        "d_head": config.model.d_head,
        "rows": rows,
        "accuracy": [row for length in lengths for row in _accuracy(length, device)],
    }


def _kernels(config: Config, ctx: int, device: torch.device, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    heads, d_head = config.model.n_head, config.model.d_head
    q, k, v = (torch.randn(1, heads, ctx, d_head, device=device, dtype=dtype).requires_grad_() for _ in range(3))
    slope = slopes(heads).to(device)
    fixed = -slope[:, None] * torch.arange(ctx, device=device)
    learned = fixed.clone().requires_grad_()
    fire = build(configs.load(["pos=fire"]).pos, experiment.NO_SCALING, Geometry(heads * d_head, heads, ctx)).to(device)
    by_query = fire(torch.arange(ctx, device=device), ctx=ctx).query_bias
    kinds = {
        "none": Bias(), "fixed": Bias(fixed, slopes=slope), "learned": Bias(learned), "FIRE": Bias(by_query=by_query),
    }  # fmt: skip
    calls: dict[tuple[str, str, str], Callable[[], None]] = {}
    for label, bias in kinds.items():
        for use in ("forward", "with gradients"):
            if use == "with gradients" and ctx > BACKWARD.get(device.type, 16384):
                continue
            grads = use == "with gradients"
            chosen = choose_kernel(device, ctx, training=grads, bias=bias, dtype=dtype)
            names = {chosen, *(("materialised",) if ctx <= IN_FULL else ())}
            if bias.plain:
                names |= {"sdpa"}
            elif not bias.pairwise:
                names |= {"recomputed"} if grads else {"blocks"}
                names |= {"triton"} if device.type == "cuda" else set()
            for name in sorted(names):
                attend = Attend(ctx, bias=bias, device=device, training=grads, dtype=dtype, kernel=name)
                wanted = [q, k, v, *([learned] if label == "learned" else [])]
                timed = _with_gradients if grads else _forward
                calls[label, use, name] = functools.partial(timed, attend, q, k, v, wanted)
    if device.type == "cuda":
        for label, vector in (("fixed", fixed), ("learned", learned)):
            for use in ("forward", "with gradients"):
                calls[label, use, "flex"] = _flex(q, k, v, vector, grads=use == "with gradients")
    errors: dict[tuple[str, str, str], str] = {}
    for key, call in list(calls.items()):
        try:
            call()
        except Exception as error:  # a rival that a version of torch lacks must not end the bench
            errors[key] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            del calls[key]
    named = {" / ".join(key): call for key, call in calls.items()}
    seconds = best(named, rounds=rounds, synchronise=synchroniser(device))
    rows = []
    for label, use, kernel in calls:
        value = seconds[f"{label} / {use} / {kernel}"]
        floor = seconds[f"none / {use} / sdpa"]
        # the causal half of two products; a backward pass is 2.5 times a forward one
        work = (3.5 if use == "with gradients" else 1) * 2 * heads * ctx**2 * d_head
        rows.append({
            "ctx": ctx, "bias": label, "use": use, "kernel": kernel, "seconds": value,
            "ratio": value / floor, "flops_per_s": work / value,
        })  # fmt: skip
    return rows + [
        {"ctx": ctx, "bias": label, "use": use, "kernel": kernel, "error": text}
        for (label, use, kernel), text in errors.items()
    ]


def _forward(attend: Attend, q: Tensor, k: Tensor, v: Tensor, wanted: list[Tensor]) -> None:
    with torch.no_grad():
        attend(q, k, v)


def _with_gradients(attend: Attend, q: Tensor, k: Tensor, v: Tensor, wanted: list[Tensor]) -> None:
    # the mask of scores in full hangs on the bias's graph, which the next round needs again
    torch.autograd.grad(attend(q, k, v).sum(), wanted, retain_graph=True)


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, grads: bool) -> Callable[[], None]:
    """torch's FlexAttention reading the same bias by distance: a rival, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = q.shape[2]
    causal = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=str(q.device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def score(scores: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return scores + bias[h, (i - j).clamp(min=0)]

    def call() -> None:
        wanted = [q, k, v, *([bias] if bias.requires_grad else [])]
        if grads:
            torch.autograd.grad(compiled(q, k, v, score_mod=score, block_mask=causal).sum(), wanted)
        else:
            with torch.no_grad():
                compiled(q, k, v, score_mod=score, block_mask=causal)

    return call


def _accuracy(length: int, device: torch.device) -> list[dict[str, Any]]:
    """Largest error of the last 64 queries' output, values +-1, against ALiBi in fp64: 12 heads of 64 dimensions."""
    heads, d_head, rows = 12, 64, 64
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(3, 1, heads, length, d_head, generator=generator)
    slope = slopes(heads)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k = plain[0].to(dtype), plain[1].to(dtype)
        v = plain[2].sign().to(dtype)
        i = torch.arange(length - rows, length)[:, None]
        distance = i - torch.arange(length)  # (rows, T)
        expected = torch.empty(heads, rows, d_head, dtype=torch.float64)
        naive = torch.empty_like(expected)
        for h in range(heads):
            scores = q[0, h, -rows:].double() @ k[0, h].double().T / math.sqrt(d_head)
            future = distance < 0
            value = v[0, h].double()
            expected[h] = (scores - slope[h].double() * distance).masked_fill(future, -math.inf).softmax(-1) @ value
            added = (slope[h].to(dtype) * torch.arange(length).to(dtype)).double()  # the position in one number
            naive[h] = (scores + added).masked_fill(future, -math.inf).softmax(-1) @ value
        name = experiment.DTYPE_NAMES[dtype]
        outputs = {"one number": naive}
        vector = -slope[:, None] * torch.arange(length)
        bias = Bias(vector.to(device), slopes=slope.to(device))
        kernels = ["blocks", "digits", *(["triton"] if device.type == "cuda" else [])]
        for kernel in kernels:
            attend = Attend(length, bias=bias, device=device, training=False, dtype=dtype, kernel=kernel)
            with torch.no_grad():
                outputs[kernel] = attend(q.to(device), k.to(device), v.to(device))[0, :, -rows:].cpu().double()
        for kernel, out in outputs.items():
            error = float((out - expected).abs().max())
            found.append({"ctx": length, "dtype": name, "kernel": kernel, "max_error": error})
    return found
