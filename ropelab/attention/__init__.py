"""Causal attention with positions: the one call that every layer makes, and the kernel that serves it."""

from ropelab.attention.bias import Bias
from ropelab.attention.kernels import KERNELS, Kernel
from ropelab.attention.kernels.slope_dims import augment
from ropelab.attention.scores import Request
from ropelab.attention.select import Attend, choose_kernel

__all__ = [
    "KERNELS",
    "Attend",
    "Bias",
    "Kernel",
    "Request",
    "augment",
    "choose_kernel",
]
