"""How the site reads our code: faces that are lazy, and fields whose comment is what is to be said of them."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path
from typing import Any

import griffe


class OurCode(griffe.Extension):
    """Takes an `__init__.pyi` as the face of its package, and the comment beside a field as its docstring."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called when a package was loaded, its stubs merged."""
        pending = [pkg]
        while pending:
            module = pending.pop()
            pending += [child for child in module.members.values() if isinstance(child, griffe.Module)]
            path = Path(str(module.filepath))
            stub = path.with_suffix(".pyi")
            if module.is_init_module and module.exports is None and stub.exists():
                module.exports = names(stub)
            said = comments(path)
            classes = [child for child in module.members.values() if isinstance(child, griffe.Class)]
            for field in (one for held in classes for one in held.members.values()):
                if isinstance(field, griffe.Attribute) and field.docstring is None and field.endlineno in said:
                    field.docstring = griffe.Docstring(said[field.endlineno], parent=field)


def names(stub: Path) -> list[str | griffe.ExprName]:
    """The names that a stub hands on under their own name."""
    found: list[str | griffe.ExprName] = []
    for node in ast.walk(ast.parse(stub.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found += [alias.asname for alias in node.names if alias.asname]
    return found


def comments(path: Path) -> dict[int | None, str]:
    """The comment behind the code of each line that has one, but for those of tools (`fmt:`, `type:`, `noqa`)."""
    found: dict[int | None, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        text = token.string.lstrip("# ")
        beside = token.type == tokenize.COMMENT and token.line[: token.start[1]].strip()
        if beside and not text.startswith(("fmt:", "type:", "noqa", "isort:")):
            found[token.start[0]] = text
    return found
