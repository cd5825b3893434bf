"""`python -m bench`: what it runs is there, and what fails ends it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from bench.__main__ import STUDIES, TIMED, run


def test_its_parts_are_there() -> None:
    for command in (*STUDIES, *TIMED, "readme"):
        assert find_spec(f"bench.{command.split()[0]}") is not None, command


def test_a_failure_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"bench\.compare nonsense failed"):
        run("compare nonsense")
    assert "unknown workload 'nonsense'" in capsys.readouterr().out
