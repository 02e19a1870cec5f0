"""Scalings: changes of a trained encoding for longer contexts, and the table of names."""

from ropelab.scalings.base import HfRope, Scaling, SpectralScaling
from ropelab.scalings.proportional import proportional_rope
from ropelab.scalings.registry import SCALINGS, build, make_scaling, resolve_factor

__all__ = [
    "SCALINGS",
    "HfRope",
    "Scaling",
    "SpectralScaling",
    "build",
    "make_scaling",
    "proportional_rope",
    "resolve_factor",
]
