"""The GPU benchmark and the tuner, through all their motions at toy sizes."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from featcal_kernels import blas, configs

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
    assert "by more than 3%: 0 of 0 shapes" in capsys.readouterr().out
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


def test_sections_of_other_versions_do_not_stay(tmp_path: Path):
    out = tmp_path / "result.json"
    gpu.main(["--dry-run", "--sections", "fold", "--out", str(out)])
    out.write_text(out.read_text().replace(torch.__version__, "2.0"))
    gpu.main(["--dry-run", "--sections", "solve", "--out", str(out)])
    assert set(json.loads(out.read_text())["sections"]) == {"solve"}


def test_a_run_that_is_cut_off_leaves_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "result.json"
    monkeypatch.setitem(gpu.SECTIONS, "solve", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpu.main(["--dry-run", "--sections", "fold,solve", "--out", str(out)])
    assert set(json.loads(out.read_text())["sections"]) == {"fold"}


def test_sections_keep_no_tensors():
    """Not even until garbage is collected: the next section's memory is its own."""
    run = gpu.Run(torch.device("cpu"), dry=True, peak=1.0)
    gpu.llama_layer(run)  # imports, which keep what they like
    gc.collect()
    gc.disable()
    try:
        before = set(map(id, _tensors()))
        tables = [section(run) for section in gpu.SECTIONS.values()]
        after = [x.shape for x in _tensors() if id(x) not in before]
    finally:
        gc.enable()
    assert len(tables) == len(gpu.SECTIONS)
    assert not after


def _tensors() -> list[torch.Tensor]:
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]


@pytest.mark.parametrize(("n", "other"), [(16, 3.0), (4096, 1 / 3)], ids=["blas", "triton"])
def test_the_path_not_taken_is_held_against_the_one_that_is(n: int, other: float, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(blas, "available", lambda device: True)
    monkeypatch.setattr(configs, "arch_of", lambda device: replace(configs.TABLE["sm_90"], blas_flops=1e7))
    monkeypatch.setattr(gpu, "measure", lambda calls, run: dict.fromkeys(calls, 1.0) | {"triton": 6.0, "blas": 2.0})
    shape = gpu.Shape(64, 48, n, torch.bfloat16)
    run = gpu.Run(torch.device("cpu"), dry=False, peak=1.0)
    assert gpu._moments_row(shape, run)["other/taken"] == pytest.approx(other)
    assert gpu._moments_row(replace(shape, dtype=torch.float32), run)["other/taken"] is None


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
