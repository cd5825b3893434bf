"""Experts of eight bits and scales: descriptions that lie, scales that are missing, misshapen or no numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from attacks.core import Variant, attack, attacks, slug
from attacks.good import QUANTISED, WEIGHTS, Job

CONFIG, FILE = "math/config.json", f"math/{WEIGHTS}"
NAME, SCALES = f"{QUANTISED}.weight", f"{QUANTISED}.weight_scale_inv"
VALUES: dict[str, list[Any]] = {
    "weight_block_size": [0, "8", [], [8], [8, 8, 8], [0, 8], [-8, 8], [8.0, 8], [True, 8], {}, [2**70, 8], [[8], [8]]],
    "expert_dtype": ["fp4", 5, []],
    "quant_method": ["modelopt", "compressed-tensors", "mxfp4", "x\x1b[2J", 5, ["fp8"]],
}
COMPRESSED: dict[str, list[Any]] = {
    "format": ["pack-quantized", "dense", None, 5, [], {}, "mixed-precision", "marlin-24"],
    "config_groups": [5, [1], "x", {"a": 5}, {"a": {"weights": 5}}, {"a": {"weights": {"group_size": "x"}}}],
    "sparsity_config": [5, "x", {"format": "sparse-24-bitmask"}],
    "transform_config": [5, {"a": 1}],
}


def _described(job: Job, **changes: Any) -> None:
    job.json(CONFIG, quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8], **changes})


@attacks("scaled")
def values() -> Iterator[Variant]:
    for key, found in VALUES.items():
        for value in found:
            yield (
                f"{key}-{slug(value)}",
                ("expert math", ("config.json", NAME, SCALES)),
                lambda job, k=key, v=value: _described(job, **{k: v}),
            )


@attacks("scaled")
def compressed() -> Iterator[Variant]:
    for key, found in COMPRESSED.items():
        for value in found:
            good = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
            yield (
                f"{key}-{slug(value)}",
                ("expert math", ("config.json", "format", "scale_inv")),
                lambda job, own={**good, key: value}: job.json(CONFIG, quantization_config=own),
            )


PARTS: dict[str, dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    NAME: {
        "int8": lambda t: t.view(torch.int8),
        "uint8": lambda t: t.view(torch.uint8),
        "int64": lambda t: t.long(),
        "float32": lambda t: t.float(),
        "flat": lambda t: t.reshape(-1),
        "nothing": lambda t: t[:0],
        "longer": lambda t: torch.cat([t.float()] * 4).to(t.dtype),
    },
    SCALES: {
        "int64": lambda t: t.long(),
        "uint8": lambda t: t.to(torch.uint8),
        "float64": lambda t: t.double(),
        "bools": lambda t: t > 0,
        "codes": lambda t: t.to(torch.float8_e4m3fn),
        "longer": lambda t: torch.cat([t, t]),
        "shorter": lambda t: t[1:],
        "deeper": lambda t: t[None],
        "flat": lambda t: t.reshape(-1),
        "nothing": lambda t: t[:0],
    },
}


@attacks("scaled")
def parts() -> Iterator[Variant]:
    for part, changes in PARTS.items():
        short = "codes" if part == NAME else "scales"
        for name, change in changes.items():
            yield f"{short}-{name}", ("expert math", NAME), lambda job, p=part, c=change: job.tensors(FILE, **{p: c})
        yield f"{short}-gone", ("expert math", NAME), lambda job, p=part: job.tensors(FILE, p)


@attacks("scaled", calibrate_only="values of weights are read with their layer")
def scales() -> Iterator[Variant]:
    for value in (0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e30):
        yield (
            slug(value),
            (FILE, NAME, SCALES),
            lambda job, v=value: job.tensors(FILE, **{SCALES: lambda t: torch.full_like(t, v)}),
        )


@attack(FILE, NAME, kind="scaled", calibrate_only="values of weights are read with their layer")
def codes_that_are_no_numbers(job: Job) -> None:
    job.tensors(FILE, **{NAME: lambda t: torch.full_like(t.view(torch.uint8), 127).view(t.dtype)})


@attack("expert math", "weight_scale_2", kind="scaled")
def scales_of_scales(job: Job) -> None:
    job.tensors(FILE, **{f"{NAME}_scale_2": torch.ones(1)})


@attack("expert math", "mlp.extra.weight_scale_inv", kind="scaled")
def scales_of_nothing(job: Job) -> None:
    job.tensors(FILE, **{"model.layers.0.mlp.extra.weight_scale_inv": torch.ones(2, 2)})
