"""Triton's attention by distance against a plain fp64 loop: on a GPU, and in Triton's interpreter on any machine.

Triton decides when it is imported whether it interprets. The checks of this file therefore run in another Python with
`TRITON_INTERPRET=1`, which `test_the_checks_hold_in_the_interpreter` starts; in this one they need a CUDA device.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from ropelab.attention import row_bands, select, triton_kernels
from ropelab.attention.kernels import triton as kernels_of_triton
from ropelab.attention.triton_kernels import Launch, Launches, attend_by_distance, attend_by_query, attend_with_decays
from ropelab.config import Method, ModelConfig
from ropelab.model import GPT
from ropelab.positions import Geometry
from ropelab.scalings import build
from tests.test_positions import method

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# the interpreter cannot multiply bf16 matrices: it takes their bits for integers
HALF = torch.float16 if INTERPRETED else torch.bfloat16
# largest error as a share of the largest number expected, or of 1
TOLERANCE = {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# several tiles at short T, of shapes that training does not have
SMALL = Launches(Launch(64, 32, 4, 1), Launch(32, 64, 4, 1), Launch(64, 32, 4, 1), Launch(32, 32, 4, 1))


def triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])


def kernels(check: Callable[..., None]) -> Any:
    """A check that launches the kernels."""
    skip = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.gpu(skip(check))


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: int | None) -> Tensor:
    """Query by query in fp64: q, k, v (B, H, T, D), bias (H, T) by distance or (H, T, T) -> (B, H, T, D)."""
    q, k, v, bias = (x.double() for x in (q, k, v, bias))
    out = []
    for i in range(q.shape[2]):
        seen = [j for j in range(i + 1) if window is None or i - j < window]
        scores = torch.einsum("bhd,bhjd->bhj", q[:, :, i], k[:, :, seen]) / math.sqrt(q.shape[-1])
        scores = scores + (bias[:, i, seen] if bias.dim() == 3 else bias[:, [i - j for j in seen]])
        out.append(torch.einsum("bhj,bhjd->bhd", scores.softmax(-1), v[:, :, seen]))
    return torch.stack(out, dim=2)


def check_against_the_loop(
    batch: int, heads: int, length: int, d_head: int, window: int | None, dtype: torch.dtype, *, seed: int = 0
) -> None:
    """Output and all gradients; q, k, v are views of one packed tensor, as the model's are."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, length, 3, heads, d_head, generator=generator).to(DEVICE, dtype).requires_grad_()
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # three of (B, H, T, D)
    vector = (3 * torch.randn(heads, length, generator=generator)).to(DEVICE).requires_grad_()
    given = vector
    if window is not None and seed % 2:  # as the model hands it over: the window alone says the same
        given = vector.masked_fill(torch.arange(length, device=DEVICE) >= window, -math.inf)
    weights = torch.randn(batch, heads, length, d_head, generator=generator).to(DEVICE)
    expected = plain(q, k, v, vector, window)
    out = attend_by_distance(q, k, v, given, window=window)
    assert out.dtype == dtype
    mine = torch.autograd.grad((out.float() * weights).sum(), (packed, vector))
    theirs = torch.autograd.grad((expected * weights).sum(), (packed, vector))
    close(out, expected, dtype)
    for got, want in zip(mine, theirs, strict=True):
        close(got, want, dtype)


def check_bands_against_the_loop(
    batch: int,
    heads: int,
    length: int,
    d_head: int,
    window: int | None,
    dtype: torch.dtype,
    *,
    first: int,
    seed: int = 0,
) -> None:
    """The same with a bias of every query and key, for the queries from `first` on."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, length, 3, heads, d_head, generator=generator).to(DEVICE, dtype).requires_grad_()
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # three of (B, H, T, D)
    full = (3 * torch.randn(heads, length, length, generator=generator)).to(DEVICE).requires_grad_()
    made = row_bands.make(by_query(full), first, length, device=DEVICE, again=bool(seed % 2))
    weights = torch.randn(batch, heads, length - first, d_head, generator=generator).to(DEVICE)
    expected = plain(q, k, v, full, window)[:, :, first:]
    out = attend_by_query(q[:, :, first:], k, v, made, window=window)
    assert out.dtype == dtype
    mine = torch.autograd.grad((out.float() * weights).sum(), (packed, full))
    theirs = torch.autograd.grad((expected * weights).sum(), (packed, full))
    close(out, expected, dtype)
    for got, want in zip(mine, theirs, strict=True):
        close(got, want, dtype)


def check_decays_against_the_loop(
    batch: int, heads: int, length: int, d_head: int, window: int | None, dtype: torch.dtype, *, seed: int = 0
) -> None:
    """The same with decays, on top of a total that fp32 could not hold: steps of 1 after 1e5 of a text."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, length, 3, heads, d_head, generator=generator).to(DEVICE, dtype).requires_grad_()
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # three of (B, H, T, D)
    steps, gain = torch.rand(2, batch, heads, length, generator=generator).to(DEVICE).requires_grad_().unbind(0)
    leaves = (packed, steps, gain) if seed % 2 else (packed, steps)
    weights = torch.randn(batch, heads, length, d_head, generator=generator).to(DEVICE)
    total = 1e5 + steps.double().cumsum(-1)
    factor = gain.double()[..., None] if seed % 2 else 1
    fallen = total[..., None] - total[..., None, :]  # (B, H, T, T)
    # a sequence at a time, since each has a bias of its own
    expected = torch.cat([plain(*(x[b, None] for x in (q, k, v)), -(factor * fallen)[b], window) for b in range(batch)])
    out = attend_with_decays(q, k, v, total, gain if seed % 2 else None, window=window)
    assert out.dtype == dtype
    mine = torch.autograd.grad((out.float() * weights).sum(), leaves, retain_graph=True)
    theirs = torch.autograd.grad((expected * weights).sum(), leaves)
    close(out, expected, dtype)
    for got, want in zip(mine, theirs, strict=True):
        close(got, want, dtype)


def by_query(full: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A bias (H, T, T) as an encoding says it."""

    def bias(query: Tensor, distance: Tensor) -> Tensor:
        return full[:, query.long(), (query - distance).long()]  # (H, Q, K)

    return bias


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    largest = max(1.0, want.abs().max().item())
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=TOLERANCE[dtype] * largest)


@kernels
@pytest.mark.parametrize("seed", range(10))
def test_output_and_gradients_equal_the_plain_loop(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random shapes; lengths that no block divides, head dimensions that are no power of two, windows, groups."""
    rng = random.Random(seed)
    monkeypatch.setattr(triton_kernels, "PROGRAMS", rng.choice([1, 8, 1024]))
    monkeypatch.setattr(triton_kernels, "LAUNCHES", dict.fromkeys(triton_kernels.LAUNCHES, SMALL))
    check_against_the_loop(
        rng.randint(1, 3),
        rng.randint(1, 3),
        rng.randint(1, 150),
        rng.choice([8, 16, 24, 32, 64]),
        rng.choice([None, 1, 5, 64, 200]),
        rng.choice([torch.float32, HALF]),
        seed=seed,
    )


@kernels
@pytest.mark.parametrize("seed", range(5))
def test_a_bias_by_query_equals_the_plain_loop(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random shapes; bands that end within a tile and within a block of queries, queries that begin late, windows."""
    rng = random.Random(seed)
    monkeypatch.setattr(row_bands, "BAND", rng.choice([32, 48, 64]))
    monkeypatch.setattr(triton_kernels, "LAUNCHES", dict.fromkeys(triton_kernels.LAUNCHES, SMALL))
    length = rng.randint(1, 130)
    check_bands_against_the_loop(
        rng.randint(1, 3),
        rng.randint(1, 3),
        length,
        rng.choice([8, 16, 24, 32, 64]),
        rng.choice([None, None, 1, 5, 64]),
        rng.choice([torch.float32, HALF]),
        first=rng.choice([0, 0, length // 3 // 16 * 16, (length - 1) // 16 * 16]),
        seed=seed,
    )


@kernels
@pytest.mark.parametrize("seed", range(4))
def test_decays_equal_the_plain_loop(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random shapes, with and without gains and windows; a single token among them."""
    rng = random.Random(seed)
    monkeypatch.setattr(triton_kernels, "LAUNCHES", dict.fromkeys(triton_kernels.LAUNCHES, SMALL))
    check_decays_against_the_loop(
        rng.randint(1, 2),
        rng.randint(1, 3),
        1 if seed == 1 else rng.randint(2, 130),
        rng.choice([8, 16, 24, 64]),
        rng.choice([None, None, 1, 5, 64]),
        rng.choice([torch.float32, HALF]),
        seed=seed,
    )


@kernels
def test_a_window_ends_where_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows around those whose last query or key is the first of a tile."""
    monkeypatch.setattr(triton_kernels, "LAUNCHES", dict.fromkeys(triton_kernels.LAUNCHES, SMALL))
    for window in (2, 33, 34, 35):
        check_against_the_loop(1, 1, 100, 16, window, torch.float32)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    ("length", "d_head", "window"), [(1, 16, None), (128, 64, None), (150, 64, 70), (140, 80, None), (130, 256, 9)]
)
def test_the_blocks_of_training_equal_the_plain_loop(
    length: int, d_head: int, window: int | None, dtype: torch.dtype
) -> None:
    check_against_the_loop(2, 1, length, d_head, window, dtype)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("length", "d_head"), [(1, 16), (130, 64), (60, 80), (40, 256)])
def test_the_blocks_of_training_equal_the_plain_loop_with_a_bias_by_query(
    length: int, d_head: int, dtype: torch.dtype
) -> None:
    check_bands_against_the_loop(1, 1, length, d_head, None, dtype, first=0)


@kernels
@pytest.mark.parametrize("kind", ["by distance", "by query", "decays"])
def test_gradients_of_a_bias_are_equal_bit_by_bit(kind: str) -> None:
    """Of any number of runs, and so is everything else: a run with a learned bias can be resumed exactly."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 130, 16, generator=generator).to(DEVICE, HALF).requires_grad_() for _ in range(3))
    attended: Callable[..., Tensor]
    attended, *shape = {
        "by distance": (attend_by_distance, 2, 130),
        "by query": (attend_by_query, 2, row_bands.numel(0, 130)),
        "decays": (functools.partial(attend_with_decays, gate=None), 3, 2, 130),
    }[kind]
    bias = torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()
    runs = []
    for _ in range(2 if INTERPRETED else 10):
        out = attended(q, k, v, bias, window=None)
        runs.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v, bias))))
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))


@kernels
@pytest.mark.parametrize(("pos", "shared"), [("fire", True), ("fire", False), ("cable", False), ("fox", False)])
def test_a_training_step_equals_the_plain_one(pos: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of all weights. FIRE's bias is made once for all layers, or by each by blocks of queries."""
    config = ModelConfig("test", n_layer=2, d_model=32, n_head=2, qk_norm=False)
    chosen = method("pos", pos, **({"threshold": 20} if pos == "fire" else {}))
    encoding = build(chosen, Method("none", {}), Geometry(32, 2, 40, 2))
    model = GPT(config, 50, encoding, seed=0).to(DEVICE)
    tokens = torch.randint(0, 49, (1, 41), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def step(kernel: str) -> list[Tensor]:
        monkeypatch.setattr(select, "choose_kernel", lambda request: select.kernel_named(kernel, request))
        loss = model.nll(model(tokens[:, :-1]), tokens[:, 1:]).mean()
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    monkeypatch.setattr(row_bands, "BAND", 16)
    monkeypatch.setattr(kernels_of_triton, "SHARED", 40 if shared else 39)
    monkeypatch.setattr(kernels_of_triton, "HELD", 16 * 2 * 40)  # blocks of one band
    expected = step("materialised")
    made = []
    make = row_bands.make
    monkeypatch.setattr(row_bands, "make", lambda *args, **options: made.append(args[1:]) or make(*args, **options))
    for got, want in zip(step("triton"), expected, strict=True):
        # rounding is left of the gradient of the network's last bias, which changes nothing
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-8 + 1e-5 * want.abs().max().item())
    blocks = [(0, 16), (16, 32), (32, 40)] if pos == "fire" else []
    assert made == [(0, 40)] if shared else made[:6] == 2 * blocks  # and each again in the backward pass


@kernels
def test_a_bias_that_is_not_learned_costs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "_diagonals_kernel", None)
    q = torch.randn(1, 2, 20, 16, device=DEVICE, requires_grad=True)
    vector = torch.randn(2, 20, device=DEVICE)
    attend_by_distance(q, q.detach(), q.detach(), vector, window=None).sum().backward()
    assert q.grad is not None
    assert vector.grad is None


@kernels
def test_heads_may_share_a_bias_and_distances_may_lie_apart() -> None:
    """An expanded row, its gradient summed over the heads; the transpose of a table; an expanded gradient."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 40, 16, generator=generator).to(DEVICE) for _ in range(3))
    row = torch.randn(1, 40, generator=generator).to(DEVICE).requires_grad_()
    table = torch.randn(40, 3, generator=generator).to(DEVICE).requires_grad_()
    for leaf, vector in ((row, row.expand(3, -1)), (table, table.T)):
        expected = plain(q, k, v, vector, None)
        out = attend_by_distance(q, k, v, vector, window=None)
        close(out, expected, torch.float32)
        got, want = (torch.autograd.grad(x.sum(), leaf)[0] for x in (out, expected))
        close(got, want, torch.float32)


@kernels
def test_a_bias_is_added_in_fp32_to_scores_of_less() -> None:
    """Biases of 1000 and 1000.2, which are one in bf16 and in fp16: weights of 0.55 and 0.45, not two halves."""
    q, k = torch.zeros(2, 1, 1, 2, 16, dtype=HALF, device=DEVICE).unbind(0)
    v = torch.eye(2, 16, dtype=HALF, device=DEVICE)[None, None]
    vector = torch.tensor([[1000.0, 1000.2]], device=DEVICE)
    out = attend_by_distance(q, k, v, vector, window=None)
    assert out[0, 0, 1, 0].item() == pytest.approx(1 / (1 + math.exp(-0.2)), abs=3e-3)


@kernels
def test_steep_biases_neither_overflow_nor_vanish() -> None:
    """-1000 a token and all of 1e4: each query attends to itself, and gradients are finite."""
    q = torch.randn(1, 1, 70, 16, device=DEVICE, requires_grad=True)
    for vector in (-1000.0 * torch.arange(70.0), 1e4 - 1000.0 * torch.arange(70.0)):
        vector = vector[None].to(DEVICE).requires_grad_()
        out = attend_by_distance(q, q, q, vector, window=None)
        torch.testing.assert_close(out, q)
        gradients = torch.autograd.grad(out.sum(), (q, vector))
        assert all(gradient.isfinite().all() for gradient in gradients)


@kernels
def test_compilation_keeps_one_graph_and_the_numbers() -> None:
    """torch's own checks of an operator, and a compiled function without a break."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 16, generator=generator).to(DEVICE).requires_grad_() for _ in range(3))
    vector = torch.randn(2, 40, generator=generator).to(DEVICE).requires_grad_()
    in_bands = torch.randn(2, row_bands.numel(0, 40), generator=generator).to(DEVICE).requires_grad_()
    for bias, band, cases in ((vector, 0, (True, False)), (in_bands, row_bands.BAND, (True,))):
        torch.library.opcheck(triton_kernels._attend, (q, k, v, bias, 30, band))
        out, lse = (x.detach() for x in triton_kernels._attend(q, k, v, bias, 30, band))
        inputs = tuple(x.detach() for x in (q, q, k, v, bias, out, lse))
        for learned in cases:
            torch.library.opcheck(triton_kernels._backward, (*inputs, 30, band, learned))

    def loss(q: Tensor, vector: Tensor) -> Tensor:
        return attend_by_distance(2 * q, k, v, vector.exp(), window=30).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    eager = torch.autograd.grad(loss(q, vector), (q, vector))
    for got, want in zip(torch.autograd.grad(compiled(q, vector), (q, vector)), eager, strict=True):
        assert torch.equal(got, want)


@pytest.mark.integration
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.skipif(triton_version() < (3, 7), reason="the interpreter of Triton 3.6 breaks on NumPy 2.4")
@pytest.mark.parametrize("which", ["[0]", pytest.param("", marks=pytest.mark.slow)])
def test_the_checks_hold_in_the_interpreter(which: str) -> None:
    """The first checks of each kernel, or all of them, in another Python: none may fail, and none may be skipped."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", which, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"^\d+ passed, \d+ deselected", ran.stdout, re.MULTILINE), ran.stdout


class Target:
    """Stands in for the driver of a GPU that is not there: enough to compile for it."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for the GPU that is here")
@pytest.mark.parametrize(("arch", "shared"), [(80, 99), (90, 227)])
def test_kernels_compile_for_gpus_and_once_for_all_lengths(
    arch: int, shared: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Down to machine code, in bf16 at D = 64, within `shared` KB of shared memory; sm_80's code fits sm_86 too."""
    from triton.runtime import JITFunction
    from triton.runtime.driver import driver

    compiled = []

    def compile_only(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: compiled.append(kernel.warmup(*args, grid=grid, **options))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "__getitem__", compile_only)
    monkeypatch.setattr(driver, "_active", Target(arch))
    for batch, length, window in [(2, 1024, None), (3, 77, 5), (1, 1, None), (1, 4096, 1024)]:
        packed = torch.zeros(batch, length, 3, 4, 64, dtype=torch.bfloat16, requires_grad=True)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # three of (B, H, T, D)
        vector = torch.zeros(1, length, requires_grad=True).expand(4, -1)
        due = torch.zeros(batch, length, 4, 64, dtype=torch.bfloat16).transpose(1, 2)
        attend_by_distance(q, k, v, vector, window=window).backward(due)
        bias = torch.zeros(4, row_bands.numel(0, length), requires_grad=True)
        attend_by_query(q, k, v, bias, window=window).backward(due)
        total = torch.zeros(batch, 4, length, dtype=torch.float64, requires_grad=True)
        attend_with_decays(q, k, v, total, None, window=window).backward(due)
    assert len(compiled) == (4 + 4 + 3) * 4
    different = {id(kernel): kernel for kernel in compiled}.values()
    assert len(different) == 4 + 4 + 3
    for kernel in different:
        assert len(kernel.asm["cubin"]) > 0
        assert kernel.metadata.shared <= 1024 * shared


def test_head_dimensions_past_the_table_are_refused() -> None:
    with pytest.raises(ValueError, match="up to 256, not 257"):
        attend_by_distance(*torch.zeros(3, 1, 1, 4, 257).unbind(0), torch.zeros(1, 4), window=None)
