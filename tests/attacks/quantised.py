"""Quantised experts: descriptions of weights that lie, parts that are missing, misshapen or of another type."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file

from attacks.core import Needle, Variant, attack, attacks, slug, valued
from attacks.good import QUANTISED, WEIGHTS, Job

FILE = f"math/{WEIGHTS}"
NAME = f"{QUANTISED}.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
STATES: dict[str, list[Any]] = {
    "blocksize": [None, 0, -1, 1.5, "64", True, [], {}, 1, 63, 10**30, 2**63],
    "dtype": [None, 5, "x", "float64", "int8", [], {}, True, "float32\0"],
    "shape": [
        *(None, 5, "x", [], {}, [16], [256], [16, -16], [0, 16], [16, 17], [16.0, 16], ["16", "16"], [True, 256]),
        *([10**30], [10**30, 16], [2**40, 2**40], [8, 32], [16, 16, 1], [1] * 100 + [256], [[16], [16]]),
    ],
    "nested_blocksize": [0, -1, 1.5, "256", True, [], {}, 1, None],
    "nested_dtype": ["float64", "x", 5, [], None],
    "nested_offset": [None, "0.1", [], {}, True, 1e300, "x"],
}


def _described(values: dict[str, Any] | bytes) -> torch.Tensor:
    data = values if isinstance(values, bytes) else json.dumps(values).encode()
    return torch.tensor(list(data), dtype=torch.uint8)


def _state(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(load_file(job.path(FILE))[STATE].numpy().tobytes())
    return found


def _put(name: str, value: torch.Tensor | Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Job], None]:
    return lambda job: job.tensors(FILE, **{name: value})


@attacks("nf4")
def states() -> Iterator[Variant]:
    for key, values in STATES.items():
        for value in values:

            def damage(job: Job, key: str = key, value: Any = value) -> None:
                _put(STATE, _described({**_state(job), key: value}))(job)

            yield f"{key}-{slug(value)}", ("math", "q_proj"), damage
        if not key.startswith("nested"):

            def remove(job: Job, key: str = key) -> None:
                _put(STATE, _described({own: value for own, value in _state(job).items() if own != key}))(job)

            yield f"{key}-gone", (FILE, "q_proj"), remove


@attacks("nf4")
def documents() -> Iterator[Variant]:
    for name, data in {
        "null": b"null",
        "a-list": b"[]",
        "a-number": b"5",
        "no-json": b"{{",
        "zeros": b"\0" * 50,
        "no-utf-8": b'{"\xff": 1}',
        "nested": b"[" * 100_000,
        "nested-closed": b'{"other": ' + b"[" * 500 + b"]" * 500 + b"}",
        "nan": b'{"blocksize": 64, "dtype": "float32", "shape": [16, 16], "nested_offset": NaN}',
        "infinity": b'{"blocksize": 64, "dtype": "float32", "shape": [16, 16], "nested_offset": 1e999}',
        "doubled": b'{"blocksize": 64, "blocksize": 64, "dtype": "float32", "shape": [16, 16]}',
        "digits": b'{"blocksize": ' + b"9" * 5000 + b"}",
    }.items():
        yield name, (FILE, "q_proj"), _put(STATE, _described(data))


# Changes of a part that make another weight of it, or none.
PARTS: dict[str, dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    NAME: {"longer": lambda t: torch.cat([t, t]), "shorter": lambda t: t[1:], "nothing": lambda t: t[:0]},
    f"{NAME}.quant_map": {
        "int64": lambda t: t.to(torch.int64),
        "uint8": lambda t: t.to(torch.uint8),
        "float16": lambda t: t.half(),
        "float64": lambda t: t.double(),
        "longer": lambda t: torch.cat([t, t]),
        "deeper": lambda t: t.reshape(4, 4),
        "bools": lambda t: t > 0,
    },
    f"{NAME}.absmax": {
        "int64": lambda t: t.to(torch.int64),
        "float32": lambda t: t.float(),
        "int8": lambda t: t.view(torch.int8),
        "longer": lambda t: torch.cat([t, t]),
        "deeper": lambda t: t[:, None],
        "bools": lambda t: t > 0,
    },
    f"{NAME}.nested_absmax": {
        "int64": lambda t: t.to(torch.int64),
        "float64": lambda t: t.double(),
        "bfloat16": lambda t: t.bfloat16(),
        "longer": lambda t: torch.cat([t, t]),
        "deeper": lambda t: t[:, None],
    },
    f"{NAME}.nested_quant_map": {
        "int64": lambda t: t.to(torch.int64),
        "float16": lambda t: t.half(),
        "shorter": lambda t: t[1:],
        "deeper": lambda t: t.reshape(16, 16),
    },
    STATE: {"float32": lambda t: t.float(), "int64": lambda t: t.long(), "nothing": lambda t: t[:0]},
}


@attacks("nf4")
def parts() -> Iterator[Variant]:
    for part, changes in PARTS.items():
        short = part.removeprefix(NAME).strip(".").split(".")[0] or "codes"
        for name, change in changes.items():
            yield f"{short}-{name}", ("math", "q_proj"), _put(part, change)
        yield f"{short}-gone", ("math", "q_proj"), lambda job, p=part: job.tensors(FILE, p)


@attack(FILE, "absmax", kind="nf4")
def scales_that_are_codes_of_nothing(job: Job) -> None:
    """uint8, where the description tells of no nested quantisation."""
    kept = {key: value for key, value in _state(job).items() if not key.startswith("nested")}
    _put(STATE, _described(kept))(job)


@attack(FILE, "q_proj", kind="nf4")
def two_descriptions(job: Job) -> None:
    _put(STATE.replace("nf4", "fp4"), _described({**_state(job), "quant_type": "fp4"}))(job)


@attack(FILE, ("nf5", "q_proj"), kind="nf4")
def an_unknown_kind(job: Job) -> None:
    job.header(FILE, lambda found: {key.replace("bitsandbytes__nf4", "bitsandbytes__nf5"): found[key] for key in found})


@attack("math", ("extra", "q_proj"), kind="nf4")
def a_description_of_nothing(job: Job) -> None:
    _put(STATE.replace("q_proj", "extra"), _described(_state(job)))(job)


@attack("math", ("quantised", "dtype"), kind="nf4")
def a_config_that_does_not_tell(job: Job) -> None:
    job.json("math/config.json", "quantization_config")


@attack("math", ("gptq", "quantised"), kind="nf4")
def another_method(job: Job) -> None:
    job.json("math/config.json", quantization_config={"quant_method": "gptq"})


# Of LLM.int8.
SCALES, LAYOUT = f"{QUANTISED}.SCB", f"{NAME}_format"
EIGHT: dict[str, dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    NAME: {
        "uint8": lambda t: t.view(torch.uint8),
        "int64": lambda t: t.long(),
        "bools": lambda t: t > 0,
        "flat": lambda t: t.reshape(-1),
        "deeper": lambda t: t[None],
        "longer": lambda t: torch.cat([t, t]),
        "nothing": lambda t: t[:0],
        "no-width": lambda t: t[:, :0],
    },
    SCALES: {
        "int64": lambda t: t.long(),
        "uint8": lambda t: t.to(torch.uint8),
        "bools": lambda t: t > 0,
        "longer": lambda t: torch.cat([t, t]),
        "deeper": lambda t: t[:, None],
        "one": lambda t: t[:1],
    },
    LAYOUT: {"tiles": lambda t: t + 2, "float32": lambda t: t.float() + 1},
}


@attacks("int8")
def eight_bit() -> Iterator[Variant]:
    needle: Needle = ("q_proj", "SCB")
    for part, changes in EIGHT.items():
        short = {NAME: "codes", SCALES: "scales", LAYOUT: "format"}[part]
        for name, change in changes.items():
            yield f"{short}-{name}", ("math", needle), _put(part, change)
        if part != LAYOUT:
            yield f"{short}-gone", ("math", needle), lambda job, p=part: job.tensors(FILE, p)
    for value in ("x", 5, "float64", "int8", [], {}):
        yield (
            f"dtype-{slug(value)}",
            ("math", ("dtype", "float")),
            valued("math/config.json", "dtype", value),
        )


@attacks("int8", calibrate_only="values of weights are read with their layer")
def scales_not_finite() -> Iterator[Variant]:
    for value in (float("nan"), float("inf")):
        yield slug(value), (FILE, NAME), _put(SCALES, lambda t, v=value: torch.full_like(t, v))


@attacks("nf4", calibrate_only="values of weights are read with their layer")
def parts_not_finite() -> Iterator[Variant]:
    for part in (f"{NAME}.quant_map", f"{NAME}.nested_absmax", f"{NAME}.nested_quant_map"):
        yield part.rpartition(".")[2], (FILE, NAME), _put(part, lambda t: torch.full_like(t, float("nan")))
