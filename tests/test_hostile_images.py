"""Images of strangers, and the processors that make pixels of them: bounded, and named when they are not to be had."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import zlib
from io import BytesIO

import pytest
import torch
from data_files import save_image
from PIL import Image

from featcal_fast.data import images, sources
from featcal_fast.data.batches import load_batches
from featcal_fast.errors import DataError


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, rows=b"", bits=8, color=2, more=b""):
    """A PNG file that says it is so large, and holds these rows, packed."""

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows, 1))
    return b"\x89PNG\r\n\x1a\n" + size + more + data + chunk(b"IEND", b"")


def saved(kind, mode="RGB", size=(8, 8), **options):
    memory = BytesIO()
    Image.new(mode, size).save(memory, kind, **options)
    return memory.getvalue()


WHOLE = png(8, 8, b"\0" * 8 * 25)
BROKEN = {
    "empty": b"",
    "text": b"no image",
    "cut": WHOLE[:-20],
    "a wrong sum": WHOLE[:-30] + b"\1" + WHOLE[-29:],
    "rows missing": png(8, 8, b"\0" * 25),
    "no pixels": png(0, 8),
    "a jpeg that is cut": saved("JPEG", size=(64, 64))[:300],
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n",
    "another format": saved("PCX"),
    "a text that unpacks": png(8, 8, b"\0" * 8 * 25, more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27)))),
    "more pixels than Pillow takes": png(65_000, 65_000),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_images_that_are_none_are_named(tmp_path, vision, data, monkeypatch):
    """Whichever of them it is, and no other program is asked for."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("another program"))
    for name in ("a", "b", "d"):
        save_image(tmp_path / "pictures" / f"{name}.png", (1, 2, 3))
    (tmp_path / "pictures" / "c.png").write_bytes(data)
    with pytest.raises(DataError, match=r"c\.png: (cannot be read as an image|found an image of)"):
        load_batches(tmp_path / "pictures", folders=[vision])


@pytest.mark.parametrize(
    ("width", "height", "bits", "color"), [(13_000, 13_000, 1, 0), (9_000, 8_000, 8, 2), (2**31 - 1, 1, 8, 0)]
)
def test_images_of_too_many_pixels_are_not_unpacked(tmp_path, vision, width, height, bits, color):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(width, height, b"", bits, color))
    message = rf"a.png: found an image of {width} x {height} pixels, expected 67108864 at most; shrink it"
    with pytest.raises(DataError, match=message):
        load_batches(tmp_path / "pictures", folders=[vision])


def test_a_long_strip_of_pixels_is_not_blown_up(tmp_path, vision):
    save_image(tmp_path / "pictures" / "a.png", (1, 2, 3), size=(10**6, 1))
    (vision / "preprocessor_config.json").write_text(
        json.dumps({**config(vision), "size": {"shortest_edge": 4000}, "crop_size": {"height": 4000, "width": 4000}})
    )
    with pytest.raises(DataError, match=r"image processor of .*vision (cannot process it|makes)"):
        load_batches(tmp_path / "pictures", folders=[vision])


def test_image_files_are_bounded_and_regular(tmp_path, vision):
    (tmp_path / "pictures").mkdir()
    with (tmp_path / "pictures" / "a.png").open("wb") as file:
        file.write(WHOLE)
        file.truncate(2**40)
    with pytest.raises(DataError, match=r"a.png: cannot be read: it is larger than 128 MiB"):
        load_batches(tmp_path / "pictures", folders=[vision])
    os.mkfifo(tmp_path / "pictures" / "b.png")
    with pytest.raises(DataError, match=r"b.png: it is not a regular file"):
        load_batches(tmp_path / "pictures", folders=[vision])


def test_images_may_have_any_name_and_ordinary_form(tmp_path, vision):
    (tmp_path / "pictures").mkdir()
    contents = {
        b"\xff.png": WHOLE,
        b"a \n.jpg": saved("JPEG"),
        b"grey16.png": saved("PNG", "I;16"),
        b"palette.png": saved("PNG", "P"),
        b"alpha.webp": saved("WEBP", "RGBA"),
        b"cmyk.jpg": saved("JPEG", "CMYK"),
        b"moves.png": saved("PNG", save_all=True, append_images=[Image.new("RGB", (8, 8), "white")]),
        b"interlaced.png": WHOLE,
    }
    for name, data in contents.items():
        with open(os.fsencode(tmp_path / "pictures") + b"/" + name, "wb") as file:
            file.write(data)
    (batch,) = load_batches(tmp_path / "pictures", folders=[vision])
    assert batch["pixel_values"].shape == (len(contents), 3, 4, 4)
    assert (batch["pixel_values"][:3] <= 1).all()


def test_images_come_in_order_whatever_there_is_room_for(tmp_path, vision, monkeypatch):
    for i in range(12):
        save_image(tmp_path / "pictures" / f"{i:02}.png", (i * 20, 0, 0))
    whole = load_batches(tmp_path / "pictures", folders=[vision])
    monkeypatch.setattr(images, "ROOM", 64 + 192 * 2 + 70)
    parts = load_batches(tmp_path / "pictures", folders=[vision])
    assert torch.equal(whole[0]["pixel_values"], parts[0]["pixel_values"])


# ---- processors


def config(folder):
    return json.loads((folder / "preprocessor_config.json").read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_size": 20_000}, r"vision"),
        ({"crop_size": {"height": 10**9, "width": 10**9}}, r"vision"),
        ({"size": {"shortest_edge": 10**6}}, r"vision"),
        ({"size": {"shortest_edge": 10**30}}, r"vision"),
        ({"crop_size": {"height": 0, "width": 0}}, r"vision"),
        ({"image_mean": [0.5]}, r"image processor of .*vision cannot process"),
        ({"image_std": [0, 0, 0]}, r"pictures/a.png, pixel_values: found values that are not finite"),
        ({"resample": "x"}, r"preprocessor_config.json: found resample 'x', expected one of \[0, 1"),
        ({"image_processor_type": "CLIPModel"}, r"vision"),
        ({"image_processor_type": "\x1b[31mNope"}, r"vision"),
    ],
)
def test_processors_that_make_no_image_are_named(tmp_path, vision, changes, message, capfd):
    save_image(tmp_path / "pictures" / "a.png", (1, 2, 3))
    (vision / "preprocessor_config.json").write_text(json.dumps({**config(vision), **changes}))
    with pytest.raises(DataError, match=message) as error:
        load_batches(tmp_path / "pictures", folders=[vision])
    assert "\x1b" not in str(error.value) + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "content", [b"\xff", b"[" * 10**5, b"[]", b'{"size": 1, "size": 2}', b'{"rescale_factor": NaN}']
)
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_processor_configs_that_are_no_json_are_named(tmp_path, vision, content, name):
    save_image(tmp_path / "pictures" / "a.png", (1, 2, 3))
    (vision / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"vision/{name}: (it is not valid JSON|found a JSON list)"):
        load_batches(tmp_path / "pictures", folders=[vision])


def test_code_of_a_processor_is_not_run_and_nobody_is_told_to(tmp_path, vision):
    save_image(tmp_path / "pictures" / "a.png", (1, 2, 3))
    own = {"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "code.Mine"}}
    (vision / "preprocessor_config.json").write_text(json.dumps({**config(vision), **own}))
    (vision / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: ...\n")
    with pytest.raises(DataError, match=r"vision: AutoImageProcessor cannot load it.*its own, which is never") as error:
        load_batches(tmp_path / "pictures", folders=[vision])
    assert "trust_remote_code" not in str(error.value)
    assert not (tmp_path / "ran").exists()


# ---- folders


def test_folders_of_very_many_files_are_not_looked_through(tmp_path, vision, monkeypatch):
    for name in ("a", "b", "c"):
        save_image(tmp_path / "pictures" / name / "a.png", (1, 2, 3))
    monkeypatch.setattr(sources, "ENTRIES", 5)
    with pytest.raises(DataError, match=r"pictures: found more than 5 files in it; expected a folder of a model"):
        load_batches(tmp_path / "pictures", folders=[vision])


def test_hidden_folders_are_not_entered(tmp_path, vision, monkeypatch):
    save_image(tmp_path / "pictures" / "a.png", (1, 2, 3))
    for i in range(50):
        save_image(tmp_path / "pictures" / ".cache" / f"{i}.png", (1, 2, 3))
    monkeypatch.setattr(sources, "ENTRIES", 5)
    assert len(load_batches(tmp_path / "pictures", folders=[vision])) == 1
