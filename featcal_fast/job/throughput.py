"""How fast runs were on this machine, remembered for the estimates of `plan`."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path

import torch

from featcal_fast import files
from featcal_fast.untrusted.documents import parse_json


def known_rate(device: torch.device) -> float | None:
    """Operations a second of the last run on such a device, as `remember_rate` kept it; None if there was none."""
    with suppress(RuntimeError, AssertionError, KeyError):  # no home, no such device, no run on it
        return _known(_rates())[_name(device)]
    return None


def remember_rate(device: torch.device, rate: float) -> None:
    """Keep the rate of a run for estimates to come, in the user's cache folder; where that cannot be, do nothing."""
    with suppress(OSError, RuntimeError, AssertionError):
        path = _rates()
        if not path.parent.is_dir():
            files.make_folder(path.parent)
        text = json.dumps({**_known(path), _name(device): rate}, indent=2) + "\n"
        files.replace_bytes(path, text.encode())


def _known(path: Path) -> dict[str, float]:
    """What the file holds that may be a rate; nothing where it cannot be read, or is none of ours."""
    try:
        rates = parse_json(files.read_bytes(path))
    except (OSError, ValueError):
        return {}
    if not isinstance(rates, dict):
        return {}
    return {name: rate for name, rate in rates.items() if isinstance(rate, float) and 0 < rate < math.inf}


def _rates() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "featcal_fast" / "rates.json"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
