"""The recipe as a document: YAML that is none, nested, aliased, doubled, or meant for other readers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from attacks.core import Variant, attack, attacks, slug
from attacks.good import Job

FILE = "recipe.yaml"

# Whole documents, and what of them must be named.
DOCUMENTS: dict[str, tuple[bytes, str | tuple[str, ...]]] = {
    "empty": (b"", "mapping"),
    "null": (b"null\n", "mapping"),
    "a-list": (b"- base_model: base\n", "mapping"),
    "a-text": (b"base_model\n", "mapping"),
    "a-number": (b"17\n", "mapping"),
    "zeros": (b"\0" * 100, ("yaml", "unacceptable")),
    "no-utf-8": (b"base_model: \xff\xfe\n", "yaml"),
    "utf-16": ("base_model: base\n".encode("utf-16"), "yaml"),
    "utf-32": ("base_model: base\n".encode("utf-32"), "yaml"),
    "zip": (b"PK\x03\x04" + bytes(range(256)), "yaml"),
    "elf": (b"\x7fELF\x02\x01\x01" + b"\0" * 64, "yaml"),
    "two-documents": (b"base_model: base\n---\nbase_model: other\n", ("document", "yaml")),
    "unclosed-list": (b"experts: [\n", "yaml"),
    "unclosed-text": (b'base_model: "base\n', "yaml"),
    "tabs": (b"experts:\n\tmath: {}\n", "yaml"),
    "unknown-anchor": (b"base_model: *nothing\n", "nothing"),
    "bad-escape": (b'base_model: "\\q"\n', "yaml"),
    "bad-directive": (b"%YAML 9.9\n---\nbase_model: base\n", ("yaml", "version")),
    "control-character": (b"base_model: a\x07b\n", "yaml"),
    "escape-code": (b"base_model: a\x1b[31mb\n", "yaml"),
    "nested-lists": (b"x: " + b"[" * 1000, "nested"),
    "nested-lists-closed": (b"x: " + b"[" * 500 + b"]" * 500, "nested"),
    "nested-far": (b"[" * 100_000, "nested"),
    "nested-mappings": (b"{a: " * 1000, "nested"),
    "nested-mappings-closed": (b"{a: " * 300 + b"1" + b"}" * 300, "nested"),
    "nested-blocks": (b"".join(b" " * i + b"a:\n" for i in range(300)), "nested"),
    "nested-dashes": (b"- " * 3000 + b"1", "nested"),
    "nested-keys": (b"? " * 3000 + b"1", ("nested", "yaml")),
}

# Lines added to a good recipe, and what of them must be named.
LINES: dict[str, tuple[str, str | tuple[str, ...]]] = {
    "run-python": ("seed: !!python/object/apply:os.system ['touch run']", "python"),
    "run-python-new": ("seed: !!python/object/new:type [x, [], {}]", "python"),
    "python-name": ("seed: !!python/name:os.system", "python"),
    "python-module": ("seed: !!python/module:os", "python"),
    "python-tuple": ("seed: !!python/tuple [1, 2]", "python"),
    "own-tag": ("seed: !mine 5", "mine"),
    "set": ("settings: !!set {a, b}", "set"),
    "ordered": ("settings: !!omap [a: 1]", "omap"),
    "binary": ("seed: !!binary AAAA", "binary"),
    "timestamp": ("seed: !!timestamp 2024-13-45", "timestamp"),
    "no-integer": ("seed: !!int abc", ("abc", "line")),
    "no-bool": ("settings: {calibrate_bias: !!bool maybe}", ("maybe", "line")),
    "no-float": ("settings: {ridge_lambda: !!float x}", ("line", "ridge_lambda")),
    "no-null": ("seed: !!null 5", ("line", "null", "seed")),
    "list-as-integer": ("seed: !!int [1]", ("line", "int")),
    "mapping-as-text": ("seed: !!str {a: 1}", ("line", "str")),
    "digits": (f"seed: {'9' * 5000}", "digits"),
    "many-digits": (f"seed: {'1' * 100_000}", "digits"),
    "doubled": ("samples: 4\nsamples: 8", "samples"),
    "doubled-across": ("out: elsewhere", "out"),
    "doubled-quoted": ("samples: 4\n'samples': 8", "samples"),
    "doubled-below": ("settings: {ridge_lambda: 1, ridge_lambda: 2}", "ridge_lambda"),
    "doubled-settings": ("settings: {ridge_lambda: 1}\nsettings: {anchor_rho: 1}", "settings"),
    "doubled-deep": ("settings: {include: [{a: 1, a: 2}]}", "twice"),
    "merged-keys": ("settings: {<<: {ridge_lambda: 1, nonsense: 2}}", "nonsense"),
    "merged-scalar": ("settings: {<<: 5}", ("yaml", "settings")),
    "unknown-key": ("sampels: 4", "sampels"),
    "unknown-key-escape": ('"\\e[31mred": 4', "red"),
    "unknown-key-right-to-left": ('"\\u202eabc": 4', "abc"),
    "unknown-key-surrogate": ('"\\ud800": 4', ("key", "yaml")),
    "unknown-key-zero": ('"a\\0b": 4', "key"),
    "unknown-key-long": (f"{'k' * 900}: 4", "kkkk"),
    "unknown-key-newline": ('"a\\nb": 4', "key"),
    "key-number": ("5: 4", "5"),
    "key-null": ("~: 4", "key"),
    "key-bool": ("true: 4", "true"),
    "key-list": ("? [a, b]\n: 4", ("key", "yaml")),
    "key-mapping": ("? {a: b}\n: 4", ("key", "yaml")),
    "key-float": (".5: 4", ".5"),
    "alias-to-itself": ("settings: &a [*a]", ("itself", "recursive", "unhashable")),
    "alias-to-itself-mapping": ("settings: &a {x: *a}", ("itself", "recursive")),
    "alias-as-key": ("settings: {&a x: 1, *a : 2}", ("x", "twice")),
    "root": ("root: /", "root"),
}


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _bomb(depth: int, width: int) -> str:
    """Lines that stand for width ** depth values."""
    lines = ["a: &a [x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * width)}]" for old, new in pairwise(LETTERS[:depth])]
    return "\n".join(lines)


_DOUBLED = [f"{new}: &{new} {{x: *{old}, y: *{old}}}" for old, new in pairwise(LETTERS)]
LINES["bomb"] = (_bomb(9, 9), ("alias", "values"))
LINES["bomb-wide"] = (_bomb(4, 99), ("alias", "values"))
LINES["bomb-deep"] = (_bomb(26, 2), ("alias", "values"))
LINES["bomb-mapping"] = ("\n".join(["a: &a {x: 1, y: 1}", *_DOUBLED]), ("alias", "values"))
LINES["bomb-in-key"] = (_bomb(9, 9) + "\nsettings: *i", ("alias", "values"))


@attacks()
def documents() -> Iterator[Variant]:
    for name, (data, needle) in DOCUMENTS.items():
        yield name, (FILE, needle), lambda job, data=data: job.write(FILE, data)


@attacks()
def lines() -> Iterator[Variant]:
    for name, (text, needle) in LINES.items():
        yield name, (FILE, needle), lambda job, text=text: job.line(text)


@attack(FILE, ("bytes", "larger"))
def long_comment(job: Job) -> None:
    job.line("# " + "x" * 2**20)


@attack(FILE, ("bytes", "large"))
def fifty_megabytes(job: Job) -> None:
    job.write(FILE, b"a: b\n" * 10_000_000)


@attack(FILE, ("bytes", "large"))
def endless_zeros(job: Job) -> None:
    job.sparse(FILE, 2**40)


@attack(FILE, ("bytes", "large"))
def many_keys(job: Job) -> None:
    job.line("\n".join(f"k{i}: {{}}" for i in range(100_000)))


@attack(FILE, "math", "twice")
def an_expert_twice(job: Job) -> None:
    job.recipe("experts")
    job.line(
        "experts:\n  math: {model: math, data: data/math.safetensors}\n"
        "  code: {model: code, data: data/code.safetensors}\n  math: {model: code, data: data/code.safetensors}"
    )


@attack(FILE, ("experts.1", "'1'"))
def experts_that_are_called_alike(job: Job) -> None:
    job.recipe("experts")
    job.line(
        "experts:\n  1: {model: math, data: data/math.safetensors}\n  '1': {model: code, data: data/code.safetensors}"
    )


@attacks()
def experts_that_mean_the_same() -> Iterator[Variant]:
    """Names that are written in two ways, and are one to a reader."""
    for one, other in (
        ("true", "'True'"),
        ("1", "+1"),
        ("1", "01"),
        ("0.5", "5.0e-1"),
        ("~", "null"),
        ("!!str a", "a"),
    ):

        def damage(job: Job, names: tuple[str, str] = (one, other)) -> None:
            job.recipe("experts")
            models = zip(names, ("math", "code"), strict=True)
            job.line(
                "experts:\n" + "\n".join(f"  {name}: {{model: {m}, data: data/{m}.safetensors}}" for name, m in models)
            )

        yield slug(other), (FILE, ("experts", "twice", "text")), damage


@attack(FILE, "file")
def is_a_folder(job: Job) -> None:
    job.path(FILE).unlink()
    job.path(FILE).mkdir()


@attack(FILE, "file")
def is_missing(job: Job) -> None:
    job.path(FILE).unlink()


@attack(FILE, "file")
def is_a_pipe(job: Job) -> None:
    job.pipe(FILE)


@attack(FILE, "file")
def is_an_endless_device(job: Job) -> None:
    job.link(FILE, "/dev/zero")


@attack(FILE, ("file", "read"))
def is_a_link_to_itself(job: Job) -> None:
    job.link(FILE, FILE)


@attack(FILE, "rights", as_user=True)
def may_not_be_read(job: Job) -> None:
    job.path(FILE).chmod(0)
