"""On a CUDA device: the same numbers as on the CPU, and the kernels that only run there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ropelab import config, devices
from ropelab.devices import resolve_dtype
from ropelab.model import GPT
from ropelab.positions import Geometry
from ropelab.scalings import build
from tests.test_attention import check_against_the_loop

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


PLAIN = {"length": 65, "rows": 64, "window": None, "bias": False, "by_query": False, "block": None, "decay": "none",
         "far": None, "scale": False, "cap": None, "training": False, "seed": 0}  # fmt: skip


@pytest.mark.parametrize("length", [1, 31, 65])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"bias": True},
        {"bias": True, "window": 20},
        {"by_query": True},
        {"block": 16},
        {"decay": "gained"},
        {"far": 24, "scale": True},
        {"cap": 2.0},
        {"bias": True, "decay": "plain", "block": 7},
    ],
)
def test_attention_equals_the_plain_loop(length: int, training: bool, kind: dict[str, Any]) -> None:
    case = {**PLAIN, **kind, "length": length, "training": training}
    check_against_the_loop(case, torch.device("cuda"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pos", config.choices("pos"))
def test_a_model_says_the_same_on_both_devices(pos: str) -> None:
    resolved = config.load([f"pos={pos}"])
    geometry = Geometry.of(resolved.model, 128)
    model = GPT(resolved.model, 257, build(resolved.pos, resolved.scaling, geometry), seed=0).eval()
    tokens = torch.randint(0, 256, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        here = model.nll(model(tokens), tokens.roll(-1, 1))
        model._prepared = None
        there = model.cuda().nll(model(tokens.cuda()), tokens.roll(-1, 1).cuda()).cpu()
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)


def test_auto_is_cuda_and_bf16() -> None:
    device = devices.resolve_device("auto")
    assert device.type == "cuda"
    assert resolve_dtype("auto", device) == torch.bfloat16
