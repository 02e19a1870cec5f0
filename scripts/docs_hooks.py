"""What the documentation site takes from outside docs/: pages of the checkout, and files that pages link to.

mkdocs calls these (`hooks` in mkdocs.yml). Pages are written so that their links work in the checkout; in the site a
page of the checkout's root lies beside the others, and any other file that is linked to is copied below `checkout/`.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

CHECKOUT = Path(__file__).parent.parent
PAGES = {
    "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "README.md": "index.md",
    "SECURITY.md": "security.md",
}  # fmt: skip
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages and every file outside docs/ that a page links to."""
    texts = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for source, target in PAGES.items():
        if files.get_file_from_path(target) is None:
            texts[source] = (CHECKOUT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, target, content=relinked(texts[source], source, target)))
    linked = {outside(link[2], source) for source, text in texts.items() for link in LINK.finditer(text)}
    for place in sorted(place for place in linked if place is not None and place not in PAGES):
        files.append(File.generated(config, f"checkout/{place}", abs_src_path=str(CHECKOUT / place)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page of docs/ with its links out of it led to what `on_files` added, and `|` in code as mkdocs wants it."""
    if page.file.src_uri not in PAGES.values() or page.file.src_uri == "index.md":  # the others were made relinked
        markdown = relinked(markdown, "docs/" + page.file.src_uri, page.file.src_uri)
    return re.sub(r"^\|.*$", lambda row: re.sub(r"`[^`]*`", unescaped, row[0]), markdown, flags=re.M)


def unescaped(code: re.Match[str]) -> str:
    """Code in a cell of a table: GitHub needs `\\|` there, and mkdocs would print the backslash."""
    return code[0].replace("\\|", "|")


def outside(link: str, source: str) -> str | None:
    """The path in the checkout that a link of the page `source` leads to, if that is a file outside docs/."""
    place = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    known = not re.match(r"[a-z]+:", link) and not place.startswith(("docs/", "../"))
    return place if known and (CHECKOUT / place).is_file() else None


def relinked(text: str, source: str, target: str) -> str:
    """The text of the checkout's page `source`, as it must be at `target` in the site."""

    def led(link: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        if (out := outside(link[2], source)) is not None:
            site = PAGES.get(out, f"checkout/{out}")
        elif source in PAGES and place.startswith("docs/"):
            site = place.removeprefix("docs/")
        else:
            return link[0]
        return f"{link[1]}{posixpath.relpath(site, posixpath.dirname(target) or '.')}{link[3] or ''}{link[4]}"

    return LINK.sub(led, text)
