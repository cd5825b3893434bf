"""The GPU benchmark and the tuner, through all their motions at toy sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu, readme, tune

ROOT = Path(__file__).resolve().parent.parent.parent


def test_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "sub" / "result.json"
    gpu.main(["--dry-run", "--out", str(out)])
    written = json.loads(out.read_text())
    assert set(written["sections"]) == set(gpu.SECTIONS)
    assert {"device", "torch", "triton"} <= set(written["environment"])
    rows = written["sections"]["moments"]["rows"]
    assert {row["in"] for row in rows} == {"bfloat16", "float32"}
    assert all(row["taken"] > 0 and max(row["gram error"], row["cross error"]) < 1e-6 for row in rows)
    assert "slower path taken: 0" in capsys.readouterr().out
    tables = readme.gpu_tables(written).splitlines()
    assert tables[0].startswith("**cpu** (torch ")
    assert sum(line.startswith("| ") for line in tables) == len(rows) + 4 + 5  # and two heads; four ways and the ideal


def test_sections_are_added_to_what_was_measured_before(tmp_path: Path):
    out = tmp_path / "result.json"
    for name in ("fold", "solve"):
        gpu.main(["--dry-run", "--sections", name, "--out", str(out)])
    written = json.loads(out.read_text())
    assert set(written["sections"]) == {"fold", "solve"}
    assert readme.gpu_tables(written).startswith("**cpu** (torch ")


def test_unknown_section(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--sections", "moments,nonsense"])
    assert "no section nonsense" in capsys.readouterr().err


def test_tuner(capsys: pytest.CaptureFixture[str]):
    tune.main(["--dry-run"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("Arch(half=Tile(")


def test_crossovers():
    rows = [
        {"d": d, "GFLOP": d * n * 1e-3, "triton": 1.0, "blas": 0.5 if d * n < 3000 or d >= 4096 else 2.0}
        for d in (512, 1024, 2048, 4096)
        for n in (2, 16)
    ]
    flops, columns = tune.crossovers(rows)
    assert 2.048e9 < flops <= 8.192e9
    assert columns == 4096


def test_the_gpu_benchmark_needs_no_more_than_torch_and_transformers():
    """It runs from a checkout; what only terminals and demos need may be absent."""
    code = "import sys; sys.modules.update(dict.fromkeys(['rich', 'typer', 'bitsandbytes', 'sklearn', 'matplotlib']));"
    code += "from bench import gpu, layer, tune; gpu.main(['--dry-run', '--sections', 'fold'])"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
