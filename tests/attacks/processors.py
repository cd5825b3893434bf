"""Image processors: documents that are none, sizes that ask for all memory, numbers that make pixels of nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attacks.core import Needle, Variant, attack, attacks, broken_texts, holding, slug, valued
from attacks.good import Job

FILE = "merged/preprocessor_config.json"
VALUES: dict[str, list[Any]] = {
    "size": [
        *("x", [], {"a": 1}, {"shortest_edge": "x"}, {"shortest_edge": 0}, {"shortest_edge": -4}, 1.5),
        *(
            {"shortest_edge": 10**5},
            {"shortest_edge": 10**9},
            {"shortest_edge": 10**30},
        ),
    ],
    "crop_size": [
        *("x", [], {"a": 1}, {"height": "x", "width": 16}, {"height": 0, "width": 0}, {"height": -1, "width": -1}),
        *({"height": 20000, "width": 20000}, {"height": 10**9, "width": 10**9}, {"height": 8, "width": 8}, 20, 20000),
        {"height": 10**30, "width": 1},
    ],
    "image_mean": ["x", {}, ["x", "y", "z"], [0.5], [0.5] * 4, [1e300] * 3],
    "image_std": ["x", {}, ["x", "y", "z"], [0.5], [0.5] * 4, [0, 0, 0], [1e-300] * 3],
    "rescale_factor": ["x", [], {}, 1e300],
    "resample": ["x", 99, -1, [], {}],
    "do_center_crop": [False],
    "image_processor_type": [5, [], {}, "Nope", "os.system", "\x1b[31mCLIPImageProcessor", "CLIPModel"],
}


@attacks("clip")
def values() -> Iterator[Variant]:
    needle: Needle = ("preprocessor_config", "image", "pixel")
    for key, wrong in VALUES.items():
        for value in wrong:
            yield (
                f"{key}-{slug(value)}",
                (("merged", "data/images"), needle),
                valued(FILE, key, value),
            )


@attacks("clip")
def documents() -> Iterator[Variant]:
    for name, damage in broken_texts(FILE):
        yield name, ("merged", ("processor", "json")), damage
    for name, data in {
        "a-list": b"[]",
        "null": b"null",
        "empty": b"{}",
        "nested": b"[" * 100_000,
        "nested-closed": b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
        "digits": b'{"a": ' + b"9" * 5000 + b"}",
        "spaces": b" " * (17 * 2**20),
    }.items():
        yield name, ("merged", ("processor", "json", "bytes")), holding(FILE, data)
    for name, text in {
        "doubled": '"size": {"shortest_edge": 17}',
        "nan": '"rescale_factor": NaN',
        "large": '"rescale_factor": 1e999',
    }.items():
        yield (
            name,
            ("merged", ("processor", "json", name)),
            lambda job, t=text: job.edit(FILE, lambda data: data.rstrip()[:-1] + b", " + t.encode() + b"}"),
        )


@attack("merged", "processor", kind="clip")
def code_of_its_own(job: Job) -> None:
    job.write("merged/code.py", "import pathlib; pathlib.Path(__file__).with_name('was-run').write_text('')\n")
    job.json(FILE, auto_map={"AutoImageProcessor": "code.P"}, image_processor_type="MineImageProcessor")


@attack("merged", "processor", kind="clip")
def a_pipe(job: Job) -> None:
    job.pipe(FILE)


@attack("merged", "processor", kind="clip")
def an_endless_device(job: Job) -> None:
    job.link(FILE, "/dev/zero")


@attack("data/images", "processor", kind="clip")
def gone(job: Job) -> None:
    job.path(FILE).unlink()


@attack(("out:", "merged"), ("free", "processor"), kind="clip")
def without_end(job: Job) -> None:
    job.sparse(FILE, 2**40)
