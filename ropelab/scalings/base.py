"""What a scaling is: a change of a trained encoding for longer contexts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


def factor_is_one(parameters: Mapping[str, Any], ctx: int) -> bool:
    """Where a static scaling changes nothing: at factor 1."""
    return bool(parameters["factor"] == 1)


ROTARY = ("rope", "p_rope")


class Scaling(NamedTuple):
    """A scaling method, as the table in `positions/__init__.py` holds it.

    `apply` is a function of the spectrum as in this module, or, where `spectral` is False, one from `changes.py` that
    is called with the encoding and the parameters and changes what the encoding says. Its keywords are the parameters
    of its YAML, `original_ctx` resolved to a length.
    """

    apply: Callable[..., Any]
    applies_to: tuple[str, ...] | None = ROTARY  # names of encodings; None: any
    spectral: bool = True
    dynamic: bool = False  # the factor follows ctx, and `auto` is 1
    evaluation_only: bool = False  # no run is trained with it
    idle: Callable[[Mapping[str, Any], int], bool] = factor_is_one  # (parameters, ctx): must it change nothing there?

    def length_dependent(self, parameters: Mapping[str, Any]) -> bool:
        """Does what is said at a position depend on ctx?"""
        return self.dynamic or bool(parameters.get("short_factors"))
