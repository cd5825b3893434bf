"""Texts of strangers, and the programs that make token ids of them: bounded, and named when they are not to be had."""

from __future__ import annotations

import json
import os
import time
from collections import deque

import pytest
import torch
from data_files import BOS, EOS, TEMPLATE, A, ids, rows, save_tokenizer

from featcal_fast import files
from featcal_fast.data import packed, samples, text_files, texts
from featcal_fast.data.batches import load_batches
from featcal_fast.data.text_files import read_texts
from featcal_fast.errors import DataError

MESSAGES = {"messages": [{"role": "user", "content": "a"}]}
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


# ---- lines


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 100_000, r"line 1: found invalid JSON.*nested"),
        (b'{"text": "a", "text": "b"}', r"line 1: found invalid JSON.*twice"),
        (b'{"text": NaN}', r"line 1, text: found float; expected a string"),
        (b'{"text": 1e999}', r"line 1, text: found float; expected a string"),
        (b'{"text": ' + b"9" * 5000 + b"}", r"line 1: found invalid JSON.*digits"),
        (b'{"text": "a\0b"}', r"line 1: found invalid JSON"),
        ('{"text": "a"}'.encode("utf-16"), r"found a text in UTF-16, expected UTF-8"),
        ('{"text": "a"}'.encode("utf-32"), r"found a text in UTF-32, expected UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', r"line 1: found invalid JSON.*UTF-8"),
        (b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}', r"line 2: found invalid JSON"),
        (b"\n  \n\t\r\n", r"data.jsonl: found zero samples"),
    ],
)
def test_lines_that_would_break_their_reader_are_named(tmp_path, plain, data, message):
    (tmp_path / "data.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        load_batches(tmp_path / "data.jsonl", folders=[plain])
    assert len(str(error.value)) < 1000


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path, bare):
    (tmp_path / "data.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert sorted(rows(load_batches(tmp_path / "data.jsonl", folders=[bare]))) == [[A], [A + 1]]


def test_lines_are_found_wherever_blocks_end(tmp_path, monkeypatch):
    """And those that are drawn are those of all that are not blank."""
    texts = [f"{i}" * (i % 7) for i in range(60)]
    content = "\n".join(
        "" if i % 5 == 3 else " \t\r" if i % 5 == 1 else json.dumps({"text": t}) for i, t in enumerate(texts)
    )
    expected = [(i + 1, t) for i, t in enumerate(texts) if i % 5 not in (1, 3)]
    order = torch.randperm(len(expected), generator=torch.Generator().manual_seed(3)).tolist()
    for ending in ("", "\n", "\n\n \n"):
        (tmp_path / "data.jsonl").write_text(content + ending)
        for size in (1, 5, 16, 50, 1000, 10**6):
            monkeypatch.setattr(packed, "BLOCK", size)
            found = read_texts([tmp_path / "data.jsonl"], 20, 3, "data", [])
            assert [(s.where.rpartition(" ")[2], s.values["text"]) for s in found] == [
                (str(expected[i][0]), expected[i][1]) for i in order[:20]
            ]


def test_many_lines_take_no_memory_and_a_second(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "a"}\n' + b"{}\n" * 10**7)
    began = time.process_time()
    with pytest.raises(DataError, match=r"line \d+: found the keys nothing"):
        read_texts([tmp_path / "data.jsonl"], 4, 0, "data", [])
    assert time.process_time() - began < 5  # a loop over them takes longer


def test_lines_and_what_is_drawn_of_them_are_bounded(tmp_path, write, plain, monkeypatch):
    with (tmp_path / "data.jsonl").open("wb") as file:
        file.write(b'{"text": "a"}\n')
        file.truncate(2**40)
    with pytest.raises(DataError, match=r"data.jsonl: cannot be read: line 2 is longer than 16 MiB"):
        load_batches(tmp_path / "data.jsonl", folders=[plain])
    (tmp_path / "data.jsonl").unlink()
    monkeypatch.setattr(text_files, "TOGETHER", 30)
    with pytest.raises(DataError, match=r"the samples that were drawn have more than"):
        load_batches(write(*[{"text": "a"}] * 3), folders=[plain])
    assert len(load_batches(write(*[{"text": "a"}] * 3), folders=[plain], samples=2)) == 1


def test_a_file_that_changes_while_it_is_read_is_named(write, plain, monkeypatch):
    path = write(*[{"text": "a"}] * 9)
    inner = files.read_at
    for content in ('{"text": "b"}\n' * 2, '{"text": "b"}\n' * 90):

        def read_at(file, size, position, content=content):
            found = inner(file, size, position)
            if not found:  # all lines are counted
                path.write_text(content)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(files, "read_at", read_at)
            with pytest.raises(DataError, match=r"data.jsonl: it changed while it was being read"):
                load_batches(path, folders=[plain])
        write(*[{"text": "a"}] * 9)


def test_what_is_no_file_is_not_waited_for(tmp_path, plain):
    os.mkfifo(tmp_path / "data.jsonl")
    (tmp_path / "endless.jsonl").symlink_to("/dev/zero")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("data.jsonl", "endless.jsonl"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read: it is not a regular file"):
            load_batches(tmp_path / name, folders=[plain])
    with pytest.raises(DataError, match=r"folder.jsonl: found no images"):
        load_batches(tmp_path / "folder.jsonl", folders=[plain])


def test_texts_of_any_length_are_not_tokenized(write, plain, monkeypatch):
    monkeypatch.setattr(texts, "LONGEST_TEXT", 100)
    for count in (50, 51, 5000):
        assert len(rows(load_batches(write({"text": " b" * count}), folders=[plain]))[0]) == 52


# ---- draws


def test_draws_of_very_many_samples_hold_only_the_drawn():
    drawn = samples.draw(2**62, 1000, 1, "data")
    assert len({*drawn}) == 1000
    assert all(0 <= each < 2**62 for each in drawn)
    assert drawn == samples.draw(2**62, 1000, 1, "data") != samples.draw(2**62, 1000, 2, "data")
    assert samples.draw(50, 10, 7, "d") == torch.randperm(50, generator=torch.Generator().manual_seed(7))[:10].tolist()


# ---- templates


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ENDLESS, "cannot render the messages: it takes longer than 1 s"),
        ("{{ 'a ' * 5000000000 }}", r"rejects the messages \(MemoryError"),
        (
            "{% for a in range(99999) %}{{ 'a ' * 99999 }}{% endfor %}",
            "cannot render the messages|rejects the messages",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "rejects the messages|calls itself too often"),
        ("{{ 'a ' * 600000 }}", r"line 1: found a text of 1200000 characters"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", r"line 1: the chat template of .*evil rejects the messages"),
    ],
)
def test_templates_may_not_take_all_there_is(write, tmp_path, template, message):
    folder = save_tokenizer(tmp_path / "evil", template=template)
    began = time.process_time()
    with pytest.raises(DataError, match=message):
        load_batches(write(MESSAGES), folders=[folder])
    assert time.process_time() - began < 5


def test_a_message_that_a_template_refuses_is_named(write, tmp_path):
    strict = "{{ raise_exception('no such role') if messages[0]['role'] == 'x' else 'a' }}"
    folder = save_tokenizer(tmp_path / "strict", template=strict)
    odd = {"messages": [{"role": "x", "content": "a"}]}
    with pytest.raises(DataError, match=r"line 3: the chat template of .*strict rejects .*no such role"):
        load_batches(write(MESSAGES, MESSAGES, odd, MESSAGES), folders=[folder])


# ---- tokenizers


def pattern(folder, regex):
    """A tokenizer that splits texts by a regular expression."""
    save_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_tokenizers_whose_patterns_do_not_end_are_given_up(write, tmp_path):
    """The library gives them up with what Python takes for no error."""
    folder = pattern(tmp_path / "evil", "((a+)+)+!")
    with pytest.raises(DataError, match=r"evil: its tokenizer cannot be used: 64 characters of text: it takes"):
        load_batches(write({"text": "a" * 5000}), folders=[folder])


def test_tokenizers_that_do_not_end_are_ended(write, plain, monkeypatch):
    monkeypatch.setattr(texts, "TOKENIZER_SECONDS", 1)
    monkeypatch.setattr(texts.Splitter, "row", lambda *_: deque(iter(int, 1), maxlen=0))
    with pytest.raises(DataError, match=r"data.jsonl: the tokenizer in .* cannot tokenize the texts: it takes"):
        load_batches(write({"text": "a"}), folders=[plain])


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"]
)
def test_tokenizer_files_are_looked_at_before_a_library_reads_them(write, tmp_path, name):
    path = save_tokenizer(tmp_path / "odd", template=TEMPLATE) / name
    path.unlink(missing_ok=True)
    data = write({"text": "a"})
    os.mkfifo(path)
    with pytest.raises(DataError, match=rf"odd/{name}: it is not a regular file"):
        load_batches(data, folders=[tmp_path / "odd"])
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match=rf"odd/{name}: found 1099511627776 bytes, expected at most"):
        load_batches(data, folders=[tmp_path / "odd"])
    path.unlink()
    (tmp_path / "outside").write_text("{}")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match=rf"odd/{name}: it is a link to .*outside, outside of the model folder"):
        load_batches(data, folders=[tmp_path / "odd"])


@pytest.mark.parametrize("content", [b"[" * 10**5, b"\xff", b"[]", b'{"a": 1, "a": 2}', b'{"a": NaN}', b""])
def test_tokenizer_configs_that_are_no_json_are_named(write, tmp_path, content):
    path = save_tokenizer(tmp_path / "odd") / "tokenizer_config.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"odd/tokenizer_config.json: (it is not valid JSON|found a JSON list)"):
        load_batches(write({"text": "a"}), folders=[tmp_path / "odd"])


def test_code_of_a_tokenizer_is_not_run_and_nobody_is_told_to(write, tmp_path):
    folder = save_tokenizer(tmp_path / "own")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["code.MyTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **own}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass MyTokenizer: ...\n")
    with pytest.raises(
        DataError, match=r"own: AutoTokenizer cannot load it.*code of its own, which is never run"
    ) as error:
        load_batches(write({"text": "a"}), folders=[folder])
    assert "trust_remote_code" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_nothing_of_a_library_reaches_the_terminal(write, tmp_path, capfd):
    folder = save_tokenizer(tmp_path / "odd", template="{{ '\x1b[31m' }}")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "\x1b[31mNope"}))
    with pytest.raises(DataError):
        load_batches(write(MESSAGES), folders=[folder])
    assert "\x1b" not in "".join(capfd.readouterr())


def test_one_process_after_the_other_where_there_are_many_texts(write, plain, monkeypatch):
    path = write(*({"text": "a b"} for _ in range(5)))
    monkeypatch.setattr(texts, "IDS", 2 * 512)
    assert rows(load_batches(path, folders=[plain])) == [[BOS, *ids("a b"), EOS]] * 5
