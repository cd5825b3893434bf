"""Values of the recipe's keys and settings: of other types, out of range, too large; patterns without end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attacks.core import Variant, attack, attacks, set_to, slug
from attacks.good import Job

FILE = "recipe.yaml"
TEXTS: list[Any] = [None, True, 0, 17, 1.5, [], ["x"], {}, {"a": "b"}, ""]  # no text is one of these
# No count is one of these. What is None is left out in a recipe.
COUNTS: list[Any] = [True, False, 0, -1, -(2**63), 1.5, 1e300, "", "x", "4", "0x10", "1:30", "1_000", [], [4], {}]
NUMBERS: list[Any] = ["", "x", "1,5", "--1", "1e", "1e999", True, False, None, [], [1.0], {}, "0x1p3", "½", "\uff11"]
TRUTHS: list[Any] = ["true", "yes", "", 0, 1, 2.0, [], {}, [True], "\x1b[2J"]
CHOICES: list[Any] = ["", "x", "float16", "AUTO", " auto", "auto\n", 32, True, [], ["auto"], {}, "\x1b[31mauto"]
NOT_FINITE = (".inf", "-.inf", ".nan", "1.0e+400", "-1.0e+400", "1" + "0" * 400)
PATTERNS: dict[str, Any] = {
    "unclosed": "(",
    "nothing-to-repeat": "*",
    "bad-group": "(?P<a",
    "bad-escape": "\\",
    "bad-range": "[z-a]",
    "too-many-times": "a{99999999999999}",
    "nested-groups": "(" * 5000 + ")" * 5000,
    "lookbehind": "(?<=a+)b",
    "catastrophic": "(([a-z0-9_.])+)+!",
    "catastrophic-alternatives": "([a-z]|[a-z.0-9_])*!",
    "catastrophic-dots": "(.*)*(.*)*(.*)*!",
    "catastrophic-reference": r"(.+)(.+)*\1!",
    "catastrophic-counted": "((.{1,40}){1,40}){1,40}!",
    "number": 5,
    "truth": True,
    "mapping": {"a": "b"},
    "no-names": [],
    "empty-name": [""],
    "numbers": [1, 2],
    "nothing": [None],
    "lists": [["q_proj"]],
    "none-like-it": "no_such_module",
    "names-of-none": ["no_such_module"],
    "escape": "\x1b[31m",
}


@attacks()
def texts() -> Iterator[Variant]:
    for key in ("base_model", "merged_model", "out"):
        for value in TEXTS:
            if value is not None or key != "out":
                needle = "merge" if value is None and key == "merged_model" else key
                yield f"{key}-{slug(value)}", (FILE, needle), set_to(key, value)
    for key in ("model", "data"):
        for value in TEXTS:
            yield (
                f"expert-{key}-{slug(value)}",
                (FILE, f"experts.math.{key}"),
                lambda job, k=key, v=value: job.expert(**{k: v}),
            )


@attacks()
def counts() -> Iterator[Variant]:
    for key in ("samples", "max_length", "batch_size"):
        for value in COUNTS:
            yield f"{key}-{slug(value)}", (FILE, key), set_to(key, value)
    for key in ("samples", "max_length"):
        for value in COUNTS[2:8]:
            yield f"expert-{key}-{slug(value)}", (FILE, f"math.{key}"), lambda job, k=key, v=value: job.expert(**{k: v})


@attacks()
def seeds() -> Iterator[Variant]:
    for value in (True, 1.5, "x", "7", [], {}, 2**64, 2**64 + 1, 10**30, -(2**64), -(10**30)):
        yield slug(value), (FILE, "seed"), set_to("seed", value)


@attacks()
def storages() -> Iterator[Variant]:
    for value in CHOICES:
        yield slug(value), (FILE, "expert_storage"), set_to("expert_storage", value)


@attacks()
def numbers() -> Iterator[Variant]:
    for key in ("ridge_lambda", "anchor_rho", "teacher_alpha", "covariance_eps"):
        for value in NUMBERS:
            yield f"{key}-{slug(value)}", (FILE, (key, "line")), set_to("settings", {key: value})
        for text in NOT_FINITE:
            yield (
                f"{key}-as-{slug(text)}",
                (FILE, (key, "line")),
                lambda job, k=key, t=text: job.line(f"settings: {{{k}: {t}}}"),
            )


@attacks()
def out_of_range() -> Iterator[Variant]:
    for key, value in (
        *(("ridge_lambda", value) for value in (-1, -1e-300, 1e300, 1e308)),
        *(("anchor_rho", value) for value in (1e300, -1e300, 1e39, -1e308)),
        *(("teacher_alpha", value) for value in (-0.1, 1.1, 1e300, -1e300)),
        *(("covariance_eps", value) for value in (0, -1, 1e300, 1e308)),
    ):
        yield f"{key}-{slug(value)}", (FILE, key), set_to("settings", {key: value})


@attacks()
def truths() -> Iterator[Variant]:
    for key in ("calibrate_bias", "calibrate_layernorm", "compile_blocks"):
        for value in TRUTHS:
            yield f"{key}-{slug(value)}", (FILE, key), set_to("settings", {key: value})


@attacks()
def choices() -> Iterator[Variant]:
    for key in ("preset", "forward_dtype", "moment_dtype", "solve_dtype"):
        for value in CHOICES:
            if (key, value) not in (("moment_dtype", "x"), ("solve_dtype", "x")):
                yield f"{key}-{slug(value)}", (FILE, key), set_to("settings", {key: value})


@attacks()
def patterns() -> Iterator[Variant]:
    for key in ("include", "exclude"):
        for name, value in PATTERNS.items():
            yield f"{key}-{name}", (key, "settings"), set_to("settings", {key: value})


@attack("settings", "exclude")
def everything_is_left_out(job: Job) -> None:
    job.recipe(settings={"exclude": ".*"})


@attacks()
def wrong_settings() -> Iterator[Variant]:
    for value in (5, True, "x", [], ["ridge_lambda"], [["ridge_lambda", 1]]):
        yield slug(value), (FILE, "settings"), set_to("settings", value)
    for key in ("lambda", "ridge-lambda", "RIDGE_LAMBDA", "\x1b[31mrho", "__class__", "from_dict", "k" * 100_000):
        yield f"key-{slug(key)}", (FILE, "unknown"), set_to("settings", {key: 1})


@attacks()
def wrong_experts() -> Iterator[Variant]:
    for value in (None, 5, True, "math", [], {}, ["math"], {"math": None}, {"math": "math"}, {"math": []}, {"math": 5}):
        yield slug(value), (FILE, "experts"), set_to("experts", value)
    for key in ("root", "modle", "__init__", "\x1b]0;title\x07"):
        yield f"key-{slug(key)}", (FILE, "experts.math"), lambda job, k=key: job.expert(**{k: "x"})


@attacks()
def merges() -> Iterator[Variant]:
    values: list[Any] = [5, True, "average", [], {}, {"method": "x"}, {"method": ["average"]}, {"method": None}]
    values += [{"method": "ties", key: value} for key in ("scaling", "density") for value in ("x", True, [], {}, 1e30)]
    values += [{"method": "dare_ties", "seed": value} for value in ("x", 1.5, -1, 2**64)]
    values += [{"method": "average", key: 0.5} for key in ("scaling", "density", "t", "seed", "steps")]
    values += [{"method": "ties", "weights": value} for value in (1, "x", [1, 2], {}, {"math": 1}, {"x": 1})]
    values += [{"method": "ties", "weights": {"math": value, "code": 1}} for value in (None, "x", -1, 1e30, [], True)]
    values += [{"method": "average", "way": 1}, {"scaling": 0.3}, {"method": "\x1b[31maverage"}]
    for value in values:
        yield slug(value), (FILE, "merge"), lambda job, v=value: job.recipe("merged_model", merge=v)
    for value in (1e30, -1e30, 1e300, 1e39):
        merge = {"method": "task_arithmetic", "scaling": value}
        yield f"scaling-{slug(value)}", ("merge", "scaling"), lambda job, v=merge: job.recipe("merged_model", merge=v)


@attack(FILE, "merge", "merged_model")
def both_merges(job: Job) -> None:
    job.recipe(merge={"method": "average"})


@attack(FILE, "merge", "merged_model")
def no_merge(job: Job) -> None:
    job.recipe("merged_model")


@attack(FILE, "out")
def long_text(job: Job) -> None:
    job.recipe(out="o" * 100_000)


@attacks()
def missing() -> Iterator[Variant]:
    for key in ("base_model", "experts"):
        yield key, (FILE, key), lambda job, k=key: job.recipe(k)
    for key in ("model", "data"):
        yield f"expert-{key}", (FILE, f"experts.math.{key}"), lambda job, k=key: job.expert(k)
