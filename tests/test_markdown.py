"""Texts of strangers within a page in Markdown: fenced, and with headings below those of the page."""

from __future__ import annotations

import re

import pytest
from markdown_it import MarkdownIt

from featcal_fast.reporting.markdown import demoted, fenced


def test_a_fence_is_longer_than_what_it_holds() -> None:
    assert fenced("a\n````\nb", "yaml") == "`````yaml\na\n````\nb\n`````"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# A\n## B #\n###### F\n#no\n#\n", "### A\n#### B #\n###### F\n#no\n###\n"),
        ("A\n===\n\nB\nmore\n---\nrest\n", "### A\n\n#### B more\nrest\n"),
        ("```\n# code\n```\n# A", "```\n# code\n```\n### A"),
        ("~~~~ sh\n# code\n~~~\n```\n# more\n~~~~~\n# A\n", "~~~~ sh\n# code\n~~~\n```\n# more\n~~~~~\n### A\n"),
        ("1. ```sh\n   # code\n   ```\n# A\n", "1. ```sh\n   # code\n   ```\n### A\n"),
        ("> ```\n> # code\n> ```\n\n# A\n", "> ```\n> # code\n> ```\n\n### A\n"),
        ("```never ended\n# code\n", "```never ended\n# code\n"),
        ("`` ` `` ```x``` y\n# A\n", "`` ` `` ```x``` y\n### A\n"),
        ("    # code\n\t# code\n   # A\n", "    # code\n\t# code\n   ### A\n"),
        ("a\n\n---\n\n- b\nc\n---\n| d |\n---\n> e\n---\n", "a\n\n---\n\n- b\nc\n---\n| d |\n---\n> e\n---\n"),
        ("# A\r\n\r\nB\r\n===\r\ntext\r\n", "### A\r\n\r\n### B\ntext\r\n"),
        ("a \x0c \u2028 # b\n", "a \x0c \u2028 # b\n"),
        ("", ""),
    ],
)
def test_headings_of_a_section(text: str, expected: str) -> None:
    assert demoted(text, 2) == expected


def test_headings_are_those_that_readers_of_markdown_find() -> None:
    parser = MarkdownIt("commonmark")
    text = "# A\n\nText.\n\n## B\n### C\n\n```yaml\n# the whole of it\nx: y\n```\n\n###### D\n# E\n"
    before, after = (
        [int(each.tag[1]) for each in parser.parse(page) if each.type == "heading_open"]
        for page in (text, demoted(text, 2))
    )
    assert [min(level + 2, 6) for level in before] == after
    assert len(before) == 5
    assert re.sub("(?m)^#+", "", text) == re.sub("(?m)^#+", "", demoted(text, 2))
