"""What this machine has: memory free and in use, asked of the operating system and the device."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import torch

LARGE = 2**20


def return_large_blocks() -> None:
    """Have the C library hand back every freed block of a MiB or more at once, where it can be told to.

    glibc otherwise learns to keep blocks of up to 32 MiB for itself, in a heap a thread, and a run would hold on to a
    fifth more memory than it uses. It concerns the whole process, so only programs call it, no library function.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(-3, LARGE)  # M_MMAP_THRESHOLD, which also ends the learning


def resident_bytes() -> int:
    """Host memory that this process holds; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def peak_resident_bytes() -> int:
    """The most host memory that this process ever held; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, ValueError, StopIteration):
        return 0


def available_host_bytes() -> int:
    """Host memory that can be had without swapping, besides what this process holds."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_cgroup_rest()])


def available_device_bytes(device: torch.device) -> int:
    """Device memory that is free, or that this process's allocator holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _cgroup_rest() -> list[int]:
    """What a container's limit leaves, where there is one."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = int((root / "memory.max").read_text())
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return [limit - used + int(stat.get("inactive_file", 0))]
    except (OSError, ValueError):
        return []
