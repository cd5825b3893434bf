"""Images to pixels, by a checkpoint's own image processor.

Image files are a stranger's, and so are the sizes that a processor is told to make of them. Both are met in a process
of its own, which is ended where it takes too much; pixels come back by memory that it shares with this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from featcal_fast import files
from featcal_fast.data.pictures import as_picture
from featcal_fast.data.png import check_png
from featcal_fast.data.preprocess import find_image_processor, load_image_processor
from featcal_fast.data.samples import Sample, as_data_error, confined, os_errors
from featcal_fast.errors import DataError
from featcal_fast.untrusted.limits import LimitError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # each under any name, as in Oxford-IIIT Pet
LARGEST_FILE = 2**27  # bytes
MOST_PIXELS = 2**26  # of an image as it is stored; telephones make 48, 50 and 64 million
SECONDS, SECONDS_AN_IMAGE = 10, 4  # that may be taken; 48 million pixels of a PNG file take two
TRIAL_BYTES, BYTES = 3 * 2**27, 2**31  # likewise, for a small image, whatever a config says; for large ones
ROOM = 2**26  # bytes of what is made of images at a time
ALIGNED = 64  # bytes
TRIAL = 64  # pixels of the sides of a small image

Form = tuple[int, list[int], str]  # of an image's pixels: where they are in the shared memory, their shape and dtype


def process_images(source: object, samples: Sequence[Sample], folders: Sequence[Path]) -> Iterator[Sample]:
    """Every image as `pixel_values`, `[channels, height, width]`, in the processor's dtype.

    Args:
        source: where they are from.
        samples: with a path each, or the bytes of a file.
        folders: model folders; the first that has an image processor counts.

    Raises:
        DataError: an image cannot be read or is too large, or what the processor makes of it is; there is no processor.
    """
    folder = find_image_processor(source, folders)
    memory, done = files.share(ROOM), 0
    _tried(folder)
    while done < len(samples):
        waiting = samples[done:]
        try:
            forms = confined(partial(_fill, memory, waiting, folder), SECONDS + SECONDS_AN_IMAGE * len(waiting), BYTES)
        except LimitError as error:
            culprit = waiting[int.from_bytes(memory[:ALIGNED], "little")]
            raise DataError(
                f"{culprit.where}: the image processor of {folder} cannot process it: {error}; replace the image, "
                "or repair the processor's config"
            ) from None
        for sample, (position, shape, dtype) in zip(waiting, forms, strict=False):
            pixels = _room(memory, position, shape, getattr(torch, dtype)).clone()
            yield Sample(sample.where, {"pixel_values": pixels})
        done += len(forms)


def _tried(folder: Path) -> None:
    """Raises:
    DataError: a folder's processor takes too much even for a small image, or makes one of it that no model takes."""
    from PIL import Image

    def trial() -> None:
        torch.set_num_threads(1)
        where = f"a grey image of {TRIAL} x {TRIAL} pixels"
        pixels = _processed(Image.new("RGB", (TRIAL, TRIAL), "grey"), load_image_processor(folder), where, folder)
        _check_room(pixels, where, folder)

    try:
        confined(trial, SECONDS, TRIAL_BYTES)
    except LimitError as error:
        raise DataError(
            f"{folder}: its image processor cannot be used: {error}; repair its config (size, crop_size)"
        ) from None


def _fill(memory: memoryview, samples: Sequence[Sample], folder: Path) -> list[Form]:
    """In a process of its own: pixels of as many images as there is room for, behind the number of the last one."""
    torch.set_num_threads(1)  # others are not there after a copy
    processor = load_image_processor(folder)
    forms: list[Form] = []
    position = ALIGNED
    for number, sample in enumerate(samples):
        memory[:ALIGNED] = number.to_bytes(ALIGNED, "little")
        pixels = _processed(_decoded(sample), processor, sample.where, folder)
        _check_room(pixels, sample.where, folder)
        if position + pixels.nbytes > ROOM:
            break
        _room(memory, position, [*pixels.shape], pixels.dtype).copy_(pixels)
        forms.append((position, [*pixels.shape], str(pixels.dtype).removeprefix("torch.")))
        position += -(-pixels.nbytes // ALIGNED) * ALIGNED
    return forms


def _check_room(pixels: torch.Tensor, where: str, folder: Path) -> None:
    if ALIGNED + pixels.nbytes > ROOM:
        raise DataError(
            f"{where}: the image processor of {folder} makes {[*pixels.shape]} of it, which is larger than any image "
            "that a model takes; repair the sizes in its config"
        )


def _room(memory: memoryview, position: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """A place in the shared memory as a tensor."""
    return torch.frombuffer(memory, dtype=dtype, count=torch.Size(shape).numel(), offset=position).reshape(shape)


def _decoded(sample: Sample) -> Any:
    """An image file as a picture in RGB: the first, where it has several."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # in this process; the limit here is another
    data = _content(sample)
    error = f"{sample.where}: cannot be read as an image ({', '.join(FORMATS)}); replace or remove it"
    with as_data_error(error), _opened(data, error) as image:
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise DataError(
                f"{sample.where}: found an image of {width} x {height} pixels, expected {MOST_PIXELS} at most; "
                "shrink it"
            )
        if image.format == "PNG":
            check_png(data)
        return as_picture(image)


def _opened(data: bytes, error: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # whose text shows an object of ours
        raise DataError(f"{error} (it is none of them)") from None


def _processed(picture: Any, processor: Any, where: str, folder: Path) -> torch.Tensor:
    with as_data_error(f"{where}: the image processor of {folder} cannot process it; repair its config"):
        pixels: torch.Tensor = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        if not pixels.numel():
            raise ValueError(f"it makes {[*pixels.shape]} of it")
    return pixels


def _content(sample: Sample) -> bytes:
    """An image file's bytes."""
    data: Path | bytes = sample.values["image"]
    if isinstance(data, Path):
        with os_errors(sample.where):
            return files.read_bytes(data, LARGEST_FILE)
    if len(data) > LARGEST_FILE:
        raise DataError(f"{sample.where}: found an image of {len(data)} bytes, expected at most {LARGEST_FILE}")
    return data
