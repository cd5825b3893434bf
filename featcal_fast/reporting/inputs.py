"""What a run was made of, as its report says it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class InputFile:
    """A file of a model's folder.

    Attributes:
        bytes: its size.
        modified_ns: when it was changed last, in nanoseconds since 1970.
        sha256: of its content, where it was hashed: weights mostly are too large.
        header_sha256: of what comes before its data, if it is one of safetensors: names, shapes and dtypes.
        hub_sha256: of its content as the hub says, by the file's name in the hub's cache; not hashed here.
    """

    bytes: int
    modified_ns: int
    sha256: str | None = None
    header_sha256: str | None = None
    hub_sha256: str | None = None


@dataclass
class ModelInput:
    """A model that was read, or merged on the fly.

    Attributes:
        reference: what the recipe calls it; None for a merge.
        form: `checkpoint`, `lora`, `bitsandbytes`, `fp8`, `gguf`, or `merge` for one made on the fly, without files.
        revision: the commit, where it is a snapshot of the hub's cache.
        files: by path in its folder.
    """

    reference: str | None
    form: str
    revision: str | None = None
    files: dict[str, InputFile] = field(default_factory=dict)


@dataclass
class DataInput:
    """The calibration data of a task.

    Attributes:
        reference: what the recipe calls it.
        samples_asked: how many the recipe asks for.
        samples: how many were used, those that are held out among them.
        held_out: how many the result was judged on, and nothing fitted to.
        max_length: tokens that its texts are cut at; None where it has none.
        left_out: how many were drawn and not used, by reason.
        batches: how many they made.
        sha256: of the batches' tensors: names, dtypes, shapes and values, in order.
        files: how many it lies in; 0 for a data set of the hub.
        bytes: of these, together.
    """

    reference: str
    samples_asked: int
    samples: int
    batches: int
    sha256: str
    held_out: int = 0
    max_length: int | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    files: int = 0
    bytes: int = 0


@dataclass
class Inputs:
    """All that was read; empty where models and batches were in memory.

    Attributes:
        models: `merged model`, `base model`, and `expert NAME` a task.
        data: by task.
    """

    models: dict[str, ModelInput] = field(default_factory=dict)
    data: dict[str, DataInput] = field(default_factory=dict)
