"""What a text sample is: by its keys, of which people use many, made one of a few forms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from featcal_fast.data.messages import as_messages
from featcal_fast.data.samples import Sample, listed
from featcal_fast.errors import DataError, shown

# By a kind's keys, in the order in which they count, what its samples become, one of the forms below.
TEXT_KINDS: dict[tuple[str, ...], str] = {
    ("text",): "text",
    ("prompt", "completion"): "joined",
    ("messages",): "messages",
    ("conversations",): "messages",
    ("conversation",): "messages",
    ("instruction", "output"): "asked",
    ("instruction", "response"): "asked",
    ("question", "answer"): "asked",
    ("question", "response"): "asked",
    ("query", "response"): "asked",
    ("problem", "solution"): "asked",
    ("prompt", "response"): "asked",
    ("input", "output"): "asked",
    ("prompt", "chosen"): "joined",
    ("question", "chosen"): "asked",
    ("instruction", "chosen"): "asked",
    ("query", "chosen"): "asked",
    ("input", "chosen"): "asked",
    ("chosen",): "text",
    ("content",): "text",
}
ANSWERED = ("joined", "asked")
PLAIN = list(TEXT_KINDS)[:3]  # which count before images and tokens, where a data set has these too
CONTEXTS = ("input", "context")  # what what is asked may come with
TEXT_KEYS = "; ".join(", ".join(kind) for kind in TEXT_KINDS)
# The values of samples as they leave here.
MOST = 5  # keys that a note names
FORMS = (("text",), ("prompt", "completion"), ("messages",), ("instruction", "input", "output"))


def has_kind(keys: Iterable[str]) -> bool:
    """Whether a sample of such keys is of a kind that is known."""
    found = set(keys)
    return any(found.issuperset(kind) for kind in TEXT_KINDS)


def as_texts(
    samples: Sequence[Sample], source: object, notes: list[str], targets: bool = False, ignored: Sequence[str] = ()
) -> list[Sample]:
    """Samples in one of the `FORMS`, by the first kind that all of them are of.

    Args:
        samples: at least one, with all keys that were found.
        source: where they are from.
        notes: is told which keys are ignored.
        targets: whether kinds that ask and answer count before the others, for an encoder-decoder.
        ignored: those that were not even read.

    Raises:
        DataError: one is of no kind, or of another than the others; a value is not what its key says.
    """
    kind = _kind(samples, targets)
    asked = TEXT_KINDS[kind] == "asked"
    context = [key for key in CONTEXTS if asked and key not in kind]
    used = [*kind, *context]
    others = dict.fromkeys(key for sample in samples for key in sample.values if key not in used)
    others |= dict.fromkeys(ignored)
    if others:
        notes.append(f"{source}: read as {', '.join(kind)} (ignored: {listed(map(_name, others), MOST)})")
    made = [Sample(sample.where, _made(sample, kind, context)) for sample in samples]
    for sample in made:
        if sample.values.keys() != made[0].values.keys():
            raise DataError(
                f"{sample.where}: found {listed(sample.values)}, expected {listed(made[0].values)} as in "
                f"{made[0].where}; give each kind its own file"
            )
    return made


def _name(key: str) -> str:
    return key or "a column without a name"


def _kind(samples: Sequence[Sample], targets: bool) -> tuple[str, ...]:
    """The first that all samples are of; a key whose value is null counts only where no other kind will do."""
    kinds = sorted(TEXT_KINDS, key=lambda kind: targets and TEXT_KINDS[kind] not in ANSWERED)
    for nulls in (False, True):
        for kind in kinds:
            if all(key in each and (nulls or each[key] is not None) for _, each in samples for key in kind):
                return kind
    first = _own(samples[0])
    other = next(each for each in samples if not each.values.keys() >= {*first})
    raise DataError(
        f"{other.where}: found {listed(_own(other))}, expected {listed(first)} as in {samples[0].where}; "
        "give each kind its own file"
    )


def _own(sample: Sample) -> tuple[str, ...]:
    """A sample's own kind."""
    for kind in TEXT_KINDS:
        if sample.values.keys() >= {*kind}:
            return kind
    found = listed(sample.values)
    raise DataError(f"{sample.where}: found the keys {found}; expected those of one kind: {TEXT_KEYS}; rename them so")


def _made(sample: Sample, kind: tuple[str, ...], context: Sequence[str]) -> dict[str, Any]:
    where, values = sample
    form, first = TEXT_KINDS[kind], values[kind[0]]
    if form == "messages" or (kind == ("chosen",) and isinstance(first, list)):
        return {"messages": as_messages(first, f"{where}, {kind[0]}")}
    if any(isinstance(values[key], list) for key in kind) and len(kind) == 2:
        return {"messages": _conversation(sample, kind)}
    texts = [_text(sample, key) for key in kind]
    if form == "text":
        return {"text": texts[0]}
    if form == "joined":
        return dict(zip(("prompt", "completion"), texts, strict=True))
    more = [_text(sample, key) for key in context if values.get(key) is not None]
    return {"instruction": texts[0], "input": "\n\n".join(text for text in more if text), "output": texts[1]}


def _conversation(sample: Sample, kind: tuple[str, ...]) -> list[dict[str, Any]]:
    """A question and its answer, of which at least one is a list of messages."""
    turns: list[dict[str, Any]] = []
    for key, role in zip(kind, ("user", "assistant"), strict=True):
        value = sample.values[key]
        if isinstance(value, str):
            new = [{"role": role, "content": value}]
        elif isinstance(value, list) and not any(isinstance(each, dict) for each in value):
            raise DataError(f"{sample.where}, {key}: found {shown(value)}; expected a text, or a list of messages")
        else:
            new = as_messages(value, f"{sample.where}, {key}")
        # Data of preferences may have the whole conversation in each answer.
        turns = new if new[0]["role"] in ("system", "user") else turns + new
    return turns


def _text(sample: Sample, key: str) -> str:
    value = sample.values[key]
    if not isinstance(value, str):
        raise DataError(f"{sample.where}, {key}: found {type(value).__name__}; expected a string")
    return value
