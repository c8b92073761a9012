"""The running text of an HTML page."""

from __future__ import annotations

import html.parser
import re
from typing import Any


class _Text(html.parser.HTMLParser):
    """Collects the running text of a page, with blank lines between paragraphs."""

    BLOCKS = frozenset({"p", "h1", "h2", "h3", "h4", "blockquote", "li", "ul", "ol", "div", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.in_head = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.in_head = self.in_head or tag == "head"
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.in_head = self.in_head and tag != "head"
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.in_head:
            self.parts.append(re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    """The text of an HTML page without tags and head; white space is collapsed as a browser does."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    paragraphs = (re.sub(r" +", " ", part).strip() for part in "".join(parser.parts).split("\n\n"))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
