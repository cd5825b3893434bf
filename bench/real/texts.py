"""Texts of the language model's domains, and of one that none covers: the same archives and Python, the same texts.

A text belongs to the part that its file belongs to: a source file, the mails of one subject, an entry of WordNet.
What nearly repeats a text of another part is left out.
"""

from __future__ import annotations

import ast
import email
import email.message
import json
import re
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from bench.language.llama import NOT_CODE
from bench.real.sources import SourceError, archive, member, members

PARTS = ("test", "validation", "training")
SHARES = {"test": 20, "validation": 10}  # in a hundred files
COUNTS = {"test": 600, "validation": 300, "training": 4500}  # at most, of a domain
SHORTEST, LONGEST = 250, 400  # bytes of a text
PER_FILE = {"test": 8, "validation": 8, "training": 16}  # texts at most
WORDS = 6  # in a row make a phrase: texts with a quarter of their phrases in common nearly repeat each other
CLASSES = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
# What introduces a quoted mail, here "\0": "On Monday, A <a@b.c>\nwrote:", "A said:".
INTRODUCED = re.compile(r"^((On|At|In|Quoting)\b[^\n]*(\n[^\n]+)?|[^\n]*):[ \t]*\n\s*\0", re.MULTILINE)
T = TypeVar("T")


@dataclass(frozen=True)
class Text:
    """A text, and the file that it is from: texts of one file are in one part."""

    text: str
    file: str


Domain = dict[str, list[Text]]  # by part, in a fixed random order


def domains(archives: Mapping[str, Path]) -> dict[str, Domain]:
    """By domain; one whose source could not be had is left out."""
    return _domains(tuple(sorted(archives.items())))


@cache
def _domains(paths: tuple[tuple[str, Path], ...]) -> dict[str, Domain]:
    archives = dict(paths)
    return built({"code": _code, "mails": lambda: _mails(archives), "glossary": lambda: _glossary(archives)})


def other(archives: Mapping[str, Path]) -> list[Text]:
    """Text of what no domain covers, reviews, in a fixed random order; nothing if they could not be had."""
    found = built({"other text": lambda: _joined((text, name) for name, text, _ in reviews(archives))})
    return shuffled(found.get("other text", []), key=lambda each: each.text)


def fingerprint(found: Any) -> str:
    """The SHA-256 of texts, in any form of dictionaries, lists, tuples and dataclasses."""
    return sha256(json.dumps(found, default=asdict, sort_keys=True).encode()).hexdigest()


def built(makers: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """What can be made; of the rest, a line that says why not."""
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except SourceError as error:
            print(f"{name} is left out: {error}")
    return found


def part_of(file: str) -> str:
    """The same part for the same name, always."""
    place = int(sha256(file.encode()).hexdigest()[:8], 16) % 100
    if place < SHARES["test"]:
        return "test"
    return "validation" if place < sum(SHARES.values()) else "training"


def shuffled(items: Iterable[T], key: Callable[[T], str]) -> list[T]:
    """In a random order that depends on nothing but each item's own key."""
    return sorted(items, key=lambda item: sha256(f"order {key(item)}".encode()).digest())


# Domains


def _code() -> Domain:
    return parted(Text(piece, name) for name, source in library().items() for piece in pieces(source))


def _mails(archives: Mapping[str, Path]) -> Domain:
    found = ((piece, mail.subject) for mail in mails(archives) for piece in pieces(mail.body))
    return parted(Text(*each) for each in found if each[0].isascii())  # others are of many and of wrong encodings


def _glossary(archives: Mapping[str, Path]) -> Domain:
    """Entries as in a glossary, a few to a text: its file is its first entry."""
    by_part: dict[str, list[tuple[str, str]]] = {part: [] for part in PARTS}
    for entry in shuffled(entries(archives), key=lambda each: each.key):
        by_part[part_of(entry.key)].append((f"{entry.lemma} ({CLASSES[entry.kind]}): {entry.gloss}", entry.key))
    return _chosen({part: _joined(found, separator="\n") for part, found in by_part.items()})


def parted(texts: Iterable[Text]) -> Domain:
    """By the files' parts."""
    found: Domain = {part: [] for part in PARTS}
    for text in texts:
        found[part_of(text.file)].append(text)
    return _chosen(found)


def _chosen(found: Domain) -> Domain:
    """At most `COUNTS`, and `PER_FILE` of a file, less what nearly repeats a text before it or of an earlier part."""
    seen: set[str] = set()
    chosen: Domain = {}
    for part in PARTS:
        files: Counter[str] = Counter()
        chosen[part] = []
        for text in shuffled(found[part], key=lambda each: each.text):
            said = phrases(text.text)
            if len(chosen[part]) == COUNTS[part]:
                break
            if files[text.file] < PER_FILE[part] and 4 * len(said & seen) <= len(said):
                chosen[part].append(text)
                files[text.file] += 1
                seen |= said
    return chosen


def phrases(text: str) -> set[str]:
    """All runs of `WORDS` words."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[at : at + WORDS]) for at in range(len(words) - WORDS + 1)}


def pieces(text: str) -> Iterator[str]:
    """Runs of whole lines of `SHORTEST` to `LONGEST` bytes, one after the other; what fits in none is left out."""
    part = ""
    for line in text.splitlines(keepends=True):
        if len((part + line).encode()) > LONGEST:
            part = ""  # a shorter one is left out, and so is a line that is too long
        part += line if len(line.encode()) <= LONGEST else ""
        if len(part.strip().encode()) >= SHORTEST:
            yield part.strip("\n")
            part = ""


def _joined(found: Iterable[tuple[str, str]], separator: str = " ") -> list[Text]:
    """Short texts and their files, joined to `SHORTEST` to `LONGEST` bytes; a text's file is the first one's."""
    texts: list[Text] = []
    parts: list[str] = []
    first = ""
    for text, file in found:
        first = first if parts else file
        parts.append(text)
        joined = separator.join(parts)
        if len(joined.encode()) >= SHORTEST:
            texts += [Text(joined, first)] if len(joined.encode()) <= LONGEST else []
            parts = []
    return texts


# What the sources hold


@cache
def library() -> dict[str, str]:
    """The standard library's source files by their path, less tests and what other packages put there.

    Raises:
        SourceError: there are none.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = {path.relative_to(root): path for path in root.rglob("*.py")}
    found = {
        name.as_posix(): path.read_text(encoding="utf-8", errors="replace")
        for name, path in sorted(paths.items())
        if not NOT_CODE & set(name.parts)
    }
    if not found:
        raise SourceError(f"this Python has no source files in {root}")
    return found


def docstrings() -> Iterator[tuple[str, str]]:
    """Modules of the standard library, and what their functions and classes say of themselves."""
    for name, source in library().items():
        try:
            nodes: list[ast.AST] = [*ast.parse(source).body]
        except SyntaxError:
            continue
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield name.split("/")[0].removesuffix(".py"), ast.get_docstring(node) or ""
            for block in ("body", "orelse"):  # no function is in an expression
                nodes += getattr(node, block, ()) if isinstance(node, ast.stmt) else ()


@dataclass(frozen=True)
class Entry:
    """A synset: its first lemma, part of speech, gloss and the number of its lexicographer file."""

    key: str
    lemma: str
    kind: str
    gloss: str
    supersense: int


@cache
def _entries(path: Path) -> tuple[Entry, ...]:
    found = []
    for name in ("noun", "verb", "adj", "adv"):
        for line in member(path, f"package/dict/data.{name}").decode("utf-8", "replace").splitlines():
            if not line.startswith(" "):  # the licence
                head, _, gloss = line.partition(" | ")
                offset, supersense, kind, _, lemma = head.split(" ")[:5]
                lemma = re.sub(r"\(\w+\)$", "", lemma).replace("_", " ")
                found.append(Entry(f"{kind}{offset}", lemma, kind, gloss.strip(), int(supersense)))
    return tuple(found)


def entries(archives: Mapping[str, Path]) -> Sequence[Entry]:
    """WordNet's."""
    return _entries(archive(archives, "wordnet"))


def reviews(archives: Mapping[str, Path]) -> Iterator[tuple[str, str, int]]:
    """Where a sentence is from, the sentence, and whether it is positive."""
    path = archive(archives, "reviews")
    for name in ("amazon", "imdb", "yelp"):
        for row in json.loads(member(path, f"package/test/fixtures/{name}.json")):
            yield name, row["text"].strip(), row["class"]


@dataclass(frozen=True)
class Mail:
    """What its sender wrote: without headers, quoted mails, signature, and what a list appends.

    Attributes:
        subject: without what stands before it: a question and its answers have one.
        body: lines of at most 80 characters.
        to: the headers that a mailing list is known by.
    """

    subject: str
    body: str
    to: str


@cache
def _mails_of(path: Path) -> tuple[Mail, ...]:
    wanted = re.compile(r"package/data/(easy|hard)-ham-\d/[^/]+\.json")
    found = sorted(members(path, lambda name: wanted.fullmatch(name) is not None))
    if not found:
        raise SourceError(f"{path.name} has no mails")
    mails = (email.message_from_string(json.loads(data)["text"]) for _, data in found)
    return tuple(_mail(mail) for mail in mails if "rssfeeds" not in str(mail["From"]))


def mails(archives: Mapping[str, Path]) -> Sequence[Mail]:
    """Those that are not spam, less what a machine made of news feeds."""
    return _mails_of(archive(archives, "mails"))


def _mail(mail: email.message.Message) -> Mail:
    subject = re.sub(r"(\[[^\]]*\]|\b(re|fwd?|aw)\s*:|\s)+", " ", str(mail["Subject"]).lower()).strip()
    to = " ".join(str(mail[name]) for name in ("List-Id", "To", "Cc", "Subject"))
    plain = next((part for part in mail.walk() if part.get_content_type() == "text/plain"), None)
    if plain is None:
        return Mail(subject, "", to)
    data = plain.get_payload(decode=True)
    assert isinstance(data, bytes)
    return Mail(subject, written(data.decode("latin-1")), to)


def written(body: str) -> str:
    """Of a mail's body, what its sender wrote."""
    kept: list[str] = []
    for line in body.replace("\0", "").splitlines():
        if re.match(r"--|__|==|To unsubscribe", line):  # a signature, what a list appends, a forwarded mail
            break
        if re.match(r"\s*([>|:}%#]|\w{1,3}>)", line):
            kept.append("\0")
        else:
            kept += textwrap.wrap(line, 80) if len(line) > 80 else [line.rstrip()]
    text = INTRODUCED.sub("", "\n".join(kept)).replace("\0", "")
    return re.sub(r"\n{3,}", "\n\n", text).strip()
