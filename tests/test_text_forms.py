"""Texts in every form that people have: which file is read how, and what is said of those that are not."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import sys
import tracemalloc
import zlib

import pytest
from data_files import A, assert_same, ids, rows, save_image

from featcal_fast import files
from featcal_fast.data import json_items, packed
from featcal_fast.data.batches import load_batches
from featcal_fast.data.lines import Lines
from featcal_fast.data.sources import data_files, is_hub_id, read_samples
from featcal_fast.data.text_files import read_texts
from featcal_fast.errors import DataError

zstandard = pytest.importorskip("zstandard")
PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}
LETTERS = ["a", "b c", "d", "e f g", "h", "i j"]
SAMPLES = [{"text": text} for text in LETTERS]


def lined(samples):
    return "".join(json.dumps(each) + "\n" for each in samples).encode()


def read(path, samples=100, seed=0):
    """What is read, in the order of the file."""
    return sorted(read_samples(path, samples, seed), key=lambda each: int(each.where.rpartition(" ")[2]))


def found(path, *more):
    return [each.values for each in read(path, *more)]


def refused(path, message):
    with pytest.raises(DataError, match=message) as error:
        load_batches(path, folders=[path.parent])
    assert len(str(error.value)) < 1500


# ---- every form holds the same samples


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", lined(SAMPLES)),
        ("a.ndjson", lined(SAMPLES)),
        ("a.json", lined(SAMPLES)),
        ("a.json", json.dumps(SAMPLES).encode()),
        ("a.json", b"\xef\xbb\xbf \n" + json.dumps(SAMPLES, indent=2).encode() + b"\r\n"),
        ("a.json", json.dumps(LETTERS).encode()),
        ("a.json", json.dumps({"version": 1, "data": SAMPLES}).encode()),
        ("a.json", json.dumps({"data": SAMPLES}, indent=1).encode()),
        ("a.txt", b"\xef\xbb\xbf" + "\r\n\r\n".join(LETTERS).encode()),
        ("a.csv", "\r\n".join(["\ufeffid,text", *(f"{i},{each}" for i, each in enumerate(LETTERS))]).encode()),
        ("a.csv", "\n".join(['"text";"n"', *(f'"{each}";1' for each in LETTERS), "", ""]).encode()),
        ("a.tsv", "\n".join(["text\tn", *(f"{each}\t1" for each in LETTERS)]).encode()),
    ],
)
def test_every_form_gives_the_same_samples(name, data, tmp_path):
    (tmp_path / "data.jsonl").write_bytes(lined(SAMPLES))
    expected = [each.values for each in read_samples(tmp_path / "data.jsonl", 4, 3)]
    assert len(expected) == 4
    path = tmp_path / name
    path.write_bytes(data)
    assert [each.values for each in read_samples(path, 4, 3)] == expected
    for ending, pack in PACK.items():
        path = tmp_path / f"{name.upper()}.{ending}"
        path.write_bytes(pack(data))
        assert [each.values for each in read_samples(path, 4, 3)] == expected


def test_packed_lines_are_found_wherever_blocks_end(tmp_path, monkeypatch):
    data = b"\n" + b"\r\n \n".join(json.dumps({"text": f"{i}" * (i % 7)}).encode() for i in range(60))
    (tmp_path / "a.jsonl").write_bytes(data)
    expected = [each.values for each in read_texts([tmp_path / "a.jsonl"], 20, 1, "data", [])]
    for ending, pack in PACK.items():
        path = tmp_path / f"a.jsonl.{ending}"
        path.write_bytes(pack(data[:100]) + pack(data[100:]) + b"\0" * 50_000 * (ending == "gz"))  # several streams
        for size in (7, 64, 10**6):
            monkeypatch.setattr(packed, "BLOCK", size)
            assert [each.values for each in read_texts([path], 20, 1, "data", [])] == expected


def test_items_of_an_array_are_found_wherever_blocks_end(tmp_path, monkeypatch):
    chance = random.Random(0)
    values = ["".join(chance.choices('a"\\[]{},é\n ', k=chance.randrange(9))) for _ in range(40)]
    items = [{"text": each, "more": [each, {each: []}]} for each in values]
    for number, indent in enumerate((None, 3)):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(items, indent=indent, ensure_ascii=False))
        for size in (1, 2, 5, 64, 10**6):
            monkeypatch.setattr(packed, "BLOCK", size)
            array = json_items.Items(path)
            assert array.count == 40
            assert [(i, n, json.loads(raw)) for i, n, raw in array.pick([7, 0, 39, 8])] == [
                (i, i + 1, items[i]) for i in (0, 7, 8, 39)
            ]
    for empty in ("[]", " [\n] "):
        path.write_text(empty)
        refused(path, "found zero samples")


def test_quoted_fields_may_hold_anything(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n"a ""b"",\nc",d\n\n"e;f",\n')
    assert [(each.where[-6:], *each.values.values()) for each in read(path)] == [
        ("line 2", 'a "b",\nc', "", "d"),
        ("line 5", "e;f", "", ""),
    ]
    path.write_text('text\n"' + "a" * 200_000 + '"\n')  # the library's limit is 131,072
    assert len(found(path)[0]["text"]) == 200_000


# ---- folders


def test_a_folder_of_texts_is_one_set_of_samples(tmp_path, bare):
    (tmp_path / "data.jsonl").write_bytes(lined(SAMPLES))
    expected = load_batches(tmp_path / "data.jsonl", folders=[bare], samples=4, seed=3)
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "0.jsonl").write_bytes(lined(SAMPLES[:2]))
    (folder / "1.jsonl.gz").write_bytes(gzip.compress(lined(SAMPLES[2:3])))
    (folder / "2.jsonl").touch()
    (folder / "3.jsonl.zst").write_bytes(zstandard.compress(lined(SAMPLES[3:])))
    notes = []
    assert_same(load_batches(folder, folders=[bare], samples=4, seed=3, notes=notes), expected)
    assert not notes
    for name in ("README.md", "LICENSE.txt", "dataset_infos.json"):
        (folder / name).write_text("notes")
    (folder / "4.jsonl").symlink_to("nowhere")
    for name in ("notes.txt", "labels.csv", "load.py"):
        (folder / name).write_text("not read")
    save_image(folder / "logo.png", (0, 0, 0))
    assert_same(load_batches(folder, folders=[bare], samples=4, seed=3, notes=notes), expected)
    (note,) = notes
    assert "4 files of texts (.jsonl) are read (ignored: logo.png" in note
    assert "notes.txt" in note
    assert "load.py" in note
    assert "4.jsonl" in note
    assert "LICENSE" not in note
    (folder / "1.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError, match=r"found (text|messages), expected (text|messages) as in .*give each kind"):
        load_batches(folder, folders=[bare])


def test_of_a_folder_of_splits_the_training_one_is_read(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl", "validation.jsonl.gz"):
        (tmp_path / name).touch()
    data = data_files(tmp_path)
    assert [each.name for each in data.files] == ["train-0.jsonl", "train-1.jsonl"]
    assert "ignored: test.jsonl, validation.jsonl.gz" in data.notes[0]
    for name in ("train-0.jsonl", "train-1.jsonl"):
        (tmp_path / name).unlink()
    assert len(data_files(tmp_path).files) == 2
    for name in ("test", "train"):
        (tmp_path / "split" / name).mkdir(parents=True)
        (tmp_path / "split" / name / "0.json").touch()
    assert data_files(tmp_path / "split").files == [tmp_path / "split" / "train" / "0.json"]


def test_texts_beside_more_images_are_notes(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"text": "a"}\n')
    for i in range(2):
        save_image(tmp_path / f"{i}.png", (0, 0, 0))
    assert data_files(tmp_path).kind == "images"


def test_captions_of_images_are_no_texts(tmp_path):
    """However they are called: beside each image, texts that tell about it."""
    for i in range(2):
        save_image(tmp_path / f"{i}.jpg", (0, 0, 0))
        for name in (f"{i}.json", f"{i}.jpg.json", f"{i}.txt"):
            (tmp_path / name).write_text(json.dumps({"text": "a"}))
    assert data_files(tmp_path).kind == "images"
    for i in range(3):
        (tmp_path / f"part{i}.json").write_text(json.dumps([{"text": "a"}]))
    data = data_files(tmp_path)
    assert (data.kind, [each.name for each in data.files]) == ("texts", [f"part{i}.json" for i in range(3)])
    assert "ignored: 0.jpg, 1.jpg, 0.jpg.json" in data.notes[0]


def test_many_texts_beside_a_picture_are_texts(tmp_path):
    save_image(tmp_path / "cover.png", (0, 0, 0))
    (tmp_path / "labels.txt").write_text("cat")
    assert data_files(tmp_path).kind == "images"
    (tmp_path / "book.txt").write_text("a")
    assert data_files(tmp_path).kind == "texts"


def test_of_an_object_the_list_of_samples_is_read(tmp_path):
    path, notes = tmp_path / "a.json", []
    for lists in ({"version": 1, "data": [{"text": "a"}]}, {"test": [], "train": [{"text": "a"}], "val": ["b"]}):
        path.write_text(json.dumps(lists))
        assert [each.values for each in read_samples(path, 9, 0, notes=notes)] == [{"text": "a"}]
    assert notes == [
        f"{path}: the list 'data' is read (ignored: version)",
        f"{path}: the list 'train' is read (ignored: test, val)",
    ]
    path.write_text(json.dumps({"sentences": ["a"]}))
    assert found(path) == [{"text": "a"}]
    for labels in ({"id": 3, "tags": ["a"]}, {"train": ["a"], "more": ["b"]}, {"test": ["a"], "val": ["b"]}):
        path.write_text(json.dumps(labels))
        refused(path, f"found the keys {', '.join(labels)}, expected an array of samples")


@pytest.mark.parametrize("name", ["a.json", "b.csv", "c.tsv", "d.txt", "e.jsonl.zst", "f.gz", "g.ndjson"])
def test_names_of_files_are_no_ids_of_the_hub(name):
    assert not is_hub_id(f"org/{name}")
    with pytest.raises(DataError, match="no such file or folder"):
        load_batches(f"org/{name}", folders=[])


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'[{"text": "a"}', r"a.json: its JSON array does not end"),
        ("a.json", b'[{"text": "a"}] b', r"a.json: found more behind the end of its JSON array"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', r"a.json, item 1: found invalid JSON"),
        ("a.json", b'[{"text": "a"},]', r"a.json, item 2: found invalid JSON"),
        ("a.json", b'[{"text": "a"}, 5]', r"a.json, item 2: found a JSON int; expected a text, or an object with"),
        ("a.json", b'[{"text": "a", "text": "b"}]', r"item 1: found invalid JSON.*twice"),
        ("a.json", b"[" + b"[" * 10**6 + b"]" * 10**6 + b"]", r"item 1: found invalid JSON.*nested"),
        ("a.json", b"a", r"a.json: found invalid JSON"),
        ("a.json", b'{"a": [5]}', r"a.json, item 1: found a JSON int; expected a text, or an object with"),
        ("a.json", b'{"a": [[5]]}', r"a.json, item 1: found a JSON list; expected a text, or an object with"),
        ("a.json", b"5", r"a.json: found a int, expected an array of samples"),
        ("a.json", b'{"a": [{"text": "a"}], "b": [{"text": "b"}]}', r"a.json: found the keys a, b, expected an array"),
        ("a.json", b"", r"a.json: found zero samples"),
        ("a.json", b'[{"text": "\xff"}]', r"item 1: found invalid JSON.*UTF-8"),
        ("a.jsonl", b'[\n{"text": "a"}\n]\n', r"line \d: found invalid JSON.* ends in \.json"),
        ("a.txt", b"a\nb\0c\n", r"a.txt, line 2: found a zero byte"),
        ("a.txt", "a\né\n".encode("latin-1"), r"a.txt, line 2: found bytes that are not UTF-8"),
        ("a.txt", "a\n".encode("utf-16"), r"a.txt: found a text in UTF-16, expected UTF-8"),
        ("a.txt", b'{"text": "a"}\n', r"a.txt, line 1: found a JSON object, .*\.jsonl"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", r"a.txt: line 1: .*Git LFS"),
        ("a.csv", b"", r"a.csv: found zero samples"),
        ("a.csv", b"text\n", r"a.csv: found zero samples"),
        ("a.csv", b"id,label\n1,2\n", r"a.csv, line 2: found the keys id, label; expected those of one kind: text"),
        ("a.csv", b"text,label\na\n", r"a.csv, line 2: found 1 fields, expected 2"),
        ("a.csv", b"text,text\na,b\n", r"a.csv, line 1: found the columns text more than once"),
        ("a.csv", b'text\n"a\n', r"a.csv, line 2: cannot be read as a row.*double quotes"),
        ("a.csv", b'text\nb\n"a"c\n', r"a.csv, line 3: cannot be read as a row"),
        ("a.csv", b"text\nb\na\0\n", r"a.csv, line 3: found a zero byte"),
        ("a.csv", "text\nb\né\n".encode("latin-1"), r"a.csv, line 3: found bytes that are not UTF-8"),
        ("a.csv", b"," * 20_000 + b"\n", r"a.csv, line 1: found 20001 columns, expected at most 10000"),
        ("a.jsonl.gz", b'{"text": "a"}\n', r"a.jsonl.gz: cannot be unpacked as .gz"),
        ("a.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\n", r"line 1: .*Git LFS"),
        (
            "a.jsonl",
            gzip.compress(b"{}", mtime=0),
            r"a.jsonl: found what is packed as .gz, .*; give it a name that ends so",
        ),
        ("a.csv", zstandard.compress(b"a"), r"a.csv: found what is packed as .zst"),
        ("a.txt.gz", gzip.compress(bz2.compress(b"a"), mtime=0), r"a.txt.gz: found what is packed as .bz2"),
        ("a.json", lzma.compress(b"a"), r"a.json: found what is packed as .xz"),
        ("a.jsonl.gz", b"", r"a.jsonl.gz: cannot be unpacked as .gz .*ends in the middle"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0) + b"\0" * 2**21, r"cannot be unpacked as .gz .*goes on with zeros"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0) * 100_000, r"a.jsonl.gz: found zero samples"),
        ("a.zip", b"a", r"a.zip: found the unknown file type '.zip'; expected a .jsonl file \(or .json"),
        ("a.tar.gz", b"a", r"a.tar.gz: found the unknown file type '.gz'"),
    ],
)
def test_what_cannot_be_read_is_named(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    refused(tmp_path / name, message)


@pytest.mark.parametrize("ending", PACK)
def test_packed_files_that_are_broken_are_named(ending, tmp_path):
    data = PACK[ending](lined(SAMPLES) * 100)
    damaged = bytes(each ^ 255 if 20 < i < 40 else each for i, each in enumerate(data))
    for broken in (data[: len(data) // 2], data[:-1], data + b"more behind it", damaged, lined(SAMPLES)):
        (tmp_path / f"a.jsonl.{ending}").write_bytes(broken)
        refused(tmp_path / f"a.jsonl.{ending}", rf"a.jsonl.{ending}: cannot be unpacked as .{ending}.*copy or pack it")


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lined(SAMPLES)))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    refused(tmp_path / "a.jsonl.zst", r"a.jsonl.zst: cannot be read without zstandard; pip install zstandard")


# ---- bounds


def bomb(packer, piece, count):
    return b"".join([*(packer.compress(piece) for _ in range(count)), packer.flush()])


@pytest.mark.parametrize("piece", [b"\0" * 2**20, b"\n" * 2**20])
@pytest.mark.parametrize(
    "make", [lambda: zlib.compressobj(9, 8, 31), lambda: zstandard.ZstdCompressor().compressobj(), bz2.BZ2Compressor]
)
def test_what_unpacks_to_far_more_is_refused_within_bounds(make, piece, tmp_path, monkeypatch):
    """A line without end, and lines without end."""
    monkeypatch.setattr(packed, "ROOM", 2**24)
    packer = make()
    path = tmp_path / f"a.txt.{ {'Compress': 'gz', 'BZ2Compressor': 'bz2'}.get(type(packer).__name__, 'zst') }"
    path.write_bytes(bomb(packer, piece, 24))
    tracemalloc.start()
    try:
        refused(path, r"unpacks to more than \d+ MiB, which is too large|line 1 is longer than 16 MiB")
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()


def test_windows_that_take_too_much_memory_are_refused(tmp_path):
    large = zstandard.ZstdCompressionParameters(window_log=30)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(bomb(zstandard.ZstdCompressor(compression_params=large).compressobj(), lined(SAMPLES), 1))
    refused(path, "cannot be unpacked as .zst.*too much memory")
    path = tmp_path / "a.jsonl.xz"
    stream = bytearray(lzma.compress(lined(SAMPLES), lzma.FORMAT_XZ, lzma.CHECK_NONE))
    assert stream[14:17] == b"\x21\x01\x16"  # the filter, whose property is the size of what it looks back at
    stream[16] = 40  # 4 GiB
    stream[20:24] = zlib.crc32(stream[12:20]).to_bytes(4, "little")
    path.write_bytes(stream)
    refused(path, "cannot be unpacked as .xz.*limit")


def test_rows_items_and_objects_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 1000)
    monkeypatch.setattr(packed, "BLOCK", 100)
    (tmp_path / "a.csv").write_text('text\n"' + "a\n" * 1000 + '"\n')
    refused(tmp_path / "a.csv", r"a row is longer than .* MiB; does a quote not end\?")
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": "a" * 2000}]))
    refused(tmp_path / "a.json", "a.json: cannot be read: item 2 is longer than")
    monkeypatch.setattr("featcal_fast.data.text_files.LARGEST_OBJECT", 300)
    (tmp_path / "a.json").write_text(json.dumps({"data": ["a" * 400]}))
    refused(tmp_path / "a.json", r"a.json: found a JSON object of more than .* MiB, expected an array")


def test_only_what_is_drawn_is_read_of_a_file_that_is_not_packed(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lined(SAMPLES) * 10_000)
    lines, read_at, got = Lines(path), files.read_at, []
    monkeypatch.setattr(files, "read_at", lambda *given: got.append(read_at(*given)) or got[-1])
    assert [line for _, _, line in lines.pick([0, 6])] == [lined(SAMPLES[:1])] * 2
    assert sum(map(len, got)) <= packed.BLOCK


def test_a_packed_file_that_changes_while_it_is_read_is_named(tmp_path, bare, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lined(SAMPLES)))
    inner = files.read_at

    def read_at(*given):
        data = inner(*given)
        if not data:
            path.write_bytes(gzip.compress(lined(SAMPLES[:2])))
        return data

    monkeypatch.setattr(files, "read_at", read_at)
    refused(path, "a.jsonl.gz: it changed while it was being read")


def test_a_single_table_is_read(tmp_path, bare, datasets):
    datasets.Dataset.from_list([{"text": "a", "id": 1}]).to_parquet(tmp_path / "a.parquet")
    notes = []
    assert rows(load_batches(tmp_path / "a.parquet", folders=[bare], notes=notes)) == [[A]]
    assert notes == [f"{tmp_path}/a.parquet: read as text (ignored: id)"]
    assert ids("a") == [A]
