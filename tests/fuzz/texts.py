"""Files of texts in all forms, packed or not: what is drawn, and what samples become before they are tokenised."""

from __future__ import annotations

import gzip
import json
import random
import tempfile
from pathlib import Path

from featcal_fast.data.samples import os_errors
from featcal_fast.data.text_files import read_texts
from tests.fuzz import damaged

FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-")
NAMES = (b"a.jsonl", b"a.json", b"a.csv", b"a.tsv", b"a.txt", b"a.jsonl.gz", b"a.json.xz", b"a.txt.bz2", b"a.csv.zst")
LINES = [
    {"text": "a", "id": 1},
    {"prompt": "a", "completion": "b"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "b", "tool_calls": [1]}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": None, "output": "b"},
    {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}]},
]
SEEDS = [  # a name, and what is in the file
    *(b"a.jsonl\n" + json.dumps(line).encode() for line in LINES),
    b"a.json\n" + json.dumps([LINES[0]] * 3, indent=1).encode(),
    b"a.json\n" + json.dumps({"data": LINES[:1] + ["a"]}).encode(),
    b'a.csv\ntext;n\n"a ""b"" \nc";1\n\nd;2\n',
    b"a.tsv\nquestion\tanswer\na\tb\n",
    b"a.txt\n\xef\xbb\xbfa\r\n\r\nb\n",
    b"a.jsonl.gz\n" + gzip.compress(b'{"text": "a"}\n' * 9),
]
ODD = [
    None,
    True,
    -1,
    1e308,
    "",
    "\ud800",
    "\x1b[2J",
    "x" * 300,
    [],
    {},
    [[]],
    {"a": 1},
    ["a", 1],
    "[{",
    '[{"role": "a"}]',
]
WRAPPERS = ["text", "content", "type", "x", 1, None]
ADDED = ["text", "messages", "chosen", "context", "role", "from", "", "a" * 500]


def target(data: bytes) -> None:
    """As `load_batches` reads them."""
    name, _, content = data.partition(b"\n")
    path = Path(FOLDER.name, (name if name in NAMES else NAMES[len(name) % len(NAMES)]).decode())
    path.write_bytes(content)
    with os_errors(path):
        read_texts([path], 3, 0, path, [])


def damage(data: bytes, chance: random.Random) -> bytes:
    """A value of a line changed, a key added or given twice; or another name."""
    name, _, content = data.partition(b"\n")
    if chance.random() < 0.1:
        return chance.choice(NAMES) + b"\n" + content
    values = damaged(content, chance, ODD, [1, 2, 2000], WRAPPERS, ADDED)
    if values is None:
        return data
    return name + b"\n" + json.dumps(values, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
