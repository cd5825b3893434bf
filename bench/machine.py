"""What a figure was measured on, and with: it stands beside every result."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import featcal_fast as ff


def machine(threads: int | None = None) -> dict[str, Any]:
    """CPU, threads, GPU if there is one, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    found: dict[str, Any] = {"cpu": next(names, platform.processor()), "cores": os.cpu_count()}
    found["threads"] = threads or torch.get_num_threads()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | {module.__name__: module.__version__ for module in (ff, torch, transformers)}
