"""What is kept about a machine from run to run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import featcal_fast as ff
from featcal_fast.streaming import machine
from featcal_fast.streaming.machine import find_device

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "mps", "gpu"])
def test_a_device_that_is_not_there_is_an_error(name: str) -> None:
    with pytest.raises(ff.FeatCalError, match="device: found"):
        find_device(name)


def test_a_gpu_elsewhere_can_be_planned_for() -> None:
    assert find_device("cuda:99", present=False) == torch.device("cuda:99")
    assert find_device("cpu") == CPU


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_groups_around_ones_own_count(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "memory" if version == 1 else tmp_path
    own = root / "jobs" / "mine"
    own.mkdir(parents=True)
    limit, used, cached = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )
    for folder, most in ((own, "max" if version == 2 else str(2**63 - 4096)), (root / "jobs", "5000")):
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text("3000\n")
        (folder / "memory.stat").write_text(f"anon 7\n{cached} 400\n")
    lines = {1: ["3:cpu,cpuacct:/jobs", "2:memory:/jobs/mine"], 2: ["0::/jobs/mine"]}[version]
    lookup = machine._lines
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "_lines", lambda path: lines if str(path) == "/proc/self/cgroup" else lookup(path))
    assert min(machine._cgroup_rest()) == 5000 - 3000 + 400
    assert machine.available_host_bytes() == 2400


FAULTS = """
import resource, torch
from featcal_fast.streaming.machine import resident_bytes
from featcal_fast.streaming.malloc import caching_malloc, configure_process

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**21)  # 8 MiB, 2048 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with caching_malloc():
    pass  # nothing was set up
configure_process()
fresh, before = faults(), resident_bytes()
with caching_malloc():
    reused = faults()
    small = [torch.ones(2**18), torch.ones(2**20)]
    del small[1]
print(fresh, reused, resident_bytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is for Linux")
def test_freed_blocks_are_used_again_while_batches_pass_and_go_back_after() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    fresh, reused, kept = map(int, done.stdout.split())
    assert fresh > 20 * 2048 / 2
    assert reused < fresh / 5
    assert kept < 3 * 2**20  # the MiB in use, not what was freed


HOLES = """
import torch
from featcal_fast.streaming.machine import resident_bytes
from featcal_fast.streaming.malloc import MALLOC_CACHE_BYTES, caching_malloc, configure_process

configure_process()
with caching_malloc() as limit:
    before = resident_bytes()
    blocks = [torch.ones(2**n) for _ in range(3 * MALLOC_CACHE_BYTES // 2**23) for n in (21, 18)]  # of 8 MiB, and of 1
    del blocks[::2]
    held = resident_bytes() - before
    limit()
    left = resident_bytes() - before
print(MALLOC_CACHE_BYTES, held, left, sum(block.nbytes for block in blocks))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is for Linux")
def test_holes_between_blocks_in_use_go_back_when_they_have_become_many() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    most, held, left, used = map(int, done.stdout.split())
    assert held > used + 2 * most
    assert left < used + most / 4
