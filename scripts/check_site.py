"""Does a built site load anything from elsewhere? Exit status 1, and a line for each page and address that would.

    python scripts/check_site.py site

Links that a reader may follow are no matter; scripts, styles, fonts, pictures and frames are, and so are files that are
not there. Needs only Python's standard library.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"stylesheet", "preload", "modulepreload", "icon", "preconnect", "dns-prefetch", "manifest"}  # of <link rel>
CSS = re.compile(r"url\([\"']?([^\"')]+)[\"']?\)|@import [\"']([^\"']+)[\"']")


class Loads(HTMLParser):
    """`found`: the addresses that a page loads when it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "link" and LOADED & set(values.get("rel", "").split()):
            self.found.append(values.get("href", ""))
        elif tag in ("script", "img", "iframe", "source", "video", "audio", "embed", "object"):
            self.found += [values[name] for name in ("src", "data") if values.get(name)]
        if "mermaid" in values.get("class", "").split():
            self.found.append("https: the script that draws a mermaid diagram")


def loads(path: Path) -> list[str]:
    """The addresses that an HTML page or a style sheet loads."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".css":
        return [one or other for one, other in CSS.findall(text)]
    parser = Loads()
    parser.feed(text)
    return parser.found


def problems(site: Path) -> list[str]:
    """A line for each thing that a page would load from elsewhere, or that is not there."""
    lines = []
    pages = sorted(path for path in site.rglob("*") if path.suffix in (".html", ".css"))
    if not any(path.suffix == ".html" for path in pages):
        return [f"{site} holds no page"]
    for path in pages:
        for address in loads(path):
            parts = urlsplit(address)
            where = path.relative_to(site)
            if parts.scheme == "data" or not (parts.scheme or parts.netloc or parts.path):
                continue
            if parts.scheme or parts.netloc:
                lines.append(f"{where} loads {address}")
            else:
                base = site if parts.path.startswith("/") else path.parent
                if not (base / unquote(parts.path).lstrip("/")).exists():
                    lines.append(f"{where} loads {address}, which is not there")
    return lines


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python scripts/check_site.py SITE", file=sys.stderr)
        return 2
    found = problems(Path(sys.argv[1]))
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
