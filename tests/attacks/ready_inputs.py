"""Ready inputs: tensors that no model takes, ids and masks that mislead it, files that ask for all memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from attacks.core import Variant, attack, attacks, slug
from attacks.good import Job

FILE = "data/math.safetensors"
Change = Callable[[torch.Tensor], torch.Tensor]


def _put(**changes: torch.Tensor | Change) -> Callable[[Job], None]:
    return lambda job: job.tensors(FILE, **changes)


def _first(value: float) -> Change:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def _raw(job: Job, header: dict[str, Any], size: int) -> None:
    """A file of `size` bytes of zeros behind a header."""
    text = json.dumps(header).encode()
    job.write(FILE, len(text).to_bytes(8, "little") + text)
    job.sparse(FILE, 8 + len(text) + size)


@attacks()
def ids() -> Iterator[Variant]:
    for name, change in {
        "next": _first(20),
        "far": _first(2**40),
        "negative": _first(-1),
        "least": _first(-(2**63)),
        "float": lambda t: t.float(),
        "float16": lambda t: t.half(),
        "complex": lambda t: t.to(torch.complex64),
        "bools": lambda t: t > 5,
        "flat": lambda t: t[:, 0],
        "deeper": lambda t: t[:, :, None],
        "none": lambda t: t[:0],
        "empty": lambda t: t[:, :0],
        "longer": lambda t: torch.cat([t] * 4, dim=1),
        "unsigned": lambda t: (t - 1).to(torch.uint64),
    }.items():
        yield name, (FILE, "input_ids"), _put(input_ids=change)


@attacks()
def masks() -> Iterator[Variant]:
    for name, change in {
        "two": _first(2),
        "negative": _first(-1),
        "zeros": lambda t: t * 0,
        "a-row-of-zeros": lambda t: torch.cat([t[:1] * 0, t[1:]]),
        "half": lambda t: t * 0.5,
        "nan": lambda t: t * float("nan"),
        "complex": lambda t: t.to(torch.complex64),
        "shorter": lambda t: t[:, 1:],
        "longer": lambda t: torch.cat([t, t], dim=1),
        "fewer": lambda t: t[1:],
        "more": lambda t: torch.cat([t, t]),
        "flat": lambda t: t[:, 0],
        "deeper": lambda t: t[:, None, :],
        "square": lambda t: t[:, :, None].expand(-1, -1, t.shape[1]),
        "causal": lambda t: t[:, None, :, None].expand(-1, 1, -1, t.shape[1]),
        "one-wide": lambda t: t[:, :1],
    }.items():
        yield name, (FILE, "attention_mask"), _put(attention_mask=change)


UNKNOWN = ("attention_masks", "input_idz", "mask", "Attention_mask", "label", "x" * 10**5, "\x1b[31mred", "self", "")


@attacks()
def unknown() -> Iterator[Variant]:
    for name in UNKNOWN:

        def damage(job: Job, name: str = name) -> None:
            found = torch.ones(4, 20, dtype=torch.int64)
            job.tensors(FILE, **{"placeholder": found})
            job.header(FILE, lambda header: {name if key == "placeholder" else key: header[key] for key in header})

        yield slug(name), (FILE, name[-20:].removeprefix("\x1b[31m") or "expected"), damage


@attacks()
def others_arguments() -> Iterator[Variant]:
    """What a forward takes, but no calibration data may say."""
    for name, value in {
        "pixel_values": torch.zeros(4, 3, 16, 16),
        "output_attentions": torch.ones(4, 1, dtype=torch.int64),
        "past_key_values": torch.zeros(4, 2),
        "kwargs": torch.zeros(4, 2),
        "return_dict": torch.zeros(4, 1),
        "inputs_embeds": torch.zeros(4, 20, 16),
    }.items():
        yield name, (FILE, name), _put(**{name: value})


@attack("math", "input")
def masks_only(job: Job) -> None:
    job.tensors(FILE, "input_ids")


@attack(FILE, ("zero samples", "nothing", "tensors", "input_ids"))
def no_tensors(job: Job) -> None:
    job.write(FILE, (8).to_bytes(8, "little") + b"{}      ")


@attacks()
def sizes() -> Iterator[Variant]:
    """Shapes that ask for all memory, in small files or in files that take no room."""
    ids = {"dtype": "I64", "shape": [1, 4], "data_offsets": [0, 32]}
    for name, header, size in (
        ("samples-without-tokens", {"input_ids": {"dtype": "I64", "shape": [2**30, 0], "data_offsets": [0, 0]}}, 0),
        ("all-samples", {"input_ids": {"dtype": "I64", "shape": [2**62, 0], "data_offsets": [0, 0]}}, 0),
        ("wide", {"input_ids": {"dtype": "U8", "shape": [1, 2**31], "data_offsets": [0, 2**31]}}, 2**31),
        ("wider", {"input_ids": {"dtype": "I64", "shape": [1, 2**37], "data_offsets": [0, 2**40]}}, 2**40),
        (
            "mask",
            {
                "input_ids": ids,
                "attention_mask": {"dtype": "U8", "shape": [1, 2**30], "data_offsets": [32, 32 + 2**30]},
            },
            32 + 2**30,
        ),
    ):
        yield (
            name,
            (FILE, ("input_ids", "attention_mask", "samples", "tokens", "memory")),
            (lambda job, h=header, s=size: _raw(job, h, s)),
        )


@attack(FILE, ("attention_mask", "zeros"))
def a_mask_of_a_gigabyte(job: Job) -> None:
    shape = [2**24, 64]
    header = {name: {"dtype": "U8", "shape": shape} for name in ("input_ids", "attention_mask")}
    header["input_ids"]["data_offsets"], header["attention_mask"]["data_offsets"] = [0, 2**30], [2**30, 2**31]
    _raw(job, header, 2**31)


@attacks()
def files() -> Iterator[Variant]:
    for name, damage in {
        "empty": lambda data: b"",
        "cut": lambda data: data[:-8],
        "cut-in-the-header": lambda data: data[:50],
        "longer": lambda data: data + b"\0" * 8,
        "git-lfs": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "zip": lambda data: b"PK\x03\x04" + data,
        "huge-header": lambda data: (2**63).to_bytes(8, "little") + data[8:],
    }.items():
        yield name, (FILE, "safetensors"), lambda job, d=damage: job.edit(FILE, d)
    for name, value in {
        "nested": b"[" * 100_000,
        "nan": b'{"a": NaN}',
        "null": b"null",
        "no-utf-8": b'{"\xff": 1}',
    }.items():
        yield f"header-{name}", (FILE, ("safetensors", "header")), lambda job, v=value: job.header(FILE, lambda _: v)
    for key, value in (("dtype", ["I64"]), ("dtype", "X"), ("shape", [-4, -20]), ("shape", "x"), ("data_offsets", [0])):

        def change(job: Job, key: str = key, value: Any = value) -> None:
            job.header(FILE, lambda header: header["input_ids"].update({key: value}))

        yield f"field-{key}-{slug(value)}", (FILE, ("safetensors", "input_ids")), change


@attack(FILE, "input_ids", ("twice", "there"))
def a_tensor_twice(job: Job) -> None:
    job.header(
        FILE,
        lambda header: f'{json.dumps(header)[:-1]}, "input_ids": {json.dumps(header["attention_mask"])}}}'.encode(),
    )


@attack(FILE, ("file", "regular"))
def a_pipe(job: Job) -> None:
    job.pipe(FILE)


@attack(FILE, ("file", "regular"))
def an_endless_device(job: Job) -> None:
    job.link(FILE, "/dev/zero")


@attacks("bert")
def encoder_inputs() -> Iterator[Variant]:
    ones = torch.ones(4, 20, dtype=torch.int64)
    for name, tensor, value in (
        ("types-out-of-range", "token_type_ids", ones * 2),
        ("types-negative", "token_type_ids", -ones),
        ("types-float", "token_type_ids", ones.float()),
        ("types-shorter", "token_type_ids", ones[:, 1:]),
        ("positions-out-of-range", "position_ids", ones * 64),
        ("positions-negative", "position_ids", -ones),
        ("positions-shorter", "position_ids", ones[:, 1:]),
        ("labels", "labels", ones),
    ):
        yield name, (FILE, tensor), _put(**{tensor: value})
    yield "next", (FILE, "input_ids"), _put(input_ids=_first(100))


@attacks("clip")
def pixels() -> Iterator[Variant]:
    file = "data/code.safetensors"
    for name, change in {
        "nan": _first(float("nan")),
        "inf": _first(float("inf")),
        "integers": lambda t: t.long(),
        "complex": lambda t: t.to(torch.complex64),
        "no-width": lambda t: t[..., :0],
        "no-height": lambda t: t[:, :, :0],
        "no-channels": lambda t: t[:, :0],
        "one-channel": lambda t: t[:, :1],
        "four-channels": lambda t: torch.cat([t, t[:, :1]], dim=1),
        "smaller": lambda t: t[..., :8, :8],
        "larger": lambda t: torch.cat([t, t], dim=-1),
        "flat": lambda t: t.reshape(len(t), -1),
        "deeper": lambda t: t[:, None],
        "none": lambda t: t[:0],
        "last-channel": lambda t: t.permute(0, 2, 3, 1),
    }.items():
        yield name, (file, "pixel_values"), lambda job, c=change: job.tensors(file, pixel_values=c)
    yield (
        "of-another-name",
        (file, "pixels"),
        lambda job: job.tensors(file, "pixel_values", pixels=torch.zeros(8, 3, 16, 16)),
    )
    yield (
        "with-a-mask",
        (file, "attention_mask"),
        lambda job: job.tensors(file, attention_mask=torch.ones(8, 17, dtype=torch.int64)),
    )


@attacks("t5")
def targets() -> Iterator[Variant]:
    for name, change in {
        "out-of-range": _first(100),
        "negative": _first(-5),
        "none": lambda t: t * 0 - 100,
        "float": lambda t: t.float(),
        "deeper": lambda t: t[:, None],
        "empty": lambda t: t[:, :0],
    }.items():
        yield name, (FILE, "labels"), _put(labels=change)
    yield "gone", (FILE, "labels"), lambda job: job.tensors(FILE, "labels")
    ones = torch.ones(4, 11, dtype=torch.int64)
    for name, tensor, value in (
        ("decoder-out-of-range", "decoder_input_ids", ones * 100),
        ("decoder-negative", "decoder_input_ids", -ones),
        ("decoder-mask-shorter", "decoder_attention_mask", ones[:, 1:]),
        ("decoder-mask-of-twos", "decoder_attention_mask", ones * 2),
    ):
        yield name, (FILE, tensor), _put(**{tensor: value})
