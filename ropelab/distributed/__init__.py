"""Several processes that work on one run: the group of ranks (`Ranks`), and a model replicated or sharded over them."""

from ropelab.distributed.group import SIGNALS, SINGLE, Ranks, detect_launch, init_distributed
from ropelab.distributed.sharding import (
    clip_gradients,
    full_state_dict,
    is_sharded,
    parallel_of,
    shard_like,
    sync_on_last,
    wrap_ddp,
    wrap_fsdp,
)

__all__ = [
    "SIGNALS",
    "SINGLE",
    "Ranks",
    "clip_gradients",
    "detect_launch",
    "full_state_dict",
    "init_distributed",
    "is_sharded",
    "parallel_of",
    "shard_like",
    "sync_on_last",
    "wrap_ddp",
    "wrap_fsdp",
]
