"""The file of results: every row at once on disk, whole or not at all; only rows of one code, machine and versions."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
SOURCES = (  # what a measurement depends on
    "kernels/featcal_kernels",
    "featcal_fast",
    "bench/baselines.py",
    "bench/gpu",
    "bench/harness",
    "bench/phases.py",
    "bench/workers",
    "bench/workloads.py",
)
Rows = dict[str, dict[str, Any]]


class Results:
    """Rows by section and key. What was measured before under the same conditions counts as measured.

    Attributes:
        environment: code, machine, versions and inputs.
        rows: `rows[section][key]`.
        failed: `failed[section][key]`: the error that a row ended with.
        left_out: `left_out[section][key]`: why a row was not measured; it is tried again.
    """

    def __init__(self, path: Path | None, environment: dict[str, Any], fresh: bool = False) -> None:
        self.path, self.environment = path, environment
        self.rows: dict[str, Rows] = {}
        self.failed: dict[str, dict[str, str]] = {}
        self.left_out: dict[str, dict[str, str]] = {}
        if path is not None and path.exists():
            try:
                before = json.loads(path.read_text())
                if not fresh and {**before["environment"], "time": environment["time"]} == environment:
                    self.rows = {name: part["rows"] for name, part in before["sections"].items()}
                    self.failed = {name: part["failed"] for name, part in before["sections"].items()}
                    return
            except (ValueError, KeyError, TypeError):  # not by this code
                pass
            path.replace(path.with_suffix(".json.before"))  # rows of other code, cards or versions stay apart

    def add(self, section: str, key: str, row: dict[str, Any]) -> None:
        self.rows.setdefault(section, {})[key] = row
        self.failed.get(section, {}).pop(key, None)
        self._write()

    def fail(self, section: str, key: str, why: str) -> None:
        self.failed.setdefault(section, {})[key] = why
        self._write()

    def leave_out(self, section: str, left: dict[str, str]) -> None:
        self.left_out[section] = left
        self._write()

    def of(self, section: str) -> Rows:
        return self.rows.get(section, {})

    def to_json(self) -> dict[str, Any]:
        sections = {
            name: {part: getattr(self, part).get(name, {}) for part in ("rows", "failed", "left_out")}
            for name in dict.fromkeys([*self.rows, *self.failed, *self.left_out])
        }
        return {"environment": self.environment, "sections": sections}

    def _write(self) -> None:
        if self.path is not None:
            write_whole(self.path, self.to_json())


def write_whole(path: Path, found: Any) -> None:
    """As JSON, whole or not at all, whoever else writes it; on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("w") as file:
        file.write(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)  # whose entry is to last, too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def environment(device: torch.device, **inputs: Any) -> dict[str, Any]:
    """Code, hardware and versions, and whatever else rows must agree in to stand in one file."""
    found: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "code": code_hash(SOURCES),
        **versions(),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30)}
        found["multiprocessors"] = properties.multi_processor_count
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
            found["driver, power limit, clock"] = answer.splitlines()[0].strip()
        except (OSError, subprocess.SubprocessError, IndexError):
            found["driver, power limit, clock"] = None
    return found | inputs


def machine(threads: int | None = None) -> dict[str, Any]:
    """What a figure was measured on, and with: CPU, threads, GPU if there is one, versions."""
    import featcal_fast

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    found: dict[str, Any] = {"cpu": next(names, platform.processor()), "cores": os.cpu_count()}
    found["threads"] = threads or torch.get_num_threads()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | {"featcal_fast": featcal_fast.__version__, **versions()}


def versions(*more: str) -> dict[str, str | None]:
    """Of Python and of packages, None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", *more):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def code_hash(sources: tuple[str, ...]) -> str:
    """Of Python files, and of those in folders; there may be no git on the machine to ask."""
    digest = hashlib.sha256()
    for source in sources:
        path = ROOT / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]
