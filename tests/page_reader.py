"""Reads a page as a browser's parser does, so far as the tests ask."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

_VOID = {"meta", "link", "input", "wbr", "br"}


@dataclasses.dataclass
class Element:
    """An element, its text with that of its children, and where in the page it begins."""

    tag: str
    attributes: dict[str, str]
    place: int
    text: str = ""
    children: list[Element] = dataclasses.field(default_factory=list)

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """Its descendants of that tag, in order; an attribute must hold the word given."""
        found = []
        for child in self.children:
            words = {k: child.attributes.get(k.rstrip("_"), "").split() for k in attributes}
            if child.tag == tag and all(v in words[k] for k, v in attributes.items()):
                found.append(child)
            found += child.all(tag, **attributes)
        return found

    @property
    def words(self) -> str:
        """Its text, white space made one space."""
        return " ".join(self.text.split())


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("page", {}, 0)]
        self.count = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count += 1
        element = Element(tag, {k: v or "" for k, v in attrs}, self.count)
        self.open[-1].children.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data


def read_page(text: str) -> Element:
    """The page as a tree. Every element must be closed where it should."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert len(reader.open) == 1, reader.open[-1].tag
    return reader.open[0]
