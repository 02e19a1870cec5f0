"""Who may import whom. `FLOORS` is the drawing of the architecture: an import that does not go down in it fails."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

import ropelab

PACKAGE = Path(ropelab.__file__).parent

# From the ground up: what stands on a floor imports from the floors below it only. A package stands for all its files.
FLOORS = (
    ("__init__", "errors", "progress", "plugins"),
    ("files", "distributed", "attention", "protocols"),
    ("config", "devices"),
    ("positions", "data", "claims"),
    ("scalings", "model"),
    ("runs",),
    ("evaluation",),
    ("training", "huggingface", "analysis", "report"),
    ("search", "sweeps", "bench"),
    ("reproduce",),
    ("cli",),
    ("__main__",),
)

# library -> the only rooms that may import it
ONLY = {
    "hydra": {"config"},
    "omegaconf": {"config"},
    "wandb": {"training"},
    "submitit": {"sweeps"},
    "datasets": {"data"},
    "tokenizers": {"data"},
    "huggingface_hub": {"data", "huggingface"},
    "typer": {"cli"},
    "plotly": {"report"},
    "matplotlib": {"report"},
    "transformers": {"bench", "huggingface"},
    "x_transformers": {"bench"},
    "triton": {"attention"},
    "pickle": set[str](),
}

AT_TOP = 9  # files beside the packages, __init__ among them


class Import(NamedTuple):
    """`file` (dotted, without `ropelab.`) imports `name` of the module `source`; `face`: while it is loaded."""

    file: str
    source: str
    name: str | None

    @property
    def room(self) -> str:
        """The package or module at the top level that the importing file belongs to."""
        return self.file.split(".")[0]


def dotted(path: Path) -> str:
    """`evaluation/protocols.py` -> `evaluation.protocols`, `evaluation/__init__.py` -> `evaluation`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports() -> list[Import]:
    """Every import statement of the package, those inside functions and of the lazy faces' stubs included."""
    found = []
    for path in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")]):
        file = dotted(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += [Import(file, alias.name, None) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert (node.level == 0) == (path.suffix == ".py"), f"{path}: relative imports are those of stubs"
                source = node.module or ""
                if node.level:
                    source = f"ropelab.{file}.{source}"
                found += [Import(file, source, alias.name) for alias in node.names]
    return found


FOUND = imports()
MODULES = {dotted(path) for path in PACKAGE.rglob("*.py")}


def target(found: Import) -> str | None:
    """The file of ours that is imported (a package: its face), dotted; None for a library."""
    if found.source.split(".")[0] != "ropelab":
        return None
    source = found.source.removeprefix("ropelab").removeprefix(".")
    inner = ".".join(part for part in (source, found.name) if part)
    return inner if inner in MODULES else source or "__init__"


def test_every_room_is_in_the_drawing() -> None:
    assert {name.split(".")[0] for name in MODULES} == {room for floor in FLOORS for room in floor}
    assert len(list(PACKAGE.glob("*.py"))) <= AT_TOP


def test_imports_go_down() -> None:
    level = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    wrong = []
    for found in FOUND:
        goal = target(found)
        if goal is not None and (room := goal.split(".")[0]) != found.room and level[room] >= level[found.room]:
            wrong.append(f"{found.file} imports {goal}")
    assert not wrong


def test_no_floor_could_be_lower() -> None:
    """The drawing is the code's: each room but `__init__` stands directly above something that it imports."""
    level = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    below: dict[str, set[int]] = {room: set() for room in level}
    for found in FOUND:
        goal = target(found)
        if goal is not None and goal.split(".")[0] != found.room:
            below[found.room].add(level[goal.split(".")[0]])
    assert {room: max(numbers, default=-1) + 1 for room, numbers in below.items()} == level


def test_a_package_is_entered_by_its_face() -> None:
    """From outside only what a package's `__init__` names, or a package inside it."""
    packages = {dotted(path) for path in PACKAGE.rglob("__init__.py")}
    wrong = []
    for found in FOUND:
        goal = target(found)
        if goal is not None and "." in goal and goal not in packages and goal.split(".")[0] != found.room:
            wrong.append(f"{found.file} imports {goal}")
    assert not wrong


def test_no_circle_inside_a_package() -> None:
    """Files of a package import each other in one direction; the lazy faces load nothing, so they are no part of it."""
    arrows: dict[str, set[str]] = {module: set() for module in MODULES}
    lazy = {dotted(path) for path in PACKAGE.rglob("__init__.pyi")}
    for found in FOUND:
        goal = target(found)
        if goal is not None and goal in MODULES and found.file not in lazy:
            arrows[found.file].add(goal)
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for goal in sorted(arrows[module] - {module}):
                walk(goal, (*path, module))
            done.add(module)

    for module in sorted(arrows):
        walk(module, ())


def test_libraries_stay_in_their_rooms() -> None:
    wrong = [
        f"{found.file} imports {found.source}"
        for found in FOUND
        if (library := found.source.split(".")[0]) in ONLY and found.room not in ONLY[library]
    ]
    assert not wrong
