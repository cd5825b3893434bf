"""Images: none, broken ones, ones that decompress to all memory, other programs' formats under a harmless name."""

from __future__ import annotations

import os
import random
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO

from PIL import Image

from attacks.core import Variant, attack, attacks, holding
from attacks.good import Job

FOLDER = "data/images"
LAST = f"{FOLDER}/z.png"  # not the first of them


def png(width: int, height: int, rows: bytes = b"", bits: int = 8, color: int = 2, more: bytes = b"") -> bytes:
    """A PNG file that says it is so large, and holds these rows, packed."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + size + more + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _saved(kind: str, **options: object) -> bytes:
    memory = BytesIO()
    Image.new("RGB", (16, 16), "red").save(memory, kind, **options)
    return memory.getvalue()


def _mode(kind: str, mode: str) -> bytes:
    memory = BytesIO()
    Image.new(mode, (16, 16)).save(memory, kind)
    return memory.getvalue()


def _tiff(changes: dict[int, int], more: int = 0) -> bytes:
    """A picture of 16 x 16 grey pixels, but for tags; the next one, if any, begins at `more`."""
    tags = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: 16, 279: 256, **changes}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", more)
    return head.ljust(200, b"\0") + b"\x80" * (256 if not changes else 0)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(touch run) system\nshowpage\n%%EOF\n"
FILES: dict[str, bytes] = {
    "empty": b"",
    "text": b"no image\n",
    "html": b"<html></html>",
    "zeros": b"\0" * 1000,
    "signature-only": b"\x89PNG\r\n\x1a\n",
    "cut": png(16, 16, random.Random(0).randbytes(16 * 49))[:-200],
    "no-pixels": png(0, 0),
    "no-width": png(0, 16),
    "unknown-bits": png(16, 16, b"\0" * 16 * 49, bits=7),
    "unknown-color": png(16, 16, b"\0" * 16 * 49, color=9),
    "bad-data": png(16, 16, b"").replace(b"IDAT", b"IDAT", 1)[:-30] + b"\xff" * 30,
    "huge": png(65_000, 65_000),
    "huger": png(2**31 - 1, 2**31 - 1),
    "wide": png(2**31 - 1, 1),
    "large": png(20_000, 20_000, b"\0" * 1000, bits=1, color=0),
    "postscript": EPS,
    "tiff-cut": _saved("TIFF")[:400],
    "tiff-huge": _tiff({256: 2**20, 257: 2**20}),
    "tiff-of-itself": _tiff({273: 8}, more=8),
    "tiff-floats": _mode("TIFF", "F"),
    "tiff-32-bits": _mode("TIFF", "I"),
    "ppm-huge": b"P6 100000 100000 255\n" + b"\0" * 100,
    "ppm-cut": b"P5 16 16 65535\n\0",
    "pfm": b"Pf 4 4 -1.0\n" + b"\0" * 64,
    "pcx": _saved("PCX"),
    "icon": _saved("ICO"),
    "pdf": b"%PDF-1.4\n1 0 obj<<>>endobj\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "fits": b"SIMPLE  =                    T" + b" " * 3000,
    "jpeg-cut": _saved("JPEG")[:200],
    "webp-cut": _saved("WEBP")[:30],
    "bmp-huge": b"BM" + struct.pack("<IHHIIiiHHI", 100, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, 0) + b"\0" * 40,
    "bmp-negative": b"BM" + struct.pack("<IHHIIiiHHI", 100, 0, 0, 54, 40, -16, -(2**31), 1, 24, 0) + b"\0" * 40,
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
}


@attacks("clip")
def files() -> Iterator[Variant]:
    for name, data in FILES.items():
        yield name, (LAST, "image"), holding(LAST, data)


@attack(LAST, ("image", "pixels"), kind="clip")
def thirteen_thousand_by_thirteen_thousand(job: Job) -> None:
    """Twenty kilobytes, which are half a gigabyte in colors."""
    job.write(LAST, png(13_000, 13_000, b"\0" * 13_000 * 1626, bits=1, color=0))


@attack(LAST, ("image", "pixels"), kind="clip")
def nine_thousand_by_nine_thousand(job: Job) -> None:
    job.write(LAST, png(9_000, 9_400, b"\0" * 9_400 * 1126, bits=1, color=0))


@attack(LAST, "image", kind="clip")
def a_text_that_unpacks(job: Job) -> None:
    text = b"Comment\0\0" + zlib.compress(b"\0" * 2**26, 9)
    job.write(LAST, png(16, 16, b"\0" * 16 * 49, more=_chunk(b"zTXt", text)))


@attack(LAST, ("image", "bytes", "large"), kind="clip")
def a_file_without_end(job: Job) -> None:
    job.write(LAST, png(16, 16, b"\0" * 16 * 49))
    job.sparse(LAST, 2**40)


@attack(FOLDER, ("file", "image"), kind="clip")
def a_pipe(job: Job) -> None:
    job.write(LAST, "")
    job.pipe(LAST)
    for name in ("a", "b", "c"):
        job.path(f"{FOLDER}/{name}.png").unlink()


@attack(FOLDER, ("image", "name", "xff", "udcff"), kind="clip")
def a_name_that_is_no_text(job: Job) -> None:
    with open(os.fsencode(job.path(FOLDER)) + b"/\xff.png", "wb") as file:
        file.write(b"no image")


@attack(FOLDER, ("image", "read"), kind="clip")
def a_name_that_acts(job: Job) -> None:
    job.write(f"{FOLDER}/\x1b[31mred.png", b"no image")


@attacks("clip")
def folders() -> Iterator[Variant]:
    def empty(job: Job) -> None:
        for file in job.path(FOLDER).iterdir():
            file.unlink()

    def texts(job: Job) -> None:
        empty(job)
        job.write(f"{FOLDER}/notes.txt", "none")

    def hidden(job: Job) -> None:
        job.path(f"{FOLDER}/.hidden").mkdir()
        for file in list(job.path(FOLDER).glob("*.png")):
            file.rename(job.path(f"{FOLDER}/.hidden/{file.name}"))

    def folder(job: Job) -> None:
        empty(job)
        job.path(f"{FOLDER}/a.png").mkdir()

    def circle(job: Job) -> None:
        empty(job)
        job.link(f"{FOLDER}/a.png", "a.png")

    def dangling(job: Job) -> None:
        empty(job)
        job.link(f"{FOLDER}/a.png", "nothing.png")

    for damage in (empty, texts, hidden, folder, circle, dangling):
        yield damage.__name__, (FOLDER, ("image", "read")), damage


@attack("data/images", ("pixel", "processor"), kind="llama")
def images_for_a_decoder(job: Job) -> None:
    from data_files import save_image

    save_image(job.path("data/images/a.png"), "red")
    job.expert(data="data/images")


@attack("data/math.jsonl", ("tokenizer", "pixel"), kind="clip")
def texts_for_a_vision_model(job: Job) -> None:
    job.write("data/math.jsonl", '{"text": "a"}\n')
    job.expert(data="data/math.jsonl")
