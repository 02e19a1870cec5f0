"""Pieces of HTML that every part of the page is made of."""

from __future__ import annotations

import html


def esc(text: object) -> str:
    """Text as HTML that shows it, in an element or a quoted attribute."""
    return html.escape(str(text))


def section(name: str, title: str, body: str) -> str:
    """A section of the page under a heading; title and body are HTML already."""
    return f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{body}</section>\n'
