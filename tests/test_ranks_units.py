"""Who does what, and what ranks say to each other, by itself."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import run_ranks
from torch import Tensor

from featcal_fast.errors import DataError, DeviceError, RankError
from featcal_fast.ranks import join as joining
from featcal_fast.ranks import panels, watch
from featcal_fast.ranks.deal import Dealt, Work, deal
from featcal_fast.ranks.join import join, launched, own_device
from featcal_fast.ranks.panels import row_panels
from featcal_fast.ranks.shares import Part, Shares, ring
from featcal_fast.ranks.world import World
from featcal_fast.streaming.transfers import Transfers

CPU = torch.device("cpu")
GRID = [(tasks, shards, size) for tasks in (1, 2, 3, 8) for shards in (1, 2, 5) for size in (1, 2, 3, 4, 9)]


def names(count: int) -> tuple[str, ...]:
    return tuple(f"task{number}" for number in range(count))


# ---- shares


@pytest.mark.parametrize(("tasks", "shards", "size"), GRID)
def test_parts_are_dealt_out_in_order_and_evenly(tasks: int, shards: int, size: int) -> None:
    every = [Shares(names(tasks), shards, size, rank) for rank in range(size)]
    assert [part for each in every for part in each.parts] == every[0].all_parts
    counts = [len(each.parts) for each in every]
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)  # who has none comes last
    for rank, each in enumerate(every):
        assert each.own_tasks == list(dict.fromkeys(part.task for part in each.parts))
        assert each.owned == [task for task in names(tasks) if each.owner(task) == rank]
        assert [each.number(part) for part in each.all_parts] == list(range(tasks * shards))


@pytest.mark.parametrize(("tasks", "shards", "size"), GRID)
def test_owners_have_the_last_shards_in_the_order_of_tasks(tasks: int, shards: int, size: int) -> None:
    shares = Shares(names(tasks), shards, size)
    by_task = [shares.owner(task) for task in shares.tasks]
    assert all(
        Part(task, shards - 1) in shares.parts_of(rank) for task, rank in zip(shares.tasks, by_task, strict=True)
    )
    assert by_task == sorted(by_task)
    assert shares.owners == sorted(set(by_task))
    assert all(shares.is_last(part) == (part.shard == shards - 1) for part in shares.all_parts)


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 100])
def test_shards_take_a_tasks_batches_in_order(shards: int, count: int) -> None:
    """There may be more shards than batches: some have none, the last one always has some."""
    shares = Shares(("task",), shards)
    found = [range(count)[shares.batches(part, count)] for part in shares.all_parts]
    assert [number for each in found for number in each] == list(range(count))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert len(found[-1])


def test_a_ring_begins_anywhere() -> None:
    assert ring(2, [0, 1, 3, 2], 4) == [2, 3, 0, 1]
    assert ring(0, [3, 1], 4) == [1, 3]


# ---- panels and who solves them


@pytest.mark.parametrize(
    ("rows", "width", "size"),
    [(4096, 4096, 4096), (14336, 4096, 4096), (4096, 14336, 1152), (300, 10**6, 128), (5, 7, 5), (0, 64, 0)],
)
def test_panels_are_multiples_of_a_step_and_cover_all_rows(rows: int, width: int, size: int) -> None:
    found = row_panels(rows, width)
    assert [row for each in found for row in range(each.start, each.stop)] == list(range(rows))
    assert max((each.stop - each.start for each in found), default=0) == size
    assert all(each.start % panels.STEP == 0 for each in found)


def slowest(systems: list[Work], dealt: Dealt) -> float:
    """Operations of the rank that has most to do."""
    costs = []
    for items in dealt:
        factors = sum(systems[index].factor for index in {index for index, _ in items})
        costs.append(factors + sum(systems[index].panels[panel] for index, panel in items))
    return max(costs)


def works() -> list[list[Work]]:
    """Of layers: as large as can be, equal, one large, many small, and at random."""
    generator = random.Random(0)
    return [
        [],
        [Work(1.0, (1.0,))],
        [Work(0.0, (5.0,)), Work(10.0, tuple(1.0 for _ in range(40)))],
        [Work(1.0, (1.0, 1.0)) for _ in range(6)],
        *(
            [
                Work(generator.uniform(0, 9), tuple(generator.uniform(0, 9) for _ in range(generator.randint(1, 9))))
                for _ in range(generator.randint(1, 6))
            ]
            for _ in range(12)
        ),
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("systems", works())
def test_every_panel_is_dealt_to_one_rank(systems: list[Work], size: int) -> None:
    dealt = deal(systems, size)
    assert len(dealt) == size
    items = [item for own in dealt for item in own]
    assert sorted(items) == [(index, panel) for index, each in enumerate(systems) for panel in range(len(each.panels))]
    for own in dealt:  # in runs: a rank has consecutive panels of a system
        for (index, panel), (following, after) in pairwise(own):
            assert following != index or after == panel + 1
    alone = sum(each.factor + sum(each.panels) for each in systems)
    assert slowest(systems, dealt) <= alone * (1 + 1e-9)
    # No rank has more than its even share of panels with a system's factor, or two where one begins in its midst.
    panel_sum = sum(sum(each.panels) for each in systems)
    largest = max((max(each.panels) for each in systems), default=0.0)
    factors = sum(each.factor for each in systems)
    assert slowest(systems, dealt) <= panel_sum / size + factors + largest + 1e-6 * alone


def test_panels_of_one_large_system_are_shared() -> None:
    work = Work(8.0, tuple(1.0 for _ in range(64)))
    assert [len(own) for own in deal([work], 4)] == [16, 16, 16, 16]
    assert slowest([work], deal([work], 4)) == 24.0


# ---- what is said


def said_by(size: int, folder: Path, work: Callable[[World], Any]) -> list[Any]:
    """What each rank's `work` returns, as JSON has it."""

    def each(_: int) -> str:
        with join(size) as world:
            return json.dumps(work(world))

    found = run_ranks(size, each, folder)
    assert [status for status, _ in found] == [0] * size, found
    return [json.loads(said) for _, said in found]


def test_values_are_gathered_told_and_merged(tmp_path: Path) -> None:
    def work(world: World) -> Any:
        numbers = world.gather([math.nan, math.inf, -math.inf, 0.1 + world.rank, None, "x" * 1000 * world.rank])
        assert [len(each[-1]) for each in numbers] == [0, 1000, 2000]
        assert all(math.isnan(each[0]) and each[1:3] == [math.inf, -math.inf] for each in numbers)
        told = world.tell({"from": world.rank}, 1), world.tell("first" if world.is_first else "other")
        merged = world.merge({"all": world.rank, str(world.rank): [world.rank]})
        return [[each[3] for each in numbers], told, merged, world.gather(None), world.gather({})]

    expected = [
        [0.1, 1.1, 2.1],
        [{"from": 1}, "first"],
        {"all": 2, "0": [0], "1": [1], "2": [2]},
        [None, None, None],
        [{}, {}, {}],
    ]
    assert said_by(3, tmp_path, work) == [expected] * 3


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_tensors_of_any_layout_arrive_as_they_are(tmp_path: Path) -> None:
    """Views, columns, no elements, several dtypes; what was sent may change at once."""
    whole = made(40, 30)
    sent = [
        *(whole[i : i + 8, i:] for i in range(0, 32, 8)),
        whole.mT,
        whole[:, 3],
        torch.empty(0, 5),
        torch.tensor(7),
        whole.bfloat16()[::2],
        whole.double() * 1e300,
    ]

    def work(world: World) -> Any:
        if world.rank == 0:
            for each in sent:
                own = each.clone(memory_format=torch.preserve_format) if each.is_contiguous() else each
                world.send(own, 1)
                if own is not each:
                    own.zero_()
            world.flush()
            assert world.sent == sum(each.numel() * each.element_size() for each in sent)
            return True
        views = [torch.empty_like(each.mT).mT if each.ndim == 2 else torch.empty_like(each) for each in sent]
        arrived = list(world.receive(views, 0))
        assert len(arrived) == sum(each.numel() > 0 for each in sent)
        assert world.received == sum(each.numel() * each.element_size() for each in sent)
        return all(torch.equal(view, each) for view, each in zip(views, sent, strict=True))

    assert said_by(2, tmp_path, work) == [True, True]


def test_tensors_are_broadcast_in_place(tmp_path: Path) -> None:
    values = [made(6, 4), made(6, 4).bfloat16(), torch.empty(0), made(3), torch.tensor(2.5)]

    def work(world: World) -> Any:
        same = True
        for number, value in enumerate(values):
            source = number % 3
            own = torch.zeros(*value.shape[:-1], 2 * value.shape[-1], dtype=value.dtype) if value.ndim else value * 0
            view = own[..., ::2] if value.ndim else own  # of which every other element shall stay
            if world.rank == source:
                view.copy_(value)
            world.broadcast(view, source)
            same &= torch.equal(view, value) and (not value.ndim or not own[..., 1::2].any())
        return [bool(same), world.sent, world.received]

    sizes = [each.numel() * each.element_size() for each in values]
    found = said_by(3, tmp_path, work)
    for rank, (same, sent, received) in enumerate(found):
        assert same
        assert sent == sum(size for number, size in enumerate(sizes) if number % 3 == rank)
        assert received == sum(sizes) - sent


def test_many_go_around_at_once(tmp_path: Path) -> None:
    """From each to the next, more than are on their way at a time, while the next is arriving."""

    def work(world: World) -> Any:
        after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
        for number in range(2):
            world.send(made(50, 50, seed=100 * world.rank + number), after)
        views = [torch.empty(50, 50) for _ in range(20)]
        for number, _ in enumerate(world.receive(views, before)):
            if number + 2 < 20:
                world.send(made(50, 50, seed=100 * world.rank + number + 2), after)
        world.flush()
        return all(torch.equal(view, made(50, 50, seed=100 * before + n)) for n, view in enumerate(views))

    assert said_by(3, tmp_path, work) == [True] * 3


@pytest.mark.parametrize("how", ["receive", "send", "broadcast", "gather"])
def test_whoever_waits_for_one_that_dies_is_told(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "BEAT", 0.2)

    def work(rank: int) -> None:
        with join(2) as world:
            world.gather(None)
            if rank:
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "receive":
                list(world.receive([torch.empty(4)], 1))
            elif how == "send":
                for _ in range(100):
                    world.send(torch.zeros(2**18), 1)
                world.flush()
            elif how == "broadcast":
                for _ in range(100):
                    world.broadcast(torch.zeros(2**18), 0)
            else:
                world.gather(1)

    (status, said), (other, _) = run_ranks(2, work, tmp_path)
    assert other == -signal.SIGKILL
    assert status == 1
    assert said.startswith("RankError: another rank has failed: rank 1")


def test_one_that_ends_while_its_reader_waits_for_another_tells_all(tmp_path: Path) -> None:
    """Which waits for it: neither would ever end."""

    def work(rank: int) -> None:
        with join(2) as world:
            apart = world.apart()
            if rank:
                for _ in world.receive([torch.zeros(3)], 0):
                    pass
            with Transfers(CPU, "reader") as reader, closing_after(apart):
                reader.submit(lambda: apart.broadcast(torch.zeros(3), 1))
                raise DataError("its samples are wrong")

    @contextmanager
    def closing_after(world: World) -> Iterator[None]:
        try:
            yield
        finally:
            world.end()

    (status, said), (other, heard) = run_ranks(2, work, tmp_path)
    assert (status, other) == (1, 1)
    assert said == "DataError: its samples are wrong"
    assert heard.startswith("RankError: another rank has failed: rank 0 ")


def test_one_alone_needs_nobody() -> None:
    world = World()
    assert world.is_first
    assert world.gather(3) == [3]
    assert world.tell("x") == "x"
    assert world.merge({"a": 1}) == {"a": 1}
    world.broadcast(torch.zeros(3), 0)
    assert (world.sent, world.received) == (0, 0)


# ---- how they find each other

ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def having(**variables: str) -> None:
        for name in (*ENVIRONMENT, "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return having


def test_how_many_there_are_is_in_the_environment(environment: Callable[..., None]) -> None:
    environment()
    assert launched() == 1
    environment(WORLD_SIZE="1")
    assert launched() == 1
    environment(**ENVIRONMENT)
    assert launched() == 2


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_of_an_environment_is_refused(missing: str, environment: Callable[..., None]) -> None:
    environment(**{name: value for name, value in ENVIRONMENT.items() if name != missing})
    with pytest.raises(RankError, match=f"WORLD_SIZE=2 is set, but not {missing}; start the job with torchrun"):
        launched()


@pytest.mark.parametrize(
    ("rank", "size"), [("2", "2"), ("-1", "2"), ("x", "2"), ("0", "many"), ("0", "0"), ("0", "-2"), ("0", "1.5")]
)
def test_ranks_that_cannot_be_are_refused(rank: str, size: str, environment: Callable[..., None]) -> None:
    environment(**{**ENVIRONMENT, "RANK": rank, "WORLD_SIZE": size})
    with pytest.raises(RankError, match=f"found RANK={rank} and WORLD_SIZE={size}, expected a rank below"):
        launched()


def test_each_takes_a_gpu_of_its_own(environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    gpu = torch.device("cuda")
    assert own_device(gpu, 1) == gpu
    assert own_device(CPU, 4) == CPU
    environment(**ENVIRONMENT, LOCAL_RANK="1")
    assert own_device(gpu, 2) == torch.device("cuda", 1)
    assert taken == [1]
    with pytest.raises(DeviceError, match="found cuda:1 for 2 ranks, expected cuda"):
        own_device(torch.device("cuda", 1), 2)
    environment(**ENVIRONMENT, LOCAL_RANK="2")
    with pytest.raises(DeviceError, match="found 2 GPUs for at least 3 ranks on this machine"):
        own_device(gpu, 4)


def test_one_that_never_comes_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "ARRIVAL", timedelta(seconds=1))

    def work(rank: int) -> None:
        if rank:
            raise RankError("something was wrong before")
        with join(2):
            pass

    (status, said), _ = run_ranks(2, work, tmp_path)
    assert status == 1
    assert said.startswith("RankError: the 2 ranks did not find each other: ")
