"""A model over several processes: replicas (DDP) or parts (FSDP2), their gradients, and their weights in full."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

STATE_BYTES = 16  # of a parameter in training: weight, gradient and the optimizer's two moments, fp32


def parallel_of(setting: str, n_parameters: int, free: int | None) -> str:
    """ddp or fsdp: `auto` is fsdp where the training state of all parameters would fill over half of a device.

    `free`: bytes of the smallest device; None where they are unknown.
    """
    if setting != "auto":
        return setting
    return "fsdp" if free is not None and STATE_BYTES * n_parameters > free / 2 else "ddp"


def wrap_ddp(loss: nn.Module) -> nn.Module:
    """A module that every rank holds in full; its gradients become the mean over the ranks (DDP).

    The buckets keep the order of the parameters from the first step on, as DDP does where parameters may get no
    gradient: otherwise it would sort them after the first step, and a resumed training would add in another order.
    """
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(loss, find_unused_parameters=True, gradient_as_bucket_view=True)


def wrap_fsdp(loss: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> nn.Module:
    """A module of which each rank holds a shard (FSDP2): `blocks` are gathered one at a time, the rest at once.

    Its parameters become DTensors on the device, except scalars, which every rank keeps. Outside of a forward or
    backward pass only the shards exist.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    numbers = {parameter for parameter in loss.parameters() if parameter.dim() == 0}
    for parameter in numbers:
        parameter.data = parameter.data.to(device)
    for module in (*blocks, loss):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=numbers)
    return loss


def is_sharded(tensor: Tensor) -> bool:
    """Is it a DTensor, of which this rank holds a part?"""
    return hasattr(tensor, "full_tensor")


def _full(tensor: Tensor) -> Tensor:
    """On all ranks: a DTensor in full; other tensors as they are."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def sync_on_last(loss: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[object]:
    """Around each of several passes over one batch: replicas exchange their gradients in the last one only."""
    if last or not hasattr(loss, "no_sync"):
        return contextlib.nullcontext()
    quiet: contextlib.AbstractContextManager[object] = loss.no_sync()  # type: ignore[operator]
    return quiet


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` by the norm of the whole gradient, also where ranks hold parts of it.

    On all ranks. Scalars that every rank keeps of a sharded model have a gradient of their own rank: here it becomes
    the mean.
    """
    import torch
    import torch.distributed as dist
    from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

    if not any(is_sharded(parameter) for parameter in parameters):
        return clip_grad_norm_(parameters, limit)
    of_shards = [parameter for parameter in parameters if is_sharded(parameter)]
    of_all = [parameter for parameter in parameters if not is_sharded(parameter)]
    for parameter in of_all:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
    norms = [get_total_norm([p.grad for p in part if p.grad is not None]) for part in (of_shards, of_all)]
    norm: Tensor = torch.linalg.vector_norm(torch.stack([_full(part) for part in norms]))
    for part in (of_shards, of_all):
        clip_grads_with_norm_(part, limit, norm)
    return norm


def full_state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On all ranks: named tensors in full, in host memory; {} on ranks other than the first."""
    import torch.distributed as dist

    tensors_in_full = {}
    for name, tensor in tensors.items():
        full = _full(tensor)
        if dist.get_rank() == 0:
            tensors_in_full[name] = full.detach().cpu()
    return tensors_in_full


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """A full tensor, equal on all ranks, placed as `like` is: on its device, and this rank's shard of a DTensor."""
    if not is_sharded(like):
        return full.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    placed: Tensor = distribute_tensor(
        full.to(like.device), like.device_mesh, like.placements, src_data_rank=None  # type: ignore[attr-defined]
    )  # fmt: skip
    return placed
