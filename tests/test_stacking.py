"""Models trained in one stack against the same models trained alone: losses, weights, moments, failures, files."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from ropelab.config import Method, ModelConfig, TrainConfig
from ropelab.errors import NonFiniteLossError
from ropelab.model import GPT
from ropelab.positions import Geometry
from ropelab.scalings import build
from ropelab.training import Step, build_optimizer, load_optimizer_tensors, steps
from ropelab.training.batched import check_stackable, stack, stacked_steps
from ropelab.training.batched import steps as stack_steps
from ropelab.training.batched.steps import At
from ropelab.training.loop import validation_nll
from ropelab.training.optimizer import optimizer_tensors
from tests.test_positions import method
from tests.test_training import CTX, SEPARATOR, VOCAB, Windows, literal_losses, recipe, windows

pytestmark = pytest.mark.integration

NONE = Method("none", {})
Entry = Step | NonFiniteLossError
# 20 steps: at this rate the two orders of summation stay 1e-6 apart; at ten times it AdamW makes noise of noise
RECIPE = recipe(steps=20, lr=1e-3, warmup_steps=3, weight_decay=1.0, grad_clip=0.5)


def gpt(pos: str, seed: int, *, scaling: Method = NONE, qk_norm: bool = False, **changes: object) -> GPT:
    shape = ModelConfig("test", n_layer=2, d_model=16, n_head=2, qk_norm=qk_norm)
    model = GPT(shape, VOCAB, build(method("pos", pos, **changes), scaling, Geometry(16, 2, CTX, 2)), seed=seed)
    with torch.no_grad():  # large enough that attention is far from uniform, and positions matter
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and not name.startswith("encoding."):
                parameter.mul_(8)
    return model


def gpts(names: Sequence[str], *, qk_norm: bool = False) -> list[GPT]:
    """One model of each name, with seeds 0, 1, 2, ..."""
    return [gpt(name, seed, qk_norm=qk_norm) for seed, name in enumerate(names)]


def batches(seed: int) -> At:
    return lambda step: windows(seed=1000 * seed + step)


def places(seed: int) -> At:
    """Positions of 4 sequences, (4, CTX): others in each, growing."""

    def at(step: int) -> Windows:
        draw = np.random.default_rng([seed, step])
        return np.sort(np.stack([draw.choice(64, CTX, replace=False) for _ in range(4)])).astype(np.int64)

    return at


class Trained:
    """Models after a training, with their optimizers and all that was yielded for each."""

    def __init__(self, models: Sequence[GPT], config: TrainConfig) -> None:
        self.models = list(models)
        self.optimizers = [build_optimizer(model, config) for model in models]
        self.entries: list[list[Entry]] = [[] for _ in models]

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Weights and the optimizer's state of a model."""
        return {**self.models[index].state_dict(), **optimizer_tensors(self.models[index], self.optimizers[index])}

    def copy(self, index: int) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.tensors(index).items()}


def alone(
    models: Sequence[GPT], config: TrainConfig = RECIPE, *, at: Callable[[int], At] = batches,
    places_at: Callable[[int], At] | None = None, into: Trained | None = None, start: int = 0,
) -> Trained:  # fmt: skip
    """Each model trained by `training.steps`; a NonFiniteLossError stands in place of the step that raised it."""
    trained = into or Trained(models, config)
    for index, (model, optimizer) in enumerate(zip(trained.models, trained.optimizers, strict=True)):
        positions_at = None if places_at is None else places_at(index)
        try:
            for step in steps(
                model, optimizer, at(index), config, start=start, dtype=torch.float32, positions_at=positions_at
            ):
                trained.entries[index].append(step)
        except NonFiniteLossError as error:
            trained.entries[index].append(error)
    return trained


def stacked(
    models: Sequence[GPT], config: TrainConfig = RECIPE, *, at: Callable[[int], At] = batches,
    places_at: Callable[[int], At] | None = None, into: Trained | None = None, start: int = 0,
    max_in_flight: int | None = None, dtype: torch.dtype = torch.float32, compiled: bool = False,
) -> Trained:  # fmt: skip
    trained = into or Trained(models, config)
    count = len(trained.models)
    for entries in stacked_steps(
        trained.models, trained.optimizers, [at(index) for index in range(count)], config, start=start, dtype=dtype,
        positions_at=None if places_at is None else [places_at(index) for index in range(count)],
        max_in_flight=max_in_flight, compiled=compiled,
    ):  # fmt: skip
        for of_one, entry in zip(trained.entries, entries, strict=True):
            of_one.append(entry)
    return trained


def assert_same(one: Trained, other: Trained) -> None:
    """Within the rounding of another order of summation."""
    for index in range(len(one.models)):
        assert len(one.entries[index]) == len(other.entries[index])
        for a, b in zip(one.entries[index], other.entries[index], strict=True):
            assert isinstance(a, Step)
            assert isinstance(b, Step)
            assert (a.step, a.lr, a.synced) == (b.step, b.lr, b.synced)
            assert a.loss == pytest.approx(b.loss, rel=1e-5)
            assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
        assert_close(one.tensors(index), other.tensors(index))


# FIRE's gradients that are 0, or next to it, in exact arithmetic (softmax does not see what all scores share): AdamW
# makes steps of their rounding
NOISE = {f"encoding.{name}" for name in ("output.bias", "hidden.bias", "threshold_factor")}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.shape == other[name].shape, name
        atol = 2e-3 if name in NOISE else 1e-5
        assert torch.allclose(value, other[name], rtol=1e-4, atol=atol), name


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# --- the same training ----------------------------------------------------------------------------------------------

SEEDS = ["rope", "none", "learned", "sinusoidal", "sinusoidal_qk", "alibi", "t5", "kerple_log", "fire", "xpos"]
MIXED = [
    ("rope", "none", "sinusoidal"),
    ("alibi", "none", "alibi"),
    ("alibi", "t5", "learned"),
    ("fire", "rope", "sinusoidal_fairseq"),
    ("drope", "rope", "sinusoidal_qk"),
]


@pytest.mark.parametrize("names", [(name,) * 3 for name in SEEDS] + MIXED, ids="-".join)
def test_a_stack_trains_each_model_as_alone(names: tuple[str, ...]) -> None:
    together, each = stacked(gpts(names)), alone(gpts(names))
    assert_same(together, each)
    norms = [[entry.grad_norm for entry in of_one if isinstance(entry, Step)] for of_one in each.entries]
    assert all(max(of_one) > 0.5 for of_one in norms)  # every model was clipped, each by its own norm
    assert len({of_one[0] for of_one in norms}) == 3
    for model, start in zip(together.models, gpts(names), strict=True):
        for name, parameter in model.named_parameters():
            assert not torch.equal(parameter, start.get_parameter(name)), name  # every tensor was trained


@pytest.mark.parametrize("names", [("rope", "rope"), ("t5", "learned")], ids="-".join)
def test_queries_and_keys_are_normalised_with_the_gains_of_each_model(names: tuple[str, ...]) -> None:
    def models() -> list[GPT]:
        found = gpts(names, qk_norm=True)
        with torch.no_grad():
            for index, model in enumerate(found):
                model.get_parameter("blocks.0.norm_q.weight").mul_(1 + index)
                model.get_parameter("blocks.1.norm_k.weight").mul_(2 + index)
        return found

    assert_same(stacked(models()), alone(models()))


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("names", [("learned", "t5", "none"), ("rope", "rope", "rope")], ids="-".join)
def test_gradients_are_accumulated_as_alone(names: tuple[str, ...], micro: int) -> None:
    config = replace(RECIPE, micro_batch_size=micro)
    assert_same(stacked(gpts(names), config), alone(gpts(names), config))


def test_without_a_limit_nothing_is_clipped() -> None:
    config = replace(RECIPE, grad_clip=None)
    assert_same(stacked(gpts(["rope", "learned"]), config), alone(gpts(["rope", "learned"]), config))


def test_sequences_may_have_positions_of_their_own() -> None:
    names = ["rope", "sinusoidal", "none", "sinusoidal_qk"]
    together, each = stacked(gpts(names), places_at=places), alone(gpts(names), places_at=places)
    assert_same(together, each)
    assert together.entries[0][-1] != alone(gpts(names)).entries[0][-1]


@pytest.mark.parametrize(
    ("pos", "scaling"),
    [
        ("none", Method("temperature", {"factor": 8.0, "a": 0.4})),
        ("rope", Method("linear", {"factor": 4.0})),
        ("alibi", Method("interpolated_slopes", {"factor": 4.0})),
    ],
)
def test_scaled_encodings_stack_with_unscaled_ones(pos: str, scaling: Method) -> None:
    def models() -> list[GPT]:
        return [gpt(pos, 0, scaling=scaling), gpt(pos, 0)]

    together = stacked(models())
    assert_same(together, alone(models()))
    # the scaling did something: with one batch and one start the two would be one model
    same_batch = stacked(models(), at=lambda _: batches(0))
    assert same_batch.entries[0] != same_batch.entries[1]


def test_blocks_of_one_length_stack() -> None:
    def models() -> list[GPT]:
        return [gpt(pos, 0, scaling=Method("block_causal", {"block": 3})) for pos in ("rope", "alibi")]

    assert_same(stacked(models()), alone(models()))


@pytest.mark.parametrize("pos", ["rope", "learned", "t5"])
def test_the_first_step_is_the_mean_loss_and_gradient_of_each_models_own_batch(pos: str) -> None:
    """Against a sum over targets of log-softmax, one by one in fp64, and torch.autograd.grad of it."""
    done = stacked(gpts([pos] * 2), replace(RECIPE, steps=1, warmup_steps=0))
    for index, model in enumerate(gpts([pos] * 2)):
        loss = torch.stack(literal_losses(model.train(), batches(index)(1))).mean()
        norm = math.sqrt(
            sum(float(g.double().square().sum()) for g in torch.autograd.grad(loss, [*model.parameters()]))
        )
        (step,) = done.entries[index]
        assert isinstance(step, Step)
        assert step.loss == pytest.approx(float(loss.detach()), rel=1e-6)
        assert step.grad_norm == pytest.approx(norm, rel=1e-5)


def test_blocks_computed_again_in_the_backward_pass_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    block = stack_steps.block_of_all

    def counted(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return block(*arguments)

    monkeypatch.setattr(stack_steps, "block_of_all", counted)
    plain = stacked(gpts(["t5"] * 2))
    once, calls = calls, 0
    again = stacked(gpts(["t5"] * 2), replace(RECIPE, activation_checkpointing=True))
    assert (once, calls) == (2 * 20, 2 * 2 * 20)  # two layers, 20 steps
    assert plain.entries == again.entries
    for index in range(2):
        assert_equal(plain.tensors(index), again.tensors(index))


def test_the_loss_of_a_few_rows_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stacked(gpts(["rope"] * 3))
    held: list[int] = []

    def few(device: torch.device, *, training: bool) -> int:
        held.append(5 * 3 * VOCAB)  # five targets of each of three models, of 64
        return held[-1]

    monkeypatch.setattr(stack, "logits_held", few)
    assert_same(stacked(gpts(["rope"] * 3)), whole)
    assert held


# --- weights and states between the steps and after -----------------------------------------------------------------


def test_a_model_can_be_evaluated_between_two_steps() -> None:
    names, held_out = ["sinusoidal", "rope", "t5"], windows(seed=9)
    together, each = Trained(gpts(names), RECIPE), Trained(gpts(names), RECIPE)
    in_stack = stacked_steps(
        together.models, together.optimizers, [batches(index) for index in range(3)], RECIPE, start=0,
        dtype=torch.float32,
    )  # fmt: skip
    one_by_one = [
        steps(each.models[index], each.optimizers[index], batches(index), RECIPE, start=0, dtype=torch.float32)
        for index in range(3)
    ]
    for taken, *_ in zip(in_stack, *one_by_one, strict=True):
        for entry, model, its in zip(taken, together.models, each.models, strict=True):
            assert isinstance(entry, Step)
            if entry.step % 6 == 0:
                found, expected = (
                    validation_nll(m.eval(), held_out, dtype=torch.float32, batch=4) for m in (model, its)
                )
                assert found == pytest.approx(expected, rel=1e-6)
                model.train()
                its.train()
    for index in range(3):
        assert_close(together.tensors(index), each.tensors(index))


NAMES = ["rope", "learned", "t5"]


def saved_at(step: int, *, closed: bool) -> list[bytes]:
    """Weights and optimizer states of a stack after a step, as files: before or after the iterator is closed."""
    trained = Trained(gpts(NAMES), RECIPE)
    running = stacked_steps(
        trained.models, trained.optimizers, [batches(index) for index in range(3)], RECIPE, start=0,
        dtype=torch.float32,
    )  # fmt: skip
    for _ in range(step):
        next(running)
    if closed:
        running.close()  # type: ignore[attr-defined]
    return [save(trained.tensors(index)) for index in range(3)]


def restored(files: Sequence[bytes]) -> Trained:
    trained = Trained([gpt(name, 77) for name in NAMES], RECIPE)
    for model, optimizer, content in zip(trained.models, trained.optimizers, files, strict=True):
        tensors = load(content)
        model.load_state_dict({name: value for name, value in tensors.items() if "/" not in name}, strict=True)
        load_optimizer_tensors(model, optimizer, {name: value for name, value in tensors.items() if "/" in name})
    return trained


@pytest.mark.parametrize("closed", [False, True])
def test_a_checkpoint_of_a_stack_goes_on_alone_and_in_a_stack(closed: bool) -> None:
    files = saved_at(8, closed=closed)
    whole = alone(gpts(NAMES))
    for go_on in (alone, stacked):
        second = go_on([], into=restored(files), start=8)
        for index in range(3):
            assert [entry.step for entry in second.entries[index] if isinstance(entry, Step)] == list(range(9, 21))
            whole_half = [entry.loss for entry in whole.entries[index][8:] if isinstance(entry, Step)]
            assert [e.loss for e in second.entries[index] if isinstance(e, Step)] == pytest.approx(whole_half, rel=1e-5)
            assert_close(second.tensors(index), whole.tensors(index))


def test_checkpoints_of_models_trained_alone_go_on_in_a_stack() -> None:
    first = Trained(gpts(NAMES), RECIPE)
    for index in range(3):
        running = steps(
            first.models[index], first.optimizers[index], batches(index), RECIPE, start=0, dtype=torch.float32
        )
        for _ in range(8):
            next(running)
    files = [save(first.tensors(index)) for index in range(3)]
    second, whole = stacked([], into=restored(files), start=8), alone(gpts(NAMES))
    for index in range(3):
        assert_close(second.tensors(index), whole.tensors(index))


def test_after_the_training_models_and_optimizers_share_nothing() -> None:
    trained = stacked(gpts(["rope", "sinusoidal", "rope"]), replace(RECIPE, steps=3))
    storages = [value.untyped_storage().data_ptr() for index in range(3) for value in trained.tensors(index).values()]
    assert len(set(storages)) == len(storages)
    for value in trained.tensors(0).values():
        assert value.untyped_storage().nbytes() == value.nbytes
    before = [trained.copy(index) for index in (1, 2)]
    # two more steps of one model alone
    config = replace(RECIPE, steps=5)
    list(steps(trained.models[0], trained.optimizers[0], batches(0), config, start=3, dtype=torch.float32))
    assert float(trained.tensors(0)["tokens.weight/step"]) == 5
    for index, copied in zip((1, 2), before, strict=True):
        assert float(trained.tensors(index)["tokens.weight/step"]) == 3
        assert_equal(trained.tensors(index), copied)


# --- what is not finite ---------------------------------------------------------------------------------------------


def without_targets(index: int, step: int) -> Callable[[int], At]:
    """`batches`, but one step of one model has no target at all: its mean loss is 0/0."""

    def of_model(model: int) -> At:
        def at(now: int) -> Windows:
            batch = batches(model)(now)
            return np.full_like(batch, SEPARATOR) if (model, now) == (index, step) else batch

        return at

    return of_model


@pytest.mark.parametrize("in_flight", [1, 4])
@pytest.mark.parametrize("step", [1, 6, 20])
@pytest.mark.parametrize("names", [("rope",) * 3, ("learned", "sinusoidal", "t5"), ("drope",) * 3], ids="-".join)
def test_a_model_that_fails_leaves_and_the_others_do_not_notice(
    names: tuple[str, ...], step: int, in_flight: int
) -> None:
    healthy = stacked(gpts(names))
    at = without_targets(1, step)
    together, each = stacked(gpts(names), at=at, max_in_flight=in_flight), alone(gpts(names), at=at)
    for index in (0, 2):
        losses, expected = (
            [entry.loss for entry in one.entries[index] if isinstance(entry, Step)] for one in (together, healthy)
        )
        if names[0] == "drope":  # the failed model keeps its rotation: the others are turned by 0, not left alone
            assert losses == pytest.approx(expected, rel=1e-5)
            assert_close(together.tensors(index), healthy.tensors(index))
        else:  # bit by bit
            assert losses == expected
            assert_equal(together.tensors(index), healthy.tensors(index))
    assert len(together.entries[1]) == 20
    for entry in together.entries[1][step - 1 :]:
        assert isinstance(entry, NonFiniteLossError)
        assert str(entry) == str(each.entries[1][-1])
        assert entry.step == step
    assert [entry.step for entry in together.entries[1][: step - 1] if isinstance(entry, Step)] == [*range(1, step)]
    # its weights and moments are those of the step before
    assert_close(together.tensors(1), each.tensors(1))
    assert float(together.tensors(1)["tokens.weight/step"]) == step - 1


@pytest.mark.parametrize("max_in_flight", [1, 5])
def test_a_step_is_synced_where_the_models_are_as_it_left_them(max_in_flight: int) -> None:
    trained = Trained(gpts(["rope", "none"]), replace(RECIPE, steps=12))
    at = without_targets(1, 7)
    synced = []
    for first, _ in stacked_steps(
        trained.models, trained.optimizers, [at(0), at(1)], replace(RECIPE, steps=12), start=0, dtype=torch.float32,
        sync_at=lambda step: step == 9, max_in_flight=max_in_flight,
    ):  # fmt: skip
        assert isinstance(first, Step)
        assert (float(trained.tensors(0)["tokens.weight/step"]) == first.step) == first.synced
        synced += [first.step] if first.synced else []
    # after 6 the stack waits until the failed model has left, then goes on from 7
    assert synced == (list(range(1, 13)) if max_in_flight == 1 else [5, 6, 9, 12])


def test_a_non_finite_gradient_of_a_finite_loss_is_not_applied() -> None:
    config = replace(RECIPE, steps=4)
    models, each = gpts(["sinusoidal"] * 3), alone(gpts(["sinusoidal"] * 3), config)
    scale = models[2].get_parameter("encoding.scale")
    scale.register_hook(lambda grad: grad * math.inf)  # type: ignore[no-untyped-call]
    start = {name: value.clone() for name, value in models[2].state_dict().items()}
    trained = stacked(models, config)
    assert_equal(dict(models[2].state_dict()), start)
    for entry in trained.entries[2]:
        assert isinstance(entry, NonFiniteLossError)
        assert str(entry).startswith("the norm of the gradient became inf at step 1;")
    for index in (0, 1):
        assert_close(trained.tensors(index), each.tensors(index))


def test_two_models_fail_in_turn_and_the_training_ends_with_the_last() -> None:
    def at(model: int) -> At:
        return without_targets(0, 3)(0) if model == 0 else without_targets(1, 5)(1)

    for max_in_flight in (1, 8):
        trained = stacked(gpts(["rope", "learned"]), at=at, max_in_flight=max_in_flight)
        kinds = [[type(entry) for entry in of_one] for of_one in trained.entries]
        assert kinds == [[Step] * 2 + [NonFiniteLossError] * 3, [Step] * 4 + [NonFiniteLossError]]
        assert [float(trained.tensors(index)["norm_out.weight/step"]) for index in (0, 1)] == [2, 4]


# --- what cannot be stacked -----------------------------------------------------------------------------------------


def shaped(n_vocab: int = VOCAB, **changes: object) -> GPT:
    shape = replace(ModelConfig("test", 2, 16, 2, False), **changes)  # type: ignore[arg-type]
    return GPT(shape, n_vocab, build(method("pos", "rope"), NONE, Geometry(shape.d_model, shape.n_head, CTX)), seed=0)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: shaped(n_layer=3), r"different model.n_layer \(2, 3\)"),
        (lambda: shaped(d_model=32), r"different model.d_model \(16, 32\)"),
        (lambda: shaped(n_head=4), r"different model.n_head \(2, 4\)"),
        (lambda: shaped(qk_norm=True), r"different model.qk_norm \(False, True\)"),
        (lambda: shaped(n_vocab=VOCAB + 1), r"different vocabulary \(12, 13\)"),
        (lambda: gpt("cable", 0), "Cable reads the text in every layer"),
        (lambda: gpt("fox", 0), "Fox reads the text in every layer"),
        (lambda: gpt("rope", 0, layout="interleaved"), "pair the dimensions of a head differently"),
        (lambda: gpt("rope", 0, fraction=0.5), "pair the dimensions of a head differently"),
        (lambda: gpt("rope", 0, scaling=Method("block_causal", {"block": 3})), "blocks of different lengths"),
        (
            lambda: gpt("rope", 0, scaling=Method("rerope", {"window": 4, "log_scaling": False})),
            "other scores for distant keys",
        ),
    ],
)
def test_what_cannot_be_stacked_is_refused_before_anything_is_changed(other: Callable[[], GPT], reason: str) -> None:
    models = [gpt("rope", 0), other()]
    with pytest.raises(ValueError, match=reason):
        check_stackable(models, CTX)
    trained = Trained(models, RECIPE)
    before = [trained.copy(index) for index in (0, 1)]
    with pytest.raises(ValueError, match=reason):
        stacked_steps(models, trained.optimizers, [batches(0), batches(1)], RECIPE, start=0, dtype=torch.float32)
    for index in (0, 1):
        assert_equal(trained.tensors(index), before[index])


def test_optimizers_at_different_steps_are_refused() -> None:
    trained = Trained(gpts(["rope", "rope"]), RECIPE)
    list(steps(trained.models[1], trained.optimizers[1], batches(1), recipe(steps=3), start=0, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"optimizers after \[0, 3\] steps"):
        stacked_steps(
            trained.models, trained.optimizers, [batches(0), batches(1)], RECIPE, start=0, dtype=torch.float32
        )


# --- precision and compilation --------------------------------------------------------------------------------------


def test_bf16_learns_with_weights_in_fp32() -> None:
    """A text that repeats itself, learnt in 60 steps: far below the loss of a guess, ln 11 = 2.40."""
    repeating = np.stack([(np.arange(CTX + 1) + row) % 5 for row in range(4)]).astype(np.int64)
    config = recipe(steps=60, weight_decay=0.0)
    coarse = stacked(gpts(["rope", "t5"]), config, at=lambda _: lambda step: repeating, dtype=torch.bfloat16)
    exact = stacked(gpts(["rope", "t5"]), replace(config, steps=1), at=lambda _: lambda step: repeating)
    for index in range(2):
        first, last, reference = coarse.entries[index][0], coarse.entries[index][-1], exact.entries[index][0]
        assert isinstance(first, Step)
        assert isinstance(last, Step)
        assert isinstance(reference, Step)
        assert first.loss == pytest.approx(reference.loss, rel=0.02)
        assert first.loss != reference.loss  # it was computed in bf16
        assert last.loss < 0.5
        assert {value.dtype for value in coarse.tensors(index).values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # two of torch's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_a_compiled_stack_trains_the_same_models() -> None:
    names = ["rope", "t5", "sinusoidal"]
    assert_same(stacked(gpts(names), compiled=True), stacked(gpts(names)))
