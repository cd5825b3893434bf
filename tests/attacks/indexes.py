"""Indexes of models in several files: names that leave the folder, that are none, and what does not belong together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from safetensors.torch import load_file, save_file

from attacks.core import Variant, attack, attacks, broken_texts, holding, slug, valued
from attacks.good import Job

INDEX = "merged/model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NAME = "model.layers.0.self_attn.q_proj.weight"  # is in the first
# Names of files that no tensor may be in, and what of them must be named.
FILES: dict[str, Any] = {
    "absolute": "/etc/passwd",
    "absolute-weights": "/tmp/model.safetensors",
    "up": "../base/model.safetensors",
    "up-far": "../../../../../../etc/passwd.safetensors",
    "below": "deep/model.safetensors",
    "here": f"./{FIRST}",
    "backslashes": "..\\base\\model.safetensors",
    "another-suffix": "pytorch_model.bin",
    "no-suffix": "model",
    "suffix-only": ".safetensors",
    "itself": "model.safetensors.index.json",
    "empty": "",
    "dot": ".",
    "dots": "..",
    "nothing": None,
    "number": 5,
    "truth": True,
    "list": [FIRST],
    "mapping": {"file": FIRST},
    "missing": "model-00003-of-00002.safetensors",
    "long": "n" * 300 + ".safetensors",
    "very-long": "n" * 10**6 + ".safetensors",
    "zero": "a\0.safetensors",
    "surrogate": "\udcff.safetensors",
    "escape": "\x1b[31mred.safetensors",
    "right-to-left": "\u202esrotcnes.safetensors",
    "newline": "a\nb.safetensors",
    "other-file": SECOND,
}


def _place(value: Any) -> Callable[[Job], None]:
    def damage(job: Job) -> None:
        listed = json.loads(job.path(INDEX).read_text())["weight_map"]
        job.json(INDEX, weight_map={**listed, NAME: value})

    return damage


@attacks("sharded")
def files() -> Iterator[Variant]:
    for name, value in FILES.items():
        yield name, ("merged", (NAME, "safetensors")), _place(value)


@attacks("sharded")
def maps() -> Iterator[Variant]:
    for value in (None, 5, "x", [], [[NAME, FIRST]], {}, True):
        yield slug(value), (INDEX, ("weight_map", "index")), valued(INDEX, "weight_map", value)
    yield "gone", (INDEX, "weight_map"), lambda job: job.json(INDEX, "weight_map")


@attacks("sharded")
def documents() -> Iterator[Variant]:
    for name, damage in broken_texts(INDEX):
        yield name, (INDEX, ("index", "json")), damage
    for name, data in {
        "a-list": b"[]",
        "null": b"null",
        "nested": b'{"weight_map": ' + b"[" * 100_000,
        "nested-closed": b'{"metadata": ' + b"[" * 500 + b"]" * 500 + b', "weight_map": {}}',
        "nan": b'{"metadata": {"total_size": NaN}, "weight_map": {}}',
        "infinity": b'{"metadata": {"total_size": 1e999}, "weight_map": {}}',
        "digits": b'{"metadata": {"total_size": ' + b"9" * 5000 + b'}, "weight_map": {}}',
        "spaces": b" " * (17 * 2**20),
    }.items():
        yield name, (INDEX, ("index", "json", "bytes")), holding(INDEX, data)


@attack(INDEX, "twice", kind="sharded")
def a_tensor_twice(job: Job) -> None:
    job.edit(INDEX, lambda data: data.replace(b'"weight_map": {', f'"weight_map": {{"{NAME}": "{SECOND}", '.encode()))


@attack(INDEX, "twice", kind="sharded")
def a_map_twice(job: Job) -> None:
    job.edit(INDEX, lambda data: data.replace(b'"metadata": {}', b'"weight_map": {}'))


@attack(INDEX, "unknown.weight", kind="sharded")
def a_tensor_that_no_file_has(job: Job) -> None:
    listed = json.loads(job.path(INDEX).read_text())["weight_map"]
    job.json(INDEX, weight_map={**listed, "unknown.weight": FIRST})


@attack("merged", NAME, kind="sharded")
def a_tensor_in_both_files(job: Job) -> None:
    """The index says the first one; which is read must not depend on their order."""
    tensor = load_file(job.path(f"merged/{FIRST}"))[NAME]
    save_file({**load_file(job.path(f"merged/{SECOND}")), NAME: tensor + 1}, job.path(f"merged/{SECOND}"))


@attack("merged", FIRST, kind="sharded")
def a_file_that_is_gone(job: Job) -> None:
    job.path(f"merged/{FIRST}").unlink()


@attack("merged", FIRST, "link", kind="sharded")
def a_file_from_outside(job: Job) -> None:
    job.outside(f"merged/{FIRST}")


@attack("merged", "index", "link", kind="sharded")
def an_index_from_outside(job: Job) -> None:
    job.outside(INDEX)


@attack("merged", FIRST, kind="sharded")
def a_file_that_is_a_pipe(job: Job) -> None:
    job.pipe(f"merged/{FIRST}")


@attack("merged", "index", kind="sharded")
def an_index_that_is_a_pipe(job: Job) -> None:
    job.pipe(INDEX)


@attack("merged", "index", kind="sharded")
def an_index_without_end(job: Job) -> None:
    job.sparse(INDEX, 2**40)


@attack("merged", FIRST, kind="sharded")
def a_file_that_is_a_folder(job: Job) -> None:
    job.path(f"merged/{FIRST}").unlink()
    job.path(f"merged/{FIRST}").mkdir()
