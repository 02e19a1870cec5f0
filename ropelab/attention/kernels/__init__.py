"""The attention kernels; a new one is one file here."""

from ropelab.attention.kernels.base import Kernel
from ropelab.plugins import classes

# Filled from the modules of this package, highest priority first.
KERNELS: list[type[Kernel]] = sorted(
    classes(__name__, Kernel),
    key=lambda kernel: -kernel.priority,
)

__all__ = ["KERNELS", "Kernel"]
