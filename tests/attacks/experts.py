"""Models that would compute something else than the merged model, with weights of the same shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attacks.core import Variant, attacks, slug
from attacks.good import Job

DECODER: dict[str, list[Any]] = {
    "num_attention_heads": [1, 4],
    "num_key_value_heads": [2],
    "hidden_act": ["gelu", "relu"],
    "rms_norm_eps": [1e-3, 1e-8],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ],
}
ENCODER: dict[str, list[Any]] = {
    "num_attention_heads": [2, 8],
    "hidden_act": ["relu", "silu"],
    "layer_norm_eps": [1e-3, 1e-6],
}
_KNOWN_AS = {"rope_parameters": ("rope_parameters", "rope_theta", "rope_scaling", "rope_type", "factor")}


def _each(keys: dict[str, list[Any]], models: tuple[str, ...]) -> Iterator[Variant]:
    for model in models:
        for key, values in keys.items():
            for value in values:
                changes = {key: value}
                if key.startswith("num_"):  # the product with the width of a head stays as it is
                    changes |= {"head_dim": 8 if key == "num_key_value_heads" else 16 // value}
                yield (
                    f"{model}-{key}-{slug(value)}",
                    (model, _KNOWN_AS.get(key, (key, "head_dim", "shape"))),
                    (lambda job, m=model, c=changes: job.json(f"{m}/config.json", **c)),
                )


@attacks()
def decoders() -> Iterator[Variant]:
    yield from _each(DECODER, ("math", "base"))


@attacks()
def with_the_theta_of_old() -> Iterator[Variant]:
    """As versions of transformers before 5 wrote it."""

    def damage(job: Job) -> None:
        job.json("math/config.json", "rope_parameters", rope_theta=500000.0)

    yield "math", ("math", "rope"), damage


@attacks("bert")
def encoders() -> Iterator[Variant]:
    yield from _each(ENCODER, ("math", "base"))


@attacks("clip")
def towers() -> Iterator[Variant]:
    yield from _each(ENCODER, ("math", "base"))
