"""The card that a model came with, for what is made of it to repeat: what stays true of its metadata, and its text.

It is a stranger's. What cannot be read of it is left out or shown as it is, never believed, and never an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from featcal_fast.errors import printable
from featcal_fast.reporting.markdown import fenced
from featcal_fast.untrusted.documents import DocumentError, parse_yaml

LARGEST = 2**20  # bytes of a card that is repeated
LONGEST, MOST = 2000, 500  # characters of a text, and texts of a list
# What stays true of a model when its weights are calibrated: whose it is, who may use it, and what for. All else is not
# repeated: results (`model-index`, `eval_results`, `metrics`) and `co2_eq_emissions` are those of other weights,
# `new_version` and `model_name` would name another model, and what nobody knows may be any of these.
TEXT = re.compile(r"license|license_name|license_link|pipeline_tag|library_name|mask_token")
TEXTS = re.compile(r"language|datasets|tags|base_model")
ANY = re.compile(r"widget|inference|extra_gated_[a-z_]{1,40}")
KEY = re.compile(r"""^(["']?)([\w.-]{1,100})\1[ \t]*:(?=\s|$)""", re.MULTILINE)
FRONT = re.compile(r"\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?(?:\n|\Z)", re.DOTALL | re.MULTILINE)
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
SLUG = re.compile(r"[\w.-]{1,100}", re.ASCII)
HUB_ID = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class OwnCard:
    """A model's own card.

    Attributes:
        metadata: what stays true of it; `tags`, `base_model`, `language` and `datasets` are lists.
        text: Markdown, without the metadata; empty where there is none.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    text: str = ""


def is_hub_id(text: str) -> bool:
    """Whether a text may be the name of a model on the hub."""
    return len(text) <= 96 and HUB_ID.fullmatch(text) is not None and not re.search(r"--|\.\.|[.-](/|$)|\.git$", text)


def read_card(data: bytes | None) -> OwnCard:
    """What a README.md says, however broken.

    Args:
        data: its content; None where it is larger than `LARGEST`.
    """
    if data is None:
        return OwnCard(text=f"*It is larger than {LARGEST // 2**20} MiB, and not repeated here.*")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return OwnCard(text="*It is not a text in UTF-8, and not repeated here.*")
    # Control characters mean nothing in Markdown, and act on the terminals of those who print a card.
    text = CONTROL.sub("", text)
    front = FRONT.match(text)
    if front is None:
        return OwnCard(text=text.removeprefix("\ufeff"))
    try:
        values = parse_yaml(_wanted(front[1]).encode())
    except DocumentError:
        shown = f"*Its metadata could not be read:*\n\n{fenced(front[1])}\n\n"
        return OwnCard(text=shown + text[front.end() :])
    if not isinstance(values, (dict, type(None))):
        return OwnCard(text=text)  # no metadata, but two lines across the page
    return OwnCard(_true(values or {}), text[front.end() :])


def _wanted(front: str) -> str:
    """The keys that count: results, which do not, are often larger than all that YAML may hold here."""
    keys = list(KEY.finditer(front))
    if not keys:
        return front
    ends = [each.start() for each in keys[1:]] + [len(front)]
    wanted = [
        front[key.start() : end]
        for key, end in zip(keys, ends, strict=True)
        if any(form.fullmatch(key[2]) for form in (TEXT, TEXTS, ANY))
    ]
    return "".join(wanted)


def _true(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is of the type that it must have, and can be shown."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if TEXT.fullmatch(name) and _is_text(value):
            found[name] = value
        elif TEXTS.fullmatch(name):
            listed = [value] if isinstance(value, str) else value
            if isinstance(listed, list) and len(listed) <= MOST:
                found[name] = list(dict.fromkeys(each for each in listed if _is_text(each)))
        elif ANY.fullmatch(name) and _is_plain(value):
            found[name] = value
    for name in ("pipeline_tag", "library_name"):
        if name in found and not SLUG.fullmatch(found[name]):
            del found[name]
    if "base_model" in found:
        found["base_model"] = [each for each in found["base_model"] if is_hub_id(each)]
    return found


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST and printable(value) == value


def _is_plain(value: object) -> bool:
    """Whether all texts in it can be shown."""
    if isinstance(value, dict):
        return all(_is_text(key) and _is_plain(each) for key, each in value.items())
    if isinstance(value, list):
        return all(_is_plain(each) for each in value)
    return value == "" or not isinstance(value, str) or _is_text(value)
