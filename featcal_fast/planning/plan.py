"""What a job will need, before anything runs: memory, disk, bytes read, arithmetic, and which weights will change."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from featcal_fast.errors import MemoryBudgetError, one_line, shown
from featcal_fast.layer.layout import Layout
from featcal_fast.layer.tokens import TokenCounts
from featcal_fast.planning.duration import Duration
from featcal_fast.planning.sampled import Sampled
from featcal_fast.planning.wire import LayerBytes, Rows
from featcal_fast.settings import Settings

if TYPE_CHECKING:  # only terminals need it, and bench.gpu runs without
    from rich.table import Table
    from rich.text import Text

UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
MOST = 2**63  # bytes that a number may mean


@dataclass(frozen=True)
class TaskWork:
    """Floating-point operations that a task takes in a layer, by kind.

    Attributes:
        fitted: of the samples that are fitted to, which ranks may share, until its moments are complete.
        advance: forward of these through the calibrated layer.
        followed, followed_after: likewise of the samples that are held out.
        fold: by which it is added to the layer's sums.
    """

    fitted: dict[str, float]
    advance: float
    followed: dict[str, float]
    followed_after: float
    fold: float


@dataclass(frozen=True)
class LayerPlan:
    """One layer: what is solved for, and what that takes.

    Attributes:
        index: its number, in forward order.
        layout: its input groups and LayerNorms.
        kept: linear weights of it that keep their merged values, each with the reason.
        system: bytes of the running ridge systems.
        scratch: bytes of one task's moments.
        working: bytes beyond these, at most: features, attention, copies.
        flops: floating-point operations by kind of work (forward, moments, fold, solve), all tasks'.
        passing: bytes as `working`, but only until the layer is solved.
        work: the same operations but for the solve, by task.
        counts: of its stage's tokens, padding included.
        rows: the same tokens, by task and shard.
        wire: what ranks that share the job send to each other.
        blocks: bytes of each task's block; and under None, of the merged model's and the base model's.
        merged: bytes of its block, where one of them merges it on the fly for all.
        ahead: bytes of what a rank keeps of the next layer, whose first samples it runs while it waits for others.
    """

    index: int
    layout: Layout
    kept: dict[str, str]
    system: int
    scratch: int
    working: int
    flops: dict[str, float]
    passing: int = 0
    work: dict[str, TaskWork] = field(default_factory=dict)
    counts: TokenCounts = TokenCounts(0, 0, 0)  # noqa: RUF009 (frozen)
    rows: Rows = field(default_factory=Rows)
    wire: LayerBytes | None = None
    blocks: dict[str | None, int] = field(default_factory=dict)
    merged: int = 0
    ahead: int = 0

    @property
    def modules(self) -> list[str]:
        """Names of the linear modules that will be calibrated."""
        return [name for group in self.layout.groups for name in group.modules]


@dataclass
class RankPlan:
    """One of several processes that share a job.

    Attributes:
        samples: that it has: names of tasks, with `2/4` behind it for the second of four shards.
        host_bytes, device_bytes: of memory, at its peak.
        sent, received: bytes of tensors, to and from other ranks; what all are sent counts once where it comes from.
            A run's are the same where samples are as many tokens as planned and no layer that is merged on the fly got
            worse; else sums from the token side may differ, and moments of tasks whose samples are split.
        flops: floating-point operations by kind of work. A system's factorisation counts on each rank that solves some
            of it.
    """

    samples: list[str]
    host_bytes: int = 0
    device_bytes: int = 0
    sent: int = 0
    received: int = 0
    flops: dict[str, float] = field(default_factory=dict)


@dataclass
class Plan:
    """What a recipe will need.

    Attributes:
        device: where it would compute.
        tokens: positions a task, padding included, of the samples that are fitted to.
        exact: whether these are the data's; otherwise texts are taken to be as long as they may be.
        chunk: tokens that pass a layer at a time, at most, padding included.
        layers: one entry a layer.
        kept: weights that keep their merged values, layers folded to `*`, each with the reason.
        host, device_items: what memory holds when most of it is in use, by item, bytes; on a CPU all is `host`. Of
            several ranks, that of the one that needs most.
        machine: host memory of all ranks on a machine together, by item; of several machines, where most is needed.
        disk: bytes written to disk that must be free, by item; all ranks', but in a folder for hidden states, which
            each machine may have on a disk of its own, those of the machine with most.
        bytes_read: bytes of tensors, by model; all ranks'.
        bytes_written: bytes of tensors.
        host_budget, device_budget: bytes that there are, or that were allowed.
        problems: why it will not fit, each with the key that would make it fit; empty when it does.
        warnings: what should be known beforehand, a sentence each: settings that do not go together, missing samples.
        merges: whether models are merged on the fly, whose arithmetic is not counted.
        dtype: of most of what layers' forwards multiply, as torch calls it.
        sample: what a few samples say of whether it will help, where that was asked for and memory will do.
        ranks: one entry a rank, where several share the job.
        local_ranks: how many of them are taken to share one machine's host memory.
        settings: the recipe's.
    """

    device: str
    tokens: dict[str, int]
    exact: bool
    chunk: int = 1
    layers: list[LayerPlan] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    device_items: dict[str, int] = field(default_factory=dict)
    machine: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    bytes_read: dict[str, int] = field(default_factory=dict)
    bytes_written: dict[str, int] = field(default_factory=dict)
    host_budget: int = 0
    device_budget: int = 0
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    merges: bool = False
    dtype: str = "float32"
    sample: Sampled | None = None
    ranks: list[RankPlan] = field(default_factory=list)
    local_ranks: int = 1
    settings: Settings = Settings()  # noqa: RUF009 (frozen)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory at its peak; of several ranks, that of the one that needs most."""
        return sum(self.host.values())

    @property
    def machine_bytes(self) -> int:
        """Bytes of host memory of all ranks on a machine; of several machines, that of the one that needs most."""
        return sum(self.machine.values())

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory at its peak; 0 on a CPU."""
        return sum(self.device_items.values())

    @property
    def disk_bytes(self) -> int:
        """Bytes that must be free on disk."""
        return sum(self.disk.values())

    @property
    def calibrated(self) -> int:
        """Number of linear weights that will be calibrated."""
        return sum(len(layer.modules) for layer in self.layers)

    @property
    def flops(self) -> dict[str, float]:
        """Floating-point operations by kind of work."""
        total: Counter[str] = Counter()
        for layer in self.layers:
            total.update(layer.flops)
        return dict(total)

    @property
    def largest_matrix(self) -> tuple[int, int]:
        """Inputs and outputs of the largest of what shares an input: what is multiplied by most."""
        groups = (group for layer in self.layers for group in layer.layout.groups)
        sizes = ((group.in_features, sum(group.out_features)) for group in groups)
        return max(sizes, key=math.prod, default=(1, 1))

    def seconds(self, rate: float) -> float:
        """Seconds for the arithmetic alone, at a `rate` of so many operations a second; of the rank with most."""
        most = max((sum(each.flops.values()) for each in self.ranks), default=sum(self.flops.values()))
        return most / rate

    @property
    def fits(self) -> bool:
        """Whether memory will do."""
        return self.machine_bytes <= self.host_budget and (
            not self.device_items or self.device_bytes <= self.device_budget
        )

    def check(self) -> None:
        """Refuse a job that will not fit.

        Raises:
            MemoryBudgetError: it does not; with the key that would make it fit.
        """
        if self.problems:
            raise MemoryBudgetError("; ".join(self.problems))

    def tables(self) -> list[Table]:
        """For a terminal: layers, weights that stay, memory; and whether it will help."""
        from rich.table import Table

        layers = Table(title="Layers", caption="layers that are alike share a row")
        for name in ("layer", "calibrated, by shared input", "in x out"):
            layers.add_column(name)
        for name in ("systems", "moments", "features", "TFLOP"):
            layers.add_column(name, justify="right")
        for first, last in _runs(self.layers):
            groups = first.layout.groups
            span = str(first.index) if first is last else f"{first.index} - {last.index}"
            names = _names(", ".join(_last_part(name) for name in group.modules) for group in groups)
            sizes = "\n".join(f"{group.in_features} x {sum(group.out_features)}" for group in groups)
            cells = [format_bytes(size) for size in (first.system, first.scratch, first.working)]
            layers.add_row(span, names, sizes, *cells, f"{sum(first.flops.values()) / 1e12:.3g}")
        kept = Table(title="Weights that keep their merged values")
        for name in ("weights", "why"):
            kept.add_column(name)
        for reason in dict.fromkeys(self.kept.values()):
            kept.add_row(_names(name for name, why in self.kept.items() if why == reason), reason)
        needs = Table(title=f"Needs on {self.device}")
        needs.add_column("what")
        needs.add_column("bytes", justify="right")
        for title, items in (("device memory", self.device_items), ("host memory", self.host), ("disk", self.disk)):
            for name, size in items.items():
                needs.add_row(f"{title}: {name}", format_bytes(size))
        for name, size in self.bytes_read.items():
            needs.add_row(_names([f"read: {name}"]), format_bytes(size))
        for name, size in self.bytes_written.items():
            needs.add_row(f"written: {name}", format_bytes(size))
        sampled = [] if self.sample is None else [self.sample.table()]
        ranks = [_rank_table(self.ranks)] if self.ranks else []
        return [layers, *([kept] if self.kept else []), needs, *ranks, *sampled]

    def _told_of_ranks(self) -> list[str]:
        """A line, where there are several."""
        if not self.ranks:
            return []
        sent, received = (format_bytes(max(getattr(each, way) for each in self.ranks)) for way in ("sent", "received"))
        on_one = f", {self.local_ranks} on a machine" if self.local_ranks < len(self.ranks) else ""
        idle = sum(not each.samples for each in self.ranks)
        without = f"; without samples, which settings.sample_shards gives them: {idle}" if idle else ""
        return [f"{len(self.ranks)} ranks{on_one}: one sends {sent} at most, and receives {received}{without}"]

    def summary(self, rate: float | None = None, duration: Duration | None = None) -> str:
        """A few lines: peaks, arithmetic, the time where that is known, warnings, whether it will help, and fits.

        Args:
            rate: floating-point operations a second, to tell the time by.
            duration: the time to tell where there is no rate, as `job.throughput.expected` knows it.

        Returns:
            The lines, as one text.
        """
        bound = "" if self.exact else ", at most: padding counts, and texts as max_length tokens"
        parts = ", ".join(f"{kind} {flops / 1e12:.3g}" for kind, flops in self.flops.items())
        device = f"device {format_bytes(self.device_bytes)}, " if self.device_items else ""
        lines = [
            f"{self.calibrated} linear weights in {len(self.layers)} layers, "
            f"{sum(self.tokens.values()):,} tokens{bound}; {self.chunk:,} tokens a pass",
            f"peaks: {device}host {format_bytes(self.host_bytes)}, disk {format_bytes(self.disk_bytes)}; "
            f"read {format_bytes(sum(self.bytes_read.values()))}",
            f"arithmetic: {sum(self.flops.values()) / 1e12:.3g} TFLOP ({parts})",
        ]
        lines += self._told_of_ranks()
        if rate is not None:
            duration = Duration(self.seconds(rate), self.seconds(rate), f"at {rate / 1e12:g} TFLOP/s")
        if duration is not None:
            others = "reading and merging keep" if self.merges else "reading keeps"
            lines.append(f"time: {duration}, {duration.source}, if {others} up")
        lines += [f"warning: {each}" for each in self.warnings]
        lines += [] if self.sample is None else [self.sample.line()]
        each = " a rank" if self.ranks else ""
        machine = f" for {self.local_ranks} ranks on a machine" if self.local_ranks > 1 else ""
        needs = [(f"host memory{machine}", self.machine_bytes, self.host_budget)]
        if self.device_items:
            needs.insert(0, (f"device memory{each}", self.device_bytes, self.device_budget))
        told = ", ".join(f"{format_bytes(size)} of {format_bytes(budget)} {name}" for name, size, budget in needs)
        if self.problems and self.fits:
            lines.append("does not fit: a disk has too little room")
        else:
            lines.append(f"{'fits' if self.fits else 'does not fit'}: {told}")
        return "\n".join(lines)


def _rank_table(ranks: list[RankPlan]) -> Table:
    """What each rank has, and what that takes."""
    from rich.table import Table

    table = Table(title="Ranks", caption="bytes of tensors, to and from other ranks; ranks that are alike share a row")
    table.add_column("rank")
    table.add_column("samples")
    for name in ("device", "host", "sends", "receives", "TFLOP"):
        table.add_column(name, justify="right")
    rows: dict[tuple[object, ...], list[int]] = {}
    for rank, each in enumerate(ranks):
        sizes = each.device_bytes, each.host_bytes, each.sent, each.received
        flops = f"{sum(each.flops.values()) / 1e12:.3g}"
        rows.setdefault((", ".join(each.samples), *map(format_bytes, sizes), flops), []).append(rank)
    for (samples, *cells), same in rows.items():
        span = str(same[0]) if len(same) == 1 else f"{same[0]} - {same[-1]}"
        table.add_row(span, _names([str(samples)]), *map(str, cells))
    return table


def format_bytes(size: float) -> str:
    """For example `512 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1000 or unit == "TiB":
            return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    raise AssertionError


def parse_bytes(text: str) -> int:
    """`24GB` or `22.5 GiB` as a number of bytes.

    Raises:
        MemoryBudgetError: not a number with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]I?)B?\s*", text.upper())
    size = float(match[1]) * UNITS[match[2]] if match else math.inf
    if size >= MOST:
        raise MemoryBudgetError(
            f"memory: found {shown(text)}, expected a number and a unit, for example 24GB or 22.5GiB"
        )
    return int(size)


def memory_bytes(name: str, value: object) -> int | None:
    """How much memory may be used, as whoever calls from Python or the command line may say it.

    Args:
        name: of the argument.
        value: a number of bytes, a text such as `22.5GiB`, or None.

    Returns:
        Bytes; None where nothing was said.

    Raises:
        MemoryBudgetError: it is something else.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return parse_bytes(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < MOST:
        return int(value)
    raise MemoryBudgetError(f"{name}: found {shown(value)}, expected a number of bytes, or a text such as '22.5GiB'")


def folded(names: Mapping[str, str]) -> dict[str, str]:
    """Weights and reasons with layer numbers replaced by `*`."""
    return {re.sub(r"\.\d+\.", ".*.", name): reason for name, reason in names.items()}


def _runs(layers: list[LayerPlan]) -> list[tuple[LayerPlan, LayerPlan]]:
    """First and last of each run of layers that need the same."""
    runs: list[tuple[LayerPlan, LayerPlan]] = []
    for layer in layers:
        if runs and _need(runs[-1][0]) == _need(layer):
            runs[-1] = runs[-1][0], layer
        else:
            runs.append((layer, layer))
    return runs


def _need(layer: LayerPlan) -> tuple[object, ...]:
    return layer.layout, layer.system, layer.scratch, layer.working, tuple(layer.flops.values())


def _names(lines: Iterable[str]) -> Text:
    """A cell of lines that hold names, which may be a stranger's: nothing in them is markup, or acts on a terminal."""
    from rich.text import Text

    return Text("\n".join(one_line(line) for line in lines))


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
