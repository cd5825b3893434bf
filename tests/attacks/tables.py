"""Data sets in folders: tables that are none, cut off or of other columns; descriptions that lead elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from attacks.core import Variant, attack, attacks, holding, slug, valued
from attacks.good import Job

SAVED, TABLE = "data/set", "data/tables/part.parquet"
STATE, INFO, ARROW = f"{SAVED}/state.json", f"{SAVED}/dataset_info.json", f"{SAVED}/data-00000-of-00001.arrow"


@attacks("table")
def saved() -> Iterator[Variant]:
    for file in (STATE, INFO):
        for name, data in {
            "empty": b"",
            "no-json": b"{",
            "a-list": b"[]",
            "nested": b"[" * 100_000,
            "nested-mappings": b'{"a":' * 100_000,
            "no-utf-8": b'{"\xff": 1}',
        }.items():
            yield f"{file.rpartition('/')[2]}-{name}", (SAVED, ("data set", "cannot be read")), holding(file, data)
    for value in ("../../../../../../etc/passwd", "/etc/passwd", "", ".", "..", 5, None, "\x1b[31m", "a\0b", "n" * 300):
        yield (
            f"part-{slug(value)}",
            (SAVED, ("part", "data set", "cannot be read")),
            valued(STATE, "_data_files", [{"filename": value}]),
        )
    wrong: list[Any] = [5, None, "x", {}, [5], [{}]]
    for value in wrong:
        yield (
            f"parts-{slug(value)}",
            (SAVED, ("data set", "part", "cannot be read")),
            valued(STATE, "_data_files", value),
        )
    for value in (5, "x", {"text": 5}, {"text": {"_type": "os.system"}}, {"text": {"dtype": "nope", "_type": "Value"}}):
        yield f"features-{slug(value)}", (SAVED, "cannot be read"), valued(INFO, "features", value)


@attacks("table")
def splits() -> Iterator[Variant]:
    for name in ("../../outside", "/etc", "..", "\x1b[31m"):

        def damage(job: Job, name: str = name) -> None:
            job.path(SAVED).rename(job.path("data/whole"))
            job.path(SAVED).mkdir()
            job.path("data/whole").rename(job.path(f"{SAVED}/train"))
            job.write(f"{SAVED}/dataset_dict.json", f'{{"splits": ["train", {json.dumps(name)}]}}')

        yield slug(name), (SAVED, ("part", "splits", "cannot be read")), damage


@attacks("table")
def contents() -> Iterator[Variant]:
    for name, data in {"empty": b"", "zeros": b"\0" * 100, "magic": b"PAR1" + b"\0" * 100 + b"PAR1"}.items():
        yield f"arrow-{name}", (SAVED, "cannot be read"), holding(ARROW, data)
        yield f"parquet-{name}", ("data/tables", "cannot be read"), lambda job, d=data: _table(job, d)
    yield "arrow-cut", (SAVED, "cannot be read"), lambda job: job.edit(ARROW, lambda data: data[: len(data) // 2])
    yield "parquet-cut", ("data/tables", "cannot be read"), lambda job: _table(job, job.path(TABLE).read_bytes()[:-50])


def _table(job: Job, data: bytes) -> None:
    job.write(TABLE, data)
    job.expert(data="data/tables")


@attack("data/tables", ("regular file", "cannot be read"), kind="table")
def a_pipe(job: Job) -> None:
    job.pipe(TABLE)
    job.expert(data="data/tables")


@attack("data/tables", ("regular file", "cannot be read"), kind="table")
def an_endless_device(job: Job) -> None:
    job.link(TABLE, "/dev/zero")
    job.expert(data="data/tables")


@attack(SAVED, ("cannot be read", "expected a"), kind="table")
def a_script(job: Job) -> None:
    """Old versions of `datasets` ran it."""
    job.path(STATE).unlink()
    job.path(ARROW).unlink()
    job.write(f"{SAVED}/set.py", "import pathlib; pathlib.Path(__file__).with_name('was-run').write_text('')\n")


@attack("data/tables", ("text", "large", "memory", "bytes"), kind="table")
def a_text_again_and_again(job: Job) -> None:
    """A few kilobytes, which are six hundred megabytes of texts."""
    import pyarrow as pa
    from pyarrow import parquet

    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 300), pa.array(["a " * 10**6]))
    parquet.write_table(pa.table({"text": texts}), job.path(TABLE), store_schema=False)
    job.expert(data="data/tables")
