"""The C library's allocator (glibc's malloc), told what a run needs of it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from featcal_kernels import allow_bf16_units

from featcal_fast.streaming.machine import resident_bytes

LARGE = 2**20
MALLOC_CACHE_BYTES = 2**27
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8  # as glibc's malloc.h has them

_configured = False  # whether this process was set up for a run


def configure_process() -> None:
    """Set this process up for a run. For programs only: it concerns everything that the process does."""
    global _configured
    # glibc otherwise learns to keep blocks of up to 32 MiB for itself, in a heap a thread, wherever they were used.
    _configured = _mallopt(M_MMAP_THRESHOLD, LARGE)
    _mallopt(M_ARENA_MAX, 1)  # one heap: what the thread that reads blocks frees is used again by the others
    allow_bf16_units()
    gc.freeze()  # what is imported by now stays: to look for garbage in it takes a fifth of a second each time


def is_configured() -> bool:
    """Whether `configure_process` has set this process up."""
    return _configured


@contextmanager
def caching_malloc() -> Iterator[Callable[[], None]]:
    """Within the context, the C library (glibc) keeps blocks that are freed for those that are asked for next.

    Outside, each block of a MiB or more goes back to the system at once, so that nothing is held that is not used. For
    the features of a forward pass, which come and go, that would mean fresh pages every time: a quarter of a run on a
    CPU. All go back at the end. Does nothing in a process that did not call `configure_process`.

    Yields:
        What gives them back before, if they have become more than `MALLOC_CACHE_BYTES`: holes pile up.
    """
    if not _configured:
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
    if _configured:
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
        return int(found.uordblks + found.hblkhd)
    return 0


def _mallopt(option: int, value: int) -> bool:
    """Whether there is a C library that can be told so, and it agreed."""
    with suppress(OSError, AttributeError, TypeError):
        return bool(ctypes.CDLL(None).mallopt(option, value))
    return False
