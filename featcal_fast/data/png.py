"""What Pillow reads of a PNG file although it is not whole."""

from __future__ import annotations

import struct
import zlib

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by kind of colour
PIECE = 2**20  # bytes that are unpacked at a time, of what may be very much


def check_png(data: bytes) -> None:
    """Raises:
    ValueError: a PNG file that Pillow would read has parts that are broken, or lacks rows, which would be black."""
    rest = memoryview(data)[8:]
    expected = rows = 0  # bytes
    unpacker = zlib.decompressobj()
    while True:
        length, kind = int.from_bytes(rest[:4], "big"), bytes(rest[4:8])
        body, end = rest[8 : 8 + length], rest[8 + length : 12 + length]
        if len(end) < 4 or zlib.crc32(rest[4 : 8 + length]) != int.from_bytes(end, "big"):
            raise ValueError("it is cut off, or a part of it is broken")
        if kind == b"IEND":
            break
        if kind == b"IHDR":
            width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", body)
            if not interlaced:
                expected = height * (1 + (width * bits * CHANNELS.get(colour, 0) + 7) // 8)
        if kind == b"IDAT":
            packed = bytes(body)
            while packed and rows < expected:
                rows += len(unpacker.decompress(packed, PIECE))
                packed = b"" if unpacker.eof else unpacker.unconsumed_tail
        rest = rest[12 + length :]
    if rows < expected:
        raise ValueError("rows of it are missing")
