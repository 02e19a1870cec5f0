"""Who may import whom. The dict is the drawing of the architecture: an import that is not in it fails."""

from __future__ import annotations

import ast
from pathlib import Path

import ropelab

PACKAGE = Path(ropelab.__file__).parent

# module of ours -> modules of ours that it may import (a package stands for all its files)
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    "cli": {"__init__", "bench", "claims", "cluster", "config", "data", "evaluation", "experiment",
            "figures", "files", "huggingface", "progress", "ranks", "report", "reproduce", "runs", "schema", "show",
            "sweeping", "sweeps", "worker"},
    "sweeping": {"cluster", "config", "experiment", "launcher", "schema", "sweeps"},
    "cluster": {"launcher", "progress", "ranks", "schema", "sweeps", "worker"},
    "sweeps": {"files", "runs"},
    "huggingface": {"__init__", "attention", "config", "data", "experiment", "files", "model", "positions", "progress",
                    "ranks", "runs", "schema", "training"},
    "bench": {"attention", "config", "experiment", "model", "positions", "schema", "stacking", "training"},
    "reproduce": {"claims", "config", "experiment", "launcher", "runs", "schema"},
    "worker": {"config", "experiment", "launcher", "progress", "ranks", "runs", "training"},
    "launcher": set(),
    "experiment": {"__init__", "attention", "config", "data", "diagnose", "evaluation", "files", "model", "positions",
                   "progress", "ranks", "runs", "schema", "search", "stacking", "stats", "tracking", "training"},
    "show": {"diagnose", "positions", "schema"},
    "diagnose": {"positions", "schema"},
    "search": set(),
    "training": {"model", "ranks", "schema"},
    "model": {"attention", "positions", "schema"},
    "positions": {"schema"},
    "attention": set(),
    "evaluation": {"schema"},
    "claims": {"files", "schema", "stats"},
    "config": {"files", "schema"},
    "data": {"files", "schema"},
    "runs": {"progress", "__init__", "files", "schema"},
    "stacking": {"attention", "model", "positions", "schema", "training"},
    "tracking": {"progress", "schema"},
    "report": {"figures", "files"},
    "figures": {"files"},
    "progress": set(),
    "ranks": set(),
    "stats": set(),
    "files": set(),
    "schema": set(),
}  # fmt: skip

# library -> the only modules of ours that may import it
ONLY = {
    "hydra": {"config"},
    "omegaconf": {"config"},
    "wandb": {"tracking"},
    "submitit": {"cluster"},
    "datasets": {"data"},
    "tokenizers": {"data"},
    "huggingface_hub": {"data", "huggingface"},
    "typer": {"cli"},
    "plotly": {"report"},
    "matplotlib": {"figures"},
    "transformers": {"bench", "huggingface"},
    "x_transformers": {"bench"},
    "triton": {"attention"},
    "pickle": set[str](),
}


def imports() -> list[tuple[str, str]]:
    """(module of ours, imported dotted name) for every import statement, those inside functions included."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        module = relative.parts[0] if len(relative.parts) > 1 else relative.stem
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += [(module, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{relative}: relative import"
                name = node.module or ""
                if name == "ropelab":
                    found += [(module, f"ropelab.{alias.name}") for alias in node.names]
                else:
                    found.append((module, name))
    return found


def test_every_module_is_in_the_drawing() -> None:
    modules = {
        p.stem if p.is_file() else p.name
        for p in PACKAGE.iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert modules == set(ALLOWED)


def test_imports_follow_the_drawing() -> None:
    wrong = []
    for module, name in imports():
        if name.split(".")[0] != "ropelab":
            continue
        target = name.split(".")[1] if "." in name else "__init__"
        target = "__init__" if target == "__version__" else target
        if target not in {*ALLOWED[module], module}:
            wrong.append(f"{module} imports {target}")
    assert not wrong


def test_libraries_stay_in_their_rooms() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, name in imports()
        if name.split(".")[0] in ONLY and module not in ONLY[name.split(".")[0]]
    ]
    assert not wrong


def test_no_arrow_of_the_drawing_is_unused() -> None:
    used: dict[str, set[str]] = {module: set() for module in ALLOWED}
    for module, name in imports():
        if name.startswith("ropelab"):
            target = name.split(".")[1] if "." in name else "__init__"
            used[module].add("__init__" if target == "__version__" else target)
    for module, targets in ALLOWED.items():
        assert targets <= used[module], f"{module} no longer imports {targets - used[module]}: mend the drawing"
