"""All ranks of a job, and what they say to each other: tensors from one to another or to all, and plain values.

Sums travel by send and receive, values by all_gather, weights by broadcast: what both NCCL and gloo have.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from featcal_fast.errors import RankError, told
from featcal_fast.ranks.watch import Watch

PATIENCE = timedelta(days=7)  # of the transport: how long a rank may take is for the watch to say
POLL = 0.05  # seconds between two looks at whether another rank has failed, while waiting for it
SOON = 0.001  # likewise, where there is something to do meanwhile
UNDER_WAY = 2  # tensors that may be on their way to another rank at a time


class _Work(Protocol):
    def wait(self) -> Any: ...


class World:
    """This process among all ranks; alone unless `join` found others.

    Attributes:
        rank, size: this one's number, and how many there are.
        sent, received: bytes of tensors, so far. What is broadcast counts once where it comes from.
        waited: seconds that this process has waited for others.
        idle: something to do meanwhile, called again as long as it is set.
    """

    idle: Callable[[], None] | None = None

    def __init__(
        self, rank: int = 0, size: int = 1, watch: Watch | None = None, direct: bool = False, group: Any = None
    ) -> None:
        self.rank, self.size = rank, size
        self.sent, self.received, self.waited = 0, 0, 0.0
        self._watch, self._direct, self._group = watch, direct, group  # whether a GPU's tensors go as they are
        self._whole: World | None = None  # of which this is apart
        self._ended = threading.Event()
        self._leaving: deque[tuple[_Work, Tensor]] = deque()
        self._waits: queue.SimpleQueue[tuple[_Work, Future[None]] | None] = queue.SimpleQueue()
        if size > 1:
            threading.Thread(target=self._wait_for_works, name="wire", daemon=True).start()

    def apart(self) -> World:
        """The same ranks with connections of their own between hosts, for another thread: what is said there may come
        in any order to what is said here. All ranks must ask for it."""
        group = distributed.new_group(backend="gloo", timeout=PATIENCE) if self.size > 1 else None
        other = World(self.rank, self.size, self._watch, False, group)
        other._whole = self
        return other

    @property
    def leads_machine(self) -> bool:
        """Whether this rank is the first of its machine, as torchrun counts them."""
        return self.size == 1 or os.environ.get("LOCAL_RANK", "0") == "0"

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
        self._count(sent=payload.nbytes)
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
                self._count(received=buffer.nbytes)
                yield target.copy_(buffer)

    def flush(self) -> None:
        """Wait until all that was sent has left."""
        while self._leaving:
            self._wait(*self._leaving.popleft())

    def end(self) -> None:
        """Nothing more will be said; who waits for others, in another thread, does so no more."""
        self._ended.set()
        self._waits.put(None)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Give all ranks the tensor of one, in place."""
        if self.size == 1 or not tensor.numel():
            return
        payload = self._staged(tensor)
        with self._transport():
            work = distributed.broadcast(payload, source, self._group, async_op=True)
        assert work is not None
        self._wait(work, payload)
        if source == self.rank:
            self._count(sent=payload.nbytes)
        else:
            self._count(received=payload.nbytes)
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
            work = distributed.all_gather(found, data, self._group, async_op=True)
        assert work is not None
        self._wait(work, data)
        return found

    def _count(self, sent: int = 0, received: int = 0) -> None:
        for each in (self, self._whole):
            if each is not None:
                each.sent += sent
                each.received += received

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
        began = time.perf_counter()
        self._waits.put((work, done))
        while not done.done():
            with suppress(NotYet):
                done.exception(SOON if self.idle is not None else POLL)
            if self._watch is not None and not done.done():
                self._watch.check()
                if self._ended.is_set():
                    raise RankError("this rank's job has ended")
                if self.idle is not None:
                    self.idle()
        self.waited += time.perf_counter() - began
        with self._transport():
            done.result()

    def _wait_for_works(self) -> None:
        while (waiting := self._waits.get()) is not None:
            work, done = waiting
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
        except RuntimeError as error:
            why = self._watch.look() if self._watch is not None else ""
            raise RankError(why or f"another rank is gone: its connection was lost ({told(error)})") from error
