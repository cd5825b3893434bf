"""Whose samples are whose: tasks in order, in runs of consecutive ones.

A task's samples may be split into shards, whose number is a setting: sums of one are made apart and added up in order,
so that results do not depend on how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Part(NamedTuple):
    """Some samples of a task: one shard of them, from 0."""

    task: str
    shard: int


@dataclass(frozen=True)
class Shares:
    """Who does what.

    Args:
        tasks: all, in order.
        shards: of each task's samples.
        size: how many ranks there are.
        rank: this process's own.
    """

    tasks: tuple[str, ...]
    shards: int = 1
    size: int = 1
    rank: int = 0

    @property
    def all_parts(self) -> list[Part]:
        """In order."""
        return [Part(task, shard) for task in self.tasks for shard in range(self.shards)]

    def parts_of(self, rank: int) -> list[Part]:
        """Those of a rank: consecutive ones; where their number cannot be divided, the first ranks have one more."""
        each, more = divmod(len(self.tasks) * self.shards, self.size)
        start = rank * each + min(rank, more)
        return [
            Part(self.tasks[number // self.shards], number % self.shards)
            for number in range(start, start + each + (rank < more))
        ]

    @property
    def parts(self) -> list[Part]:
        """This rank's own."""
        return self.parts_of(self.rank)

    @property
    def own_tasks(self) -> list[str]:
        """Those of which this rank has samples, in order."""
        return list(dict.fromkeys(part.task for part in self.parts))

    def is_last(self, part: Part) -> bool:
        """Whether a task's sums are complete with it."""
        return part.shard == self.shards - 1

    def owner(self, task: str) -> int:
        """Who has the last shard of a task: it adds the task to the sums, and follows its held-out samples."""
        number = self.number(Part(task, self.shards - 1))
        each, more = divmod(len(self.tasks) * self.shards, self.size)
        longer = more * (each + 1)  # parts of those that have one more
        return number // (each + 1) if number < longer else more + (number - longer) // each

    @property
    def owned(self) -> list[str]:
        """The tasks that this rank owns."""
        return [part.task for part in self.parts if self.is_last(part)]

    @property
    def owners(self) -> list[int]:
        """All ranks that own a task, in order: the way that a layer's sums take."""
        return sorted({self.owner(task) for task in self.tasks})

    def number(self, part: Part) -> int:
        """Of a part among all, from 0."""
        return self.tasks.index(part.task) * self.shards + part.shard

    def batches(self, part: Part, count: int) -> slice:
        """Which of a task's `count` batches are in a part."""
        return slice(part.shard * count // self.shards, (part.shard + 1) * count // self.shards)


def in_turn(index: int, size: int) -> int:
    """Which of `size` ranks does what one of them does for all, the `index`-th time: each in its turn."""
    return index % size


def ring(first: int, members: Sequence[int], size: int) -> list[int]:
    """Ranks in the order in which they come from `first` on, around."""
    return sorted(members, key=lambda rank: (rank - first) % size)
