"""TODO: distributed."""

from ropelab.distributed.group import ALONE, SIGNALS, Ranks, joined, launched
from ropelab.distributed.sharding import (
    clip_gradients,
    is_sharded,
    parallel_of,
    part_of,
    passing,
    replicated,
    sharded,
    whole,
)

__all__ = [
    "ALONE",
    "SIGNALS",
    "Ranks",
    "clip_gradients",
    "is_sharded",
    "joined",
    "launched",
    "parallel_of",
    "part_of",
    "passing",
    "replicated",
    "sharded",
    "whole",
]
