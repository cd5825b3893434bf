"""Images of every kind that files hold are the picture that people see; a folder's other files are told of."""

import struct
from io import BytesIO

import pytest
import torch
from data_files import save_image
from PIL import Image, ImageOps
from test_hostile_images import chunk, png

from featcal_fast.data.batches import load_batches
from featcal_fast.data.pictures import as_picture
from featcal_fast.data.sources import data_files
from featcal_fast.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # which Pillow gives of odd files
SIZE = (5, 3)
COLOURS = Image.new("RGB", SIZE)
COLOURS.putdata([(17 * i, 255 - 17 * i, 8 * i) for i in range(15)])
GREY = COLOURS.convert("L")
SEEN = COLOURS.copy()  # with pixels that are transparent
SEEN.putalpha(Image.linear_gradient("L").resize(SIZE))


def packed(image, kind, **options):
    memory = BytesIO()
    image.save(memory, kind, **options)
    return memory.getvalue()


def picture(data):
    found = as_picture(Image.open(BytesIO(data)))
    assert found.mode == "RGB"
    return found


def same(one, other):
    return one.size == other.size and one.tobytes() == other.tobytes()


# ---- numbers of more than 8 bits


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_of_grey_are_scaled_not_clipped(kind):
    values = [0, 128, 129, 255, 256, 257, 4000, 32767, 32768, 65278, 65279, 65535]
    image = Image.frombytes("I;16", (4, 3), struct.pack("<12H", *values))
    found = picture(packed(image, kind)).getchannel("G").tobytes()
    assert list(found) == [round(value / 257) for value in values]


@pytest.mark.parametrize("order", ["I;16", "I;16B"])
def test_8_bits_of_grey_saved_as_16_are_the_same_picture(order):
    data = struct.pack(f"{'>' if order == 'I;16B' else '<'}15H", *(257 * value for value in GREY.tobytes()))
    image = Image.frombytes(order, SIZE, data)
    for kind in ("TIFF", "PNG"):
        assert same(picture(packed(image, kind)), GREY.convert("RGB"))
    assert same(as_picture(image), GREY.convert("RGB"))


@pytest.mark.parametrize(("color", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_16_bits_of_a_colour_are_scaled(color, channels):
    """By their upper 8 bits, as Pillow reads them."""
    pixels = [[(4369 * (x + y) + 257 * c) % 65536 for c in range(channels)] for y in range(3) for x in range(5)]
    rows = b"".join(
        b"\0" + b"".join(struct.pack(f">{channels}H", *pixels[5 * y + x]) for x in range(5)) for y in range(3)
    )
    found = picture(png(*SIZE, rows, bits=16, color=color)).tobytes()
    expected = [[value >> 8 for value in (pixel[:3] if channels > 2 else pixel[:1] * 3)] for pixel in pixels]
    assert list(found) == [value for pixel in expected for value in pixel]


@pytest.mark.parametrize(("mode", "told"), [("I", "32-bit integers"), ("F", "floating-point numbers")])
def test_numbers_without_a_white_are_refused(mode, told, tmp_path, vision):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.tif").write_bytes(packed(Image.new(mode, SIZE, 300), "TIFF"))
    with pytest.raises(DataError, match=rf"a.tif: cannot be read as an image .*{told}, of which nobody .*8 or 16 bits"):
        load_batches(tmp_path / "pictures", folders=[vision])


# ---- colours


PALETTE = COLOURS.quantize(8)
KINDS = {
    "rgb": packed(COLOURS, "PNG"),
    "jpeg": packed(COLOURS, "JPEG"),
    "bits": packed(COLOURS.convert("1"), "PNG"),
    "grey": packed(GREY, "PNG"),
    "grey and alpha": packed(SEEN.convert("LA"), "PNG"),
    "alpha": packed(SEEN, "PNG"),
    "palette": packed(PALETTE, "PNG"),
    "palette with a transparent colour": packed(PALETTE, "PNG", transparency=1),
    "palette with transparencies": packed(PALETTE, "PNG", transparency=bytes(range(8))),
    "inks": packed(COLOURS.convert("CMYK"), "JPEG"),
    "inks in tiff": packed(COLOURS.convert("CMYK"), "TIFF"),
    "luminance": packed(COLOURS.convert("YCbCr"), "TIFF"),
    "gif": packed(PALETTE, "GIF"),
    "webp": packed(SEEN, "WEBP", lossless=True),
    "bmp": packed(COLOURS, "BMP"),
    "ppm": packed(COLOURS, "PPM"),
}


@pytest.mark.parametrize("name", KINDS)
def test_colours_are_those_that_processors_and_torchvision_see(name):
    expected = Image.open(BytesIO(KINDS[name])).convert("RGB")
    assert same(picture(KINDS[name]), expected)


# ---- orientation


def turned(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return packed(COLOURS, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_pictures_stand_as_the_camera_was_held(kind):
    for orientation in range(1, 9):
        data = turned(kind, orientation)
        expected = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
        found = picture(data)
        assert found.size == (SIZE if orientation < 5 else SIZE[::-1])
        assert same(found, expected), orientation


def test_16_bits_of_grey_are_turned_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.frombytes("I;16", (2, 1), struct.pack("<2H", 257, 514))
    found = picture(packed(image, "PNG", exif=exif))
    assert (found.size, found.getchannel("R").tobytes()) == ((1, 2), b"\1\2")


HEAD = b"MM\0*\0\0\0\x08"
EXIFS = {
    "nothing": b"",
    "noise": b"\xff" * 64,
    "a head": HEAD,
    "very many": HEAD + b"\xff\xff" + b"\x01\x12\0\x03" * 20,
    "a text": HEAD + struct.pack(">HHHI4sI", 1, 0x0112, 2, 4, b"six\0", 0),
    "far away": HEAD + struct.pack(">HHHIII", 1, 0x0112, 3, 2**31, 2**32 - 1, 0),
    "in a circle": HEAD + struct.pack(">HHHIII", 1, 0x8769, 4, 1, 8, 8),
    "nine": HEAD + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, 9, 0, 0),
    "zero": HEAD + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, 0, 0, 0),
    "a fraction": HEAD + struct.pack(">HHHIII", 1, 0x0112, 5, 1, 8, 0),
}


@pytest.mark.parametrize("name", EXIFS)
def test_what_is_no_orientation_says_nothing(name):
    plain = packed(COLOURS, "PNG")
    cut = plain.index(b"IDAT") - 4
    for data in (
        plain[:cut] + chunk(b"eXIf", EXIFS[name]) + plain[cut:],
        packed(COLOURS, "JPEG", exif=b"Exif\0\0" + EXIFS[name]),
    ):
        assert same(picture(data), Image.open(BytesIO(data)).convert("RGB"))


def test_calibration_sees_pictures_as_they_stand(tmp_path, vision):
    """The whole way: a picture that is stored lying is that which is stored standing."""
    standing = tmp_path / "standing" / "a.png"
    save_image(standing, "red", (6, 12))
    image = Image.open(standing)
    image.paste("blue", (0, 6, 6, 12))
    image.save(standing)
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "lying").mkdir()
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying" / "a.png", exif=exif)
    found, expected = (load_batches(tmp_path / name, folders=[vision]) for name in ("lying", "standing"))
    assert torch.equal(found[0]["pixel_values"], expected[0]["pixel_values"])
    assert not torch.equal(found[0]["pixel_values"], found[0]["pixel_values"].flip(2))


# ---- folders


SUFFIXES = {
    **{".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".JPG": "JPEG", ".webp": "WEBP", ".bmp": "BMP"},
    **{".gif": "GIF", ".tif": "TIFF", ".tiff": "TIFF", ".TIF": "TIFF", ".ppm": "PPM", ".pgm": "PPM"},
}


def test_a_folder_of_many_formats_is_read_whole(tmp_path, vision):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for suffix, kind in SUFFIXES.items():
        (folder / f"{suffix[1:]}{suffix}").write_bytes(packed(GREY if suffix == ".pgm" else COLOURS, kind))
    (batch,) = load_batches(folder, folders=[vision])
    assert len(batch["pixel_values"]) == len(SUFFIXES)
    assert data_files(folder).notes == []


def test_files_that_are_not_read_are_told_of(tmp_path):
    folder = tmp_path / "pictures"
    save_image(folder / "a.png", "red")
    save_image(folder / "b.gif", "red")
    for name in (
        "c.heic",
        "d.HEIC",
        "e.svg",
        "f.avif",
        "g.txt",
        "h",
        "README.md",
        "LICENSE",
        "Thumbs.db",
        "desktop.ini",
        ".hidden.heic",
        "i.p\x1b[2J",
    ):
        (folder / name).write_text("x")
    found = data_files(folder)
    assert (found.kind, [each.name for each in found.files]) == ("images", ["a.png", "b.gif"])
    (note,) = found.notes
    assert note.startswith(f"{folder}: 2 images are read (ignored: 2 .heic, ")
    for part in ("1 .svg", "1 .avif", "1 .txt", "2 files of other names"):
        assert part in note
    assert ".db" not in note
    assert ".ini" not in note
