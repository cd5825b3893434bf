"""Blocks arrive one ahead, each read once; hidden states wait in memory or on disk with the same result."""

from __future__ import annotations

import random
import time
import weakref
from io import FileIO
from itertools import pairwise
from pathlib import Path

import pico
import pytest
import torch
from torch import nn

import featcal_fast as ff
from featcal_fast import files
from featcal_fast.errors import OutputError
from featcal_fast.forward.runner import BlockRunner
from featcal_fast.layer.moments import TaskMoments
from featcal_fast.layer.tokens import Tokens
from featcal_fast.streaming.chunks import Chunk
from featcal_fast.streaming.hidden_states import HiddenStates, _Disk, _HostMemory, _Offloaded, _OnDevice
from featcal_fast.streaming.prefetch import BlockPrefetcher
from featcal_fast.streaming.scratch import Scratch
from featcal_fast.streaming.sources import ModuleSource
from featcal_fast.streaming.transfers import Transfers

CPU = torch.device("cpu")


class SlowSource:
    """A source whose blocks take time to read; counts the blocks alive."""

    made_once = False

    def __init__(self, seconds: float) -> None:
        self.seconds, self.reads = seconds, []

    def block(self, index: int) -> nn.Module:
        time.sleep(self.seconds)
        self.reads.append(index)
        if index == 99:
            raise ValueError("block 99 is broken")
        return nn.Linear(1, 1)


def test_reading_overlaps_computing() -> None:
    """Reading as fast as computing takes little longer than either alone."""
    source = SlowSource(0.05)
    started = time.perf_counter()
    with BlockPrefetcher(((source, index) for index in range(10)), CPU) as reader:
        for _ in range(10):
            reader.next()
            time.sleep(0.05)
    assert time.perf_counter() - started < 1.15 * 11 * 0.05
    assert source.reads == list(range(10))


def test_no_more_than_one_block_is_read_ahead() -> None:
    source = SlowSource(0.0)
    with BlockPrefetcher(((source, index) for index in range(5)), CPU) as reader:
        reader.next()
        time.sleep(0.1)
        assert source.reads == [0, 1]


def test_an_error_while_reading_is_raised_where_the_block_is_needed() -> None:
    with BlockPrefetcher([(SlowSource(0.0), 0), (SlowSource(0.0), 99)], CPU) as reader:
        reader.next()
        with pytest.raises(ValueError, match="block 99 is broken"):
            reader.next()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_on_disk_are_those_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    model, cpu = pico.llama().to(dtype), torch.device("cpu")
    source, batches = ModuleSource(model, "model", cpu), pico.texts(3, seed=0)
    with torch.no_grad(), Transfers(cpu, "test") as transfers:
        runner = BlockRunner(compiled=False)
        where = cpu, Scratch(tmp_path)
        memory, disk = (HiddenStates(source, "task", cpu, transfers, runner, each) for each in where)
        memory.enter(0, batches)
        disk.enter(0, batches)
        for layer in source.structure.layers:
            for batch in range(len(batches)):
                rows = slice(0, memory.shape(batch)[0])
                chunk = Chunk(batch, rows, Tokens(None, memory.shape(batch), cpu))
                memory.advance(chunk, layer, source.block(layer.index))
                disk.advance(chunk, layer, source.block(layer.index))
                (a, _), (b, _) = memory.load(batch, rows), disk.load(batch, rows)
                assert torch.equal(a, b)
                assert b.dtype == dtype
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory", ["host", "file"])
def test_states_that_wait_elsewhere_are_those_that_were_stored(memory: str, tmp_path: Path) -> None:
    """In whatever order and parts they are loaded and stored; what was fetched ahead is never stale."""
    rng = random.Random(0)
    with Transfers(CPU, "test") as transfers:
        states = _Offloaded(CPU, transfers, _HostMemory() if memory == "host" else _Disk(Scratch(tmp_path)))
        sizes, expected = [4, 1, 6], {}
        for batch, size in enumerate(sizes):
            expected[batch] = torch.randn(size, 3, 2)
            states.store(batch, slice(0, size), expected[batch], size)
        for _ in range(200):
            batch = rng.randrange(3)
            size = sizes[batch]
            assert torch.equal(states.load(batch, None), expected[batch])
            start = rng.randrange(size)
            rows = slice(start, rng.randrange(start, size) + 1)
            assert torch.equal(states.load(batch, rows), expected[batch][rows])
            if rng.random() < 0.5:
                dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16])  # some layers change it
                new, parts = torch.randn(size, 3, 2).to(dtype), sorted({0, rng.randrange(size), size})
                for first, end in pairwise(parts):
                    if rng.random() < 0.5 and dtype == expected[batch].dtype:
                        assert torch.equal(states.load(batch, slice(first, size)), expected[batch][first:])
                    states.store(batch, slice(first, end), new[first:end].clone(), size)
                expected[batch] = new


def test_states_that_wait_on_the_device_are_replaced_when_all_are_there() -> None:
    """A part may come twice: memory ran out after it was stored."""
    states, old, new = _OnDevice(), torch.randn(6, 3, 2), torch.randn(6, 3, 2)
    states.store(0, slice(0, 6), old, 6)
    for part in (slice(0, 4), slice(0, 2), slice(2, 4)):
        states.store(0, part, new[part], 6)
        assert torch.equal(states.load(0, None), old)
    states.store(0, slice(4, 6), new[4:], 6)
    assert torch.equal(states.load(0, None), new)


def test_states_are_fetched_and_stored_while_a_chunk_is_computed() -> None:
    class Slow(_HostMemory):
        def write(self, *args) -> None:
            time.sleep(0.02)
            super().write(*args)

        def read(self, *args) -> None:
            time.sleep(0.02)
            super().read(*args)

    with Transfers(CPU, "test") as transfers:
        states = _Offloaded(CPU, transfers, Slow())
        for batch in range(10):
            states.store(batch, slice(0, 2), torch.zeros(2, 3), 2)
        started = time.perf_counter()
        for batch in range(10):
            hidden = states.load(batch, slice(0, 2))
            time.sleep(0.05)
            states.store(batch, slice(0, 2), hidden + 1, 2)
        assert time.perf_counter() - started < 1.15 * (10 * 0.05 + 0.2 + 0.02)  # 0.2: what was stored first


def test_one_chunk_is_on_its_way_out_however_many_states_there_are() -> None:
    with Transfers(CPU, "test") as transfers:
        offloaded, chunks = [_Offloaded(CPU, transfers, _HostMemory()) for _ in range(5)], []
        for states in offloaded:
            hidden = torch.zeros(2, 3)
            chunks.append(weakref.ref(hidden))
            states.store(0, slice(0, 2), hidden, 2)
            del hidden
        time.sleep(0.1)  # the thread lets go of a job's tensor once it took the next one
        assert sum(chunk() is not None for chunk in chunks) <= 2


def test_after_a_transfer_that_failed_none_is_carried_out() -> None:
    def fail() -> None:
        raise OutputError("scratch: hidden states cannot be written: No space left on device")

    done = []
    with Transfers(CPU, "test") as transfers:
        first = transfers.submit(lambda: done.append(1))
        failing = transfers.submit(fail)
        after = transfers.submit(lambda: done.append(2))
        first.result()
        for transfer in (failing, after):
            with pytest.raises(OutputError, match="No space left"):
                transfer.result()
    assert done == [1]


def test_a_full_scratch_disk_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write = files.write_at

    def full(file: FileIO, *rest: object) -> None:
        if isinstance(file.name, int):  # which has no name
            raise OSError(28, "No space left on device")
        write(file, *rest)

    recipe = pico.save(pico.job("llama", 2), tmp_path)
    monkeypatch.setattr(files, "write_at", full)
    with pytest.raises(ff.FeatCalError, match=r"scratch: .* cannot hold hidden states: No space left on device"):
        ff.calibrate(recipe, out=tmp_path / "out", scratch=tmp_path, checkpoint_every=0)
    assert not (tmp_path / "out").exists()


def test_no_more_blocks_are_alive_than_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Student and one expert (of the base only its weights); nothing of a layer is left when the next one begins."""
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    scratch: weakref.WeakSet[TaskMoments] = weakref.WeakSet()
    most = []
    take, make = BlockPrefetcher.next, TaskMoments.__init__

    def counted(reader: BlockPrefetcher) -> nn.Module:
        block = take(reader)
        alive.add(block)
        most.append(len(alive))
        return block

    def made(moments: TaskMoments, *args: object) -> None:
        assert len(scratch) == 0
        make(moments, *args)
        scratch.add(moments)

    monkeypatch.setattr(BlockPrefetcher, "next", counted)
    monkeypatch.setattr(TaskMoments, "__init__", made)
    job = pico.job("llama", 3)
    ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)
    assert max(most) == 2
