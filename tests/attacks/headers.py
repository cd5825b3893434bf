"""Headers of safetensors files: lengths, types, shapes and offsets that lie; files that are cut, padded or others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from attacks.core import Needle, Variant, attack, attacks, holding, slug
from attacks.good import WEIGHTS, Job

MERGED, MATH = f"merged/{WEIGHTS}", f"math/{WEIGHTS}"
NAME = "model.layers.0.self_attn.q_proj.weight"  # F32, [16, 16]
Entry = dict[str, Any]

# What an entry's field must not be. The tensor has 1,024 bytes.
FIELDS: dict[str, list[Any]] = {
    "dtype": [
        *(None, 5, True, [], ["F32"], {"F32": 1}, "", "f32", "F7", "float32", "F16", "F64", "I64", "C64", "BOOL"),
        *("F8_E4M3", "\x1b[31mF32", "F32\0", "x" * 100_000),
    ],
    "shape": [
        *(None, 5, "16", {}, [], [16], [256], [16, 17], [17, 16], [-16, -16], [16, -16], [0, 16], [16.0, 16]),
        *([True, 256], ["16", "16"], [[16], [16]], [None, 16], [1e30, 1], [10**30, 1], [2**32, 2**32], [2**63, 0]),
        *([1] * 63 + [16, 16], [1] * 5000, [16, 16, 10**30]),
    ],
    "data_offsets": [
        *(None, 5, "0", {}, [], [0], [0, 1, 2], ["0", "1024"], [0.0, 1024.0], [True, False], [None, None], [[0], [1]]),
        *([-1, 1023], [1024, 0], [0, 1023], [0, 1025], [0, 2**63], [2**63, 2**64], [10**30, 10**30 + 1024]),
        *([1, 1025], [1e308, 1e308]),
    ],
}


def _entry(key: str, value: Any) -> Callable[[Job], None]:
    def change(values: dict[str, Entry]) -> None:
        values[NAME][key] = value

    return lambda job: job.header(MERGED, change)


@attacks()
def fields() -> Iterator[Variant]:
    for key, values in FIELDS.items():
        for value in values:
            yield f"{key}-{slug(value)}", ("merged", "_proj"), _entry(key, value)
        yield (
            f"{key}-gone",
            (MERGED, (key, NAME)),
            lambda job, k=key: job.header(MERGED, lambda v: v[NAME].pop(k) and v),
        )


@attacks()
def entries() -> Iterator[Variant]:
    for value in (None, 5, True, "x", [], [1, 2], {}, [["dtype", "F32"]]):
        yield slug(value), (MERGED, "header"), lambda job, v=value: job.header(MERGED, lambda h: {**h, NAME: v})


@attacks()
def documents() -> Iterator[Variant]:
    deep: dict[str, bytes] = {
        "empty": b"",
        "null": b"null",
        "number": b"5",
        "list": b"[]",
        "text": b'"x"',
        "no-json": b"{" * 40,
        "no-utf-8": b'{"\xff": 5}',
        "zeros": b"\0" * 64,
        "spaces": b" " * 64,
        "pickle": b"\x80\x04\x95cos\nsystem\n.",
        "nested-lists": b"[" * 100_000,
        "nested-lists-closed": b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
        "nested-mappings": b'{"a":' * 100_000,
        "nested-metadata": b'{"__metadata__": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        "nan": b'{"a": NaN}',
        "digits": b'{"a": ' + b"9" * 5000 + b"}",
        "utf-16": '{"a": 5}'.encode("utf-16"),
    }
    for name, data in deep.items():
        yield name, (MERGED, ("header", "safetensors")), lambda job, d=data: job.header(MERGED, lambda _: d or b" ")


@attacks()
def lengths() -> Iterator[Variant]:
    for value in (0, 1, 7, 10**5, 10**8, 10**8 + 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1):
        yield (
            str(value),
            (MERGED, ("header", "safetensors")),
            lambda job, v=value: job.edit(MERGED, lambda data: v.to_bytes(8, "little") + data[8:]),
        )


@attacks()
def sizes() -> Iterator[Variant]:
    for name, cut in {"empty": 0, "seven-bytes": 7, "length-only": 8, "in-the-header": 100}.items():
        yield name, (MATH, "safetensors"), lambda job, c=cut: job.edit(MATH, lambda data: data[:c])
    for share in (0.5, 0.9, 0.999):
        yield (
            f"cut-{share}",
            (MATH, "safetensors"),
            lambda job, s=share: job.edit(MATH, lambda data: data[: int(s * len(data))]),
        )
    for more in (1, 8, 4096):
        yield (
            f"longer-by-{more}",
            (MATH, "safetensors"),
            lambda job, m=more: job.edit(MATH, lambda data: data + b"\0" * m),
        )


@attack(MATH, ("bytes", "safetensors"))
def a_terabyte_of_nothing(job: Job) -> None:
    job.sparse(MATH, 2**40)


@attack(MATH, ("header", "large", "bytes"))
def a_header_of_a_hundred_megabytes(job: Job) -> None:
    job.write(MATH, (10**8).to_bytes(8, "little") + b"{")
    job.sparse(MATH, 10**8 + 8)


@attack(MATH, ("header", "tensors", "large"))
def a_million_tensors(job: Job) -> None:
    entry = '":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(f'"t{i}{entry}' for i in range(10**6)) + "}").encode()
    job.write(MATH, len(text).to_bytes(8, "little") + text)


@attack(("math", "merged"), ("header", "tensors", "large"))
def thirty_thousand_tensors(job: Job) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    job.header(MATH, lambda values: {**{f"model.layers.0.t{i}": entry for i in range(30_000)}, **values})


@attacks()
def others() -> Iterator[Variant]:
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n"
    yield "git-lfs", (MATH, "lfs"), lambda job: job.write(MATH, lfs)
    for name, data in {
        "html": b"<!DOCTYPE html><html><body>404</body></html>",
        "zip": b"PK\x03\x04" + b"\0" * 100,
        "gguf": b"GGUF\x03\0\0\0" + b"\0" * 100,
        "text": b"not found\n" * 5,
    }.items():
        yield name, (MATH, "safetensors"), holding(MATH, data)


def _swapped(values: dict[str, Entry]) -> None:
    """Two tensors in one place, of the same size: no gap, no overlap with others."""
    values[NAME]["data_offsets"] = values[NAME.replace("q_proj", "o_proj")]["data_offsets"]


@attack(MERGED, ("q_proj", "o_proj"))
def overlapping(job: Job) -> None:
    job.header(MERGED, _swapped)


@attack(MERGED, ("lies", "tensor"))
def partly_overlapping(job: Job) -> None:
    def change(values: dict[str, Entry]) -> None:
        start, end = values[NAME]["data_offsets"]
        values[NAME]["data_offsets"] = [start + 4, end + 4]

    job.header(MERGED, change)


@attack(MERGED, ("lies", "tensor"))
def with_a_gap(job: Job) -> None:
    job.header(MERGED, lambda values: {key: value for key, value in values.items() if key != NAME})


@attack(MERGED, NAME, ("twice", "there"))
def a_tensor_twice(job: Job) -> None:
    def change(values: dict[str, Entry]) -> bytes:
        text = json.dumps(values)
        return f"{text[:-1]}, {json.dumps(NAME)}: {json.dumps(values[NAME])}}}".encode()

    job.header(MERGED, change)


@attack(MERGED, "dtype", "twice")
def a_field_twice(job: Job) -> None:
    def change(values: dict[str, Entry]) -> bytes:
        return json.dumps(values).replace('"dtype"', '"dtype": "F16", "dtype"', 1).encode()

    job.header(MERGED, change)


@attacks()
def names() -> Iterator[Variant]:
    more: dict[str, tuple[str, Needle]] = {
        "unknown": ("model.layers.0.extra.weight", "extra"),
        "another-layer": ("model.layers.7.self_attn.q_proj.weight", "layers.7"),
        "escape": ("\x1b[31mred", "red"),
        "title": ("\x1b]0;title\x07", "title"),
        "right-to-left": ("model.\u202ethgiew", "thgiew"),
        "long": ("n" * 10**6, "nnn"),
        "newline": ("a\nb", ("tensor", "merged")),
        "zero": ("a\0b", "merged"),
        "empty": ("", "merged"),
        "doubled-by-prefix": (NAME.removeprefix("model."), "q_proj"),
        "surrogate": ("\udcff", "merged"),
    }
    for name, (tensor, needle) in more.items():
        yield (
            name,
            ("merged", needle),
            lambda job, t=tensor: job.header(
                MERGED, lambda values: {t: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, **values}
            ),
        )


@attacks()
def missing() -> Iterator[Variant]:
    for model, label in {"base": "base", "merged": "merged model", "math": "expert math"}.items():
        yield model, (label, "q_proj"), lambda job, m=model: job.tensors(f"{m}/{WEIGHTS}", NAME)
    yield "an-embedding", ("merged model", "embed_tokens"), lambda job: job.tensors(MERGED, "model.embed_tokens.weight")


@attacks()
def other_tensors() -> Iterator[Variant]:
    for name, change in {
        "longer": lambda t: torch.cat([t, t]),
        "transposed": lambda t: t[:, :8].T,
        "flat": lambda t: t.reshape(-1),
        "deeper": lambda t: t[None],
        "integers": lambda t: t.to(torch.int64),
        "bytes": lambda t: t.to(torch.uint8),
        "bools": lambda t: t > 0,
        "empty": lambda t: t[:0],
    }.items():
        for file in (MERGED, MATH):
            model = file.split("/")[0]
            yield f"{model}-{name}", (model, "q_proj"), lambda job, f=file, c=change: job.tensors(f, **{NAME: c})


def _with_nan(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


@attacks(calibrate_only="values of weights are read with their layer")
def not_finite() -> Iterator[Variant]:
    for model in ("base", "merged", "math"):
        for name, value in {"nan": float("nan"), "inf": float("inf")}.items():
            yield (
                f"{model}-{name}",
                (f"{model}/{WEIGHTS}", NAME),
                lambda job, m=model, v=value: job.tensors(f"{m}/{WEIGHTS}", **{NAME: _with_nan(v)}),
            )
