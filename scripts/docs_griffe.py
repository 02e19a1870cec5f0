"""What the site's Python pages list: the face of a package, also where it is lazy and its names stand in a stub."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import griffe


class LazyFaces(griffe.Extension):
    """Takes `from .module import name as name` of an `__init__.pyi` as the package's `__all__`."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called when a package was loaded, its stubs merged."""
        pending = [pkg]
        while pending:
            module = pending.pop()
            pending += [child for child in module.members.values() if isinstance(child, griffe.Module)]
            stub = Path(str(module.filepath)).with_suffix(".pyi")
            if module.is_init_module and module.exports is None and stub.exists():
                module.exports = names(stub)


def names(stub: Path) -> list[str | griffe.ExprName]:
    """The names that a stub hands on under their own name."""
    found: list[str | griffe.ExprName] = []
    for node in ast.walk(ast.parse(stub.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found += [alias.asname for alias in node.names if alias.asname]
    return found
