"""How an error ends a command: one line, what the code says of whose it is, and with `--debug` how it came about."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

COMMANDS = (
    ("plan", "recipe.yaml"),
    ("calibrate", "recipe.yaml"),
    ("merge", "recipe.yaml"),
    ("delta", "out", "--out", "delta"),
    ("check", "out"),
    ("demo",),
)
PLACES = {
    "plan": "featcal_fast.planning.planner.plan",
    "calibrate": "featcal_fast.job.run.calibrate",
    "merge": "featcal_fast.job.run.merge",
    "delta": "featcal_fast.job.delta.delta",
    "check": "featcal_fast.job.check.check",
    "demo": "featcal_fast.demo.run",
}


def fails(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        try:
            raise KeyError("the cause")
        except KeyError as cause:
            raise error from cause

    monkeypatch.setattr(PLACES[name], fail)


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_a_fault_of_ours_is_one_line_and_a_code_of_its_own(
    arguments: tuple[str, ...], command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("{base_model: base, merged_model: merged, experts: {a: {model: a, data: a.jsonl}}}")
    fails(monkeypatch, arguments[0], RuntimeError("a\x1b[31m\nb"))
    code, _, errors = command(*arguments)
    assert code == 70
    assert errors == (
        "unexpected error: RuntimeError: a\\x1b[31m b; this is a fault of featcal_fast: run it again with --debug and "
        "report that\n"
    )
    for words in ((*arguments, "--debug"), ("--debug", *arguments)):
        code, _, errors = command(*words)
        assert code == 70
        assert "Traceback" in errors
        assert "KeyError: 'the cause'" in errors, "what led to it, too"
        assert "\x1b[31m" not in errors
        assert errors.splitlines()[-1].startswith("unexpected error: RuntimeError")


def test_the_traceback_of_an_error_of_the_users(command: Callable, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("experts: [")
    code, _, errors = command("calibrate", str(path))
    assert code == 1
    assert errors.startswith("error: ")
    assert errors.count("\n") == errors.strip("\n").count("\n") + 1
    assert "Traceback" not in errors
    debugged = command("calibrate", str(path), "--debug")
    assert debugged[0] == 1
    assert "Traceback" in debugged[2]
    assert debugged[2].endswith(errors)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1),  # of what the command line prints
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 70),
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), 70),
        (MemoryError(), 70),
    ],
    ids=repr,
)
def test_what_the_operating_system_says(
    error: Exception, code: int, command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(monkeypatch, "check", error)
    monkeypatch.setattr("featcal_fast.terminal.files.discard", lambda _: None)
    found, _, errors = command("check", "out")
    assert found == code
    assert ("standard output cannot be written" in errors) == (code == 1)
