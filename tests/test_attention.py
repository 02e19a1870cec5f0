"""Every attention kernel against one plain fp64 loop, forward and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ropelab.attention import KERNELS, Attend, Bias, Request, by_distance, choose_kernel, scores
from ropelab.attention.kernels import chunked_recompute, slope_dims, triton
from ropelab.positions import CumulativeDecay, slopes

CPU = torch.device("cpu")


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Bias,
    far: tuple[Tensor, Tensor] | None = None,
    decay: CumulativeDecay | None = None,
) -> Tensor:
    """Causal attention query by query and key by key in fp64: q, k (B, H, T, D), v (B, H, T, E)."""
    q, k, v = q.double(), k.double(), v.double()
    out = []
    for i in range(q.shape[2]):
        seen, scores = [], []
        for j in range(i + 1):
            if bias.window is not None and i - j >= bias.window:
                continue
            if bias.block is not None and i // bias.block - j // bias.block > 1:
                continue
            a, b = q[:, :, i], k[:, :, j]  # (B, H, D)
            if far is not None and bias.far is not None and i - j >= bias.far:
                a, b = far[0].double()[:, :, i], far[1].double()[:, :, j]
            score = (a * b).sum(-1) / math.sqrt(q.shape[-1])  # (B, H)
            if bias.scale is not None:
                score = score * bias.scale[i].double()
            if bias.cap is not None:
                score = bias.cap * torch.tanh(score / bias.cap)
            if bias.by_distance is not None:
                score = score + bias.by_distance[:, i - j].double()
            if bias.by_query is not None:
                score = score + bias.by_query(*(q.new_tensor([[x]]).float() for x in (i, i - j)))[:, 0, 0].double()
            if decay is not None:
                fallen = decay.cumsum[:, :, i].double() - decay.cumsum[:, :, j].double()
                score = score - (fallen if decay.gate is None else decay.gate[:, :, i].double() * fallen)
            seen.append(j)
            scores.append(score)
        weights = torch.stack(scores, dim=-1).softmax(-1)  # (B, H, seen)
        out.append(torch.einsum("bhj,bhjd->bhd", weights, v[:, :, seen]))
    return torch.stack(out, dim=2)


cases = st.fixed_dictionaries(
    {
        "length": st.integers(1, 33),
        "rows": st.sampled_from([1, 3, 8, 64]),
        "window": st.one_of(st.none(), st.integers(1, 40)),
        "bias": st.booleans(),
        "by_query": st.booleans(),
        "block": st.one_of(st.none(), st.integers(1, 12)),
        "decay": st.sampled_from(["none", "plain", "gained"]),
        "far": st.one_of(st.none(), st.integers(1, 40)),
        "scale": st.booleans(),
        "cap": st.one_of(st.none(), st.floats(0.5, 5)),
        "training": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


@settings(max_examples=120)
@given(cases)
def test_every_kernel_equals_the_plain_loop(case: dict[str, Any]) -> None:
    """Forward and gradients of queries, keys, values and biases, in every kernel that serves the case.

    Lengths that no block divides, single tokens, all kinds of bias and their mixtures are among the cases.
    """
    check_against_the_loop(case, CPU, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [Bias(), Bias(window=5), Bias(block=4), Bias(far=3), Bias(cap=2.0)])
def test_values_may_be_of_another_width(bias: Bias) -> None:
    """As in the latent attention of DeepSeek."""
    generator = torch.Generator().manual_seed(3)
    q, k, q2, k2 = (torch.randn(2, 3, 17, 8, generator=generator) for _ in range(4))
    v = torch.randn(2, 3, 17, 5, generator=generator)
    far = None if bias.far is None else (q2, k2)
    with torch.no_grad():
        out = Attend(17, bias=bias, device=CPU, training=False)(q, k, v, far=far)
    assert out.shape == v.shape
    torch.testing.assert_close(out.double(), reference(q, k, v, bias, far), rtol=1e-4, atol=1e-5)


def check_against_the_loop(case: dict[str, Any], device: torch.device, *, rtol: float, atol: float) -> None:
    """One case on one device; `rtol` and `atol` are those of the outputs, gradients get a tenfold `rtol`."""
    generator = torch.Generator().manual_seed(case["seed"])
    length = case["length"]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    q, k, v, q2, k2 = (random(2, 3, length, 8) for _ in range(5))
    learned = [random(3, length), random(3)]
    steps = torch.rand(2, 3, length, generator=generator).to(device).requires_grad_()
    gain = torch.rand(2, 3, length, generator=generator).to(device).requires_grad_()
    decay = None
    if case["decay"] != "none":
        decay = CumulativeDecay(steps.cumsum(-1), gain if case["decay"] == "gained" else None)
    bias = Bias(
        by_distance=-learned[0].abs().cumsum(1) if case["bias"] else None,
        by_query=(lambda i, d: learned[1][:, None, None] * torch.log1p(d) / (1 + i)) if case["by_query"] else None,
        window=case["window"],
        block=case["block"],
        far=case["far"],
        decays=decay is not None,
        scale=torch.linspace(0.5, 2, length, device=device) if case["scale"] else None,
        cap=case["cap"],
    )
    far = None if case["far"] is None else (q2, k2)
    expected = reference(q, k, v, bias, far, decay)
    weights = torch.randn(expected.shape, generator=generator).to(device)
    tensors = (q, k, v, q2, k2, *learned, steps, gain)
    theirs = torch.autograd.grad((expected * weights).sum(), tensors, allow_unused=True, retain_graph=True)

    chosen = Attend(length, bias=bias, device=device, training=case["training"])
    request = Request(length, chosen.bias, device, case["training"], torch.float32)
    # ALiBi's digits are checked below, Triton in its interpreter
    kernels = {kernel.name for kernel in KERNELS if kernel.supports(request)} - {"digits", "triton"} | {chosen.kernel}
    before = scores.BLOCK, chunked_recompute.ROWS, chunked_recompute.HELD
    scores.BLOCK, chunked_recompute.ROWS = case["rows"], max(1, case["rows"] // 2)
    chunked_recompute.HELD = 1 if case["seed"] % 2 else before[2]  # one sequence at a time, or all
    try:
        for kernel in sorted(kernels):
            attending = Attend(length, bias=bias, device=device, training=case["training"], kernel=kernel)
            out = attending(q, k, v, far=far, decay=decay)
            torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)
            with torch.no_grad():
                torch.testing.assert_close(attending(q, k, v, far=far, decay=decay), out, rtol=1e-6, atol=atol / 10)
                shown = attending.weights(q, k, range(length // 2, length), far=far, decay=decay)
                torch.testing.assert_close(shown @ v, out[:, :, length // 2 :], rtol=rtol, atol=atol)
            mine = torch.autograd.grad((out * weights).sum(), tensors, allow_unused=True, retain_graph=True)
            for got, want in zip(mine, theirs, strict=True):
                want = torch.zeros((), device=device) if want is None else want
                got = torch.zeros_like(want) if got is None else got
                torch.testing.assert_close(got, want.expand_as(got), rtol=10 * rtol, atol=2 * atol)
    finally:
        scores.BLOCK, chunked_recompute.ROWS, chunked_recompute.HELD = before


@pytest.mark.parametrize("gained", ["plain", "gained"])
@pytest.mark.parametrize(("length", "window"), [(1, None), (70, None), (80, 20)])
def test_decays_alone_equal_the_plain_loop(length: int, window: int | None, gained: str) -> None:
    """As encodings that read the text have them, in every kernel; several blocks of the backward pass."""
    case = {"length": length, "window": window, "decay": gained, "rows": 64, "training": length > 1, "seed": length}
    rest = {"bias": False, "by_query": False, "block": None, "far": None, "scale": False, "cap": None}
    check_against_the_loop({**case, **rest}, CPU, rtol=1e-4, atol=1e-5)


def test_gradients_of_steps_do_not_drift_along_a_long_text() -> None:
    """The gradient of a step is a sum over all later tokens: what each row of dS is off by must not add up in it."""
    length = 2048
    generator = torch.Generator().manual_seed(0)
    q, k, v, weights = torch.randn(4, 1, 1, length, 16, generator=generator).unbind(0)
    steps = torch.rand(1, 1, length, generator=generator).requires_grad_()
    total = steps.double().cumsum(-1)
    scores = q.double() @ k.double().mT / 4 - (total[..., None] - total[..., None, :])
    future = torch.ones(length, length, dtype=torch.bool).triu_(1)
    expected = scores.masked_fill(future, -math.inf).softmax(-1) @ v.double()
    out = Attend(length, bias=Bias(decays=True), device=CPU, training=True)(q, k, v, decay=CumulativeDecay(total))
    got, want = (torch.autograd.grad((x * weights).sum(), steps, retain_graph=True)[0] for x in (out, expected))
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_the_gradient_of_a_bias_is_the_same_every_time() -> None:
    """Bit by bit, over threads: a run with a learned bias can be resumed exactly."""
    q, k, v = torch.randn(3, 4, 4, 256, 16).unbind(0)
    bias = torch.randn(4, 256, requires_grad=True)
    gradients = []
    for _ in range(5):
        out = Attend(256, bias=Bias(bias), device=CPU, training=True)(q, k, v)
        gradients.append(torch.autograd.grad(out.square().sum(), bias)[0])
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


def test_a_learned_bias_is_added_in_fp32_to_bf16_scores() -> None:
    """Biases of 100 and 100.2, which bf16 does not tell apart: weights of 0.45 and 0.55, not two halves."""
    q, k = torch.zeros(2, 1, 1, 2, 8, dtype=torch.bfloat16).unbind(0)
    v = torch.eye(2, 8).bfloat16()[None, None]
    bias = torch.tensor([[100.0, 100.2]], requires_grad=True)
    attending = Attend(2, bias=Bias(bias), device=CPU, training=True, dtype=torch.bfloat16)
    assert attending.kernel == "materialised"
    out = attending(q, k, v)
    assert out.dtype == torch.bfloat16
    assert out[0, 0, 1, 0].item() == pytest.approx(1 / (1 + math.exp(-0.2)), abs=3e-3)


def test_decays_are_exact_late_in_a_long_text() -> None:
    """Steps of 1e-3 on a total of 1e5: an fp32 total would be off by 4e-3, more than a step."""
    steps = torch.full((1, 1, 64), 1e-3, dtype=torch.float64)
    steps[..., 0] = 1e5
    attending = Attend(64, bias=Bias(decays=True), device=CPU, training=False)
    mask = attending._scores.mask(32, 64, 0, CumulativeDecay(steps.cumsum(-1)))  # (1, 1, 32, 64)
    assert mask[0, 0, 8, 30].item() == pytest.approx(-1e-3 * (40 - 30), rel=1e-5)
    assert mask[0, 0, 31, 1].item() == pytest.approx(-1e-3 * (63 - 1), rel=1e-5)


def test_a_block_mask_on_a_cpu_is_a_view_of_one_vector() -> None:
    """No (rows, keys) tensor is built for a bias: the mask of a block owns rows + keys - 1 numbers a head."""
    mask = by_distance.mask(-torch.rand(2, 4096), 2048, 4096, 0)
    assert mask.shape == (2, 2048, 4096)
    assert mask.untyped_storage().nbytes() == 2 * (2048 + 4096 - 1) * 4


def test_dense_blocks_stay_within_their_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias by query is never asked for more than DENSE numbers at a time."""
    monkeypatch.setattr(scores, "DENSE", 2**12)
    asked = []

    def by_query(i: Tensor, distance: Tensor) -> Tensor:
        asked.append(2 * distance.numel())
        return torch.zeros(2, *distance.shape)

    attending = Attend(300, bias=Bias(by_query=by_query), device=CPU, training=False, kernel="blocks")
    with torch.no_grad():
        attending(*torch.randn(3, 1, 2, 300, 8).unbind(0))
    assert len(asked) > 10
    assert max(asked) <= 2**12


FP32, BF16 = torch.float32, torch.bfloat16
DISTANCE = Bias(torch.zeros(1, 128))
QUERY = Bias(by_query=lambda i, d: torch.zeros(1, *d.shape))
SLOPES = Bias(torch.zeros(1, 128), slopes=torch.ones(1))


@pytest.mark.parametrize(
    ("device", "training", "length", "dtype", "bias", "kernel"),
    [
        ("cpu", True, 128, FP32, Bias(), "materialised"),
        ("cpu", True, 128, FP32, DISTANCE, "materialised"),
        ("cpu", True, 129, FP32, Bias(), "sdpa"),
        ("cpu", True, 512, BF16, Bias(), "materialised"),
        ("cpu", True, 129, FP32, DISTANCE, "recomputed"),
        ("cpu", True, 512, BF16, SLOPES, "materialised"),
        ("cpu", True, 513, BF16, SLOPES, "recomputed"),
        ("cpu", True, 128, BF16, Bias(decays=True), "materialised"),
        ("cpu", True, 129, BF16, Bias(decays=True), "recomputed"),
        ("cpu", True, 129, FP32, Bias(decays=True), "recomputed"),
        ("cpu", True, 512, FP32, DISTANCE._replace(decays=True), "materialised"),
        ("cpu", True, 513, FP32, DISTANCE._replace(decays=True), "blocks"),
        ("cpu", True, 128, FP32, QUERY, "materialised"),
        ("cpu", True, 129, FP32, QUERY, "recomputed"),
        ("cpu", True, 1025, FP32, QUERY, "blocks"),
        ("cpu", False, 129, FP32, QUERY, "blocks"),
        ("cuda", True, 129, BF16, QUERY, "triton"),
        ("cuda", True, 2**16, FP32, QUERY, "triton"),
        ("cuda", True, 129, BF16, QUERY._replace(by_distance=torch.zeros(1, 129)), "blocks"),
        ("cuda", True, 129, BF16, QUERY._replace(block=12), "blocks"),
        ("cuda", False, 129, BF16, QUERY, "blocks"),
        ("cpu", False, 128, FP32, Bias(), "sdpa"),
        ("cpu", False, 128, FP32, Bias(window=12), "blocks"),
        ("cpu", False, 128, FP32, Bias(block=12), "blocks"),
        ("cpu", False, 128, FP32, Bias(decays=True), "blocks"),
        ("cpu", False, 128, FP32, Bias(far=12), "scores"),
        ("cpu", False, 128, FP32, Bias(cap=50.0), "scores"),
        ("mps", True, 128, FP32, DISTANCE, "recomputed"),
        ("mps", False, 128, FP32, DISTANCE, "blocks"),
        ("cuda", True, 128, BF16, Bias(), "sdpa"),
        ("cuda", True, 128, BF16, DISTANCE, "triton"),
        ("cuda", True, 128, BF16, SLOPES, "digits"),
        ("cuda", True, 128, FP32, SLOPES, "triton"),
        ("cuda", False, 128, BF16, SLOPES, "triton"),
        ("cuda", False, 128, FP32, Bias(window=12), "triton"),
        ("cuda", True, 128, BF16, Bias(decays=True), "triton"),
        ("cuda", False, 2**17, BF16, Bias(decays=True, window=12), "triton"),
        ("cuda", True, 128, BF16, DISTANCE._replace(decays=True), "blocks"),
    ],
)
def test_the_kernel_is_a_fixed_rule(
    device: str, training: bool, length: int, dtype: torch.dtype, bias: Bias, kernel: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(triton, "has_triton", lambda: True)
    assert choose_kernel(Request(length, bias, torch.device(device), training, dtype)).name == kernel


def test_a_gpu_without_triton_computes_the_scores_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "has_triton", lambda: False)
    chosen = [
        choose_kernel(Request(128, bias, torch.device("cuda"), training, BF16)).name
        for bias in (DISTANCE, QUERY, Bias(decays=True))
        for training in (True, False)
    ]
    assert chosen == ["recomputed", "blocks", "blocks", "blocks", "recomputed", "blocks"]


@pytest.mark.parametrize("kind", ["learned", "by query"])
def test_a_trained_bias_goes_through_the_fused_kernel(kind: str) -> None:
    """A mask that asks for a gradient would send torch to its attention in full, three times as slow."""
    called: list[str] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(function.name())
            return function(*args, **(kwargs or {}))

    weight = torch.rand(2, 1, 1, requires_grad=True)
    bias = Bias(-weight[:, 0] * torch.arange(200.0)) if kind == "learned" else Bias(by_query=lambda i, d: -weight * d)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 200, 8).unbind(0))
    attending = Attend(200, bias=bias, device=CPU, training=True)
    assert attending.kernel == "recomputed"
    with Calls():
        out = attending(q, k, v)
    assert any("scaled_dot_product_flash" in name for name in called)
    assert not any("softmax" in name for name in called)
    out.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("kind", ["by distance", "learned", "by query", "decays"])
def test_training_keeps_no_scores(kind: str) -> None:
    """What the backward pass holds of a layer grows with T, not with T x T."""
    length = 1024 if kind != "by query" else 1100  # where no mask is made in full for all layers
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, length, 8).unbind(0))
    learned = torch.rand(2, length, requires_grad=kind == "learned")
    bias = {
        "by distance": Bias(-learned),
        "learned": Bias(-learned),
        "by query": Bias(by_query=lambda i, d: q.mean() * torch.log1p(d)[None].expand(2, -1, -1)),
        "decays": Bias(decays=True),
    }[kind]
    decay = CumulativeDecay(torch.rand(1, 2, length).cumsum(-1).requires_grad_()) if kind == "decays" else None
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attending = Attend(length, bias=bias, device=CPU, training=True)
        out = attending(q, k, v, decay=decay)
    assert attending.kernel == ("recomputed" if bias.by_query is None else "blocks")
    out.sum().backward()
    assert q.grad is not None
    assert sum(held.values()) < length * length  # bytes: an eighth of one (H, T, T)


@pytest.mark.parametrize("bias", [Bias(window=16), Bias(block=8), Bias(far=16)])
def test_what_reaches_past_the_sequence_changes_nothing(bias: Bias) -> None:
    assert Attend(16, bias=bias, device=CPU, training=False).kernel == "sdpa"


def alibi(length: int, heads: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k (1, H, T, 64) bf16 and ALiBi's slopes (H,)."""
    q, k = torch.randn(2, 1, heads, length, 64, generator=torch.Generator().manual_seed(0)).bfloat16().unbind(0)
    return q, k, slopes(heads)


@pytest.mark.parametrize(("length", "bound"), [(300, 1e-4), (2048, 2e-4), (32768, 1e-3)])
def test_digits_give_alibis_weights_in_bf16(length: int, bound: float) -> None:
    """Total variation of the last queries' weights against ALiBi in fp64; a position in one bf16 number is far off."""
    q, k, slope = alibi(length)
    wide_q, wide_k = slope_dims.augment(q, k, slope)
    distance = torch.arange(length - 1, -1, -1).double()
    plain = (q[:, :, -1:].double() @ k.double().transpose(-2, -1)) / 8  # (1, H, 1, T)
    expected = torch.softmax(plain - slope.double()[None, :, None, None] * distance, dim=-1)
    scores = (wide_q[:, :, -1:].float() @ wide_k.float().transpose(-2, -1)) / 8  # products of bf16, summed in fp32
    off = (torch.softmax(scores, dim=-1).double() - expected).abs().sum(-1) / 2
    assert off.max() < bound
    naive = plain.float() + (slope.bfloat16()[None, :, None, None] * torch.arange(length).bfloat16()).float()
    if length >= 2048:
        assert ((torch.softmax(naive, dim=-1).double() - expected).abs().sum(-1) / 2).max() > 0.1


def test_attention_with_digits_equals_the_plain_loop() -> None:
    """In fp32, with gradients."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, 37, 8, generator=generator).requires_grad_() for _ in range(3))
    slope = torch.tensor([0.5, 0.1, 0.003])
    expected = reference(q, k, v, Bias(-slope[:, None] * torch.arange(37)))
    out = slope_dims.attend_with_slopes(q, k, v, slope)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn(expected.shape, generator=generator)
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for got, want in zip(torch.autograd.grad((out * weights).sum(), (q, k, v)), theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-5)
