"""Texts: lines that are no JSON, no sample, of two kinds, without end; tokens that the model has not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from attacks.core import Needle, Variant, attack, attacks, holding, slug
from attacks.good import Job

FILE = "data/math.jsonl"
LINES: dict[str, tuple[bytes, Needle]] = {
    "a-list": (b"[]", "line 2"),
    "null": (b"null", "line 2"),
    "a-number": (b"5", "line 2"),
    "a-text": (b'"a b"', "line 2"),
    "no-json": (b"{text: a}", "line 2"),
    "unclosed": (b'{"text": "a', "line 2"),
    "two-in-one": (b'{"text": "a"} {"text": "b"}', "line 2"),
    "more-behind": (b'{"text": "a"},', "line 2"),
    "single-quotes": (b"{'text': 'a'}", "line 2"),
    "no-utf-8": (b'{"text": "\xff\xfe"}', "line 2"),
    "cut-character": (b'{"text": "\xc3"}', "line 2"),
    "overlong": (b'{"text": "\xc0\xaf"}', "line 2"),
    "zero": (b'{"text": "a\0b"}', "line 2"),
    "control-character": (b'{"text": "a\x1bb"}', "line 2"),
    "nan": (b'{"text": NaN}', "line 2"),
    "infinity": (b'{"text": Infinity}', "line 2"),
    "large-number": (b'{"text": 1e999}', "line 2"),
    "digits": (b'{"text": ' + b"9" * 5000 + b"}", "line 2"),
    "doubled": (b'{"text": "a", "text": "b"}', ("line 2", "twice")),
    "doubled-below": (b'{"text": {"a": 1, "a": 2}}', "line 2"),
    "nested-lists": (b"[" * 100_000, "line 2"),
    "nested-mappings": (b'{"text":' * 100_000, "line 2"),
    "nested-closed": (b'{"text": ' + b"[" * 500 + b"]" * 500 + b"}", "line 2"),
    "a-byte-order-mark": (b'\xef\xbb\xbf{"text": "a"}', "line 2"),
    "no-keys": (b"{}", "line 2"),
    "unknown-key": (b'{"txet": "a"}', "txet"),
    "key-with-escape": (b'{"\\u001b[31mtext": "a"}', "line 2"),
    "long-key": (b'{"' + b"k" * 10**6 + b'": "a"}', "line 2"),
    "another-kind": (b'{"prompt": "a", "completion": "b"}', "line 2"),
    "half-a-kind": (b'{"prompt": "a"}', "prompt"),
    "empty": (b'{"text": ""}', ("line 2", "zero tokens")),
    "surrogate": (b'{"text": "\\ud800"}', "line 2"),
    "half-of-a-pair": (b'{"text": "a\\udc00b"}', "line 2"),
}
TEXTS: list[Any] = [None, 5, 1.5, True, [], ["a"], {}, {"a": "b"}]
MESSAGES: list[Any] = [
    *(None, 5, "a b", True, [], {}, [5], ["a"], [None], [[]], [{}], [{"role": "user"}], [{"content": "a"}]),
    *({"role": "user", "content": "a"}, [[{"role": "user", "content": "a"}]]),
]


@attacks("texts")
def lines() -> Iterator[Variant]:
    for name, (line, needle) in LINES.items():

        def damage(job: Job, line: bytes = line) -> None:
            job.edit(FILE, lambda data: b"\n".join([data.splitlines()[0], line, *data.splitlines()[2:]]))

        yield name, (FILE, needle), damage


@attacks("texts")
def texts() -> Iterator[Variant]:
    for value in TEXTS:
        line = json.dumps({"text": value})
        yield slug(value), (f"{FILE}, line 1", "text"), holding(FILE, line)
    for value in TEXTS:
        line = json.dumps({"prompt": "a", "completion": value})
        yield f"completion-{slug(value)}", (f"{FILE}, line 1", "completion"), holding(FILE, line)


@attacks("texts")
def messages() -> Iterator[Variant]:
    for value in MESSAGES:
        line = json.dumps({"messages": value})
        yield slug(value), ("data/code.jsonl, line 1", "messages"), holding("data/code.jsonl", line)


@attacks("texts")
def files() -> Iterator[Variant]:
    for name, data in {
        "empty": b"",
        "blank-lines": b"\n\n  \n\t\n",
        "gzip": b"\x1f\x8b\x08\0" + bytes(range(256)),
        "utf-16": '{"text": "a"}\n'.encode("utf-16"),
        "one-object": b'{\n"text": "a"\n}\n',
        "an-array": b'[\n{"text": "a"},\n{"text": "b"}\n]\n',
        "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "csv": b"text\na b c\n",
    }.items():
        yield name, (FILE, ("line", "zero samples", "UTF-8")), holding(FILE, data)


@attack(FILE, ("line", "bytes", "large"), kind="texts")
def a_line_without_end(job: Job) -> None:
    job.sparse(FILE, 2**40)


@attack(FILE, ("line", "bytes", "large"), kind="texts")
def a_line_of_forty_megabytes(job: Job) -> None:
    job.write(FILE, b'{"text": "' + b"a " * (2 * 10**7) + b'"}\n')


@attack(FILE, ("line", "bytes", "large", "sample"), kind="texts")
def five_million_lines(job: Job) -> None:
    job.write(FILE, b"1\n" * (5 * 10**6))


@attack(FILE, ("file", "regular"), kind="texts")
def a_pipe(job: Job) -> None:
    job.pipe(FILE)


@attack(FILE, ("file", "regular"), kind="texts")
def an_endless_device(job: Job) -> None:
    job.link(FILE, "/dev/urandom")


@attack(FILE, ("file", "read", "folder"), kind="texts")
def a_folder(job: Job) -> None:
    job.path(FILE).unlink()
    job.path(FILE).mkdir()


@attack(FILE, "math.txt", kind="texts")
def another_suffix(job: Job) -> None:
    job.path(FILE).rename(job.path("data/math.jsonl.math.txt"))
    job.expert(data="data/math.jsonl.math.txt")


@attack(FILE, "max_length", kind="texts")
def longer_than_the_model_takes(job: Job) -> None:
    job.expert(max_length=65)


@attack(FILE, "max_length", kind="texts")
def shorter_than_special_tokens(job: Job) -> None:
    job.expert(max_length=2)


@attack(FILE, "rights", kind="texts", as_user=True)
def may_not_be_read(job: Job) -> None:
    job.path(FILE).chmod(0)
