"""The loop against literal formulas: schedule, decay groups, loss, update, accumulation, precision, compilation."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from ropelab import experiment
from ropelab.experiment.session import compiles
from ropelab.model import GPT
from ropelab.positions import Geometry, build
from ropelab.schema import Method, ModelConfig, TrainConfig
from ropelab.training import (
    NonFiniteLossError,
    Step,
    build_optimizer,
    lr_at,
    matmul_precision,
    optimizer_tensors,
    resolve_dtype,
    steps,
    validation_nll,
)
from tests.lab import tiny
from tests.test_positions import method

VOCAB, CTX, SEPARATOR = 12, 16, 11
Windows = NDArray[np.int64]


def recipe(**changes: object) -> TrainConfig:
    plain = TrainConfig(
        ctx=CTX, batch_size=4, micro_batch_size=None, steps=100, lr=1e-2, final_lr=0.1, warmup_steps=0,
        weight_decay=0.1, grad_clip=1.0, dtype="fp32", compile=False, activation_checkpointing=False,
        deterministic=False, eval_every=10, checkpoint_every=10, keep=(),
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def gpt(pos: str = "rope", *, qk_norm: bool = False) -> GPT:
    shape = ModelConfig("test", n_layer=1, d_model=16, n_head=2, qk_norm=qk_norm)
    return GPT(shape, VOCAB, build(method("pos", pos), Method("none", {}), Geometry(16, 2, CTX)), seed=0)


def windows(n: int = 4, *, seed: int = 0) -> Windows:
    """Random tokens (n, ctx + 1); the separator is spread unevenly: row i has 4 i of them."""
    draw = np.random.default_rng(seed)
    batch = draw.integers(0, SEPARATOR, (n, CTX + 1))
    for row in range(n):
        batch[row, draw.choice(CTX + 1, min(4 * row, CTX - 2), replace=False)] = SEPARATOR
    return batch.astype(np.int64)


def literal_losses(model: GPT, batch: Windows) -> list[Tensor]:
    """-log softmax over the real tokens, target by target, in double; none where the separator is due."""
    hidden = model(torch.from_numpy(batch[:, :-1])).double()
    table = model.tokens.weight.double()
    losses = []
    for row in range(len(batch)):
        for place in range(CTX):
            target = int(batch[row, place + 1])
            if target == SEPARATOR:
                continue
            scores = torch.stack([hidden[row, place] @ table[token] for token in range(VOCAB - 1)])
            losses.append(scores.exp().sum().log() - scores[target])
    return losses


# --- schedule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # no warm-up, 4 steps: progress 1/4, 1/2, 3/4, 1 of a cosine from 1 to 0.1
        ({"steps": 4, "warmup_steps": 0}, {1: 0.8681980515, 2: 0.55, 3: 0.2318019485, 4: 0.1}),
        # 5% of 100 steps by default: a fifth more at each of 5, then the cosine over the other 95
        ({"steps": 100, "warmup_steps": None}, {1: 0.2, 2: 0.4, 5: 1.0, 6: 0.9997539650, 100: 0.1}),
        ({"steps": 7, "warmup_steps": 5}, {5: 1.0, 6: 0.55, 7: 0.1}),
        ({"steps": 4, "warmup_steps": 4}, {1: 0.25, 3: 0.75, 4: 1.0}),
        ({"steps": 2, "warmup_steps": 0, "final_lr": 1.0}, {1: 1.0, 2: 1.0}),
        ({"steps": 2, "warmup_steps": 0, "final_lr": 0.0}, {1: 0.5, 2: 0.0}),
        ({"steps": 1, "warmup_steps": None}, {1: 0.1}),
    ],
)
def test_the_learning_rate_is_as_computed_by_hand(changes: dict[str, object], expected: dict[int, float]) -> None:
    """Loshchilov and Hutter 2017 (1608.03983), equation 5, without restarts."""
    config = recipe(lr=3.0, **changes)
    assert {step: lr_at(step, config) for step in expected} == pytest.approx({k: 3 * v for k, v in expected.items()})


# --- which parameters decay -----------------------------------------------------------------------------------------

BLOCK = {f"blocks.0.{name}.weight" for name in ("qkv", "attention_out", "mlp_in", "mlp_out")}
NORMS = {"blocks.0.norm_attention.weight", "blocks.0.norm_mlp.weight", "norm_out.weight"}


@pytest.mark.parametrize(
    ("pos", "positional"),
    [("rope", set()), ("learned", {"encoding.table"}), ("sinusoidal", {"encoding.scale"}), ("alibi", set())],
)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_positional_parameters_norms_and_scalars_do_not_decay(pos: str, positional: set[str], qk_norm: bool) -> None:
    model = gpt(pos, qk_norm=qk_norm)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        group["weight_decay"]: {names[id(parameter)] for parameter in group["params"]}
        for group in build_optimizer(model, recipe(weight_decay=0.3)).param_groups
    }
    gains = {f"blocks.0.norm_{x}.weight" for x in "qk"} if qk_norm else set()
    assert groups == {0.3: {"tokens.weight", *BLOCK}, 0.0: NORMS | positional | gains}


# --- the update -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.05, None])
@pytest.mark.parametrize("pos", ["rope", "learned", "sinusoidal"])
def test_steps_are_adamw_with_clipping_as_published(pos: str, clip: float | None) -> None:
    """Three steps against Loshchilov and Hutter 2019 (1711.05101), algorithm 2, written out in fp64."""
    config = recipe(steps=3, grad_clip=clip, warmup_steps=1, weight_decay=2.0)
    model, plain = gpt(pos), gpt(pos)
    undecayed = {name for name, p in plain.named_parameters() if p.dim() < 2 or name == "encoding.table"}
    values = {name: p.detach().double() for name, p in plain.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in values.items()}
    second = {name: torch.zeros_like(value) for name, value in values.items()}
    done = list(
        steps(
            model, build_optimizer(model, config), lambda step: windows(seed=step), config, start=0, dtype=torch.float32
        )
    )
    for t in (1, 2, 3):
        with torch.no_grad():
            for name, p in plain.named_parameters():
                p.copy_(values[name])
        losses = literal_losses(plain, windows(seed=t))
        loss = torch.stack(losses).mean()
        grads = dict(zip(values, torch.autograd.grad(loss, list(plain.parameters())), strict=True))
        norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values()))
        assert done[t - 1].loss == pytest.approx(float(loss.detach()), rel=1e-6)
        assert done[t - 1].grad_norm == pytest.approx(norm, rel=1e-5)
        lr = 1e-2 * {1: 1.0, 2: 0.55, 3: 0.1}[t]
        assert done[t - 1].lr == pytest.approx(lr)
        for name, grad in grads.items():
            g = grad.double() * (1 if clip is None else min(1.0, clip / norm))
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            corrected = (first[name] / (1 - 0.9**t)) / ((second[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            decay = 0.0 if name in undecayed else 2.0
            values[name] = values[name] - lr * corrected - lr * decay * values[name]
    assert clip is None or done[0].grad_norm > clip  # else nothing was clipped
    for name, p in model.named_parameters():
        assert torch.allclose(p.double(), values[name], atol=2e-5, rtol=0), name


def gradients(micro: int, batch: Windows) -> tuple[Step, dict[str, Tensor]]:
    """The loss and the gradients of one step in micro-batches."""
    config = recipe(steps=1, micro_batch_size=micro, batch_size=len(batch), grad_clip=None)
    model = gpt("learned")
    optimizer = build_optimizer(model, config)
    caught: dict[str, Tensor] = {}

    def copy(*_: object) -> None:
        caught.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(copy)
    (done,) = steps(model, optimizer, lambda step: batch, config, start=0, dtype=torch.float32)
    return done, caught


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulated_gradients_are_those_of_the_whole_batch(micro: int) -> None:
    """Also when one micro-batch has few targets: a mean of the micro-batches' means would weigh them too much."""
    batch = windows(4)
    counts = (batch[:, 1:] != SEPARATOR).sum(1)
    assert len(set(counts.tolist())) == 4
    whole, together = gradients(4, batch)
    parts, accumulated = gradients(micro, batch)
    assert parts.loss == pytest.approx(whole.loss, abs=1e-6)
    assert together.keys() == accumulated.keys() == dict(gpt("learned").named_parameters()).keys()
    for name, grad in together.items():
        assert torch.allclose(accumulated[name], grad, atol=1e-6, rtol=0), name
    per_row = [torch.stack(literal_losses(gpt("learned"), batch[row : row + 1])).mean() for row in range(4)]
    assert abs(float(torch.stack(per_row).mean().detach()) - whole.loss) > 1e-4  # the two means do differ here


def test_the_separator_is_neither_scored_nor_predicted() -> None:
    batch = windows(4)
    expected = float(torch.stack(literal_losses(gpt(), batch)).mean().detach())
    config = recipe(steps=1)
    model = gpt()
    (done,) = steps(model, build_optimizer(model, config), lambda step: batch, config, start=0, dtype=torch.float32)
    assert done.loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_validation_is_the_mean_over_all_targets(batch_size: int) -> None:
    model = gpt("alibi").eval()
    with torch.no_grad():
        expected = float(torch.stack(literal_losses(model, windows(4))).mean())
    assert validation_nll(model, windows(4), dtype=torch.float32, batch=batch_size) == pytest.approx(expected, rel=1e-6)


def test_a_non_finite_loss_leaves_weights_and_moments_as_they_were() -> None:
    config = recipe(steps=3)
    model = gpt("learned")
    optimizer = build_optimizer(model, config)
    trained = steps(model, optimizer, lambda step: windows(seed=step), config, start=0, dtype=torch.float32)
    next(trained)
    with torch.no_grad():
        model.norm_out.weight[3] = math.nan
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {name: value.clone() for name, value in optimizer_tensors(model, optimizer).items()}
    with pytest.raises(NonFiniteLossError, match="the loss became nan at step 2") as caught:
        next(trained)
    assert caught.value.step == 2
    assert all(torch.equal(value.nan_to_num(7), weights[n].nan_to_num(7)) for n, value in model.state_dict().items())
    assert all(torch.equal(value, moments[n]) for n, value in optimizer_tensors(model, optimizer).items())


def test_a_non_finite_gradient_of_a_finite_loss_is_not_applied() -> None:
    config = recipe(steps=1)
    model = gpt()
    model.norm_out.weight.register_hook(lambda grad: grad * math.inf)  # type: ignore[no-untyped-call]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NonFiniteLossError, match=r"the norm of the gradient became (nan|inf) at step 1"):
        list(steps(model, build_optimizer(model, config), lambda step: windows(), config, start=0, dtype=torch.float32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bad", [None, 4])
def test_steps_read_late_are_the_same_steps(bad: int | None) -> None:
    """As on a GPU: losses are read every 5 steps and where the model is wanted; a bad step ends the training."""
    config = recipe(steps=13)

    def run(unread: int) -> tuple[list[Step], int | None, dict[str, torch.Tensor]]:
        model = gpt("learned")
        if bad is not None:  # the loss of this step is not finite, and those of later ones would be
            calls = 0

            def poison(module: torch.nn.Module, inputs: object, out: torch.Tensor) -> torch.Tensor:
                nonlocal calls
                calls += 1
                return out * math.inf if calls == bad else out

            model.norm_out.register_forward_hook(poison)
        done, broken = [], None
        try:
            for step in steps(
                model, build_optimizer(model, config), lambda step: windows(seed=step), config, start=0,
                dtype=torch.float32, settle_at=lambda step: step == 7, unread=unread,
            ):  # fmt: skip
                done.append(step)
        except NonFiniteLossError as error:
            broken = error.step
        return done, broken, model.state_dict()

    (late, late_bad, late_weights), (one, one_bad, one_weights) = run(5), run(1)
    assert late_bad == one_bad == bad
    assert [dataclasses.replace(step, settled=True) for step in late] == one
    assert all(torch.equal(value, one_weights[name]) for name, value in late_weights.items())
    assert all(step.settled for step in one)
    if bad is None:
        assert [step.step for step in late if step.settled] == [5, 7, 12, 13]
    else:
        assert [step.step for step in late] == [1, 2, 3]


@pytest.mark.parametrize("pos", ["rope", "t5", "fire", "cable"])
def test_activation_checkpointing_changes_no_bit(pos: str) -> None:
    found = []
    for again in (False, True):
        config = recipe(steps=2, activation_checkpointing=again)
        model = gpt(pos)
        forwards: list[object] = []
        model.blocks[0].mlp_in.register_forward_hook(lambda *_, seen=forwards: seen.append(None))
        done = list(
            steps(model, build_optimizer(model, config), lambda step: windows(seed=step), config, start=0,
                  dtype=torch.float32)
        )  # fmt: skip
        found.append((done, model.state_dict(), len(forwards)))
    (plain, plain_weights, once), (checkpointed, weights, twice) = found
    assert (once, twice) == (2, 4)  # computed again in each backward pass
    assert checkpointed == plain
    assert all(torch.equal(value, plain_weights[name]) for name, value in weights.items())


# --- precision and compilation --------------------------------------------------------------------------------------


def test_bf16_trains_on_the_cpu_with_weights_in_fp32() -> None:
    """A text that repeats itself, learnt in 60 steps: far below the loss of a guess, ln 11 = 2.40."""
    repeating = np.stack([(np.arange(CTX + 1) + row) % 5 for row in range(4)]).astype(np.int64)
    config = recipe(steps=60, weight_decay=0.0)
    model = gpt()
    done = list(
        steps(model, build_optimizer(model, config), lambda _: repeating, config, start=0, dtype=torch.bfloat16)
    )
    assert done[0].loss > 2.2
    assert done[-1].loss < 0.5
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    exact = gpt()
    (first, *_) = steps(
        exact, build_optimizer(exact, config), lambda _: repeating, config, start=0, dtype=torch.float32
    )
    assert done[0].loss != first.loss  # it was computed in bf16
    assert done[0].loss == pytest.approx(first.loss, abs=0.02)


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
)
def test_auto_is_bf16_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_dtype("auto", torch.device("cpu")) == expected


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_auto_is_bf16_on_cuda_from_capability_8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", torch.device("cuda")) == expected


def test_a_dtype_that_is_given_is_the_one_that_is_used() -> None:
    for device in ("cpu", "cuda", "mps"):
        assert resolve_dtype("fp32", torch.device(device)) == torch.float32
        assert resolve_dtype("bf16", torch.device(device)) == torch.bfloat16
    assert resolve_dtype("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize(
    ("device", "capability", "amx", "width", "expected"),
    [
        ("cpu", "AVX512", False, 192, "medium"),
        ("cpu", "AVX512", False, 128, "highest"),
        ("cpu", "AVX512", True, 512, "highest"),  # there it would be bf16
        ("cpu", "AVX2", False, 512, "highest"),
        ("cuda", "AVX512", False, 512, "highest"),  # there it would be TF32
        ("mps", "DEFAULT", False, 512, "highest"),
    ],
)
def test_the_matmul_path_is_a_fixed_rule(
    device: str, capability: str, amx: bool, width: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert matmul_precision(torch.device(device), width) == expected


def test_blocks_are_compiled_on_cuda_unless_it_is_said() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [compiles(recipe(compile=said), device) for said in (None, True, False) for device in (cpu, cuda)] == [
        False, True, True, True, False, False,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # two of torch's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_compiled_blocks_train_the_same_model(home: Path, tmp_path: Path) -> None:
    found = []
    for compiled in ("false", "true"):
        folder = tmp_path / compiled
        result = experiment.train(tiny(home, folder, f"train.compile={compiled}", "train.eval_every=8"))
        run = Path(result["run_dir"])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        names = []
        for file in sorted((run / "checkpoints").rglob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                names += list(opened.keys())
        found.append(([line["loss"] for line in lines], result["val_nll"], names))
    (eager, eager_nll, eager_names), (losses, nll, names) = found
    assert losses == pytest.approx(eager, abs=1e-4)
    assert nll == pytest.approx(eager_nll, abs=1e-4)
    assert names == eager_names
