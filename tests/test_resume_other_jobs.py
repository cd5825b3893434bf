"""Whatever changes bits is another job, which does not go on where this one ended."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Case, contents, done, left_in, stopped

from featcal_fast.errors import OutputError, ResumeError
from featcal_fast.job import fingerprint
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import LayerReport


def _threads(_: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "get_num_threads", lambda: 7)


def _torch(_: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    version = fingerprint.version
    patch.setattr(fingerprint, "version", lambda package: "0.1" if package == "torch" else version(package))


def _switch(_: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    patch.setenv("ATEN_CPU_CAPABILITY", "default")


def _setting(recipe: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    recipe["settings"] = {"anchor_rho": 1.5}


def _seed(recipe: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    recipe["seed"] = 1


def _samples(recipe: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    recipe["samples"] = 12


def _batch_size(recipe: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    recipe["batch_size"] = 4


def _expert(recipe: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    recipe["experts"]["task0"]["model"] = recipe["base_model"]


def _touched(recipe: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    os.utime(Path(recipe["base_model"]) / "model.safetensors", ns=(0, 0))


def _longer(recipe: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    _unseen(Path(recipe["merged_model"]) / "config.json", lambda data: data + b" ")


def _header(recipe: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    """Of a tensor that is not calibrated, another dtype of the same size."""
    path = Path(recipe["experts"]["task0"]["model"]) / "model.safetensors"
    norm = b'"post_layernorm.bias":{"dtype":'
    _unseen(path, lambda data: data.replace(norm + b'"F32"', norm + b'"I32"'))


def _data(recipe: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    """Its last number is another."""
    _unseen(Path(recipe["experts"]["task0"]["data"]), lambda data: data[:-4] + b"\0\0\0\0")


def _unseen(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file that looks as old as before."""
    kept = path.stat()
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))


OTHER_JOBS = [
    (_threads, r"device: threads: 1, now 7; put that back and --resume, or start over with --fresh"),
    (_torch, r"versions: torch: [^;]*, now 0\.1;"),
    (_switch, r"environment: ATEN_CPU_CAPABILITY: absent, now default;"),
    (_setting, r"recipe: settings: anchor_rho: 2\.0, now 1\.5;"),
    (_seed, r"recipe: seed: 0, now 1;"),
    (_samples, r"recipe: samples: 256, now 12;"),
    (_batch_size, r"recipe: batch_size: 8, now 4;"),
    (_expert, r"recipe: experts: task0: model: \S*/task0, now \S*/base;"),
    (_touched, r"inputs: base model: base/model.safetensors: ([\d,]+) bytes of 20.*, now \1 bytes of 1970-.*;"),
    (_longer, r"inputs: merged model: merged/config.json: [\d,]+ bytes of (20.*), now [\d,]+ bytes of \1;"),
    (_header, r"headers: expert task0: \w+, now \w+;"),
    (_data, r"the calibration data of task task0 has another content than it had; --fresh starts over"),
]


@contextmanager
def put_back(case: Case) -> Iterator[None]:
    """Inputs are as they were afterwards, times too."""
    folder = Path(case.recipe["base_model"]).parent
    inputs = [*(folder / name for name in ("base", "merged", "task0")), folder / "task0.safetensors"]
    paths = [path for each in inputs for path in (each.iterdir() if each.is_dir() else [each])]
    kept = [(path, path.read_bytes(), path.stat()) for path in paths]
    try:
        yield
    finally:
        for path, data, found in kept:
            path.write_bytes(data)
            os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize(("change", "told"), OTHER_JOBS, ids=[change.__name__[1:] for change, _ in OTHER_JOBS])
def test_another_job_is_refused_and_what_is_there_stays(
    change: Callable[..., None], told: str, case: Case, tmp_path: Path
) -> None:
    out = stopped(case, tmp_path)
    other = case.changed()
    with put_back(case), pytest.MonkeyPatch.context() as patch:
        change(other.recipe, patch)
        with pytest.raises(ResumeError, match=told):
            other.run(tmp_path, resume=True)
    assert done(out) == 2
    case.resume(tmp_path)


def test_another_job_may_start_over(case: Case, tmp_path: Path) -> None:
    stopped(case, tmp_path / "stopped")
    other = case.changed(seed=1, settings={"anchor_rho": 1.5})
    other.run(tmp_path / "stopped", fresh=True)
    other.run(tmp_path / "new")
    assert contents(tmp_path / "stopped" / "out") == contents(tmp_path / "new" / "out")


def test_an_input_that_changes_during_a_run_is_found_at_its_end(case: Case, tmp_path: Path) -> None:
    class Touch(Progress):
        def layer(self, report: LayerReport) -> None:
            _touched(case.recipe, pytest.MonkeyPatch())

    with put_back(case), pytest.raises(OutputError, match=r"inputs changed while they were read: .*base/model.safe"):
        case.run(tmp_path, progress=Touch())
    assert left_in(tmp_path) == []
    assert not (tmp_path / "out").exists()
