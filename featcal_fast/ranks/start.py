"""Several ranks on this machine, started as torchrun does it."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence

import torch

from featcal_fast.errors import DeviceError, RankError
from featcal_fast.ranks.join import launched

OPTION = "--gpus"


def start(count: int, device: str | None, arguments: Sequence[str]) -> int:
    """Run this command line in several processes, and wait for them.

    Args:
        count: how many.
        device: that they compute on, as `--device` has it.
        arguments: of the command line, `--gpus` among them.

    Returns:
        The exit code: that of the process which ended first, where one failed.

    Raises:
        DeviceError: there are not as many GPUs.
        RankError: this is a process of several already, or one of them was killed.
    """
    if launched() > 1:
        raise RankError(f"found {OPTION} {count} in one of several processes already, expected one way to start them")
    found = torch.cuda.device_count()
    if device != "cpu" and count > found:
        raise DeviceError(
            f"device: found {found} GPUs, expected {count} ({OPTION}); ask for fewer, or for processes on the CPU: "
            "--device cpu"
        )
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what there is to say, is said here
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun has it: bits depend on it, and not on how many ranks
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # or a folder would stay
    )
    try:
        elastic_launch(config, sys.executable)("-m", "featcal_fast", *without(OPTION, arguments))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise RankError(
                f"rank {failure.local_rank} (process {failure.pid}) was ended by {failure.signal_name()}, and with it "
                "the others; after SIGKILL memory may have run out: `featcal-fast plan` with --gpus says what each "
                "needs; --resume goes on from the last layer that was kept"
            ) from None
        return failure.exitcode  # it has said why
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def without(option: str, arguments: Sequence[str]) -> list[str]:
    """Arguments without an option and its value."""
    left = iter(arguments)
    kept = []
    for each in left:
        if each == option:
            next(left, None)
        elif not each.startswith(f"{option}="):
            kept.append(each)
    return kept
