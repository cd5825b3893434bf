"""Chat templates: programs that come with a model. They may not run for long, take much memory, or reach out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from attacks.core import Needle, Variant, attack, attacks, holding, slug
from attacks.good import Job

TEMPLATE, CONFIG, DATA = "merged/chat_template.jinja", "merged/tokenizer_config.json", "data/code.jsonl"
PROGRAMS: dict[str, str] = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}a",
    "a-long-loop": "{% for a in range(10**5) %}{% for b in range(10**5) %}{{ '' }}{% endfor %}{% endfor %}a",
    "power": "{{ 9 ** 9 ** 9 }}",
    "power-of-power": "{{ (10 ** 10 ** 9) % 7 }}",
    "shift": "{{ (2 ** 40000000) | string | length }}",
    "a-long-text": "{{ 'a ' * 5000000000 }}",
    "a-long-list": "{{ ([0] * 10000000000) | length }}",
    "doubling": "{% set n = namespace(t='a ') %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
    "collecting": "{% set n = namespace(l=[]) %}{% for i in range(99999) %}{% set n.l = n.l + [i] * 1000 %}"
    "{% endfor %}a",
    "output": "{% for a in range(99999) %}{{ 'a ' * 99999 }}{% endfor %}",
    "width": "{{ 'a' | center(9000000000) }}",
    "format": "{{ '%9000000000d' % 5 }}",
    "format-method": "{{ '{:>9000000000}'.format('a') }}",
    "indent": "{{ ('a\n' * 100000) | indent(100000) }}",
    "itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "itself-twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "sorting": "{% for a in range(99999) %}{% for b in range(99999) | sort(reverse=true) %}{% endfor %}{% endfor %}a",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch run') }}",
    "functions": "{{ raise_exception.__globals__ }}",
    "mutation": "{% for m in messages %}{{ messages.append(m) }}{% endfor %}",
    "import": "{% import 'os' as os %}a",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends 'base.html' %}",
    "refuses": "{{ raise_exception('no \x1b[31mred') }}",
    "division": "{{ 1 // 0 }}",
    "undefined": "{{ nothing.at.all }}",
    "unknown-filter": "{{ 'a' | nothing }}",
    "syntax": "{% for %}",
    "unclosed": "{{ 'a'",
    "nested": "{% if true %}" * 500 + "a" + "{% endif %}" * 500,
    "nested-brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "nothing": "",
    "spaces-only": "   ",
    "unknown-words": "{{ 'zzz' }}",
}


@attacks("texts")
def programs() -> Iterator[Variant]:
    for name, text in PROGRAMS.items():
        yield name, (DATA, ("template", "zero tokens", "tokenize")), holding(TEMPLATE, text)


@attacks("texts")
def values() -> Iterator[Variant]:
    found: list[Any] = [5, True, [], [5], {"a": 1}, [{"name": "default", "template": 5}], [{"name": "default"}]]
    for value in found:

        def damage(job: Job, value: Any = value) -> None:
            job.path(TEMPLATE).unlink()
            job.json(CONFIG, chat_template=value)

        yield slug(value), (("merged", DATA), ("template", "tokenizer")), damage


@attack(("merged", DATA), ("template", "bytes", "large"), kind="texts")
def fifty_megabytes(job: Job) -> None:
    job.write(TEMPLATE, "a " * (25 * 10**6))


@attack("merged", ("template", "tokenizer"), kind="texts")
def no_utf_8(job: Job) -> None:
    job.write(TEMPLATE, b"{{ '\xff' }}")


@attack("merged", "template", kind="texts")
def a_pipe(job: Job) -> None:
    job.pipe(TEMPLATE)


@attack("merged", "template", kind="texts")
def an_endless_device(job: Job) -> None:
    job.link(TEMPLATE, "/dev/zero")


@attack("merged", "template", "link", kind="texts")
def from_outside(job: Job) -> None:
    job.outside(TEMPLATE)


@attack(DATA, "template", kind="texts")
def gone(job: Job) -> None:
    job.path(TEMPLATE).unlink()


def _chat(*turns: object) -> Callable[[Job], None]:
    return lambda job: job.write(DATA, json.dumps({"messages": list(turns)}))


@attacks("texts")
def contents() -> Iterator[Variant]:
    """What the template is given, and cannot make a text of."""
    needle: Needle = ("messages", "template", "tokens", "tokenize")
    template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    for value in (None, 5, [], [5], {}, {"a": "b"}):

        def damage(job: Job, value: Any = value) -> None:
            job.write(TEMPLATE, template)
            _chat({"role": "user", "content": value})(job)

        yield slug(value), (f"{DATA}, line 1", needle), damage
