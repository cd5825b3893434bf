"""How the processes of a job find each other: as torchrun has started them."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from featcal_fast.errors import DeviceError, FeatCalError, RankError, told
from featcal_fast.ranks.watch import Watch, own_store
from featcal_fast.ranks.world import PATIENCE, World

JOBS = count()  # of this process, all of which its ranks share
ARRIVAL = timedelta(minutes=10)  # between the first process and the last


def launched() -> int:
    """How many processes torchrun, or whoever sets its environment variables, has started for this job; 1 for none.

    Raises:
        RankError: the variables do not go together.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 1
    rest = {
        "RANK": os.environ.get("RANK"),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR"),
        "MASTER_PORT": os.environ.get("MASTER_PORT"),
    }
    missing = [name for name, value in rest.items() if not value]
    if missing:
        raise RankError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, but not {', '.join(missing)}; start the job with torchrun, "
            "or unset it"
        )
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        rank = size = -1
    if not 0 <= rank < size:
        raise RankError(
            f"found RANK={os.environ['RANK']} and WORLD_SIZE={os.environ['WORLD_SIZE']}, expected a rank below the "
            "number of ranks; start the job with torchrun"
        )
    return size


def follows() -> int:
    """This process's rank, if another is the first, which talks to the user; 0 for that one."""
    return int(os.environ["RANK"]) if launched() > 1 else 0


def own_device(device: torch.device, size: int) -> torch.device:
    """Of several ranks' the one that this process computes on: a GPU by its `LOCAL_RANK`.

    Raises:
        DeviceError: there are not as many, or one was chosen for all.
    """
    if size == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise DeviceError(f"device: found {device} for {size} ranks, expected cuda: each takes one of its own")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise DeviceError(
            f"device: found {count} GPUs for at least {local + 1} ranks on this machine, expected one each; start as "
            "many with --nproc-per-node, or compute on a cpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextmanager
def join(size: int) -> Iterator[World]:
    """All ranks of the job, for as long as it takes; if this one fails, the others are told.

    Args:
        size: as `launched` has it.

    Raises:
        RankError: they do not find each other, or another one has failed.
    """
    if size == 1:
        yield World()
        return
    direct = torch.cuda.is_available() and distributed.is_nccl_available()
    started = not distributed.is_initialized()
    try:
        if started:
            store, rank, _ = next(iter(rendezvous("env://", timeout=ARRIVAL)))
            backend = "cpu:gloo,cuda:nccl" if direct else "gloo"
            distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        watch = Watch(own_store(f"featcal-fast {life} {next(JOBS)}"), distributed.get_rank(), size)
    except (RuntimeError, ValueError) as error:
        raise RankError(f"the {size} ranks did not find each other: {told(error)}") from error
    world = World(watch.rank, size, watch, direct)
    try:
        yield world
    except RankError:
        watch.leave()
        raise
    except FeatCalError as error:
        if before := watch.fail(str(error)):  # of which this may be a consequence
            raise RankError(before) from error
        raise
    except (KeyboardInterrupt, SystemExit):
        watch.fail("it was interrupted")
        raise
    except BaseException as error:
        watch.fail(told(error))
        raise
    finally:
        watch.end()
    with suppress(RankError):
        world.gather(None)  # whoever keeps the store leaves last
    world.end()
    if started:  # not before: under torchrun they could not find each other again for another job
        atexit.register(distributed.destroy_process_group)
