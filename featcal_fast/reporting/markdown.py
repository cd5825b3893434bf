"""Markdown of texts that may be a stranger's: nothing in a name is markup, breaks a table, or ends a fence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from featcal_fast.errors import one_line

# What Markdown takes for markup within a line, and what GitHub's and the hub's make links of.
MARKUP = re.compile(r"[\\`*\[\]<>|&~$#!@]|(?<![^\W_])_|_(?![^\W_])|(?<=:)/(?=/)|(?<=www)\.", re.IGNORECASE)
PLAIN = re.compile(r"[\w./=+-](?:[\w ,./@=+-]*[\w./=+-])?")
# What a line may be in, lists and quotes, and what it may be.
INSIDE = r"[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*"
FENCE = re.compile(INSIDE + r"(`{3,}(?=[^`]*$)|~{3,})")
HEADING = re.compile(r"( {0,3})(#{1,6})(?=[ \t\r\n]|$)")
UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*\r?\n?")
OTHER = re.compile(r"(?: {4}|\t| {0,3}(?:[>|<]|[-*+][ \t]|\d{1,9}[.)][ \t]|(?:[-*_][ \t]*){3,}\r?\n?$))")


def escaped(text: str) -> str:
    """A text as it is read, in one line."""
    return MARKUP.sub(r"\\\g<0>", one_line(text))


def code(text: str) -> str:
    """A text as code, in one line; in a table too, where a pipe would end its cell."""
    text = one_line(text)
    if PLAIN.fullmatch(text):
        return f"`{text}`"
    return f"<code>{''.join(each if each.isalnum() or each in ' .' else f'&#{ord(each)};' for each in text)}</code>"


def fenced(text: str, language: str = "") -> str:
    """Lines as code, whatever fences they hold."""
    longest = max((len(each) for each in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """Rows of cells that are Markdown already.

    Args:
        titles: of the columns.
        rows: with a cell for each.
        numbers: how many columns, from the right, are numbers.
    """
    marks = ["---"] * (len(titles) - numbers) + ["---:"] * numbers
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, marks, *rows))


def demoted(text: str, by: int) -> str:
    """A document whose headings are so many levels lower, 6 at most; nothing else of it changes, its code least of all.

    Headings that are underlined become one line each, as there are only two levels of them.
    """
    lines: list[str] = []
    fence, begun, fresh = "", -1, True  # where the paragraph began that a line may underline; whether one may begin
    for line in re.split(r"(?<=\n)", text):
        if fence:
            if re.match(rf"[ \t>]*{re.escape(fence[0])}{{{len(fence)},}}[ \t]*\r?\n?$", line):
                fence = ""
        elif found := FENCE.match(line):
            fence, begun, fresh = found[1], -1, True
        elif found := HEADING.match(line):
            line = f"{found[1]}{_marks(len(found[2]) + by)}{line[found.end() :]}"
            begun, fresh = -1, True
        elif begun >= 0 and (found := UNDERLINE.fullmatch(line)):
            title = " ".join(each.strip() for each in lines[begun:])
            line = f"{_marks((1 if found[1][0] == '=' else 2) + by)} {title}\n"
            del lines[begun:]
            begun, fresh = -1, True
        elif not line.strip() or OTHER.match(line):
            begun, fresh = -1, not line.strip()
        elif fresh:
            begun, fresh = len(lines), False
        lines.append(line)
    return "".join(lines)


def _marks(level: int) -> str:
    return "#" * min(level, 6)
