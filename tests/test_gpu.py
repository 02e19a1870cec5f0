"""On a CUDA device: the same numbers as on the CPU, and the kernels that only run there."""

from __future__ import annotations

import pytest
import torch

from ropelab import config, experiment
from ropelab.attention import Attend, Bias
from ropelab.model import GPT
from ropelab.positions import Geometry, build
from ropelab.training import resolve_dtype
from tests.test_attention import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("length", [1, 127, 128, 1000])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_equals_the_plain_loop(length: int, window: int | None, biased: bool) -> None:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, 4, length, 64, generator=generator).cuda().requires_grad_() for _ in range(3))
    bias = -torch.rand(4, length, generator=generator).cumsum(1).cuda() if biased else None
    out = Attend(length, bias=Bias(bias, window=window), device=q.device, training=False)(q, k, v)
    expected = reference(q, k, v, Bias(bias, window=window))
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-4)
    weights = torch.randn(out.shape, generator=generator).cuda()
    mine = torch.autograd.grad((out * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for got, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("pos", config.choices("pos"))
def test_a_model_says_the_same_on_both_devices(pos: str) -> None:
    resolved = config.load([f"pos={pos}"])
    geometry = Geometry(resolved.model.d_model, resolved.model.n_head, 128)
    model = GPT(resolved.model, 257, build(resolved.pos, resolved.scaling, geometry), seed=0).eval()
    tokens = torch.randint(0, 256, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        here = model.nll(model(tokens), tokens.roll(-1, 1))
        model._prepared = None
        there = model.cuda().nll(model(tokens.cuda()), tokens.roll(-1, 1).cuda()).cpu()
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)


def test_auto_is_cuda_and_bf16() -> None:
    device = experiment.resolve_device("auto")
    assert device.type == "cuda"
    assert resolve_dtype("auto", device) == torch.bfloat16
