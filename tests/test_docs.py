"""The pages are true: what is made from the code is as the code is, links and anchors lead somewhere, names exist."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import ropelab

CHECKOUT = Path(__file__).parent.parent
DOCS = CHECKOUT / "docs"
PAGES = [*sorted(CHECKOUT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
GENERATED = {"contributing.md", "changelog.md", "security.md"}  # in the site, of the checkout's own pages


def script(name: str) -> ModuleType:
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, CHECKOUT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative(page: Path) -> str:
    return page.relative_to(CHECKOUT).as_posix()


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["draw_architecture", "command_reference"])
def test_what_is_made_from_the_code_is_up_to_date(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "scripts" / f"{name}.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        place = page.parent / target if target else page
        assert place.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(place), f"{target} has no heading for #{anchor}"


def test_every_page_is_in_the_navigation_once() -> None:
    def paths(entry: object) -> list[str]:
        if isinstance(entry, dict):
            return [path for value in entry.values() for path in paths(value)]
        return [path for value in entry for path in paths(value)] if isinstance(entry, list) else [str(entry)]

    found = paths(yaml.safe_load((CHECKOUT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(found) == sorted({page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} | GENERATED)


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted((CHECKOUT / ".github").rglob("*.*"))], ids=relative
)  # fmt: skip
def test_make_targets_and_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    for line in re.findall(r"(?:^|`|run: )make ((?:[A-Z]+=\S+ )*[a-z][a-z -]*?)(?:`| {2,}|$|\n)", text, re.M):
        for target in [word for word in line.split() if "=" not in word]:
            assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"
    if page.name == "CHANGELOG.md" or page.parent.name == "results":
        return  # what was true at its time
    for path in re.findall(r"\b((?:scripts|configs|tests|ropelab)/[\w/.-]*\w)", text):
        names_a_new_one = "NAME" in path or path.endswith("/claim/c")
        assert names_a_new_one or (CHECKOUT / path).exists(), f"{path} is not there"


def test_the_tour_has_every_room_and_the_recipes_their_examples() -> None:
    text = (CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tour = text[text.index("## A tour") : text.index("## How to add a thing")]
    rooms = {
        name.rstrip("/") for row in re.findall(r"^\| (`.*?) \|", tour, re.M) for name in re.findall(r"`([\w./]+)`", row)
    }
    drawn = script("draw_architecture").read_rooms(CHECKOUT / "ropelab").values()
    assert rooms == {room.name if room.is_package else f"{room.name}.py" for room in drawn}
    for room in drawn:
        assert room.summary, f"{room.name} does not say what it is"
        assert not room.summary.startswith("TODO"), f"{room.name} does not say what it is"
    recipes = text[text.index("## How to add a thing") : text.index("## What to run")]
    for path in re.findall(r"`([a-z_]+/[\w/]+\.py)`", recipes):
        assert "NAME" in path or (CHECKOUT / "ropelab" / path).exists(), f"{path}, which is to be copied, is not there"


def test_the_glossary_has_each_word_once_and_stored_keys_that_exist() -> None:
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \|([^|]*)\|$", (DOCS / "glossary.md").read_text(encoding="utf-8"), re.M)
    words = [word for first, _ in rows if first != "word" for word in first.split(", ")]
    assert len(words) > 60
    assert len(set(words)) == len(words), {word for word in words if words.count(word) > 1}
    folders = (CHECKOUT / "ropelab", CHECKOUT / "configs")
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in folders for path in folder.rglob("*.*") if path.suffix in (".py", ".yaml")
    )  # fmt: skip
    for key in (key for _, stored in rows for key in re.findall(r"`([\w.]+)/?`", stored)):
        assert re.search(rf"\b{key.split('.')[-1]}\b", code), f"{key} is stored nowhere"


def test_readme_counts_the_methods() -> None:
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    for group, what in (("pos", "encodings"), ("scaling", "scalings")):
        choices = {path.stem for path in (CHECKOUT / "configs" / group).glob("*.yaml")}
        assert re.search(rf"\b{len(choices) - (group == 'scaling')} {what}\b", text), what  # without `scaling=none`


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == ropelab.__version__
    assert {"cff-version", "message", "title", "authors", "license"} <= cited.keys()


@pytest.mark.parametrize("path", sorted((CHECKOUT / ".github").rglob("*.yml")), ids=relative)
def test_forms_and_workflows_are_yaml(path: Path) -> None:
    held = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.parent.name == "workflows":
        needed: set[str] = set()
        for job in held["jobs"].values():
            needs = job.get("needs", [])
            needed |= {needs} if isinstance(needs, str) else set(needs)
        assert needed <= held["jobs"].keys()
    elif path.name != "config.yml":
        assert {"name", "description", "body"} <= held.keys()


class TestDrawing:
    """scripts/draw_architecture.py on a package whose drawing is known."""

    @pytest.fixture
    def package(self, tmp_path: Path) -> Path:
        files = {
            "__init__.py": "from made.roof import x\n",
            "roof.py": '"""The roof. And more."""\nimport made.left\ndef f():\n    from made import base, right\n',
            "left/__init__.py": '"""Left\nof it"""\nfrom made.left.inside import y\n',
            "left/inside.py": "from made.right import z\nimport torch\n",
            "right.py": "from made.base import w\nfrom made import left\n",
            "base.py": "",
        }
        for name, text in files.items():
            (tmp_path / "made" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "made" / name).write_text(text, encoding="utf-8")
        return tmp_path / "made"

    def test_rooms_imports_floors_and_circles(self, package: Path) -> None:
        draw = script("draw_architecture")
        rooms = draw.read_rooms(package)
        arrows = {name: set(room.imports) for name, room in rooms.items()}
        assert arrows == {
            "roof": {"left", "base", "right"},
            "left": {"right"},
            "right": {"base", "left"},
            "base": set(),
        }
        assert {name: room.summary for name, room in rooms.items()} == {
            "roof": "The roof.", "left": "Left of it", "right": "", "base": "",
        }  # fmt: skip
        drawn = {name: room.imports for name, room in rooms.items()}
        assert draw.floors(drawn) == {"base": 0, "left": 1, "right": 1, "roof": 2}
        assert draw.circles(drawn) == [["left", "right"]]
        assert "Circles: left, right." in draw.table(rooms)

    def test_an_implied_arrow_is_not_drawn_and_a_long_one_has_its_own_places(self) -> None:
        draw = script("draw_architecture")
        arrows = {
            "a": frozenset({"b", "c", "d"}), "b": frozenset({"c"}), "c": frozenset({"e"}),
            "d": frozenset(), "e": frozenset(),
        }  # fmt: skip
        assert draw.reduced(arrows) == {"a": ["b", "d"], "b": ["c"], "c": ["e"], "d": [], "e": []}
        rows, chains = draw.layout(arrows)
        assert [sorted(row) for row in rows] == [["d", "e"], ["a d 1", "c"], ["a d 2", "b"], ["a"]]
        assert ["a", "a d 2", "a d 1", "d"] in chains

    def test_a_page_without_its_marks_is_refused(self) -> None:
        draw = script("draw_architecture")
        with pytest.raises(ValueError, match="between which the table is written"):
            draw.with_table("# A page\n", "x")
        assert draw.with_table(f"before {draw.BEGIN} old {draw.END} after", "new") == "before new after"


class TestSite:
    """scripts/check_site.py: what a page loads, and not what it links to."""

    @pytest.mark.parametrize(
        ("page", "problem"),
        [
            ('<script src="https://cdn.example/x.js"></script>', "index.html loads https://cdn.example/x.js"),
            ('<script src="//cdn.example/x.js"></script>', "index.html loads //cdn.example/x.js"),
            ('<link rel="stylesheet" href="https://x.example/a.css">', "index.html loads https://x.example/a.css"),
            ('<link rel="preconnect" href="https://x.example">', "index.html loads https://x.example"),
            ('<img src="lost.png">', "index.html loads lost.png, which is not there"),
            ('<pre class="mermaid"></pre>', "index.html loads https: the script that draws a mermaid diagram"),
            ('<a href="https://x.example">x</a><link rel="canonical" href="https://x.example">', None),
            ('<img src="data:image/png;base64,AA"><img src="here%20too.png?1"><script>1</script>', None),
        ],
    )
    def test_a_page(self, tmp_path: Path, page: str, problem: str | None) -> None:
        (tmp_path / "index.html").write_text(page, encoding="utf-8")
        (tmp_path / "here too.png").touch()
        assert script("check_site").problems(tmp_path) == ([] if problem is None else [problem])

    def test_a_style_sheet_and_an_empty_site(self, tmp_path: Path) -> None:
        problems = script("check_site").problems
        assert problems(tmp_path) == [f"{tmp_path} holds no page"]
        (tmp_path / "index.html").touch()
        (tmp_path / "a.css").write_text('@import "https://x.example/b.css"; a{src:url(https://x.example/f.woff)}')
        assert problems(tmp_path) == ["a.css loads https://x.example/b.css", "a.css loads https://x.example/f.woff"]


def test_a_tag_needs_package_citation_and_changelog(tmp_path: Path) -> None:
    module = script("check_version")
    module.CHECKOUT = tmp_path
    (tmp_path / "ropelab").mkdir()
    (tmp_path / "ropelab" / "__init__.py").write_text('__version__ = "0.2.0"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 0.2.0\n")
    (tmp_path / "CHANGELOG.md").write_text(
        "# C\n\n## Unreleased\n\n## 0.2.0 - 2026-12-24\n\n- New\n\n## 0.1.0 - 2026-01-01\n"
    )
    assert module.notes("0.2.0") == "- New"
    assert module.notes("0.3.0") == ""
    assert module.wrong("0.2.0") == []
    assert module.wrong("0.3.0") == [
        "ropelab/__init__.py says 0.2.0, the tag 0.3.0", "CITATION.cff says 0.2.0, the tag 0.3.0",
        "CHANGELOG.md has no section headed: ## 0.3.0 - YYYY-MM-DD",
    ]  # fmt: skip
