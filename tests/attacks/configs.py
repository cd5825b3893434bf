"""Models' configs: documents that are none, values that build another model or none, and code that they bring along."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attacks.core import Variant, attack, attacks, broken_texts, holding, slug, valued
from attacks.good import Job

MERGED, MATH = "merged/config.json", "math/config.json"
# Every key that the weights' shapes follow from, or the forward.
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
WRONG: list[Any] = [0, -1, 1.5, 10**30, "x", "", [], [16], {}, True, "\x1b[31m16", 2**40]
FORWARD: dict[str, list[Any]] = {
    "hidden_act": ["x", "", 5, [], {}, ["silu"], True, "os.system", "relu"],
    "rms_norm_eps": ["x", [], {}, -1.0, 1e300, True, 0.5],
    "rope_parameters": [
        *(5, "x", [], {"rope_type": "x"}, {"rope_type": 5}, {"rope_type": "longrope"}, {"rope_type": "yarn"}),
        *({"rope_type": "default", "rope_theta": value} for value in ("x", 0, -1.0, [], None, 500.0, 1e300)),
        {"rope_type": "linear", "factor": 0, "rope_theta": 10000.0},
    ],
    "attention_bias": [True, "x", []],
    "mlp_bias": [True, 5],
    "num_hidden_layers": [0, -1, 1, 3, 1.5, "x", [], {}, True, 1000, 10**6, 10**9, 10**30],
    "max_position_embeddings": [0, -5, 1.5, "x", [], {}, True, 10**30],
    "tie_word_embeddings": [[], {}, "x", 5],
}

_KNOWN_AS = {
    "hidden_act": ("x", "activation", "relu"),
    "rope_parameters": ("rope", "theta"),
    "attention_bias": ("bias",),
    "mlp_bias": ("bias",),
    "num_hidden_layers": ("layers", "parameters"),
    "max_position_embeddings": ("positions",),
    "tie_word_embeddings": ("lm_head", "tie"),
}


@attacks()
def sizes() -> Iterator[Variant]:
    for key in SIZES:
        for value in WRONG:
            if (key, value) != ("num_key_value_heads", True):  # is 1 to Python
                yield (
                    f"{key}-{slug(value)}",
                    ("merged", ("config.json", "weight", "shape", key)),
                    valued(MERGED, key, value),
                )


@attacks()
def forward() -> Iterator[Variant]:
    for key, values in FORWARD.items():
        for value in values:
            yield (
                f"{key}-{slug(value)}",
                ("config.json", (key, "built", *_KNOWN_AS.get(key, ()))),
                valued(MERGED, key, value),
            )


@attacks()
def architectures() -> Iterator[Variant]:
    values: list[Any] = [5, {"a": 1}, True, "LlamaForCausalLM", [], [5], [None], [[]], ["pipeline"], ["AutoModel"]]
    values += [["PreTrainedModel"], ["nope"], ["__doc__"], ["utils"], ["LlamaConfig"], ["\x1b[31mLlama"], ["x" * 10**5]]
    values += [["Trainer"], ["AutoModelForCausalLM"], ["BertModel"], ["CLIPModel"], ["os.system"], [""]]
    for value in values:
        yield (
            slug(value),
            ("config.json", ("architectures", "llama", "built", "bert", "clip")),
            valued(MERGED, "architectures", value),
        )


@attacks()
def model_types() -> Iterator[Variant]:
    for value in (None, 5, True, "", "nope", [], ["llama"], {}, "../llama", "\x1b[31mllama", "x" * 10**5, "llama\0"):
        yield (
            slug(value),
            (MERGED, ("model_type", "type", "llama")),
            valued(MERGED, "model_type", value),
        )
    for value in ("bert", "clip", "gpt2"):
        yield slug(value), ("config.json", ("merged", "llama")), valued(MERGED, "model_type", value)


@attacks()
def documents() -> Iterator[Variant]:
    for name, damage in broken_texts(MERGED):
        yield name, (MERGED, "json"), damage
    for name, data in {
        "empty": b"",
        "a-list": b"[]",
        "null": b"null",
        "a-number": b"5",
        "a-text": b'"llama"',
        "nested": b"[" * 100_000,
        "nested-mappings": b'{"a":' * 100_000,
        "nested-closed": b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
        "spaces": b" " * (17 * 2**20),
        "digits": b'{"hidden_size": ' + b"9" * 5000 + b"}",
        "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    }.items():
        yield name, (MERGED, ("json", "bytes", "large")), holding(MERGED, data)


@attacks()
def lines() -> Iterator[Variant]:
    """More of an object than there may be."""
    for name, text, needle in (
        ("doubled", '"hidden_size": 17', "hidden_size"),
        ("doubled-alike", '"model_type": "llama"', "model_type"),
        ("nan", '"other": NaN', "NaN"),
        ("infinity", '"other": Infinity', "Infinity"),
        ("minus-infinity", '"other": -Infinity', "Infinity"),
        ("large", '"other": 1e999', "1e999"),
        ("digits", f'"other": {"9" * 5000}', "digits"),
        ("nested", f'"other": {"[" * 200}{"]" * 200}', "nested"),
        ("doubled-below", '"other": {"a": 1, "a": 2}', "twice"),
    ):
        for file in (MERGED, MATH, "base/config.json"):
            yield (
                f"{name}-{file.split('/')[0]}",
                (file, needle),
                lambda job, f=file, t=text: job.edit(f, lambda data: data.rstrip()[:-1] + b", " + t.encode() + b"}"),
            )


@attack(MERGED, ("bytes", "large"))
def without_end(job: Job) -> None:
    job.sparse(MERGED, 2**40)


@attacks()
def code() -> Iterator[Variant]:
    """Code that comes with a model is not run, whatever asks for it; errors advise nothing that there is not here."""
    program = "import pathlib; pathlib.Path(__file__).with_name('was-run').write_text('')\n"
    for name, changes in {
        "model": {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}},
        "elsewhere": {"model_type": "mine", "auto_map": {"AutoConfig": "other/repository--code.C"}},
        "no-mapping": {"model_type": "mine", "auto_map": ["code.C"]},
        "architecture": {"architectures": ["MineForCausalLM"], "auto_map": {"AutoModelForCausalLM": "code.M"}},
    }.items():

        def damage(job: Job, changes: dict[str, Any] = changes) -> None:
            job.write("merged/code.py", program)
            job.json(MERGED, **changes)

        yield name, ("config.json", ("auto_map", "architectures", "model_type", "code")), damage


@attacks()
def methods() -> Iterator[Variant]:
    """Keys that are names of what a config can do."""
    for key in ("to_json_string", "to_dict"):
        yield key, ("merged", "config.json"), valued(MERGED, key, 5)


@attacks()
def quantised() -> Iterator[Variant]:
    for name, value in {
        "gptq": {"quant_method": "gptq"},
        "awq": {"quant_method": "awq", "bits": 4},
        "mxfp4": {"quant_method": "mxfp4"},
        "unknown": {"quant_method": "\x1b[31mmine"},
        "unnamed": {"bits": 4},
        "a-text": "x",
        "a-number": 5,
        "a-list": [1],
        "list-of-methods": {"quant_method": ["bitsandbytes"]},
    }.items():
        yield name, (MERGED, "quantised"), valued(MERGED, "quantization_config", value)


@attack("base/config.json", "quantised")
def a_quantised_base(job: Job) -> None:
    job.json("base/config.json", quantization_config={"quant_method": "hqq"})


@attacks("clip")
def vision() -> Iterator[Variant]:
    for key, values in {
        "image_size": [0, -1, 1.5, "x", [], {}, 17, 10**6, 10**30, 32],
        "patch_size": [0, -1, 1.5, "x", [], {}, 5, 32, 10**30],
        "num_channels": [0, -1, 1, "x", [], 10**30],
        "num_attention_heads": [0, -1, 5, "x", [], 2],
        "hidden_act": ["x", 5, [], "gelu"],
        "layer_norm_eps": ["x", [], -1.0, 0.5],
    }.items():
        for value in values:
            yield (
                f"{key}-{slug(value)}",
                ("merged", ("config.json", "weight", "position", "embedding", key)),
                (valued(MERGED, key, value)),
            )


@attacks("bert")
def encoder() -> Iterator[Variant]:
    for key, values in {
        "max_position_embeddings": [0, -1, 30, "x", [], 2**40],
        "type_vocab_size": [0, -1, 1, "x", [], 2**40],
        "num_attention_heads": [0, -1, 5, "x", [], 2],
        "hidden_act": ["x", 5, [], "relu"],
        "layer_norm_eps": ["x", [], -1.0, 0.5],
    }.items():
        for value in values:
            yield (
                f"{key}-{slug(value)}",
                ("merged", ("config.json", "embedding", "weight", key)),
                (valued(MERGED, key, value)),
            )
