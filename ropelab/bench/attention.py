"""`ropelab bench attention`: the kernels beside torch's causal attention, and on CUDA beside FlexAttention."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ropelab import config as configs
from ropelab import devices, runs
from ropelab.attention import Attend, Bias, Request, augment, choose_kernel
from ropelab.bench.accuracy import accuracy
from ropelab.bench.timing import best, machine, synchroniser
from ropelab.config import Config
from ropelab.devices import resolve_dtype
from ropelab.positions import Geometry, slopes
from ropelab.scalings import build

IN_FULL = 2048  # longest ctx at which scores or masks in full are timed
BACKWARD, BACKWARD_CPU = 16384, 4096  # longest ctx at which gradients are timed
TOKENS, TOKENS_CPU = 32768, 4096  # of a call, at least one sequence: as many as a training step has
USES = ("forward", "with gradients")
FORCED = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


class Key(NamedTuple):
    """One kernel in one use."""

    bias: str
    use: str
    kernel: str


class Inputs(NamedTuple):
    """Queries, keys, values and the gradient of the output, (B, H, T, D) in the dtype of the products."""

    q: Tensor
    k: Tensor
    v: Tensor
    due: Tensor


def attention(config: Config, *, contexts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Seconds of each kernel at each length, forward and with gradients, heads and dtype as configured.

    Biases: none; `fixed` by distance (ALiBi's), with its gradients for q, k, v; `learned` by distance, (H, T), with its
    own too; `FIRE`, by query, with those of its network. What all layers of a model share (a mask in full, a bias by
    distance) is made before; its gradients are in every call, although a model computes their last part once. `ratio`
    is to torch's fused causal attention without a bias in the same rounds, `tflops` counts the causal half of the
    products, and 2.5 times as much backward. A kernel that fails has its `error`. `accuracy`: how far ALiBi's attention
    is from fp64 in each kernel.
    """
    device = devices.resolve_device(config.device)
    dtype = resolve_dtype(config.train.dtype, device)
    return {
        **machine(device),
        "dtype": devices.DTYPE_NAMES[dtype],
        "n_head": config.model.n_head,
        "d_head": config.model.d_head,
        "rows": [row for ctx in contexts for row in _at(config, ctx, device, dtype, rounds)],
        "accuracy": accuracy(device, max(contexts)),
    }


def _at(config: Config, ctx: int, device: torch.device, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """The rows of one length."""
    cpu = device.type == "cpu"
    heads, d_head = config.model.n_head, config.model.d_head
    batch = max(1, (TOKENS_CPU if cpu else TOKENS) // ctx)
    draw = functools.partial(torch.randn, batch, heads, ctx, d_head, device=device, dtype=dtype)
    inputs = Inputs(draw().requires_grad_(), draw().requires_grad_(), draw().requires_grad_(), draw())
    uses = [use for use in USES if use == "forward" or ctx <= (BACKWARD_CPU if cpu else BACKWARD)]
    calls: dict[Key, Callable[[], object]] = {}
    chosen: set[Key] = set()
    for label, bias, wanted in _biases(config, ctx, device):
        for use in uses:
            grads = use == "with gradients"
            choice = choose_kernel(Request(ctx, bias.within(ctx), device, grads, dtype)).name
            chosen.add(Key(label, use, choice))
            for kernel in dict.fromkeys([choice, *_kernels(bias, ctx, device, grads=grads)]):
                with torch.set_grad_enabled(grads):
                    attend = Attend(ctx, bias=bias, device=device, training=grads, dtype=dtype, kernel=kernel)
                of = (*inputs[:3], *wanted)
                calls[Key(label, use, kernel)] = functools.partial(_call, attend, inputs, of if grads else ())
    if device.type == "cuda":
        calls.update(_rivals(inputs, calls, uses, slopes(heads).to(device)))
    errors = {key: text for key, call in calls.items() if (text := _error(call))}
    good = {key: call for key, call in calls.items() if key not in errors}
    seconds = best({"/".join(key): call for key, call in good.items()}, rounds=rounds, synchronise=synchroniser(device))
    rows = []
    for key in calls:
        row: dict[str, Any] = {"ctx": ctx, "batch": batch, **key._asdict(), "chosen": key in chosen}
        if key in errors:
            row["error"] = errors[key]
        else:
            row["seconds"] = seconds["/".join(key)]
            floor = seconds.get("/".join(Key("none", key.use, "sdpa")))
            row["ratio"] = None if floor is None else row["seconds"] / floor
            work = (1 if key.use == "forward" else 3.5) * 2 * batch * heads * ctx**2 * d_head
            row["tflops"] = work / row["seconds"] / 1e12
            row["backend"] = _backend(key.kernel, inputs, slopes(heads).to(device))
        rows.append(row)
    return rows


def _biases(config: Config, ctx: int, device: torch.device) -> Iterator[tuple[str, Bias, tuple[Tensor, ...]]]:
    """(name, bias, what of it needs gradients)."""
    heads, d_head = config.model.n_head, config.model.d_head
    slope = slopes(heads).to(device)  # (H,)
    fixed = -slope[:, None] * torch.arange(ctx, device=device)  # (H, T)
    learned = fixed.clone().requires_grad_()
    fire = build(configs.load(["pos=fire"]).pos, runs.NO_SCALING, Geometry(heads * d_head, heads, ctx)).to(device)
    yield "none", Bias(), ()
    yield "fixed", Bias(fixed, slopes=slope), ()
    yield "learned", Bias(learned), (learned,)
    by_query = fire(torch.arange(ctx, device=device), ctx=ctx).query_bias
    yield "FIRE", Bias(by_query=by_query), tuple(fire.parameters())


def _kernels(bias: Bias, ctx: int, device: torch.device, *, grads: bool) -> list[str]:
    """The kernels of `Attend` that this device can run for a bias."""
    if bias.plain:
        names = ["sdpa"]
    elif bias.pairwise:
        names = ["blocks", *(["recomputed"] if grads and ctx <= IN_FULL else [])]
    else:
        names = ["recomputed" if grads else "blocks"]
        names += ["digits"] if bias.slopes is not None else []
        names += ["triton"] if device.type == "cuda" else []
    return [*names, *(["materialised"] if ctx <= IN_FULL else [])]


def _call(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs, wanted: Sequence[Tensor]) -> None:
    """One attention; with the gradients of `wanted`, where there are such."""
    if not wanted:
        with torch.no_grad():
            attend(*inputs[:3])
        return
    # the mask of scores in full hangs on the graph of the bias, which the next round needs again
    torch.autograd.grad(attend(*inputs[:3]), wanted, inputs.due, retain_graph=True)


def _rivals(
    inputs: Inputs, calls: dict[Key, Callable[[], object]], uses: Sequence[str], slope: Tensor
) -> dict[Key, Callable[[], object]]:
    """On CUDA: torch's causal attention by each of its kernels, and FlexAttention that reads a bias by distance."""
    found: dict[Key, Callable[[], object]] = {}
    for use in uses:
        plain = calls[Key("none", use, "sdpa")]
        for name, backend in FORCED.items():
            found[Key("none", use, f"sdpa {name}")] = functools.partial(_forced, backend, plain)
        label = "fixed" if use == "forward" else "learned"  # both would be compiled anew for what is the same
        bias = -slope[:, None] * torch.arange(inputs.q.shape[2], device=slope.device)  # (H, T)
        wanted = () if use == "forward" else (*inputs[:3], bias.requires_grad_())
        found[Key(label, use, "flex")] = functools.partial(_call, _Flex(bias), inputs, wanted)
    return found


def _forced(backend: SDPBackend, call: Callable[[], object]) -> None:
    with sdpa_kernel(backend):
        call()


class _Flex:
    """torch's compiled FlexAttention with bias[h, i - j] added, (H, T); compiled at the first call."""

    def __init__(self, bias: Tensor) -> None:
        self.bias = bias
        self.compiled: Callable[..., Tensor] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.compiled is None:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            length = q.shape[2]
            make = torch.compile(create_block_mask)  # otherwise it builds (T, T)
            self.causal = make(lambda b, h, i, j: i >= j, None, None, length, length, device=str(q.device))
            self.compiled = torch.compile(flex_attention, dynamic=False)
        return self.compiled(q, k, v, score_mod=self._score, block_mask=self.causal)

    def _score(self, scores: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return scores + self.bias[h, (i - j).clamp(min=0)]


def _error(call: Callable[[], object]) -> str | None:
    """What a first call fails with: a kernel that this device or this torch lacks must not take the others along."""
    try:
        call()
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return None


def _backend(kernel: str, inputs: Inputs, slope: Tensor) -> str | None:
    """Which of torch's kernels a call of its fused attention comes to, where torch says so."""
    if kernel not in ("sdpa", "digits"):
        return None
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    if kernel == "digits":
        q, k = augment(q, k, slope)
        v = torch.nn.functional.pad(v, (0, q.shape[-1] - v.shape[-1]))
    with contextlib.suppress(AttributeError, RuntimeError, ValueError):
        return SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True)).name.removesuffix("_ATTENTION").lower()
    return None
