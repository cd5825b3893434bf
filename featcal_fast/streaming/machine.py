"""What this machine has, asked of the operating system and the device, and how a program makes the most of it."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from featcal_kernels import allow_bf16_units

from featcal_fast.errors import DeviceError

LARGE = 2**20
MALLOC_CACHE_BYTES = 2**27
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8  # as glibc's malloc.h has them

_whole = False  # whether this process was set up for a run
CGROUPS = Path("/sys/fs/cgroup")


def configure_process() -> None:
    """Set this process up for a run. For programs only: it concerns everything that the process does."""
    global _whole
    # glibc otherwise learns to keep blocks of up to 32 MiB for itself, in a heap a thread, wherever they were used.
    _whole = _mallopt(M_MMAP_THRESHOLD, LARGE)
    _mallopt(M_ARENA_MAX, 1)  # one heap: what the thread that reads blocks frees is used again by the others
    allow_bf16_units()


@contextmanager
def caching_malloc() -> Iterator[Callable[[], None]]:
    """Within the context, the C library (glibc) keeps blocks that are freed for those that are asked for next.

    Outside, each block of a MiB or more goes back to the system at once, so that nothing is held that is not used. For
    the features of a forward pass, which come and go, that would mean fresh pages every time: a quarter of a run on a
    CPU. All go back at the end. Does nothing in a process that did not call `configure_process`.

    Yields:
        What gives them back before, if they have become more than `MALLOC_CACHE_BYTES`: holes pile up.
    """
    if not _whole:
        yield lambda: None
        return
    others = resident_bytes() - _allocated_bytes()
    _mallopt(M_MMAP_MAX, 0)
    _mallopt(M_TRIM_THRESHOLD, MALLOC_CACHE_BYTES)

    def limit() -> None:
        if resident_bytes() - _allocated_bytes() > others + MALLOC_CACHE_BYTES:
            trim_malloc()

    try:
        yield limit
    finally:
        _mallopt(M_MMAP_MAX, 2**16)  # glibc's own values
        _mallopt(M_TRIM_THRESHOLD, 2**17)
        trim_malloc()


def trim_malloc() -> None:
    """Give the system what the C library (glibc) holds freed, such as many small blocks of a forward pass."""
    if _whole:
        ctypes.CDLL(None).malloc_trim(0)


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split(" ")]


def _allocated_bytes() -> int:
    """What the C library has handed out; 0 where it does not say."""
    with suppress(OSError, AttributeError, TypeError):
        ask = ctypes.CDLL(None).mallinfo2
        ask.restype = _Mallinfo
        found = ask()
        return found.uordblks + found.hblkhd
    return 0


def _mallopt(option: int, value: int) -> bool:
    """Whether there is a C library that can be told so, and it agreed."""
    with suppress(OSError, AttributeError, TypeError):
        return bool(ctypes.CDLL(None).mallopt(option, value))
    return False


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
        device = torch.device(name or ("cuda" if count else "cpu"))
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device: found {name!r}, expected cpu, cuda or, for another than the first GPU, cuda:1")
    if device.type == "cuda" and present and (device.index or 0) >= count:
        raise DeviceError(
            f"device: found {device}, but torch {torch.__version__} sees {count} GPUs; use cpu, or install the torch "
            "build for your GPU and its driver (to plan for a GPU that is elsewhere, say how much memory it has: "
            "--device-memory)"
        )
    return device


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
                rest = int((folder / limit).read_text()) - int((folder / used).read_text())
                stat = dict(entry.split() for entry in _lines(folder / "memory.stat"))
                found.append(rest + int(stat.get(cached, 0)))
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
