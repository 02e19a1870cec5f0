"""TODO: scalings."""

from ropelab.scalings.registry import SCALINGS, applied_parameters, build, resolve_factor

__all__ = [
    "SCALINGS",
    "applied_parameters",
    "build",
    "resolve_factor",
]
