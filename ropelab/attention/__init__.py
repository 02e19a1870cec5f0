"""Causal attention with positions: the one call that every layer makes, and the kernel that serves it."""

from ropelab.attention.attend import KERNELS, Attend, choose_kernel
from ropelab.attention.bias import Bias

__all__ = ["KERNELS", "Attend", "Bias", "choose_kernel"]
