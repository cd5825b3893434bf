"""Experts in GGUF files: headers that count more than there is, and tensors that lie elsewhere, or are others."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from attacks.core import Variant, attack, attacks
from attacks.good import Job

FILE = "math.gguf"
HUGE = (2**31, 2**32, 2**62, 2**63 - 1, 2**64 - 1)
COUNTS = {"tensors": 8, "entries": 16, "key": 24}  # where the first of each is


def _at(position: int, data: bytes) -> object:
    return lambda job: job.edit(FILE, lambda found: found[:position] + data + found[position + len(data) :])


@attacks("gguf")
def counts() -> Iterator[Variant]:
    for name, position in COUNTS.items():
        for count in HUGE:
            yield f"{name}-{count}", ("expert math", FILE), _at(position, struct.pack("<Q", count))


@attacks("gguf")
def entries() -> Iterator[Variant]:
    """A first entry before the others, of a length that there is not."""
    for kind in (4, 7, 8, 9, 12, 13, 2**32 - 1):
        for count in HUGE:
            value = struct.pack("<IQ", kind, count)
            entry = struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9) + value

            def damage(job: Job, entry: bytes = entry) -> None:
                def change(found: bytes) -> bytes:
                    (number,) = struct.unpack_from("<Q", found, 16)
                    return found[:16] + struct.pack("<Q", number + 1) + entry + found[24:]

                job.edit(FILE, change)

            yield f"{kind}-{count}", ("expert math", FILE), damage


@attacks("gguf")
def lists_in_lists() -> Iterator[Variant]:
    for depth in (1, 1000, 100_000):
        entry = struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth
        yield str(depth), ("expert math", FILE), lambda job, e=entry: job.edit(FILE, lambda f: f[:24] + e + f[24:])


@attacks("gguf")
def cut() -> Iterator[Variant]:
    for share in (0, 1, 5, 20, 30, 50, 90, 99):
        yield str(share), ("expert math", FILE), lambda job, s=share: job.edit(FILE, lambda f: f[: len(f) * s // 100])


@attacks("gguf")
def struck() -> Iterator[Variant]:
    """The first tensor's number of dimensions, their sizes, its type and place."""
    name = b"blk.0.attn_q.weight"
    for offset, form in ((0, "I"), (4, "Q"), (12, "Q"), (20, "I"), (24, "Q")):
        for value in (1, 2**31, 2**32 - 1, 2**63) if form == "Q" else (1000, 2**31, 2**32 - 1):

            def damage(job: Job, offset: int = offset, form: str = form, value: int = value) -> None:
                def change(found: bytes) -> bytes:
                    position = found.index(name) + len(name) + offset
                    return found[:position] + struct.pack(f"<{form}", value) + found[position + struct.calcsize(form) :]

                job.edit(FILE, change)

            yield f"{offset}-{value}", ("expert math", FILE), damage


@attack("expert math", FILE, kind="gguf")
def an_endless_list_of_empty_texts(job: Job) -> None:
    """In a file that takes no room."""
    entry = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, 2**24)
    job.write(FILE, b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)
    job.sparse(FILE, 2**28)


@attack("expert math", FILE, kind="gguf")
def nothing_but_zeros(job: Job) -> None:
    job.write(FILE, b"GGUF" + struct.pack("<IQQ", 3, 400_000, 10_000))
    job.sparse(FILE, 2**30)


@attack("expert math", FILE, kind="gguf")
def a_pipe(job: Job) -> None:
    job.pipe(FILE)


@attack("base model", "GGUF", kind="gguf")
def a_base(job: Job) -> None:
    job.recipe(base_model=FILE)


@attack("merged model", "GGUF", kind="gguf")
def a_merged_model(job: Job) -> None:
    job.recipe(merged_model=FILE)


@attack("expert math", "outside", kind="gguf")
def a_link_out_of_the_folder(job: Job) -> None:
    job.path("set").mkdir()
    job.path(FILE).rename(job.path("set/m-00001-of-00001.gguf"))
    job.outside("set/m-00001-of-00001.gguf")
    job.expert(model="set")
