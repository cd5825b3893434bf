"""The command line as a user meets it: in processes of its own, unless that would show nothing more."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pico
import yaml

ROOT = Path(__file__).resolve().parent.parent


def started(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "featcal_fast.cli", *arguments]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "120", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


def run(*arguments: str, code: int = 0) -> str:
    result = subprocess.run(started(*arguments), env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    return result.stdout if code == 0 else result.stderr


def test_help_teaches(command: Callable) -> None:
    text = run("--help")
    assert "base_model: models/base" in text
    for name in ("calibrate", "merge", "demo"):
        assert name in text
        assert f"featcal-fast {name}" in command(name, "--help")[1]
    assert command("--version")[1].startswith("featcal-fast 0.")


def test_calibrate_and_merge(tmp_path: Path, command: Callable) -> None:
    recipe = pico.save(pico.job("clip", 2), tmp_path)
    del recipe["merged_model"]
    recipe["merge"] = {"method": "task_arithmetic", "scaling": 0.3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "peaks: host" in run("plan", str(tmp_path / "recipe.yaml"), "--device", "cpu")
    text = run("calibrate", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "mine"), "--device", "cpu")
    assert "18 of 18 linear weights calibrated" in text
    assert "layer 3/3: drift" in text
    assert "Feature drift to the experts" in text
    assert (tmp_path / "mine" / "report.json").is_file()
    assert "mine is whole" in run("check", str(tmp_path / "mine"))
    (tmp_path / "mine" / "config.json").unlink()
    assert command("check", str(tmp_path / "mine"))[0] == 1
    assert "Wrote" in run("merge", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "merged-again"))
    assert (tmp_path / "merged-again" / "model.safetensors").is_file()


def test_on_a_terminal_there_is_a_bar(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(pico.save(pico.job("clip", 2), tmp_path)))
    ours, theirs = pty.openpty()
    job = started("calibrate", str(tmp_path / "recipe.yaml"), "--device", "cpu")
    with subprocess.Popen(job, env=environment() | {"TERM": "xterm"}, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # how the end of a terminal is told
            while part := os.read(ours, 65536):
                shown += part
        assert process.wait(60) == 0
    os.close(ours)
    assert b"Wrote" in shown
    assert b"\x1b[?25l" in shown, "the cursor is hidden while a bar is drawn"


def test_an_error_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("base_modle: x\nexperts: {}\n")
    text = run("calibrate", str(tmp_path / "recipe.yaml"), code=1)
    assert text.strip().count("\n") == 0
    assert "did you mean 'base_model'" in text


def test_importing_is_light() -> None:
    """No CUDA context, and under two seconds beyond torch's own import."""
    code = (
        "import time, torch; t = time.perf_counter(); import featcal_fast; "
        "print(time.perf_counter() - t, torch.cuda.is_initialized())"
    )

    def seconds() -> float:
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, env=environment(), capture_output=True, text=True, check=True)
        spent, initialised = done.stdout.split()
        assert initialised == "False"
        return float(spent)

    assert any(seconds() < 2.0 for _ in range(3)), "one of three: the machine may do something else"
