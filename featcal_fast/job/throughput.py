"""How fast runs were on this machine, remembered for the estimates of `plan`."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import torch


def known_rate(device: torch.device) -> float | None:
    """Operations a second of the last run on such a device, as `remember_rate` kept it; None if there was none."""
    try:
        return float(json.loads(_rates().read_text())[_name(device)])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AssertionError):  # the last two: no such device
        return None


def remember_rate(device: torch.device, rate: float) -> None:
    """Keep the rate of a run for estimates to come, in the user's cache folder; where that cannot be, do nothing."""
    with suppress(OSError, RuntimeError):
        path = _rates()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            rates = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            rates = {}
        path.write_text(json.dumps({**rates, _name(device): rate}, indent=2) + "\n")


def _rates() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "featcal_fast" / "rates.json"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
