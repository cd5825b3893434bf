"""Files of texts: packed ones that unpack to far more than they are, arrays without end, rows that take too much."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from typing import Any

from attacks.core import Needle, Variant, attacks
from attacks.good import Job

MANY = 40 * 2**20


def _zstandard() -> Any:
    import zstandard  # an extra

    return zstandard.ZstdCompressor().compressobj()


def _bomb(packer: Any, piece: bytes) -> bytes:
    packed = [packer.compress(piece * 2**20) for _ in range(150)]
    return b"".join([*packed, packer.flush()])


FORMS: dict[str, tuple[str, Any, Needle]] = {
    "gzip-of-zeros": ("jsonl.gz", lambda: _bomb(zlib.compressobj(9, 8, 31), b"\0"), ("line", "unpacks")),
    "gzip-of-lines": ("txt.gz", lambda: _bomb(zlib.compressobj(9, 8, 31), b"\n"), "unpacks"),
    "zstd-of-lines": ("txt.zst", lambda: _bomb(_zstandard(), b"\n"), "unpacks"),
    "bzip2-of-lines": ("txt.bz2", lambda: _bomb(bz2.BZ2Compressor(), b"\n"), "unpacks"),
    "xz-of-commas": ("json.xz", lambda: _bomb(lzma.LZMACompressor(preset=0), b"["), ("unpacks", "longer")),
    "zeros-behind": ("jsonl.gz", lambda: gzip.compress(b"") + b"\0" * MANY, "unpacked"),
    "streams-of-nothing": ("jsonl.gz", lambda: gzip.compress(b"") * 200_000, "zero samples"),
    "cut-off": ("jsonl.gz", lambda: gzip.compress(b'{"text": "a"}\n' * 9)[:-9], "unpacked"),
    "not-packed": ("jsonl.xz", lambda: b'{"text": "a"}\n', "unpacked"),
    "array-without-end": ("json", lambda: b"[" + b'{"text": "a"},' * 10**5, "end"),
    "array-of-nothing": ("json", lambda: b"[" + b"," * 10**6 + b"]", "item"),
    "nested-arrays": ("json", lambda: b"[" * MANY, ("longer", "end")),
    "nested-in-an-item": ("json", lambda: b"[" + b"[" * 10**6 + b"]" * 10**6 + b"]", "nested"),
    "item-of-forty-megabytes": ("json", lambda: b'["' + b"a" * MANY + b'"]', "longer"),
    "two-arrays": ("json", lambda: b'["a"]["b"]', "more"),
    "two-lists": ("json", lambda: json.dumps({"one": ["a"], "two": ["b"]}), "one, two"),
    "field-of-forty-megabytes": ("csv", lambda: b'text\n"' + b"a" * MANY + b'"\n', "longer"),
    "quote-without-end": ("csv", lambda: b'text\n"' + b"a b\n" * 10**7, "longer"),
    "quote-to-the-end": ("csv", lambda: b'text\n"a b\nc\n', "line 2"),
    "columns": ("csv", lambda: b"text" + b"," * 10**7 + b"\na\n", "columns"),
    "fields": ("csv", lambda: b"text\n" + b"a," * 10**6 + b"\n", "fields"),
    "doubled": ("csv", lambda: b"text,text\na,b\n", "text"),
    "no-known-column": ("tsv", lambda: b"a\tb\n1\t2\n", "a, b"),
    "zero-byte": ("csv", lambda: b"text\na\0\n", "line 2"),
    "escapes": ("csv", lambda: b"\x1b[31mtext\na\n", "line 2"),
    "utf-16": ("csv", lambda: "text\na\n".encode("utf-16"), "UTF-16"),
    "no-utf-8": ("txt", lambda: b"a b\n\xff\n", "line 2"),
    "image-in-a-message": (
        "json",
        lambda: json.dumps([{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}]),
        ("image_url",),
    ),
}


@attacks("texts")
def files() -> Iterator[Variant]:
    for name, (ending, make, needle) in FORMS.items():

        def damage(job: Job, ending: str = ending, make: Any = make) -> None:
            job.write(f"data/math.{ending}", make())
            job.expert(data=f"data/math.{ending}")

        yield name, (f"data/math.{ending}", needle), damage
