"""The protocols of perplexity, one module each: a class in a module of this package is one, found by its name."""

from __future__ import annotations

import importlib
import pkgutil

from ropelab.protocols.base import Protocol

__all__ = ["PROTOCOLS", "Protocol"]


def _found() -> dict[str, Protocol]:
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    found = {cls.name: cls() for cls in Protocol.__subclasses__()}
    order = ("nonoverlapping", "sliding", "last", "prefix")  # as they are listed; others follow by name
    return {name: found[name] for name in sorted(found, key=lambda n: (order.index(n) if n in order else 9, n))}


PROTOCOLS: dict[str, Protocol] = _found()
