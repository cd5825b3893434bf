"""Cards that models come with: what is made of them is always a card that the hub's own library reads."""

from __future__ import annotations

from huggingface_hub import ModelCard

from featcal_fast.reporting.card import Name, Origin, card, metadata
from featcal_fast.reporting.own_card import read_card

SEEDS = [
    b"""---
base_model:
- org/base
- org/coder
library_name: transformers
license: other
license_name: mine
language: [en, no]
tags:
- mergekit
- merge
---
# union

This is a merge.

## Merge Details
### Merge Method

A heading
=========

* ./src/math

1. ```yaml
   # a comment
   models: ["a", b|c]
   ```
""",
    b"""---\r
tags: &tags [a, "b: c", 'd']\r
widget:\r
- text: "Hello \\u00e9\\n"\r
  output: {x: 1.5, y: *tags}\r
extra_gated_prompt: |-\r
  You agree\r
\r
  to all.\r
model-index:\r
- name: x\r
  results: [{task: {type: y}}]\r
---\r
> # Quoted\r
> ~~~\r
> # code\r
> ~~~\r
""",
    b"# No metadata\n\n---\n\ntext\n---\n",
]


def target(data: bytes) -> None:
    """As a job does that has done its work."""
    folders = frozenset({"org/base"})
    made = Origin("out", Name("merged"), Name("base"), {}, {}, {}, folders, read_card(data), {}, ())
    text = card(made)
    text.encode()
    found = ModelCard(text).data.to_dict()
    expected = metadata(made)
    if any(found.get(key) != value for key, value in expected.items() if value is not None):
        raise AssertionError(f"metadata: found {found}, expected {expected}")
