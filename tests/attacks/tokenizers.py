"""Tokenizers: documents that are none, classes that are others', vocabularies beyond the model's, endless patterns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from attacks.core import Variant, attack, attacks, broken_texts, slug, valued
from attacks.good import Job

FILE, CONFIG, DATA = "merged/tokenizer.json", "merged/tokenizer_config.json", "data/math.jsonl"


@attacks("texts")
def documents() -> Iterator[Variant]:
    for file in (FILE, CONFIG):
        short = file.removeprefix("merged/").removesuffix(".json")
        for name, damage in list(broken_texts(file))[::2]:
            yield f"{short}-{name}", ("merged", ("tokenizer", "json")), damage
        for name, data in {
            "a-list": b"[]",
            "nested": b"[" * 100_000,
            "nested-closed": b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
            "digits": b'{"a": ' + b"9" * 5000 + b"}",
        }.items():
            yield f"{short}-{name}", ("merged", ("tokenizer", "json")), lambda job, f=file, d=data: job.write(f, d)


@attacks("texts")
def configs() -> Iterator[Variant]:
    for key, values in {
        "tokenizer_class": [5, [], {}],
        "pad_token": [5, [], {}, True],
        "bos_token": [5, [], {}, True],
        "added_tokens_decoder": [5, "x", [], {"x": {}}, {"0": 5}, {"0": {"content": 5}}],
    }.items():
        for value in values:
            yield (
                f"{key}-{slug(value)}",
                ("merged", "tokenizer"),
                valued(CONFIG, key, value),
            )


@attack("merged", ("tokenizer", "code"), kind="texts")
def code_of_its_own(job: Job) -> None:
    job.write("merged/code.py", "import pathlib; pathlib.Path(__file__).with_name('was-run').write_text('')\n")
    job.json(CONFIG, auto_map={"AutoTokenizer": ["code.T", "code.T"]}, tokenizer_class="MineTokenizer")


def _vocabulary(change: Callable[[dict[str, Any]], Any]) -> Callable[[Job], None]:
    def damage(job: Job) -> None:
        values = json.loads(job.path(FILE).read_text())
        change(values)
        job.write(FILE, json.dumps(values))

    return damage


@attacks("texts")
def vocabularies() -> Iterator[Variant]:
    for name, number in {"next": 20, "far": 10**6, "farther": 2**31, "too-far": 2**40, "negative": -1}.items():
        yield (
            name,
            (("merged", DATA), ("vocabulary", "tokenizer")),
            _vocabulary(lambda values, n=number: values["model"]["vocab"].update(a=n)),
        )
    for value in (None, 5, "x", [], {"a": "x"}, {"a": 1.5}, {"a": None}):
        yield slug(value), ("merged", "tokenizer"), _vocabulary(lambda values, v=value: values["model"].update(vocab=v))
    for key, value in {"model": {"type": "Nope"}, "pre_tokenizer": {"type": "Nope"}, "post_processor": 5}.items():
        yield (
            f"unknown-{key}",
            ("merged", "tokenizer"),
            _vocabulary(lambda values, k=key, v=value: values.update({k: v})),
        )


@attack(DATA, ("tokenize", "tokens"), kind="texts")
def words_that_it_has_not(job: Job) -> None:
    job.write(DATA, '{"text": "zzz"}\n')


@attacks("texts")
def patterns() -> Iterator[Variant]:
    for name, pattern in {
        "unclosed": "(",
        "catastrophic": "(a+)+b",
        "catastrophic-counted": "((a{1,40}){1,40}){1,40}b",
        "reference": r"(a+)(a+)*\1\2b",
        "too-many-times": "a{99999999}",
    }.items():
        for kind, step in {
            "split": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            "replace": {"type": "Replace", "pattern": {"Regex": pattern}, "content": "x"},
        }.items():

            def damage(job: Job, kind: str = kind, step: dict[str, Any] = step) -> None:
                part = "pre_tokenizer" if kind == "split" else "normalizer"
                _vocabulary(lambda values: values.update({part: step}))(job)
                _vocabulary(lambda values: values["model"].update(unk_token="a"))(job)
                job.write(DATA, json.dumps({"text": "a" * 60}))

            yield f"{kind}-{name}", (("merged", DATA), ("token", "pattern")), damage


@attack("merged", "tokenizer.json", kind="texts")
def a_pipe(job: Job) -> None:
    job.pipe(FILE)


@attack("merged", "tokenizer.json", kind="texts")
def an_endless_device(job: Job) -> None:
    job.link(FILE, "/dev/zero")


@attack("merged", "tokenizer", kind="texts")
def a_config_that_is_a_pipe(job: Job) -> None:
    job.pipe(CONFIG)


@attack("data/", "found no tokenizer", kind="texts")
def gone(job: Job) -> None:
    job.path(FILE).unlink()


# ---- an expert's own, which is compared with the merged model's

OWN, OWN_CONFIG = "math/tokenizer.json", "math/tokenizer_config.json"


def _own(job: Job, change: Callable[[dict[str, Any]], Any] = lambda values: values.update(version="1.1")) -> None:
    """Give the expert a tokenizer, changed."""
    for file in (OWN, OWN_CONFIG):
        job.write(file, job.path(file.replace("math", "merged")).read_bytes())
    values = json.loads(job.path(OWN).read_text())
    change(values)
    job.write(OWN, json.dumps(values))


@attacks("texts")
def of_an_expert() -> Iterator[Variant]:
    for name, (file, damage) in {
        "endless": (OWN, lambda job: job.link(OWN, "/dev/zero")),
        "a-pipe": (OWN_CONFIG, lambda job: job.pipe(OWN_CONFIG)),
        "huge": (OWN, lambda job: job.sparse(OWN, 2**40)),
        "no-json": (OWN, lambda job: job.write(OWN, b'{"model": ')),
        "nested": (OWN, lambda job: job.write(OWN, b"[" * 100_000)),
        "config-a-list": (OWN_CONFIG, lambda job: job.write(OWN_CONFIG, b"[]")),
        "pickled": (OWN, lambda job: job.write(OWN, b"\x80\x04cposix\nsystem\n(Vtouch was-run\ntR.")),
        "outside": (OWN, lambda job: job.outside(OWN)),
        "far-away": (OWN, lambda job: _own(job, lambda values: values["model"]["vocab"].update(a=2**40))),
        "unknown-model": (OWN, lambda job: _own(job, lambda values: values.update(model={"type": "Nope"}))),
    }.items():

        def own(job: Job, damage: Callable[[Job], object] = damage) -> None:
            _own(job)
            damage(job)

        yield name, ("/math", ("tokenizer", file)), own


@attacks("texts")
def slow_of_an_expert() -> Iterator[Variant]:
    step = {"type": "Split", "pattern": {"Regex": "((a+)+)+!"}, "behavior": "Isolated", "invert": False}
    blown = {"type": "Replace", "pattern": {"String": "a"}, "content": "b " * 50_000}
    for name, changes in {"pattern": {"pre_tokenizer": step}, "blown-up": {"normalizer": blown}}.items():

        def own(job: Job, changes: dict[str, Any] = changes) -> None:
            _own(job, lambda values: (values.update(changes), values["model"].update(unk_token="a")))
            job.write(DATA, json.dumps({"text": "a" * 60}))
            _vocabulary(lambda values: values["model"].update(unk_token="a"))(job)

        yield name, ("math", "tokenizer"), own


@attack("math", ("tokenizer", "code"), kind="texts")
def code_of_an_expert(job: Job) -> None:
    _own(job)
    job.write("math/code.py", "import pathlib; pathlib.Path(__file__).with_name('was-run').write_text('')\n")
    job.json(OWN_CONFIG, auto_map={"AutoTokenizer": ["code.T", "code.T"]}, tokenizer_class="MineTokenizer")


@attack(DATA, ("3 of 3 samples", "expert math"), kind="texts")
def an_expert_of_other_words(job: Job) -> None:
    _own(
        job,
        lambda values: values["model"].update(vocab={f"x{word}": i for word, i in values["model"]["vocab"].items()}),
    )
