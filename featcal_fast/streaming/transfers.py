"""Tensors on their way while the device computes: one thread and, for a GPU, one copy stream; in the order asked for.

Nothing here owns device memory. Whoever asks for a transfer allocates what it fills, in the computation's own stream,
and keeps what it empties until the transfer's result was asked for. Events order the two streams, so memory is never
used again too early, and the host waits for neither.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Transfer(Generic[T]):
    """What a job will return, and when its copies are done."""

    def __init__(self, future: Future[tuple[T, torch.cuda.Event | None]], device: torch.device) -> None:
        self._future, self._device = future, device

    @property
    def done(self) -> bool:
        """Whether the job has been carried out, as far as the host is concerned."""
        return self._future.done()

    def result(self) -> T:
        """The job's result; what the device is told from now on comes after its copies.

        Raises:
            Whatever the job, or one before it, raised.
        """
        value, copied = self._future.result()
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
        return value

    def synchronize(self) -> T:
        """The job's result, for the host to read: it waits for the copies."""
        value, copied = self._future.result()
        if copied is not None:
            copied.synchronize()
        return value


class Transfers:
    """Carries out jobs one after the other, beside the computation; after an error, none.

    Args:
        device: where computation runs.
        name: of the thread.
    """

    def __init__(self, device: torch.device, name: str) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._error: Exception | None = None
        self._leaving: tuple[Tensor, Transfer[None]] | None = None

    def __enter__(self) -> Transfers:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._copies is not None:
            self._copies.synchronize()

    def submit(self, job: Callable[[], T]) -> Transfer[T]:
        """Carry out `job`; its copies begin when the device has done what it was told so far.

        The job gives out no device memory that it allocated (a merge keeps its own), and starts copies with
        `non_blocking=True`.
        """
        told = None if self._copies is None else torch.cuda.current_stream(self._device).record_event()
        return Transfer(self._thread.submit(self._run, job, told), self._device)

    def offload(self, tensor: Tensor, job: Callable[[], None]) -> None:
        """Carry out `job`, which empties `tensor`, and keep it meanwhile: one at a time, whosever it is.

        Raises:
            Whatever the one before it raised.
        """
        if self._leaving is not None:
            self._leaving[1].result()  # the memory it left is free from here on
        self._leaving = tensor, self.submit(job)

    def _run(self, job: Callable[[], T], told: torch.cuda.Event | None) -> tuple[T, torch.cuda.Event | None]:
        if self._error is not None:
            raise self._error
        try:
            if self._copies is None or told is None:
                return job(), None
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(told)
                return job(), self._copies.record_event()
        except Exception as error:
            self._error = error
            raise


def read_scalars(*scalars: list[Tensor]) -> list[list[float]]:
    """Lists of scalars, read from the device in one go."""
    every = [each.double() for one in scalars for each in one]
    values = iter(torch.stack(every).tolist() if every else ())
    return [list(islice(values, len(one))) for one in scalars]


def empty_pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty host tensor to copy to or from `device`; pinned for a GPU, where there is memory for it."""
    if device.type == "cuda":
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError:  # no more of it; ordinary memory will do
            pass
    return torch.empty(shape, dtype=dtype)
