"""The README is true: its commands and options exist, its settings compose, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from ropelab import config
from ropelab.cli.options import app

CHECKOUT = Path(__file__).parent.parent
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def written_commands() -> list[str]:
    """Every `ropelab ...` of the pages, in code blocks or in line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found += re.findall(r"`(ropelab [^`\n]+)`", text)
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
            joined = re.sub(r"\\\n\s*", "", block)
            found += [line.split("#")[0].strip() for line in joined.splitlines() if line.startswith("ropelab ")]
    return found


@pytest.mark.parametrize("line", written_commands())
def test_commands_and_options_exist(line: str) -> None:
    words = line.split()
    if words[1] == "--help":
        return
    command = COMMANDS[words[1]]
    known = {option for parameter in command.params for option in parameter.opts}
    for option in re.findall(r"(?<![\w-])--?[a-z][\w-]*", line):
        assert option in {*known, "--help"}, f"{line}: {option}"
    if "[" in line or "..." in line or "|" in line:
        return  # a synopsis
    settings = [word for word in words[2:] if re.match(r"(pos|scaling|model|data|train|eval)[.=]", word)]
    config.load([item.strip("'") for item in settings if not item.startswith("scaling.")])


def test_there_are_commands_to_check() -> None:
    assert len(written_commands()) > 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make (\w+)`?", (CHECKOUT / "README.md").read_text(encoding="utf-8"))):
        assert re.search(rf"^{target}:", makefile, re.M), target
