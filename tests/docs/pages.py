"""Markdown pages, taken apart: blocks of code, headings, tables, links."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("featcal_fast", "kernels", "bench", "tests", "docs", "examples")
PAGES = [
    path
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
        *sorted((ROOT / "docs").glob("*.md")),
        *(ROOT / name / "README.md" for name in ("bench", "examples")),
    )
    if path.is_file()
]


@dataclass(frozen=True)
class Block:
    """A fenced block of code: what stands behind its fence, its text, and the number of the text's first line."""

    kind: str
    text: str
    line: int


class Page:
    """One Markdown file, or a text in its place."""

    def __init__(self, path: Path, text: str | None = None) -> None:
        self.path = path
        self._tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text() if text is None else text)

    @cached_property
    def blocks(self) -> list[Block]:
        """In order. A block that is only indented says nothing of its kind and is of kind `indented`."""
        kinds = {"fence": lambda token: token.info.strip(), "code_block": lambda _token: "indented"}
        return [
            Block(kinds[token.type](token), token.content, token.map[0] + (2 if token.type == "fence" else 1))
            for token in self._tokens
            if token.type in kinds and token.map
        ]

    @cached_property
    def headings(self) -> list[tuple[int, str]]:
        """Level and text of each, in order."""
        return [
            (int(opening.tag[1:]), _text(inline))
            for opening, inline in pairwise(self._tokens)
            if opening.type == "heading_open"
        ]

    @cached_property
    def anchors(self) -> set[str]:
        """What links to a heading end in, as GitHub makes it."""
        seen: Counter[str] = Counter()
        found = set()
        for _, text in self.headings:
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
        return found

    @cached_property
    def links(self) -> list[str]:
        """Targets of links and images."""
        return [str(child.attrs[key]) for child in self._inline for key in ("href", "src") if key in child.attrs]

    @cached_property
    def files(self) -> list[str]:
        """What stands in backticks and looks like a file or folder of the project."""
        spans = [child.content for child in self._inline if child.type == "code_inline"]
        return [span for span in spans if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]*", span) and "NAME" not in span]

    @property
    def _inline(self) -> list[Token]:
        return [child for token in self._tokens for child in token.children or ()]

    def table(self, heading: str) -> list[list[str]]:
        """The rows, without the head, of the tables below the heading of this text."""
        rows: list[list[str]] = []
        inside = body = False
        for token, after in pairwise(self._tokens):
            if token.type == "heading_open":
                inside = _text(after) == heading
            elif token.type in ("tbody_open", "tbody_close"):
                body = token.type == "tbody_open"
            elif inside and body and token.type == "tr_open":
                rows.append([])
            elif inside and body and token.type == "td_open":
                rows[-1].append(after.content)
        assert rows, f"{self.path.name} has no table below a heading {heading!r}"
        return rows


def codes(cell: str) -> list[str]:
    """What stands in backticks in a cell of a table."""
    return re.findall(r"`([^`]+)`", cell)


def _text(inline: Token) -> str:
    return "".join(child.content for child in inline.children or ())
