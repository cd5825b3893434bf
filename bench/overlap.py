"""Reading behind computing: a job whose disk is slowed down takes little longer than the slower of the two.

    python -m bench.overlap                 # writes bench/results/overlap-cpu.json

The job is run as it is, which gives the time that computing takes. Then every read of a tensor is made to wait, so that
all reads together take twice that, and the job is run again. Each run is a process of its own.
"""

from __future__ import annotations

import json
from functools import partial

import torch

from bench.harness.results import machine, write_whole
from bench.harness.runs import check, command_line, kept_runs, results_folder, take_turns
from bench.jobs import OURS, run_job
from bench.workloads import B32, CLIP_TOY, VISION, Workload, write

JOB = Workload(VISION, {**B32, "num_hidden_layers": 8}, tasks=4, samples=48, toy=CLIP_TOY)


def main(arguments: list[str] | None = None) -> None:
    args = command_line(__doc__, "--device", "--threads", "--toy", "--folder", "--fresh").parse_args(arguments)
    check({"featcal_fast": OURS}, args.device)
    folder = args.folder / ("toy-overlap" if args.toy else "overlap")
    write(JOB.small if args.toy else JOB, folder)
    kept = kept_runs(args.folder / f"{folder.name}-runs.json", args)
    run = partial(run_job, folder, args.device, threads=args.threads)
    usual = take_turns({"as it is": run}, kept, runs=2)["as it is"][1]  # the first one warms the disk's cache
    compute, rate = usual["seconds"], usual["gib_read"] * 2**30 / (2 * usual["seconds"])
    slowed = {"slowed down": partial(run, "--read-rate", str(rate))}
    (slow,) = take_turns(slowed, kept)["slowed down"]
    reading, total = slow["seconds_reading"], slow["seconds"]
    found = {
        "compute_seconds": compute,
        "read_seconds": reading,
        "total_seconds": total,
        "over_the_slower": round(total / max(compute, reading) - 1, 3),
        "over_the_sum": round(total / (compute + reading) - 1, 3),
        "MB_a_second": round(rate / 1e6, 1),
        "machine": machine(args.threads),
    }
    path = results_folder(args) / f"overlap-{torch.device(args.device).type}.json"
    write_whole(path, found)
    print(f"{json.dumps(found, indent=1)}\nWrote {path}")


if __name__ == "__main__":
    main()
