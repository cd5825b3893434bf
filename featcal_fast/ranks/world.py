"""All ranks of a job, and what they say to each other: tensors from one to another or to all, and plain values.

Sums travel by send and receive, values by all_gather, weights by broadcast: what both NCCL and gloo have.
"""

from __future__ import annotations

import json
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from featcal_fast.errors import RankError, told
from featcal_fast.ranks.watch import Watch

POLL = 0.05  # seconds between two looks at whether another rank has failed, while waiting for it
UNDER_WAY = 2  # tensors that may be on their way to another rank at a time


class _Work(Protocol):
    def wait(self) -> Any: ...


class World:
    """This process among all ranks; alone unless `join` found others.

    Attributes:
        rank, size: this one's number, and how many there are.
        sent, received: bytes of tensors, so far. What is broadcast counts once where it comes from.
    """

    def __init__(self, rank: int = 0, size: int = 1, watch: Watch | None = None, direct: bool = False) -> None:
        self.rank, self.size = rank, size
        self.sent = self.received = 0
        self._watch, self._direct = watch, direct  # whether a GPU's tensors go as they are
        self._leaving: deque[tuple[_Work, Tensor]] = deque()
        self._waits: queue.SimpleQueue[tuple[_Work, Future[None]]] = queue.SimpleQueue()
        if size > 1:
            threading.Thread(target=self._wait_for_works, name="wire", daemon=True).start()

    @property
    def is_first(self) -> bool:
        """Whether this rank writes, and talks to the user."""
        return not self.rank

    def send(self, tensor: Tensor, to: int) -> None:
        """Send a tensor, which may change afterwards; it need not be contiguous."""
        if not tensor.numel():
            return
        payload = self._staged(tensor)
        payload = payload.clone() if payload.data_ptr() == tensor.data_ptr() else payload
        with self._transport():
            work = distributed.isend(payload, to)
        assert work is not None
        self._leaving.append((work, payload))
        self.sent += payload.nbytes
        while len(self._leaving) > UNDER_WAY:
            self._wait(*self._leaving.popleft())

    def receive(self, views: Sequence[Tensor], source: int) -> Iterator[Tensor]:
        """Fill tensors with what a rank sends, one after the other; while one is in use, the next is arriving."""
        coming: deque[tuple[_Work, Tensor, Tensor]] = deque()
        for view in [*(view for view in views if view.numel()), None]:
            if view is not None:
                buffer = torch.empty(view.shape, dtype=view.dtype, device=view.device if self._direct else "cpu")
                with self._transport():
                    arriving = distributed.irecv(buffer, source)
                assert arriving is not None
                coming.append((arriving, buffer, view))
            if coming and (len(coming) == UNDER_WAY or view is None):
                work, buffer, target = coming.popleft()
                self._wait(work, buffer)
                self.received += buffer.nbytes
                yield target.copy_(buffer)

    def flush(self) -> None:
        """Wait until all that was sent has left."""
        while self._leaving:
            self._wait(*self._leaving.popleft())

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Give all ranks the tensor of one, in place."""
        if self.size == 1 or not tensor.numel():
            return
        payload = self._staged(tensor)
        with self._transport():
            work = distributed.broadcast(payload, source, async_op=True)
        assert work is not None
        self._wait(work, payload)
        if source == self.rank:
            self.sent += payload.nbytes
        else:
            self.received += payload.nbytes
            if payload.data_ptr() != tensor.data_ptr():
                tensor.copy_(payload)

    def gather(self, value: Any) -> list[Any]:
        """A value of each rank, as JSON has it, by rank."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(size) for size in self._all_gather(torch.tensor([len(data)]))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(data)] = data
        found = self._all_gather(padded)
        return [json.loads(bytes(each[:size].numpy())) for each, size in zip(found, sizes, strict=True)]

    def tell(self, value: Any, source: int = 0) -> Any:
        """A value of one rank, as JSON has it, to all: theirs does not matter."""
        return self.gather(value if self.rank == source else None)[source]

    def merge(self, values: dict[str, Any]) -> dict[str, Any]:
        """Dictionaries of all ranks as one; of a key that several have, the last rank's value."""
        return {key: value for each in self.gather(values) for key, value in each.items()}

    def _all_gather(self, data: Tensor) -> list[Tensor]:
        found = [torch.empty_like(data) for _ in range(self.size)]
        with self._transport():
            work = distributed.all_gather(found, data, async_op=True)
        assert work is not None
        self._wait(work, data)
        return found

    def _staged(self, tensor: Tensor) -> Tensor:
        """Contiguous, where the transport can take it."""
        return (tensor if self._direct else tensor.to("cpu")).contiguous()

    def _wait(self, work: _Work, data: Tensor) -> None:
        """Until it is done, or another rank has failed; signals are heard meanwhile.

        Of a GPU's own tensors only what comes next in its stream has to wait.
        """
        if data.is_cuda:
            with self._transport():
                work.wait()
            return
        done: Future[None] = Future()
        self._waits.put((work, done))
        while True:
            try:
                with self._transport():
                    done.result(POLL)
                return
            except NotYet:
                if self._watch is not None:
                    self._watch.check()

    def _wait_for_works(self) -> None:
        while True:
            work, done = self._waits.get()
            try:
                work.wait()
                done.set_result(None)
            except BaseException as error:  # whoever waits is told
                done.set_exception(error)

    @contextmanager
    def _transport(self) -> Iterator[None]:
        """What a transport raises, in words: where another rank has failed, that is why."""
        try:
            yield
        except (NotYet, RankError):
            raise
        except RuntimeError as error:
            why = self._watch.look(2.0) if self._watch is not None else ""
            raise RankError(why or f"another rank is gone: its connection was lost ({told(error)})") from error
