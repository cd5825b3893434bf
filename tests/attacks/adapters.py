"""LoRA adapters: configs that lie, patterns without end, factors that are none or are there twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file

from attacks.core import Variant, attack, attacks, broken_texts, holding, slug, valued
from attacks.good import Job

CONFIG, WEIGHTS = "math/adapter_config.json", "math/adapter_model.safetensors"
PREFIX = "base_model.model."
MODULE = "model.layers.0.self_attn.q_proj"
A, B = f"{PREFIX}{MODULE}.lora_A.weight", f"{PREFIX}{MODULE}.lora_B.weight"
M = f"{PREFIX}{MODULE}.lora_magnitude_vector"
EMBEDDING = f"{PREFIX}model.embed_tokens.weight"
SLOW = ("(([a-z0-9_.])+)+!", "(.*)*(.*)*(.*)*!", r"((.+)(.+)*\2)+!")
NO_PATTERN = ("(", "*", "a{99999999999999}", "(" * 5000 + ")" * 5000)
VALUES: dict[str, list[Any]] = {
    "peft_type": [
        None,
        5,
        True,
        "",
        "lora",
        "LOHA",
        "ADALORA",
        "IA3",
        [],
        ["LORA"],
        {},
        "\x1b[31mLORA",
        "LORA\0",
        "PREFIX_TUNING",
    ],
    "r": [None, 0, -2, 1, 3, 2.0, 1.5, "2", True, [], [2], {}, 10**30, 1e300],
    "lora_alpha": [None, "4", True, [], {}, 1e308, -1e308, 1e300, 10**38, 10**39],
    "use_rslora": ["no", "false", 1, [True], {"a": 1}, 2.5],
    "fan_in_fan_out": ["no", "false", 1, [True], {"a": 1}],
    "rank_pattern": [5, "x", [], [1], {"q_proj": "2"}, {"q_proj": None}, {"q_proj": []}, {"q_proj": 0}, {"q_proj": 7}],
    "alpha_pattern": [5, "x", [1], {"q_proj": "4"}, {"q_proj": None}, {"q_proj": True}, {"q_proj": 1e308}],
    "target_modules": [5, True, {}, [5], [None], [["q_proj"]], ["q_proj", "v_proj", "o_proj"], ".*_proj"],
    "exclude_modules": [5, True, [5], [None]],
    "modules_to_save": [
        5,
        True,
        "embed_tokens",
        {},
        [5],
        [None],
        ["embed_tokens", "lm_head"],
        ["embed_tokens", "norm"],
    ],
    "layers_to_transform": ["x", 1.5, True, {}, ["0"], [0.5], [None], [True]],
    "layers_pattern": [5, [5]],
    "use_dora": [True, 1, "yes"],
    "use_something": [True, 1, {"a": 1}],
    "lora_bias": [True, 1],
    "trainable_token_indices": [[1, 2], [1, 1], [-1], [10**30], "x", 5, {"embed_tokens": [1, 2]}, {"": [1]}, [[1]]],
    "target_parameters": [["experts.down_proj"]],
    "layer_replication": [[[0, 1]]],
    "init_lora_weights": ["pissa", "olora", "loftq", "corda", "x", 5, [], {}, "\x1b[31m"],
}
_KNOWN_AS = {
    "r": ("rank",),
    "rank_pattern": ("rank",),
    "lora_alpha": ("scale", "alpha", "overflow"),
    "alpha_pattern": ("scale", "alpha", "overflow"),
    "target_modules": ("_proj",),
    "modules_to_save": ("norm", "lm_head", "embed_tokens"),
    "fan_in_fan_out": ("shape",),
    "use_dora": ("lora_magnitude_vector",),
}


@attacks("adapter")
def values() -> Iterator[Variant]:
    for key, wrong in VALUES.items():
        for value in wrong:
            yield (
                f"{key}-{slug(value)}",
                ("math", (key, *_KNOWN_AS.get(key, ()))),
                (valued(CONFIG, key, value)),
            )


@attacks("adapter")
def patterns() -> Iterator[Variant]:
    for kind, found in (("slow", SLOW), ("none", NO_PATTERN)):
        for i, pattern in enumerate(found):
            values: dict[str, dict[str, Any]] = {
                "target_modules": {"target_modules": pattern},
                "rank_pattern": {"rank_pattern": {pattern: 2}},
                "exclude_modules": {"exclude_modules": pattern},
                "layers_pattern": {"layers_pattern": pattern, "layers_to_transform": [0, 1]},
            }
            if kind == "slow":  # lists of layers have short names, at which none is slow
                del values["layers_pattern"]
            for key, changes in values.items():
                yield (
                    f"{kind}-{i}-{key}",
                    ("math", (key, "adapter_config")),
                    lambda job, c=changes: job.json(CONFIG, **c),
                )


@attacks("adapter")
def documents() -> Iterator[Variant]:
    for name, damage in broken_texts(CONFIG):
        yield name, (CONFIG, "json"), damage
    for name, data in {
        "a-list": b"[]",
        "null": b"null",
        "nested": b"[" * 100_000,
        "nested-closed": b'{"peft_type": "LORA", "other": ' + b"[" * 900 + b"]" * 900 + b"}",
        "nan": b'{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}',
        "infinity": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}',
        "digits": b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}",
        "doubled": b'{"peft_type": "LORA", "r": 2, "r": 2, "lora_alpha": 4}',
        "doubled-alpha": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_alpha": 400}',
        "spaces": b" " * (17 * 2**20),
    }.items():
        yield name, (CONFIG, ("json", "bytes", "large")), holding(CONFIG, data)


def _rename(old: str, new: str) -> Callable[[Job], None]:
    return lambda job: job.header(
        WEIGHTS, lambda found: {new if key == old else key: each for key, each in found.items()}
    )


@attacks("adapter")
def names() -> Iterator[Variant]:
    for name, new in {
        "lora-c": A.replace("lora_A", "lora_C"),
        "no-module": f"{PREFIX}.lora_A.weight",
        "only-the-factor": "lora_A.weight",
        "another-module": A.replace("q_proj", "x_proj"),
        "another-layer": A.replace("layers.0", "layers.9"),
        "magnitude": A.replace("lora_A", "lora_magnitude_vector"),
        "bias": A.replace("lora_A.weight", "lora_B.bias"),
        "escape": A.replace("q_proj", "\x1b[31mq_proj"),
        "long": A.replace("q_proj", "q" * 10**6),
        "dots": A.replace("self_attn", ".."),
        "empty": "",
    }.items():
        yield name, ("math", ("lora", "adapter_model")), _rename(A, new)
    for name, old in {"no-a": A, "no-b": B}.items():
        yield name, (WEIGHTS, "q_proj"), lambda job, o=old: job.tensors(WEIGHTS, o)
    yield "no-embedding", (WEIGHTS, "embed_tokens"), lambda job: job.tensors(WEIGHTS, EMBEDDING)


@attacks("adapter")
def there_twice() -> Iterator[Variant]:
    """Two names that mean one factor, or one trained tensor: which counts must not be chance."""
    factor, whole = torch.ones(2, 16), torch.ones(20, 16)
    for name, new, value in (
        ("without-prefix", A.removeprefix(PREFIX), factor),
        ("base-layer", A.replace("q_proj", "q_proj.base_layer"), factor),
        ("without-model", A.replace("model.layers", "layers"), factor),
        ("without-weight", A.removesuffix(".weight"), factor),
        ("embedding-without-prefix", EMBEDDING.removeprefix(PREFIX), whole),
        ("embedding-saved", EMBEDDING.replace("embed_tokens", "embed_tokens.modules_to_save.default"), whole),
    ):
        yield name, ("math", ("q_proj", "embed_tokens")), lambda job, n=new, v=value: job.tensors(WEIGHTS, **{n: v})
    both = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(2, 20),
        f"{PREFIX}model.embed_tokens.lora_A.weight": torch.ones(2, 20),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.ones(16, 2),
    }
    yield (
        "two-kinds",
        ("math", "embed_tokens"),
        lambda job: job.tensors(WEIGHTS, **both),
    )


@attacks("adapter")
def tensors() -> Iterator[Variant]:
    for name, change in {
        "longer": lambda t: torch.cat([t, t]),
        "transposed": lambda t: t.T,
        "flat": lambda t: t.reshape(-1),
        "deeper": lambda t: t[None],
        "integers": lambda t: t.to(torch.int64),
        "bytes": lambda t: t.to(torch.uint8),
        "bools": lambda t: t > 0,
        "empty": lambda t: t[:0],
        "complex": lambda t: t.to(torch.complex64),
    }.items():
        for which, tensor in {"a": A, "b": B}.items():
            yield f"{which}-{name}", (WEIGHTS, "q_proj"), lambda job, t=tensor, c=change: job.tensors(WEIGHTS, **{t: c})
        if name not in ("transposed", "longer"):  # with more rows, it is one of a larger vocabulary
            yield (
                f"saved-{name}",
                (WEIGHTS, "embed_tokens"),
                lambda job, c=change: job.tensors(WEIGHTS, **{EMBEDDING: c}),
            )
    yield (
        "rank-0",
        (WEIGHTS, "q_proj"),
        lambda job: job.tensors(WEIGHTS, **{A: torch.zeros(0, 16), B: torch.zeros(16, 0)}),
    )


def _dora(job: Job, **changes: torch.Tensor) -> None:
    """The adapter with DoRA, whose magnitudes leave the base as it is."""
    found = job.path(WEIGHTS)
    base = load_file(job.path("base/model.safetensors"))
    modules = [
        name.removeprefix(PREFIX).removesuffix(".lora_B.weight") for name in load_file(found) if "lora_B" in name
    ]
    norms = {f"{PREFIX}{name}.lora_magnitude_vector": base[f"{name}.weight"].norm(dim=1) for name in modules}
    job.tensors(WEIGHTS, **{**norms, **changes})
    job.json(CONFIG, use_dora=True)


@attacks("adapter")
def magnitudes() -> Iterator[Variant]:
    for name, tensor in {
        "shorter": torch.ones(15),
        "longer": torch.ones(17),
        "a-column": torch.ones(16, 1),
        "a-row": torch.ones(1, 16),
        "a-number": torch.ones(()),
        "none": torch.ones(0),
        "integers": torch.ones(16, dtype=torch.int64),
        "bools": torch.ones(16) > 0,
        "complex": torch.ones(16, dtype=torch.complex64),
    }.items():
        yield name, (WEIGHTS, "magnitude"), lambda job, t=tensor: _dora(job, **{M: t})
    yield "of-nothing", (WEIGHTS, "magnitude"), lambda job: job.tensors(WEIGHTS, **{M: torch.ones(16)})


@attacks("adapter", calibrate_only="values of factors are read with their layer")
def magnitudes_that_are_none() -> Iterator[Variant]:
    for value in (float("nan"), float("inf"), -float("inf")):
        yield slug(value), (WEIGHTS, M), lambda job, v=value: _dora(job, **{M: torch.full((16,), v)})
    huge, zero = torch.full((16,), 3e38), {B: lambda t: t * 0}
    yield "huge", (WEIGHTS, "overflow"), lambda job: _dora(job, **{M: huge})

    def without_a_direction(job: Job) -> None:
        job.tensors("base/model.safetensors", **{f"{MODULE}.weight": lambda t: t * 0})
        job.tensors(WEIGHTS, **zero)
        _dora(job)

    yield "of-zeros", (WEIGHTS, "zero"), without_a_direction


@attack("math", "changes nothing", kind="adapter")
def without_tensors(job: Job) -> None:
    job.write(WEIGHTS, (8).to_bytes(8, "little") + b"{}      ")


@attack("math", "pickled", kind="adapter")
def only_pickled(job: Job) -> None:
    job.path(WEIGHTS).unlink()
    job.write("math/adapter_model.bin", b"cos\nsystem\n(S'touch run'\ntR.")


@attack(WEIGHTS, "link", kind="adapter")
def weights_from_outside(job: Job) -> None:
    job.outside(WEIGHTS)


@attack(CONFIG, "link", kind="adapter")
def a_config_from_outside(job: Job) -> None:
    job.outside(CONFIG)


@attack("math", ("adapter_config", "config.json"), kind="adapter")
def a_config_that_is_a_pipe(job: Job) -> None:
    job.pipe(CONFIG)


@attack("math", ("adapter_config", "config.json"), kind="adapter")
def a_config_that_is_endless(job: Job) -> None:
    job.link(CONFIG, "/dev/zero")


@attack("math", "adapter_model", kind="adapter")
def weights_that_are_a_pipe(job: Job) -> None:
    job.pipe(WEIGHTS)


@attack("math", ("adapter_model", "safetensors"), kind="adapter")
def weights_cut_off(job: Job) -> None:
    job.edit(WEIGHTS, lambda data: data[:-100])


@attacks("adapter", calibrate_only="values of factors are read with their layer")
def not_finite() -> Iterator[Variant]:
    for name, tensor in {"a": A, "b": B, "saved": EMBEDDING}.items():
        for value in (float("nan"), float("inf")):

            def change(tensor: torch.Tensor, value: float = value) -> torch.Tensor:
                tensor.view(-1)[0] = value
                return tensor

            yield (
                f"{name}-{slug(value)}",
                (WEIGHTS, tensor),
                lambda job, t=tensor, c=change: job.tensors(WEIGHTS, **{t: c}),
            )


@attack("math", "overflow", kind="adapter", calibrate_only="values of factors are read with their layer")
def factors_that_overflow(job: Job) -> None:
    job.tensors(WEIGHTS, **{name: lambda t: torch.full_like(t, 1e30) for name in (A, B)})
