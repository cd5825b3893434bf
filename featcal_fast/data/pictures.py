"""From a decoded image, of any kind that files hold, to a picture in RGB of 8 bits, as people see it.

It is what `convert("RGB")` makes of it, as in transformers' processors and torchvision's data sets: of several pictures
the first, colours of transparent pixels as they are stored, inks and luminance by Pillow's own tables. Two things
differ, in which that is no picture: 16 bits of grey are scaled to 8, not clipped, and a camera's EXIF orientation is
applied, as `load_image` of transformers does.
"""

from __future__ import annotations

from typing import Any

# Modes of 16 bits of grey; Pillow gives those of some files as 32 bits.
GREY = ("I;16", "I;16L", "I;16B", "I;16N")
SIXTEEN_BITS = ("PNG", "PPM")  # formats that have no larger numbers than that
ORIENTATION = 0x0112  # in EXIF
# By orientation, what Pillow calls the way back.
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def as_picture(image: Any) -> Any:
    """An image of Pillow, opened, as a picture in RGB.

    Raises:
        ValueError: of numbers of which none is known to be white.
        Exception: whatever Pillow raises on a broken file.
    """
    image.load()
    turn = TURNS.get(_orientation(image))
    return _rgb(image) if turn is None else _turned(_rgb(image), turn)


def _rgb(image: Any) -> Any:
    if image.mode in GREY or (image.mode == "I" and image.format in SIXTEEN_BITS):
        return _grey(image).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"it is of {kind}, of which nobody can tell what is white; save it in 8 or 16 bits")
    return image.convert("RGB")


def _grey(image: Any) -> Any:
    """16 bits as 8, rounded."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _orientation(image: Any) -> int:
    """What a camera says of how it was held; what cannot be read says nothing."""
    try:
        found = image.getexif().get(ORIENTATION)
    except Exception:  # a stranger's, in a part of the file that is not the picture
        return 1
    return found if type(found) is int else 1


def _turned(picture: Any, turn: str) -> Any:
    from PIL import Image

    return picture.transpose(Image.Transpose[turn])
