"""Draw who imports whom: docs/images/architecture.svg, and the table of floors in docs/architecture.md.

    python scripts/draw_architecture.py           write both
    python scripts/draw_architecture.py --check   exit status 1 where they are not what the code says
    python scripts/draw_architecture.py --sizes   print the largest functions, classes and files

A room is a package or a file directly in `ropelab/`. Its floor is computed: one above the highest room that it imports,
so every import leads down unless there is a circle, whose rooms then share a floor and are named. Imports inside
functions count. The picture leaves out an arrow that a chain of others implies; the table has all of them.
Needs only Python's standard library and imports nothing of ropelab.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).parent.parent
PAGE, PICTURE = Path("docs/architecture.md"), Path("docs/images/architecture.svg")
BEGIN, END = "<!-- drawing: scripts/draw_architecture.py -->", "<!-- end of drawing -->"
WIDTH, BOX, ROW = 1180, 34, 84  # of the picture, the height of a box, from floor to floor

Arrows = Mapping[str, frozenset[str]]  # room -> the rooms that it imports


class Room(NamedTuple):
    """A package or file directly in `ropelab/`."""

    name: str
    is_package: bool
    summary: str  # the first sentence of its docstring
    imports: frozenset[str]


def files_of(package: Path) -> dict[str, list[Path]]:
    """The Python files of each room; `__main__` and the public names of `__init__` are no rooms."""
    found: dict[str, list[Path]] = {}
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        name = relative.parts[0] if len(relative.parts) > 1 else relative.stem
        if name not in ("__init__", "__main__"):
            found.setdefault(name, []).append(path)
    return found


def imported(path: Path, package: str) -> Iterator[str]:
    """The dotted names below `package` that a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix(f"{package}.") for name in names if name.startswith(f"{package}."))


def first_sentence(path: Path) -> str:
    """Of the docstring, on one line."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    return text if (end := text.find(". ")) < 0 else text[: end + 1]


def read_rooms(package: Path) -> dict[str, Room]:
    """The rooms of a package by name."""
    files = files_of(package)
    rooms = {}
    for name, paths in files.items():
        is_package = paths[0].parent != package
        targets = {target.split(".")[0] for path in paths for target in imported(path, package.name)}
        rooms[name] = Room(
            name, is_package, first_sentence(package / name / "__init__.py" if is_package else paths[0]),
            frozenset(targets & (files.keys() - {name})),
        )  # fmt: skip
    return rooms


def reach(arrows: Arrows) -> Arrows:
    """The rooms that each room imports, itself or through others."""
    found: dict[str, frozenset[str]] = {}
    for name in arrows:
        seen: set[str] = set()
        pending = list(arrows[name])
        while pending:
            if (target := pending.pop()) not in seen:
                seen.add(target)
                pending += arrows[target]
        found[name] = frozenset(seen)
    return found


def floors(arrows: Arrows) -> dict[str, int]:
    """The floor of each room, 0 at the bottom; rooms that import each other in a circle share one."""
    below = reach(arrows)
    found: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in found:
            circle = {other for other in below[name] if name in below[other]} | {name}
            targets = frozenset().union(*(arrows[member] for member in circle)) - circle
            height = 1 + max((floor(target) for target in targets), default=-1)
            found.update(dict.fromkeys(circle, height))
        return found[name]

    for name in sorted(arrows):
        floor(name)
    return found


def reduced(arrows: Arrows) -> dict[str, list[str]]:
    """The arrows that no chain of others implies."""
    below = reach(arrows)
    return {
        name: sorted(
            target for target in targets
            if not any(target in below[other] and other not in below[target] for other in targets - {target})
        )
        for name, targets in arrows.items()
    }  # fmt: skip


def circles(arrows: Arrows) -> list[list[str]]:
    """The groups of rooms that import each other."""
    below = reach(arrows)
    groups = {frozenset({name, *(other for other in below[name] if name in below[other])}) for name in arrows}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def rows_of(arrows: Arrows) -> list[list[str]]:
    """The rooms of each floor from the bottom, by name."""
    height = floors(arrows)
    return [sorted(name for name in arrows if height[name] == floor) for floor in range(max(height.values()) + 1)]


def layout(arrows: Arrows) -> tuple[list[list[str]], list[list[str]]]:
    """(rows, chains): the floors with a place of its own for each arrow that passes one, and the arrows through them.

    A place of an arrow is a name with blanks in it, which no room has. Rows are in an order in which few arrows cross:
    each place near those that it is joined to (the barycentre method of Sugiyama).
    """
    rows, height = rows_of(arrows), floors(arrows)
    chains = []
    for name, targets in reduced(arrows).items():
        for target in targets:
            passed = [f"{name} {target} {floor}" for floor in range(height[name] - 1, height[target], -1)]
            for floor, place in zip(range(height[name] - 1, height[target], -1), passed, strict=True):
                rows[floor].append(place)
            chains.append([name, *passed, target])
    joined: dict[str, set[str]] = {place: set() for row in rows for place in row}
    for chain in chains:
        for upper, lower in pairwise(chain):
            joined[upper].add(lower)
            joined[lower].add(upper)
    for _ in range(12):
        at = {place: (i + 0.5) / len(row) for row in rows for i, place in enumerate(row)}
        for row in (*rows, *reversed(rows)):
            row.sort(key=lambda place: (sum(at[o] for o in joined[place]) / max(1, len(joined[place])), place))
            at.update({place: (i + 0.5) / len(row) for i, place in enumerate(row)})
    return rows, chains


def picture(rooms: Mapping[str, Room]) -> str:
    """The drawing as SVG: the highest floor at the top, arrows down to what is imported."""
    rows, chains = layout({name: room.imports for name, room in rooms.items()})
    label = {name: name if room.is_package else f"{name}.py" for name, room in rooms.items()}
    width = {place: 20 + 8.2 * len(label[place]) if place in rooms else 8.0 for row in rows for place in row}
    top: dict[str, tuple[float, float]] = {}  # the middle of the top edge
    for floor, row in enumerate(rows):
        taken = sum(width[place] for place in row)
        gap = min(70.0, (WIDTH - 60 - taken) / max(1, len(row) - 1))
        x = 40 + (WIDTH - 40 - taken - gap * (len(row) - 1)) / 2
        for place in row:
            top[place] = x + width[place] / 2, 20 + ROW * (len(rows) - 1 - floor)
            x += width[place] + gap
    height = 40 + ROW * (len(rows) - 1) + BOX
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="14" role="img" aria-label="The packages of ropelab by floor, with arrows to what they import">',
        "<style>.room{fill:#e8eaf6;stroke:#3949ab}.file{fill:#fff;stroke:#3949ab}.arrow{fill:none;stroke:#5c6bc0;"
        "stroke-opacity:.6}.floor{fill:#90959c}text{fill:#1a1c2c}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#5c6bc0"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#fcfcff"/>',
    ]
    for chain in chains:
        x, y = top[chain[0]]
        drawn = f"M{x:.0f} {y + BOX:.0f}"
        for upper, lower in pairwise(chain):
            (x, y), (to_x, to_y) = top[upper], top[lower]
            y += BOX
            middle = (y + to_y) / 2
            drawn += f"C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {to_y:.0f}"
            drawn += "" if lower in rooms else f"v{BOX}"
        parts.append(f'<path class="arrow" marker-end="url(#head)" d="{drawn}"/>')
    for name, room in rooms.items():
        x, y = top[name]
        parts.append(
            f'<g><title>{escape(room.summary)}</title><rect class="{"room" if room.is_package else "file"}" '
            f'x="{x - width[name] / 2:.0f}" y="{y:.0f}" width="{width[name]:.0f}" height="{BOX}" rx="5"/>'
            f'<text x="{x:.0f}" y="{y + 22:.0f}" text-anchor="middle">{escape(label[name])}</text></g>'
        )
    for floor in range(len(rows)):
        parts.append(f'<text class="floor" x="14" y="{20 + ROW * (len(rows) - 1 - floor) + 22}">{floor}</text>')
    return "\n".join([*parts, "</svg>\n"])


def table(rooms: Mapping[str, Room]) -> str:
    """The picture's place in the page, and every room with its floor, its summary and its imports."""
    arrows = {name: room.imports for name, room in rooms.items()}
    rows = rows_of(arrows)
    lines = [
        BEGIN, "",
        f"![{len(rooms)} rooms on {len(rows)} floors, with an arrow to each room that another imports]"
        f"({PICTURE.relative_to(PAGE.parent).as_posix()})", "",
        f"{len(rooms)} rooms on {len(rows)} floors, {sum(map(len, arrows.values()))} arrows, "
        f"{sum(map(len, reduced(arrows).values()))} of them drawn: the others are implied. "
        + ("No circle." if not circles(arrows) else f"Circles: {'; '.join(map(', '.join, circles(arrows)))}."), "",
        "| floor | room | what it is | imports |", "|---|---|---|---|",
    ]  # fmt: skip
    for floor in reversed(range(len(rows))):
        for name in rows[floor]:
            room = rooms[name]
            label = f"`{name}/`" if room.is_package else f"`{name}.py`"
            summary = room.summary.replace("|", "\\|")
            lines.append(f"| {floor} | {label} | {summary} | {', '.join(sorted(room.imports)) or '-'} |")
    return "\n".join([*lines, "", END])


def with_table(page: str, drawn: str) -> str:
    """A page with what stands between the marks replaced."""
    begin, end = page.find(BEGIN), page.find(END)
    if not 0 <= begin < end:
        raise ValueError(f"{PAGE} has no two lines\n{BEGIN}\n{END}\nbetween which the table is written")
    return page[:begin] + drawn + page[end + len(END) :]


def sizes(package: Path) -> str:
    """The five largest functions, classes (by attributes set on self) and files, longest first."""
    functions, classes, lengths = [], [], []
    for path in (path for paths in files_of(package).values() for path in paths):
        text = path.read_text(encoding="utf-8")
        where = path.relative_to(package).as_posix()
        lengths.append((text.count("\n"), where))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                functions.append(((node.end_lineno or node.lineno) - node.lineno + 1, f"{where}: {node.name}"))
            elif isinstance(node, ast.ClassDef):
                own = {
                    target.attr for target in ast.walk(node)
                    if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store)
                    and isinstance(target.value, ast.Name) and target.value.id == "self"
                }  # fmt: skip
                classes.append((len(own), f"{where}: {node.name}"))
    parts = [("lines of a function", functions), ("attributes of a class", classes), ("lines of a file", lengths)]
    return "\n".join(
        f"{what}\n" + "\n".join(f"{number:6} {where}" for number, where in sorted(found, reverse=True)[:5])
        for what, found in parts
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where something is old")
    parser.add_argument("--sizes", action="store_true", help="print the largest functions, classes and files")
    parser.add_argument("--root", type=Path, default=CHECKOUT, help="the checkout to draw")
    options = parser.parse_args()
    if options.sizes:
        print(sizes(options.root / "ropelab"))
        return 0
    rooms = read_rooms(options.root / "ropelab")
    page = options.root / PAGE
    written = {page: with_table(page.read_text(encoding="utf-8"), table(rooms)), options.root / PICTURE: picture(rooms)}
    old = [path for path, text in written.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if options.check:
        for path in old:
            print(f"{path} is not what the code says: run python scripts/draw_architecture.py", file=sys.stderr)
        return bool(old)
    for path in old:
        path.write_text(written[path], encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
