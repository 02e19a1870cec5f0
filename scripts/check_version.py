"""Do the package, CITATION.cff and CHANGELOG.md name the version of a tag?

    python scripts/check_version.py v0.2.0            exit status 1, and a line for each that does not
    python scripts/check_version.py v0.2.0 --notes    print the changelog's section of it

Needs only Python's standard library.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent


def read(name: str) -> str:
    return (CHECKOUT / name).read_text(encoding="utf-8")


def found(pattern: str, name: str) -> str:
    """The first group of a pattern in a file of the checkout; `-` where it is not there."""
    match = re.search(pattern, read(name), re.M)
    return match[1] if match else "-"


def notes(version: str) -> str:
    """What CHANGELOG.md has under `## VERSION - YYYY-MM-DD`; empty if there is no such heading."""
    heading = rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d\n"
    match = re.search(rf"{heading}(.*?)(?=^## |\Z)", read("CHANGELOG.md"), re.M | re.S)
    return match[1].strip() if match else ""


def wrong(version: str) -> list[str]:
    """A line for each file that does not name the version."""
    said = {
        "ropelab/__init__.py": found(r'^__version__ = "(.*)"$', "ropelab/__init__.py"),
        "CITATION.cff": found(r"^version: (.*)$", "CITATION.cff"),
    }
    lines = [f"{name} says {other}, the tag {version}" for name, other in said.items() if other != version]
    return lines if notes(version) else [*lines, f"CHANGELOG.md has no section headed: ## {version} - YYYY-MM-DD"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag", help="vVERSION")
    parser.add_argument("--notes", action="store_true", help="print the section of the changelog")
    options = parser.parse_args()
    version = options.tag.removeprefix("v")
    lines = wrong(version)
    print(*lines, sep="\n", end="\n" if lines else "", file=sys.stderr)
    if options.notes and not lines:
        print(notes(version))
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
