"""Registries that fill themselves: a method is a class with a `name` of its own in a module of its package."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TypeVar

Kind = TypeVar("Kind")


def registered(package: str, base: type[Kind]) -> dict[str, type[Kind]]:
    """The classes under `base` that the modules of a package define with a `name` of their own, sorted by it.

    `TypeError` for two classes of one name.
    """
    found: dict[str, type[Kind]] = {}
    for kind in classes(package, base):
        name: str = vars(kind)["name"]
        if name in found:
            raise TypeError(f"{found[name].__module__} and {kind.__module__} both define '{name}'")
        found[name] = kind
    return dict(sorted(found.items()))


def classes(package: str, base: type[Kind]) -> list[type[Kind]]:
    """The same as a list, by module and then by place; several may share a name."""
    found = []
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        for kind in vars(importlib.import_module(f"{package}.{module.name}")).values():
            if isinstance(kind, type) and issubclass(kind, base) and kind.__module__ == f"{package}.{module.name}":
                found += [kind] if "name" in vars(kind) else []
    return found
