"""Model inputs as they are, from a `.safetensors` file: only the drawn rows are read."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from contextlib import closing
from difflib import get_close_matches
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from featcal_fast import files
from featcal_fast.checkpoints import parse_header, read_header
from featcal_fast.checkpoints.shards import DTYPES, Header
from featcal_fast.data.samples import Sample, draw, listed, widen
from featcal_fast.errors import DataError, shown
from featcal_fast.streaming.machine import available_host_bytes

LONGEST = 2**20  # tokens of a sample, where a model has no limit of its own
MAIN = ("input_ids", "inputs_embeds", "pixel_values")  # of which a model needs one


def read_tensors(path: Path, samples: int, seed: int, longest: int | None = None) -> Iterator[Sample]:
    """The drawn samples, one after the other: a row of every tensor; what is not floating-point as int64.

    Args:
        path: the file.
        samples: how many to draw.
        seed: of the draw.
        longest: tokens of a sample, if the model has a limit.
    """
    with closing(files.open_to_read(path)) as file:
        headers = _headers(path, file)
        count = _count(path, headers, longest or LONGEST)
        drawn = min(samples, count)
        needed = drawn * sum(1000 + 8 * math.prod(each.shape[1:]) for each in headers.values())
        if needed > (free := available_host_bytes() // 2):
            raise DataError(
                f"{path}: {drawn} samples of it take {needed / 2**30:.1f} GiB of memory, of which "
                f"{free / 2**30:.1f} GiB can be had; lower samples, or shorten them"
            )
        for i in draw(count, samples, seed, path):
            rows = {name: widen(_row(file, header, i, path)) for name, header in headers.items()}
            yield Sample(f"{path}, sample {i}", rows)


def _count(path: Path, headers: dict[str, Header], longest: int) -> int:
    """How many samples there are; of what makes no sample nothing is read."""
    counts = {name: (header.shape or (0,))[0] for name, header in headers.items()}
    first, expected = next(iter(counts.items()), ("", 0))
    for name, header in headers.items():
        form, what = [*header.shape[1:]], f"{path}, {name}: found"
        if counts[name] != expected:
            raise DataError(f"{what} {counts[name]} in the first dimension, expected {expected} samples as in {first}")
        if 0 in form:
            raise DataError(f"{what} {DTYPES[header.dtype]} of shape {form} a sample, expected at least one value")
        if name.endswith(("input_ids", "attention_mask")) and max(form, default=0) > longest:
            raise DataError(
                f"{path}, sample 0, {name}: found {max(form)} tokens, expected at most {longest}; shorten the samples"
            )
    if not expected:
        raise DataError(f"{path}: found zero samples ({listed(headers)}); expected at least one")
    return expected


def tensor_forms(path: Path) -> tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], int]:
    """What one sample is, by name: shape and dtype as it is read; and how many there are."""
    with closing(files.open_to_read(path)) as file:
        headers = _headers(path, file)
    dtypes = {name: DTYPES[each.dtype] for name, each in headers.items()}
    forms = {
        name: (each.shape[1:], dtypes[name] if dtypes[name].is_floating_point else torch.int64)
        for name, each in headers.items()
    }
    return forms, min(((each.shape or (0,))[0] for each in headers.values()), default=0)


def _headers(path: Path, file: FileIO) -> dict[str, Header]:
    """Of all tensors, token ids first."""
    size = files.stat(path).st_size
    try:
        headers, end = parse_header(read_header(file, size), path.name)
        if end != size:
            raise ValueError(f"{end} bytes expected, {size} found")
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as safetensors ({error}); save it again") from error
    for name, header in headers.items():
        dtype = DTYPES.get(header.dtype)
        real = name in MAIN and not name.endswith("_ids")
        if dtype is None or (real and not dtype.is_floating_point) or (name in MAIN and dtype == torch.bool):
            expected = "floating-point numbers" if real else "integers, or floating-point numbers"
            raise DataError(f"{path}, {name}: found values of the type {shown(header.dtype)}, expected {expected}")
    return {name: headers[name] for name in sorted(headers, key=lambda name: (name != "input_ids", name))}


def _row(file: FileIO, header: Header, i: int, path: Path) -> torch.Tensor:
    # A byte may be any number, and so no truth value; and numpy has no bfloat16.
    dtype = torch.uint8 if header.dtype == "BOOL" else DTYPES[header.dtype]
    tensor = torch.empty(header.shape[1:], dtype=dtype)
    memory = tensor.reshape(-1).view(torch.uint8).numpy().data
    if files.fill(file, memory, header.start + i * tensor.nbytes) < tensor.nbytes:
        raise DataError(f"{path}, sample {i}: it ends early; the file changed while it was being read")
    return tensor


def check_names(path: Path, config: Any) -> None:
    """Raises:
    DataError: a tensor is none that the model's forward takes, and would be left out without a word."""
    import transformers

    architectures = getattr(config, "architectures", None)
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    model: Any = getattr(transformers, str(named), None)
    parameters = inspect.signature(model.forward).parameters.values() if hasattr(model, "forward") else ()
    known = [each.name for each in parameters if re.match(r"(<class ')?(torch|typing)\b.*Tensor", str(each.annotation))]
    if not known:
        return  # it is no model, which whoever builds it will say
    found = tensor_forms(path)[0]
    for name in found:
        if name not in known:
            near = get_close_matches(name[:80], known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else "rename or remove it"
            raise DataError(
                f"{path}, {name}: found a tensor that a {model.__name__} does not take, expected some of "
                f"{listed(known)}; {hint}"
            )
    if not set(MAIN) & set(found) and set(MAIN) & set(known):
        raise DataError(
            f"{path}: found {listed(found)}, expected {' or '.join(name for name in MAIN if name in known)} too"
        )
    targets = {"labels", "decoder_input_ids", "decoder_inputs_embeds"}
    if getattr(config, "is_encoder_decoder", False) and not targets & set(found):
        raise DataError(f"{path}: found {listed(found)}, expected labels or decoder_input_ids too, for the decoder")
