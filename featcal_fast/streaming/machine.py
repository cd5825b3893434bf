"""What this machine has, asked of the operating system and the device."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

import torch

from featcal_fast import files
from featcal_fast.errors import DeviceError, shown

CGROUPS = Path("/sys/fs/cgroup")


def find_device(name: torch.device | str | None, *, present: bool = True) -> torch.device:
    """The device to compute on; by default the first GPU, or the CPU.

    Args:
        name: as torch has it: `cpu`, `cuda`, `cuda:1`.
        present: whether it must be here; to plan for it, it need not.

    Raises:
        DeviceError: no such device.
    """
    count = torch.cuda.device_count()
    try:
        device = torch.device(("cuda" if count else "cpu") if name is None else name)
    except (RuntimeError, TypeError, ValueError):
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device: found {shown(name)}, expected cpu, cuda or, for another than the first GPU, cuda:1")
    if device.type == "cuda" and present and (device.index or 0) >= count:
        raise DeviceError(
            f"device: found {device}, but torch {torch.__version__} sees {count} GPUs; use cpu, or install the torch "
            "build for your GPU and its driver (to plan for a GPU that is elsewhere, say how much memory it has: "
            "--device-memory)"
        )
    return device


def resident_bytes() -> int:
    """Host memory that this process holds; 0 where the system does not say."""
    try:
        return int(files.read_text(Path("/proc/self/statm")).split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def peak_resident_bytes() -> int | None:
    """The most that this process held at a time, since it began; None where the system does not say."""
    found = (line.split()[1] for line in _lines(Path("/proc/self/status")) if line.startswith("VmHWM:"))
    return next((int(kilobytes) * 1024 for kilobytes in found), None)


def forget_device_peak(device: torch.device) -> None:
    """What `peak_device_bytes` says is from now on."""
    if device.type == "cuda":
        with suppress(RuntimeError):  # of an allocator that keeps no count
            torch.cuda.reset_peak_memory_stats(device)


def peak_device_bytes(device: torch.device) -> int | None:
    """The most that torch held allocated on a GPU at a time; None on a CPU, or where its allocator does not say."""
    if device.type == "cuda":
        with suppress(RuntimeError):
            return torch.cuda.max_memory_allocated(device)
    return None


def available_host_bytes() -> int:
    """Host memory that can be had without swapping, besides what this process holds."""
    try:
        lines = files.read_text(Path("/proc/meminfo")).splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_cgroup_rest()])


def available_device_bytes(device: torch.device) -> int:
    """Device memory that is free, or that this process's allocator holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _cgroup_rest() -> list[int]:
    """What a container's limits leave, where there are any: of its control group and of those around it, v2 or v1."""
    found = []
    for line in _lines(Path("/proc/self/cgroup")):
        controllers, path = line.split(":", 2)[1:]
        if not controllers:
            root, limit, used, cached = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit = CGROUPS / "memory", "memory.limit_in_bytes"
            used, cached = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == root.parent:
                break
            with suppress(OSError, ValueError):  # no such group here, or no limit
                rest = int(files.read_text(folder / limit)) - int(files.read_text(folder / used))
                stat = dict(entry.split() for entry in _lines(folder / "memory.stat"))
                found.append(rest + int(stat.get(cached, 0)))
    return found


def _lines(path: Path) -> list[str]:
    try:
        return files.read_text(path).splitlines()
    except (OSError, ValueError):
        return []


def processor() -> str:
    """The processor's name, as far as the system says."""
    names = (line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
