"""Tasks of the sentence encoder: texts and the numbers of their classes.

A text with two classes is left out, and no text is in two parts: of mails, no subject.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from bench.real.texts import PARTS, built, docstrings, entries, mails, part_of, reviews, shuffled

COUNTS = {"test": 3000, "validation": 1000, "training": 16000}  # at most, of a task
OF_A_CLASS = 60  # texts at least, where a class is one of many that could be taken
OF_A_MODULE = 250  # texts at most: two modules have as many as all others
SHORTEST, LONGEST = 40, 400  # characters, of mails and docstrings
SENSES = """
top act animal artifact attribute body cognition communication event feeling food group location
motive object person phenomenon plant possession process quantity relation shape state substance time
body change cognition communication competition consumption contact creation emotion motion perception
possession social stative weather
"""  # WordNet's lexicographer files, from the third: first of nouns, then of verbs
LISTS = {  # of mails, by what their headers have
    "fork": r"\bfork\b",
    "ilug": r"\[ilug\]|\bilug@|<ilug\.",
    "rpm": r"rpm-zzzlist|rpm-list",
    "razor users": r"razor-users",
    "spamassassin talk": r"spamassassin-talk|\[satalk\]",
    "spamassassin devel": r"spamassassin-devel|\[sadev\]",
    "spambayes": r"spambayes",
    "exmh workers": r"exmh-workers",
    "exmh users": r"exmh-users",
    "zzzzteana": r"zzzzteana",
}
# What names a list, in its mails; addresses name people and lists.
NAMES = r"\S+@\S+|\S*://\S+|www\.\S+|\S*(fork|ilug|rpm|razor|spam-?assassin|satalk|sa-?dev|spambayes|exmh|zzz)\S*"


@dataclass(frozen=True)
class Task:
    """Texts to classify.

    Attributes:
        name: as in `tasks`.
        classes: their names.
        parts: by part, texts and the numbers of their classes, in a fixed random order, but that training begins with
            a text of each class.
        files: by part, the number of the file that a text is from (of a mail: its subject). Texts of a file are not
            independent.
    """

    name: str
    classes: tuple[str, ...]
    parts: dict[str, list[tuple[str, int]]]
    files: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    text: str
    label: str
    file: str  # belongs to one part


def tasks(archives: Mapping[str, Path]) -> dict[str, Task]:
    """By name; one whose source could not be had is left out."""
    return _tasks(tuple(sorted(archives.items())))


@cache
def _tasks(paths: tuple[tuple[str, Path], ...]) -> dict[str, Task]:
    archives = dict(paths)
    return built(
        {
            "nouns": lambda: task("nouns", _senses(archives, "n")),
            "verbs": lambda: task("verbs", _senses(archives, "v")),
            "modules": lambda: task("modules", _large(_modules())),
            "reviews": lambda: task("reviews", _reviews(archives)),
            "mails": lambda: task("mails", _lists(archives)),
        }
    )


def task(name: str, examples: Iterable[Example]) -> Task:
    """Of examples whose text has one class, those of an earlier part first where a text is in several."""
    labels: dict[str, set[str]] = {}
    by_part: dict[str, list[Example]] = {part: [] for part in PARTS}
    for each in examples:
        labels.setdefault(_plain(each.text), set()).add(each.label)
        by_part[part_of(each.file)].append(each)
    seen: set[str] = set()
    chosen: dict[str, list[Example]] = {}
    for part in PARTS:
        chosen[part] = []
        for each in shuffled(by_part[part], key=lambda each: each.text):
            plain = _plain(each.text)
            if len(labels[plain]) == 1 and plain not in seen:
                seen.add(plain)
                chosen[part].append(each)
    firsts = {each.label: each for each in reversed(chosen["training"])}
    classes = tuple(sorted(firsts))
    chosen["training"] = list(dict.fromkeys([*(firsts[label] for label in classes), *chosen["training"]]))
    for part, found in chosen.items():
        chosen[part] = [each for each in found if each.label in firsts][: COUNTS[part]]
    numbers: dict[str, int] = {}
    files = {part: [numbers.setdefault(each.file, len(numbers)) for each in chosen[part]] for part in PARTS}
    parts = {part: [(each.text, classes.index(each.label)) for each in chosen[part]] for part in PARTS}
    return Task(name, classes, parts, files)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _senses(archives: Mapping[str, Path], kind: str) -> Iterable[Example]:
    """Glosses without their examples, which have the word itself."""
    names = dict(enumerate(SENSES.split(), 3))
    for entry in entries(archives):
        gloss = re.split(r'; *"', entry.gloss)[0]
        if entry.kind == kind and gloss:
            yield Example(gloss, names[entry.supersense], entry.key)


def _modules() -> Iterable[Example]:
    """Which module of the standard library a docstring is from; its name is taken away."""
    for module, docstring in docstrings():
        name = module.removeprefix("_py").strip("_")
        text = re.sub(rf"\b{re.escape(name)}\b", "", " ".join(docstring.split()), flags=re.IGNORECASE)[:LONGEST]
        if len(text) >= SHORTEST:
            yield Example(text, name, _plain(text))


def _large(examples: Iterable[Example]) -> list[Example]:
    """Classes that are large enough, and of each no more than `OF_A_MODULE`."""
    found = shuffled(examples, key=lambda each: each.text)
    sizes = Counter(each.label for each in found)
    taken: Counter[str] = Counter()
    kept = []
    for each in found:
        taken[each.label] += 1
        if sizes[each.label] >= OF_A_CLASS and taken[each.label] <= OF_A_MODULE:
            kept.append(each)
    return kept


def _reviews(archives: Mapping[str, Path]) -> Iterable[Example]:
    for _, text, positive in reviews(archives):
        yield Example(text, "positive" if positive else "negative", _plain(text))


def _lists(archives: Mapping[str, Path]) -> Iterable[Example]:
    """The beginning of a mail, and which mailing list it went to, if to one alone."""
    for mail in mails(archives):
        lists = [name for name, pattern in LISTS.items() if re.search(pattern, mail.to.lower())]
        text = " ".join(re.sub(NAMES, "", mail.body[: 4 * LONGEST], flags=re.IGNORECASE).split())[:LONGEST]
        if len(lists) == 1 and len(text) >= SHORTEST:
            yield Example(text, lists[0], mail.subject)
