"""The config that lies in a folder of mergekit's: documents that are none, wrong types, models that are not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from attacks import recipes
from attacks.core import Variant, attack, attacks, slug
from attacks.good import Job

FILE = "merged/mergekit_config.yml"
GOOD: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "math"}, {"model": "code"}],
}
WHOLE = [{"model": "math", "layer_range": [0, 2]}, {"model": "code", "layer_range": [0, 2]}]

# Values of keys of the config.
VALUES: dict[str, list[Any]] = {
    "merge_method": [None, 5, True, "", [], {}, ["ties"]],
    "models": [
        *(5, True, "math", {"model": "math"}, {"a": 1}, [5], [None], [True], [[]], ["math"], [{}], [["math"]]),
        *([{"modle": "math"}], [{"model": None}], [{"model": 5}], [{"model": ""}], [{"model": " "}]),
        *([{"model": []}], [{"model": ["math"]}], [{"model": {}}], [{"model": {"path": "math"}}]),
        *([{"model": {"model": 5}}], [{"model": {"model": {}}}], [{"model": {"model": {"path": 5}}}]),
        *([{"model": {"model": {"path": "math", "revision": 5}}}], [{"model": {"model": "math", "lora": 5}}]),
        *([{"model": {"model": "math", "adapter": "x"}}], [{"model": {"model": "math", "lora": {"path": []}}}]),
        [{"model": {"model": {"path": "math", "branch": "main"}}}],
        [{"model": "math", "second_model": "other"}],
        [{"model": "math", "x": {"lora": ["other"]}}],
    ],
    "base_model": [5, True, "", [], ["base"], {}, {"path": "base"}, {"model": None}, {"model": "base", "x": 1}],
    "third_model": ["other"],
    "teachers": [["other"], [{"a": "other"}], {"a": {"b": "other"}}],
    "tuning": [{"donor": "other"}],
}
SLICES: list[Any] = [
    *(5, "x", {"a": 1}, [5], [None], [[]], [{}], [{"sources": None}], [{"sources": 5}], [{"sources": []}]),
    *([{"sources": [5]}], [{"sources": [{}]}], [{"sources": [{"model": "math"}]}]),
    *([{"sources": [{"model": "math", "layer_range": each}]}] for each in (None, 5, "0-2", [], [0], [0, 1, 2])),
    *([{"sources": [{"model": "math", "layer_range": each}]}] for each in ([2, 0], [0, 0], [-1, 2], [0.0, 2.0])),
    *([{"sources": [{"model": "math", "layer_range": each}]}] for each in ([True, 2], ["0", "2"], [0, 10**30])),
    *([{"sources": [{"model": "math", "layer_range": each}]}] for each in ([0, 1], [1, 2], [0, 3])),
    [{"sources": [WHOLE[0], {"model": "code", "layer_range": [0, 1]}]}],
    [{"sources": [WHOLE[0], {"model": "code", "layer_range": [1, 3]}]}],
    [{"sources": WHOLE, "base_model": 5}],
    [{"sources": WHOLE, "third_model": "other"}],
    [{"sources": WHOLE[:1]}, {"sources": WHOLE[1:]}],
    [{"sources": [{"model": "math", "layer_range": [0, 1]}]}, {"sources": [{"model": "math", "layer_range": [0, 2]}]}],
    [{"sources": WHOLE}, 5, None, {}],
    [{"sources": [{"model": "x" * 300, "layer_range": [0, 1]}] * 20}] * 15,
]
MODULES: list[Any] = [
    *(5, "x", [1], {"a": 5}, {"a": None}, {"a": []}, {"a": {}}, {"a": {"models": None}}, {"a": {"models": 5}}),
    {"a": {"models": GOOD["models"], "slices": [{"sources": WHOLE}]}},
    {"a": {"models": GOOD["models"]}, "b": {"models": GOOD["models"][:1]}},
    {"a": {"models": GOOD["models"], "third_model": "other"}},
    {"a": {"slices": [{"sources": WHOLE}] * 2}},
    {
        "a": {"slices": [{"sources": WHOLE, "base_model": "base"}]},
        "b": {"slices": [{"sources": WHOLE, "base_model": "x"}]},
    },
    {str(i): {"models": GOOD["models"]} for i in range(1000)},
]
# References, and what of them must be named.
REFERENCES: dict[str, tuple[str, str | tuple[str, ...]]] = {
    "nowhere": ("./nowhere", "nowhere"),
    "nowhere-absolute": ("/nowhere/model", "nowhere"),
    "far-out": ("../" * 60 + "nowhere", "nowhere"),
    "long": ("x" * 5000, "path"),
    "long-deep": ("a/" * 3000, "path"),
    "no-home": ("~nobody-of-that-name/model", "nobody"),
    "zero": ("a\0b", "null byte"),
    "escape": ("a\x1b[31mb", "31m"),
    "right-to-left": ("a\u202eb", "202e"),
    "newline": ("a\nerror: b", "error"),
    "surrogate": ("a\ud800b", "character"),
    "a-file": ("recipe.yaml", "recipe.yaml"),
    "a-device": ("/dev/zero", "/dev/zero"),
    "no-model": ("./data", ("config.json", "data")),
    "no-model-absolute": ("/etc", ("config.json", "/etc")),
    "of-processes": ("/proc/self/cwd/nowhere", "nowhere"),
    "itself": ("merged", "itself"),
    "itself-by-dots": ("merged/../merged", "itself"),
    "no-adapter": ("math+code", "adapter"),
    "adapter-nowhere": ("math+./nowhere", "nowhere"),
    "model-nowhere": ("./nowhere+math", "nowhere"),
    "nothing-behind": ("math+", "math+"),
    "nothing-before": ("+math", "+math"),
    "signs": ("+" * 4000, "+++"),
    "signs-and-dots": ("+.." * 1300, "+.."),
    "ats": ("@" * 4000, "@@@"),
    "two-ats": ("math@a@b", "math@a"),
    "a-revision": ("math@main", "main"),
    "a-revision-out": ("math@../../x", "../x"),
    "spaces": ("  ", "model"),
}


def _config(job: Job, text: str | None = None, **changes: Any) -> None:
    """The config as JSON, which is YAML too; keys that are None are not there. Or a text as it is."""
    values = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    job.write(FILE, json.dumps(values) if text is None else text)


@attacks("mergekit")
def documents() -> Iterator[Variant]:
    for name, (data, needle) in recipes.DOCUMENTS.items():
        found = ("merge_method", "models") if needle == "mapping" else needle
        yield name, (FILE, found), lambda job, data=data: job.write(FILE, data)


@attacks("mergekit")
def values() -> Iterator[Variant]:
    for key, wrong in VALUES.items():
        for value in wrong:
            needle = (key, "modle") if key == "models" else key

            def damage(job: Job, key: str = key, value: Any = value) -> None:
                job.write(FILE, json.dumps({**GOOD, key: value}))

            yield f"{key}-{slug(value)}", (FILE, needle), damage


@attacks("mergekit")
def slices() -> Iterator[Variant]:
    for value in SLICES:
        yield slug(value), (FILE, "slice"), lambda job, value=value: _config(job, models=None, slices=value)


@attacks("mergekit")
def modules() -> Iterator[Variant]:
    for value in MODULES:
        yield slug(value), (FILE, "modul"), lambda job, value=value: _config(job, models=None, modules=value)


@attacks("mergekit")
def references() -> Iterator[Variant]:
    for name, (reference, needle) in REFERENCES.items():
        models = [{"model": "code"}, {"model": reference}]
        where = ("models[1]", FILE, "expert", "data")  # of what is there its reader tells, if it is called by a name
        yield name, (where, needle), lambda job, models=models: _config(job, models=models)
        if name not in ("itself", "itself-by-dots", "no-adapter", "adapter-nowhere"):
            told = ("base_model", "base model", "line")
            yield f"base-{name}", (told, needle), lambda job, text=reference: _config(job, base_model=text)


@attack("mergekit_config.yml", "nothing is merged", kind="mergekit")
def only_the_base(job: Job) -> None:
    _config(job, models=[{"model": "base"}] * 2)


@attack("data", "code", kind="mergekit")
def the_same_model_again(job: Job) -> None:
    """One expert is named so often that nothing else is left for the second data."""
    _config(job, models=[{"model": "math"}, {"model": "./math"}, {"model": {"model": "math"}}])


@attack(FILE, "values", kind="mergekit")
def endless_models(job: Job) -> None:
    _config(job, "merge_method: ties\nmodels:\n" + "- model: a\n" * 9000)


@attack(FILE, "values", kind="mergekit")
def many_models_by_aliases(job: Job) -> None:
    lines = ["x: &a [{model: math}, {model: math}]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in pairwise("abcdefghi")]
    _config(job, "\n".join([*lines, "merge_method: ties", "models: *i"]))


@attack(FILE, "itself", kind="mergekit")
def models_in_themselves(job: Job) -> None:
    _config(job, "merge_method: ties\nmodels: &a [*a]\n")


@attack(FILE, "models", ("256", "found"), kind="mergekit")
def one_model_more_than_there_may_be(job: Job) -> None:
    _config(job, models=[{"model": f"./m{i}"} for i in range(257)])


@attack(FILE, "m255", kind="mergekit")
def as_many_missing_models_as_there_may_be(job: Job) -> None:
    """With every sign that has to be tried."""
    _config(job, models=[{"model": "math"}] * 255 + [{"model": "./" + "+a" * 100 + "m255"}])


@attack(FILE, "twice", kind="mergekit")
def a_key_twice(job: Job) -> None:
    _config(job, "merge_method: ties\nmodels: [{model: math}]\nmodels: [{model: code}]\n")


@attack(FILE, "slices", "models", kind="mergekit")
def models_and_slices(job: Job) -> None:
    _config(job, slices=[{"sources": WHOLE}])


@attack(FILE, "mergekit-moe", kind="mergekit")
def a_mixture_of_experts(job: Job) -> None:
    _config(job, "base_model: base\nexperts: [{source_model: math}, {source_model: code}]\n")


@attack("mergekit_moe_config.yml", "side by side", kind="mergekit")
def a_mixture_of_experts_by_its_own_name(job: Job) -> None:
    job.path(FILE).rename(job.path("merged/mergekit_moe_config.yml"))


@attack(FILE, "mergekit-multi", kind="mergekit")
def several_merges(job: Job) -> None:
    job.edit(FILE, lambda data: b"name: a\n" + data + b"\n---\n" + data)


@attack(FILE, "--no-write-model-card", kind="mergekit")
def is_missing(job: Job) -> None:
    job.path(FILE).unlink()


@attack(FILE, ("missing", "read"), kind="mergekit")
def is_a_folder(job: Job) -> None:
    job.path(FILE).unlink()
    job.path(FILE).mkdir()


@attack(FILE, "missing", kind="mergekit")
def is_a_pipe(job: Job) -> None:
    job.path(FILE).unlink()
    os.mkfifo(job.path(FILE))


@attack(FILE, ("missing", "read"), kind="mergekit")
def is_an_endless_device(job: Job) -> None:
    job.link(FILE, "/dev/zero")


@attack(FILE, ("link", "outside"), kind="mergekit")
def is_a_link_out(job: Job) -> None:
    job.outside(FILE)


@attack(FILE, ("missing", "read", "link"), kind="mergekit")
def is_a_circle(job: Job) -> None:
    job.link(FILE, "mergekit_config.yml")


@attack(FILE, ("bytes", "large"), kind="mergekit")
def endless_zeros(job: Job) -> None:
    job.sparse(FILE, 2**40)


@attack(FILE, ("bytes", "large"), kind="mergekit")
def long_comment(job: Job) -> None:
    job.edit(FILE, lambda data: data + b"\n# " + b"x" * 2**20)


@attack(FILE, "rights", kind="mergekit", as_user=True)
def may_not_be_read(job: Job) -> None:
    job.path(FILE).chmod(0)
