"""The model in training: its weights and moments, and the arithmetic of its steps, new or from a checkpoint."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ropelab.devices import matmul_precision, resolve_dtype
from ropelab.distributed import SINGLE, Ranks, full_state_dict, parallel_of, wrap_ddp, wrap_fsdp
from ropelab.model import GPT
from ropelab.runs import build_model
from ropelab.training.compiling import training_kernel
from ropelab.training.loop import Loss, validation_nll
from ropelab.training.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors
from ropelab.training.plan import TrainPlan
from ropelab.training.resume import Stored


@dataclasses.dataclass
class TrainState:
    """A model in training, on its device or over the ranks. All ranks call the methods, at the same steps."""

    model: GPT
    loss: nn.Module  # `Loss` of the model, wrapped by DDP or FSDP where there are several ranks
    optimizer: torch.optim.AdamW
    parallel: str | None  # ddp | fsdp; None: one process
    dtype: torch.dtype
    precision: str  # for torch.set_float32_matmul_precision
    start: int  # the step that training resumed from, or 0
    step: int  # the last step that was taken
    best: float  # validation loss
    began: float = 0.0  # time.perf_counter() when the steps began

    def begin(self) -> None:
        """Called once, before the first step of this process."""
        torch.set_float32_matmul_precision(self.precision)
        self.step, self.began = self.start, time.perf_counter()

    def validate(self, plan: TrainPlan, ranks: Ranks) -> float:
        """The validation loss after the current step, in nats per token."""
        self.model.eval()
        self.model.set_training_fraction(self.step / plan.config.train.steps)
        nll = validation_nll(
            self.model, plan.windows.validation, dtype=self.dtype, batch=plan.micro, loss=self.loss, ranks=ranks
        )
        self.best = min(self.best, nll)
        self.model.train()
        return nll

    def weights(self) -> Mapping[str, Tensor]:
        """The model's tensors in full; of shards {} on ranks other than the first."""
        return self._in_full(self.model.state_dict())

    def moments(self) -> Mapping[str, Tensor]:
        """The optimizer's tensors, as `weights`."""
        return self._in_full(optimizer_tensors(self.model, self.optimizer))

    def _in_full(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return full_state_dict(tensors) if self.parallel == "fsdp" else tensors

    def attention_kernel(self, plan: TrainPlan) -> str:
        """The attention kernel of the training."""
        model, config = self.model, plan.config
        if self.parallel == "fsdp":  # shards can only be read in a pass; and one layer's kernel is that of all
            one_layer = dataclasses.replace(config, model=dataclasses.replace(config.model, n_layer=1))
            model = build_model(one_layer, 2, scaling=config.scaling, original_ctx=plan.original_ctx).to(plan.device)
        return training_kernel(model, config.train.ctx, self.dtype)


def new_model(plan: TrainPlan) -> GPT:
    """The model before any training, on the CPU. Made once of a plan: it takes the plan's encoding."""
    return GPT(plan.config.model, plan.corpus.tokenizer.n_vocab, plan.encoding, seed=plan.config.seed)


def restore(plan: TrainPlan, model: GPT, stored: Stored, ranks: Ranks = SINGLE) -> TrainState:
    """On all ranks: the state that a run's folder holds, in a model as `new_model` made it; else the start."""
    train, device, state = plan.config.train, plan.device, stored.state
    # a damaged manifest is made again from what the checkpoint says
    known = {**state, **stored.manifest}
    dtype = resolve_dtype(known.get("dtype", train.dtype), device)
    precision = known.get("matmul_precision") or matmul_precision(device, plan.config.model.d_model)
    threads = state.get("threads") or stored.manifest.get("environment", {}).get("threads")
    if threads and device.type == "cpu":  # sums over other numbers of threads are rounded otherwise
        torch.set_num_threads(threads)
    if plan.parent is not None:
        model.load_state_dict(plan.parent.weights, strict=True)
    if stored.model:
        model.load_state_dict(stored.model, strict=True)
    if state and ranks.world > 1:
        for tensor in model.state_dict().values():
            ranks.broadcast(tensor)
    loss, parallel = _place(plan, model, dtype, ranks)
    optimizer = build_optimizer(model, train)
    start, best = 0, math.inf
    if state:
        start, best = state["step"], math.inf if state["best_val_nll"] is None else state["best_val_nll"]
        load_optimizer_tensors(model, optimizer, _broadcast_moments(model, stored.optimizer, ranks))
    return TrainState(model, loss, optimizer, parallel, dtype, precision, start, start, best)


def _place(plan: TrainPlan, model: GPT, dtype: torch.dtype, ranks: Ranks) -> tuple[nn.Module, str | None]:
    """Put the model on the device, or over those of all ranks: its loss, and ddp | fsdp | None."""
    device = plan.device
    if ranks.world == 1:
        return Loss(model.to(device), dtype), None
    free = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    parallel = ranks.broadcast_object(lambda: parallel_of(plan.config.train.parallel, model.n_parameters(), free))
    if parallel == "ddp":
        return wrap_ddp(Loss(model.to(device), dtype)), parallel
    return wrap_fsdp(Loss(model, dtype, sharded=True), model.blocks, device), parallel  # only shards are moved


def _broadcast_moments(model: GPT, moments: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """On all ranks: the optimizer's tensors, which the first rank has read."""
    if ranks.world == 1:
        return dict(moments)
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, shape in (("step", ()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape)):
            full = moments[f"{name}/{key}"] if ranks.is_first else torch.empty(shape)
            ranks.broadcast(full)
            tensors[f"{name}/{key}"] = full
    return tensors
