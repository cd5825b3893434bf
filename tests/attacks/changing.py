"""Files that change while the job runs: cut, grown, replaced, removed; and values that only a forward shows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import torch

from attacks.core import Damage, Needle, Variant, attack, attacks
from attacks.good import WEIGHTS, Job

REASON = "nothing is wrong before"
ONCE = {"checkpoint_every": 0}  # else what is done is kept, to go on from
CHANGED: Needle = ("changed", "gone", "read", "early", "no such file", "complete", "missing", "nan", "image", "link")
MATH, NORM = f"math/{WEIGHTS}", {"model.norm.weight": lambda t: t + 1}
LATER = "model.layers.1.self_attn.q_proj.weight"
# By name: the kind of job, which of its parts the error must name, and what is done at its first layer.
CHANGES: dict[str, tuple[str, str, Damage]] = {
    "an-expert-is-cut": ("llama", "math", lambda job: job.edit(MATH, lambda data: data[: len(data) // 2])),
    "an-expert-is-emptied": ("llama", "math", lambda job: job.write(MATH, b"")),
    "an-expert-grows": ("llama", "math", lambda job: job.edit(MATH, lambda data: data + b"\0")),
    "an-expert-is-removed": ("llama", "math", lambda job: shutil.rmtree(job.path("math"))),
    "an-expert-is-replaced": ("llama", "math", lambda job: job.tensors(MATH, **NORM)),
    "an-expert-is-made-a-link": ("llama", "math", lambda job: job.outside(MATH)),
    "an-expert-becomes-nan": ("llama", "math", lambda job: job.tensors(MATH, **{LATER: lambda t: t * float("nan")})),
    "the-base-is-cut": ("llama", "base", lambda job: job.edit(f"base/{WEIGHTS}", lambda data: data[:2000])),
    "the-merge-is-removed": ("llama", "merged", lambda job: shutil.rmtree(job.path("merged"))),
    "the-merge-is-replaced": ("llama", "merged", lambda job: job.tensors(f"merged/{WEIGHTS}", **NORM)),
    "a-config-changes": ("llama", "config.json", lambda job: job.json("merged/config.json", other=5)),
    "a-config-grows": ("llama", "config.json", lambda job: job.sparse("math/config.json", 2**40)),
    "ids-change": ("llama", "data", lambda job: job.tensors("data/math.safetensors", input_ids=lambda t: (t + 1) % 20)),
    "images-change": ("clip", "data", lambda job: job.write("data/images/a.png", b"no image")),
    "images-appear": ("clip", "data", lambda job: job.write("data/images/y.png", b"no image")),
    "an-adapter-is-cut": (
        "adapter",
        "math",
        lambda job: job.edit("math/adapter_model.safetensors", lambda data: data[:-64]),
    ),
    "an-adapter-changes": ("adapter", "math", lambda job: job.json("math/adapter_config.json", lora_alpha=8)),
}


def _good(job: Job) -> None:
    """Nothing is wrong with the job at first."""


for _name, (_kind, _needle, _during) in CHANGES.items():

    @attacks(_kind, calibrate_only=REASON, during=_during, options=ONCE)
    def while_it_runs(name: str = _name, needle: str = _needle) -> Iterator[Variant]:
        yield name, (needle, CHANGED), _good


@attack(("math", "layer"), ("finite", "overflow"), calibrate_only="values come of the forward")
def features_that_overflow(job: Job) -> None:
    job.tensors(MATH, **{"model.layers.0.mlp.down_proj.weight": lambda t: torch.full_like(t, 3e38)})
