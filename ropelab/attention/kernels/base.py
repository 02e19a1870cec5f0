"""The base of all attention kernels: one file each, in the order of their priority."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from ropelab.attention.scores import Request, Scores


class Kernel(ABC):
    """Causal attention with the biases of one request, prepared once and called by every layer.

    A subclass with a `name` is among the kernels. The choice is a fixed rule, never a timing: the first in the order of
    `priority`, highest first, that supports a request and suits it.
    """

    name: ClassVar[str]  # as runs and benchmarks store it; several kernels may share one
    summary: ClassVar[str]
    priority: ClassVar[int]

    def __init__(self, request: Request, scores: Scores) -> None:
        self.request, self.scores = request, scores

    @classmethod
    @abstractmethod
    def supports(cls, request: Request) -> bool:
        """Does it compute this?"""

    @classmethod
    @abstractmethod
    def suits(cls, request: Request) -> bool:
        """Is it the one to choose here, of those that support the request, if none of a higher priority is?"""

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, far: tuple[Tensor, Tensor] | None, decay: Any) -> Tensor:
        """q, k (B, H, T, D), v (B, H, T, E), in most kernels E = D -> (B, H, T, E). `far`, `decay` as of `Attend`."""
