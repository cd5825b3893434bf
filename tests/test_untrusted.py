"""What strangers wrote has bounds: documents, programs, patterns, and what of it comes into messages."""

from __future__ import annotations

import gc
import inspect
import json
import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from runs import exit_code

from featcal_fast import errors, files
from featcal_fast.errors import FeatCalError, printable, shown
from featcal_fast.untrusted.documents import DEPTH, NODES, DocumentError, parse_json, parse_yaml
from featcal_fast.untrusted.limits import LimitError, ProgramError, limited
from featcal_fast.untrusted.patterns import PatternError, full_matches


def refusal(parse: Callable[[bytes], Any], data: bytes) -> str:
    began = time.process_time()
    with pytest.raises(DocumentError) as error:
        parse(data)
    assert time.process_time() - began < 2
    assert len(str(error.value)) < 1000
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested more than 64 levels"),
        ("[" * (DEPTH + 1) + "1" + "]" * (DEPTH + 1), "nested more than 64 levels"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        ("[NaN]", "found NaN, expected a finite number"),
        ("[-Infinity]", "found -Infinity"),
        ("[1e999]", "'1e999', which is too large"),
        ("1" * 41, "an integer of 41 digits, expected at most 40"),
        ("{", "Expecting property name"),
        ("[],", "Extra data"),
        ('"\\ud8"', "escape"),
        ("[" + "[]," * 1_600_000, "more than 1500000 values"),
    ],
)
def test_json_that_is_refused(text: str, message: str) -> None:
    assert message in refusal(parse_json, text.encode())
    assert message in refusal(lambda _: parse_json(text), b"")


def test_json_in_no_encoding() -> None:
    assert "decode" in refusal(parse_json, b'{"a": "\xff"}')


def test_json_within_bounds_is_what_it_was() -> None:
    value = {"a": [1, -2.5, None, True, "é\\u0000"], "b": {}, "c": 10**39}
    for _ in range(DEPTH - 2):
        value = {"a": value}
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x: " + "[" * 1000, "nested more than 64 levels"),
        ("- " * 1000, "nested more than 64 levels"),
        (
            "a: &a [x]\n" + "".join(f"b{i}: &{i} [*{i - 1 or 'a'}]\n" for i in range(1, 70)).replace("*0", "*a"),
            "nested",
        ),
        ("{a: 1, b: 2, a: 3}", "line 1: the key 'a' is there twice"),
        ("x:\n  1: 2\n  '1': 3", "line 3: x: the key '1' is there twice in one mapping (line 2 has it, too)"),
        ("{&a x: 1, *a : 2}", "the key 'x' is there twice"),
        ("1: a\n+1: b", "line 2: the key '+1' is there twice in one mapping (line 1 has it, too)"),
        ("01: a\n1: b", "the key '1' is there twice"),
        ("0.5: a\n5.0e-1: b", "the key '5.0e-1' is there twice"),
        ("true: a\n'True': b", "the key 'True' is there twice"),
        ("~: a\nnull: b", "the key 'null' is there twice"),
        ("!!int abc: a", "'abc': it is no int"),
        ("? [a]\n: 1", "line 1: found a list or a mapping as a key"),
        ("? {a: b}\n: 1", "found a list or a mapping as a key"),
        ("a: &a [*a]", "the alias of line 1 stands for itself"),
        ("a: &a {b: *a}", "stands for itself"),
        ("a: &a [" + "x," * 300 + "]\nb: [" + "*a," * 300 + "]", "more than 20000 values"),
        (
            "a: &a {" + ", ".join(f"k{i}: 1" for i in range(200)) + "}\nb: {<<: [" + "*a," * 300 + "]}",
            "more than 20000",
        ),
        ("[" + "x," * NODES + "]", "more than 20000 values"),
        ("#" * (2**17 + 1), "131073 bytes long, expected at most 131072"),
        ("a: " + "1" * 5000, "line 1: a: '1111"),
        ("a: 1e999", "line 1: a: '1e999': found the number '1e999', which is too large"),
        ("%YAML 1." + "1" * 5000 + "\n--- a", "integer"),  # a ValueError of PyYAML
        ('a: "\\Uffffffff"', ""),  # an OverflowError of PyYAML
        ("a: !!int abc", "line 1: a: 'abc': it is no int"),
        ("a: !!bool maybe", "it is no bool"),
        ("a: {b: [1, {c: 1e999}]}", "line 1: a.b.c: '1e999'"),
        ("a: {b: {c: {d: 1, d: 2}}, e: 1}", "line 1: a.b.c: the key 'd' is there twice"),
        ('"a\\e": {b: 1, b: 2}', "line 1: 'a\\x1b': the key 'b' is there twice"),
        ("a: !!int [1]", "expected a scalar node"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: !!timestamp 2024-13-45", "could not determine a constructor"),
        ("a: *nothing", "undefined alias"),
        ("a\n---\nb", "expected a single document"),
        ("a: \0", "special characters are not allowed"),
        ("a: {<<: 5}", "expected a mapping"),
    ],
)
def test_yaml_that_is_refused(text: str, message: str) -> None:
    assert message in refusal(parse_yaml, text.encode())


def test_yaml_in_no_encoding() -> None:
    assert "decode" in refusal(parse_yaml, b"a: \xff")


def test_yaml_is_of_the_core_schema() -> None:
    text = """
        numbers: [1, -2, 010, 1e-5, 1.5, .5, +3]
        texts: [1:30, 2024-01-01, yes, no, on, 1_000, 0x10, "1", ==, '<<']
        others: [true, False, null, ~, ]
        1: a
        null: b
        1.50: c
        merged: {<<: {a: 1, b: 2}, b: 3}
    """
    assert parse_yaml(text.encode()) == {
        "numbers": [1, -2, 10, 1e-5, 1.5, 0.5, 3],
        "texts": ["1:30", "2024-01-01", "yes", "no", "on", "1_000", "0x10", "1", "==", "<<"],
        "others": [True, False, None, None],
        "1": "a",
        "null": "b",
        "1.50": "c",
        "merged": {"a": 1, "b": 3},
    }


def test_a_value_under_a_key_keeps_its_type_where_the_key_is_an_alias_of_it() -> None:
    assert parse_yaml(b"a: &x 1\n*x : b") == {"a": 1, "1": "b"}


# Programs


def test_what_a_program_makes_comes_back() -> None:
    assert limited(lambda: {"a": [1, None, "é" * 100_000]}, 2) == {"a": [1, None, "é" * 100_000]}


def endless() -> None:
    while True:
        pass


def deeper() -> None:
    deeper()


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (endless, "it takes longer than 1 s"),
        (lambda: bytearray(2**33), "more than 0.0625 GiB of memory"),
        (deeper, "calls itself too often"),
        (lambda: os._exit(3), "ends its process"),
        (lambda: sys.exit(0), "ends its process"),
        (lambda: _raise(KeyboardInterrupt()), "ends its process"),
        (lambda: {1: object()}, "ends its process"),
    ],
)
def test_programs_that_are_ended(program: Callable[[], object], message: str, capfd: Any) -> None:
    with pytest.raises(LimitError, match=message):
        limited(program, 1, 2**26)
    assert capfd.readouterr() == ("", "")


def test_a_program_does_not_pay_for_this_process() -> None:
    """Where Python searches for garbage, which it may at any time, it need not go through all that is held here."""
    held_here = len(gc.get_objects())
    assert limited(lambda: len(gc.get_objects()), 1) < 0.1 * held_here


def test_what_a_program_raises_is_told() -> None:
    with pytest.raises(ProgramError, match="KeyError: 'a'") as error:
        limited(lambda: {}["a"], 1)
    assert error.value.text == "'a'"


@pytest.mark.parametrize("program", [lambda: 1, lambda: {}[1], lambda: sys.exit(1)])
def test_nothing_of_a_program_stays(program: Callable[[], object]) -> None:
    before = held()
    with suppress(LimitError, ProgramError):
        limited(program, 1)
    assert held() == before


def held() -> tuple[int, str]:
    """Open files, and children."""
    return len(os.listdir("/proc/self/fd")), Path(f"/proc/self/task/{os.getpid()}/children").read_text()


def test_what_a_program_says_goes_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    assert limited(lambda: [os.write(1, b"out"), os.write(2, b"\x1b[2Jpanic")], 1) == [3, 9]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: suppressed(os.wait)])
def test_whoever_embeds_it_may_wait_for_all_children(handler: Any) -> None:
    def run() -> None:
        signal.signal(signal.SIGCHLD, handler)
        assert limited(lambda: 1, 1) == 1
        with pytest.raises(LimitError):
            limited(lambda: os._exit(3), 1)

    assert exit_code(run) == 0


def suppressed(call: Callable[[], object]) -> None:
    with suppress(ChildProcessError):
        call()


def test_it_may_be_run_in_threads() -> None:
    found: list[object] = []
    threads = [threading.Thread(target=lambda i=i: found.append(limited(lambda: i, 5))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 2, 3]


def test_an_interrupt_ends_the_program_too() -> None:
    def run() -> None:
        signal.signal(signal.SIGALRM, lambda *_: _raise(KeyboardInterrupt()))
        waiting = os.getpid()

        def interrupting() -> None:
            while True:  # Python forgets what is raised while it still makes the copy
                time.sleep(0.2)
                os.kill(waiting, signal.SIGALRM)

        with pytest.raises(KeyboardInterrupt):
            limited(interrupting, 100)
        assert not held()[1]

    assert exit_code(run) == 0


def test_a_program_does_not_outlive_who_waits_for_it(tmp_path: Path) -> None:
    """Its answer fills the pipe, and nobody reads it any more."""
    found = tmp_path / "child"

    def leave() -> None:
        while not found.exists() or not found.read_text():
            time.sleep(0.01)
        os._exit(0)

    def run() -> None:
        def program() -> str:
            found.write_text(str(os.getpid()))
            time.sleep(0.2)  # until its parent is gone
            return "x" * 2**20

        threading.Thread(target=leave, daemon=True).start()
        limited(program, 5)

    assert exit_code(run) == 0
    child = Path("/proc") / found.read_text()
    for _ in range(100):
        if not child.exists() or "\nState:\tZ" in (child / "status").read_text():
            return
        time.sleep(0.05)
    os.kill(int(child.name), signal.SIGKILL)
    raise AssertionError("it waits forever")


def test_limits_that_are_there_already_stay() -> None:
    def run() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
        resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))
        assert limited(lambda: 1, 2000) == 1
        with pytest.raises(LimitError, match="memory"):
            limited(lambda: len(bytearray(2**29)), 5)

    assert exit_code(run) == 0


def test_where_no_process_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> int:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", none)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(LimitError, match="no process can be had for it: Resource temporarily unavailable"):
        limited(lambda: 1, 1)
    assert len(os.listdir("/proc/self/fd")) == before


# Patterns

NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "'\\(' is not a regular expression: missing"),
        ("*", "nothing to repeat"),
        ("a{99999999999999}", "is not a regular expression"),
        ("(" * 5000 + ")" * 5000, "is not a regular expression|takes"),
        (".?" * 40 + "!", "takes longer than 1 s"),
    ],
)
def test_patterns_that_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(PatternError, match=message) as error:
        full_matches([pattern], NAMES)
    assert len(str(error.value)) < 300


def test_the_longest_of_several_patterns_that_take_long_is_named() -> None:
    with pytest.raises(PatternError, match=r"a regular expression such as '\(\(a\+\)\+\)\+!': it takes longer"):
        full_matches(["a.*", "((a+)+)+!"], ["a" * 40])


@pytest.mark.parametrize(
    "pattern", ["model.layers.1.self_attn.q_proj", r".*\.1\..*", "[[m]odel.layers.1.self_attn.q_proj"]
)
def test_patterns_match_as_pythons_do(pattern: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert full_matches([pattern, "x|y"], NAMES) == [[False, True, False, False], [False] * 4]


# Messages


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a" * 10**6, "'aaaa"),
        (10**39, "1" + "0" * 39),
        (10**5000, "<int of too many digits to show>"),
        ([10**5000, ["b" * 1000] * 1000, {"c": [[[[1]]]]}], "<list of too many"),
        (b"\xff" * 10**6, "b'"),
        ({f"k{i}": i for i in range(1000)}, "{'k0': 0"),
        (-0.5, "-0.5"),
        (None, "None"),
    ],
    ids=range(8),
)
def test_values_are_shown_in_short(value: object, text: str) -> None:
    assert shown(value).startswith(text)
    assert len(shown(value)) < 2000


def test_a_value_that_cannot_show_itself_is_shown() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError

    assert "Odd" in shown(Odd())


def test_messages_can_be_printed_anywhere() -> None:
    text = "a\x1b[31m\x07\r\u202e\u200b\ud800\ue000\u2028é日\nb"
    assert printable(text) == "a\\x1b[31m\\x07\\r\\u202e\\u200b\\ud800\\ue000\\u2028é日\nb"
    message = str(FeatCalError("x" * 10_000 + "\x1b"))
    assert len(message) < errors.LONGEST + 20
    assert message.startswith("xxx")
    assert message.endswith("x\\x1b")


# Files


def test_folders_are_made_with_all_their_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "sync_folder", lambda _: None)
    path, limit = Path(*["a"] * 200), sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)  # paths may be longer than that
    try:
        made = files.make_folder(path)
    finally:
        sys.setrecursionlimit(limit)
    assert (len(made), made[0], made[-1]) == (200, Path("a"), path)
    with pytest.raises(FileExistsError):
        files.make_folder(path)
    files.remove_empty(made)
    assert list(tmp_path.iterdir()) == []


def test_of_a_folder_that_cannot_be_made_no_parent_stays(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File name too long"):
        files.make_folder(tmp_path / "a" / "b" / ("c" * 300) / "d")
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_removed_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    files.remove_tree(tmp_path / "link")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "file"]


@pytest.mark.parametrize("opened", [files.open_to_read, files.open_to_write])
def test_what_is_no_file_is_not_opened(opened: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    before = held()
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match=f"it is not a regular file: '{path}'"):
            opened(path)
    assert held() == before


def test_where_nobody_can_say_where_a_path_leads(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for path in ("a", "a/x", "nothing/../a", "n" * 300):
        with pytest.raises(OSError, match=r"symbolic links|too long"):
            files.resolve(tmp_path / path)
    assert files.resolve(tmp_path / "nothing" / ".." / "x") == tmp_path / "x"
