"""Causal attention with positions: the one call that every layer makes, and the kernel that serves it."""

from ropelab.attention.attend import KERNELS, Attend, choose_kernel
from ropelab.attention.bias import Bias
from ropelab.attention.digits import augment

__all__ = [
    "KERNELS",
    "Attend",
    "Bias",
    "augment",
    "choose_kernel",
]
