"""One job on 1, 2 and 4 ranks: seconds, bytes between ranks and memory, beside what a plan and its model say.

    python -m bench.scale                   # writes bench/results/scale-cpu.json
    python -m bench.scale --toy             # tiny models, to see that everything works

Ranks are processes of one thread each, by torchrun with gloo, on one machine: with two cores, only two run at a time,
and four show no more than that the job is the same. The model of `featcal_fast/planning/scaling.py` is given what the
run on one rank took, by kind of work, and the speed of a transfer between two processes here; what it says of several
is beside what they took.

Its table for Llamas of 8B, 70B and 405B on GPUs is the model's alone: nothing of it was run. Its rates are those that
`bench/results/gpu-nvidia-h200.json` has of a Llama-8B layer; links and storage are assumptions, named beside it.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import featcal_fast as ff
from bench.harness import process
from bench.harness.results import RESULTS, machine, write_whole
from bench.harness.runs import command_line, kept_runs, results_folder, take_turns
from bench.holes import LLAMAS, write_holes
from bench.workloads import LLAMA_1B, LLAMA_TOY, TEXT, Workload, write
from featcal_fast.planning.plan import Plan
from featcal_fast.planning.scaling import KINDS, Speeds, scale

JOB = Workload(
    TEXT,
    {**LLAMA_1B, "num_hidden_layers": 2, "vocab_size": 32000},
    tasks=2,
    preset="llm",
    samples=8,
    tokens=256,
    padded=False,  # of which plans know nothing where systems are solved from the token side
    toy=LLAMA_TOY,
)
SIZES = (1, 2, 4)
GIB = 2**30
GPUS = ((1, 1), (8, 1), (8, 16), (64, 16))  # ranks, and settings.sample_shards
CARD = RESULTS / "gpu-nvidia-h200.json"
LINKS = {"between machines": 50e9, "within a machine": 300e9}  # bytes a second; assumptions
LATENCY, READING = 20e-6, 5e9  # seconds, bytes a second of each rank; assumptions
TASKS = {"8B": 5, "70B": 5, "405B": 8}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
WIRE = """
import time, torch
from torch import distributed
distributed.init_process_group("gloo")
rank, data = distributed.get_rank(), torch.zeros(2**24)
for turn in range(2):
    began = time.perf_counter()
    for _ in range(4):
        distributed.send(data, 1) if rank == 0 else distributed.recv(data, 0)
    distributed.barrier()
if rank == 0:
    print('{"bytes_a_second": %f}' % (4 * data.nbytes / (time.perf_counter() - began)))
distributed.destroy_process_group()
"""


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__, "--toy", "--folder", "--fresh")
    parser.add_argument("--plan", type=int, help="only say what is planned for so many ranks, in a process of its own")
    parser.add_argument("--no-llamas", action="store_true", help="leave the table of large models out")
    args = parser.parse_args(arguments)
    args.device, args.threads = "cpu", 1
    folder = args.folder / ("toy-scale" if args.toy else "scale")
    if args.plan:
        print(json.dumps(planned(folder, args.plan)))
        return
    prepare(JOB.small if args.toy else JOB, folder)
    kept = kept_runs(args.folder / f"{folder.name}-runs.json", args)
    ways = {f"{size} ranks": lambda size=size: run(folder, size) for size in SIZES}
    runs = {int(name.split()[0]): found[0] for name, found in take_turns(ways, kept).items()}
    link = process.last_json(wire_command(folder), OMP_NUM_THREADS="1")["bytes_a_second"]
    found: dict[str, Any] = {"model": JOB.config, "tasks": JOB.tasks, "samples": JOB.samples, "tokens": JOB.tokens}
    found |= {"measured": compared(folder, runs, link), "machine": machine(1)}
    if not args.no_llamas:
        found["by the model alone"] = llamas(args.folder / "scale-llamas")
    path = results_folder(args) / "scale-cpu.json"
    write_whole(path, found)
    print(f"{json.dumps(found['measured'], indent=1)}\nWrote {path}")


def prepare(work: Workload, folder: Path) -> None:
    """Models, data and a recipe with a merged model of its own, so that no merging is timed."""
    write(work, folder)
    if not (folder / "merged").is_dir():
        recipe = json.loads((folder / "recipe.json").read_text())
        ff.merge({**recipe, "out": str(folder / "merged")})


def recipe_of(folder: Path) -> dict[str, Any]:
    recipe = json.loads((folder / "recipe.json").read_text())
    del recipe["merge"]
    return {**recipe, "merged_model": str(folder / "merged"), "out": str(folder / "out")}


def run(folder: Path, size: int) -> dict[str, Any]:
    """The job on so many ranks, by its report."""
    out, path = folder / "out", folder / "shared.json"
    shutil.rmtree(out, ignore_errors=True)
    path.write_text(json.dumps(recipe_of(folder)))
    calibrate = ["-m", "featcal_fast", "calibrate", str(path), "--device", "cpu", "--fresh", "--no-checkpoint"]
    start = [sys.executable] if size == 1 else [*TORCHRUN, str(size)]
    status, output = process.run([*start, *calibrate], OMP_NUM_THREADS="1")
    if status:
        raise RuntimeError(f"{size} ranks ended with {status}: {output[-2000:]}")
    report = json.loads((out / "report.json").read_text())
    shutil.rmtree(out)
    ranks = [
        {"sent": each["sent"], "received": each["received"], "peak_host_bytes": each["peaks"]["host_bytes"]}
        for each in report["ranks"]
    ]
    layers = [round(layer["seconds"], 2) for layer in report["layers"]]
    return {
        "seconds": round(report["seconds"], 2),
        "seconds_of_layers": layers,
        "phases": {name: round(seconds, 2) for name, seconds in report["phases"].items()},
        "peak_host_bytes": report["peaks"]["host_bytes"],
        "gib_read": round(sum(report["bytes_read"].values()) / GIB, 3),
        "ranks": ranks,
    }


def wire_command(folder: Path) -> list[str]:
    script = folder / "wire.py"
    script.write_text(WIRE)
    return [*TORCHRUN, "2", str(script)]


def planned(folder: Path, size: int) -> dict[str, Any]:
    """What a plan says of the job on so many ranks."""
    plan = ff.plan(recipe_of(folder), device="cpu", gpus=size, checkpoint_every=0)
    ranks = [{"sent": each.sent, "received": each.received, "peak_host_bytes": each.host_bytes} for each in plan.ranks]
    return {"peak_host_bytes": plan.host_bytes, "ranks": ranks}


def compared(folder: Path, runs: dict[int, dict[str, Any]], link: float) -> dict[str, Any]:
    """What ranks took beside what was said of them."""
    plan = ff.plan(recipe_of(folder), device="cpu", checkpoint_every=0)
    speeds = measured_speeds(plan, runs[1], link)
    model = {row.ranks: row for row in scale(plan, SIZES, speeds).rows}
    alone, found = sum(runs[1]["seconds_of_layers"]), {}
    for size, each in runs.items():
        seconds, said = sum(each["seconds_of_layers"]), model[size]
        command = [sys.executable, "-m", "bench.scale", "--plan", str(size), "--folder", str(folder.parent)]
        command += ["--toy"] * folder.name.startswith("toy")
        found[f"{size} ranks"] = {
            **each,
            "planned": process.last_json(command, OMP_NUM_THREADS="1"),
            "speed_up": round(alone / seconds, 2),
            "model_seconds": round(said.seconds, 2),
            "model_speed_up": round(said.speed_up, 2),
            "model_phases": {name: round(value, 3) for name, value in said.phases.items()},
        }
    rates = {kind: round(rate / 1e9, 2) for kind, rate in speeds.rates.items()}
    note = "two cores: four ranks of a thread each take turns on them, which the model does not know"
    return {**found, "GFLOP/s of a rank": rates, "GB/s between two": round(link / 1e9, 2), "note": note}


def measured_speeds(plan: Plan, run: dict[str, Any], link: float) -> Speeds:
    """What a rank does a second, by what one alone took: the solve apart from the rest."""
    solving = run["phases"]["solving"]
    rest = max(1e-3, sum(run["seconds_of_layers"]) - solving)
    flops = plan.flops
    rates = dict.fromkeys(KINDS, sum(flops[kind] for kind in KINDS[:3]) / rest)
    return Speeds({**rates, "solve": flops["solve"] / max(solving, 1e-3)}, link, 1e-3)


def llamas(folder: Path) -> dict[str, Any]:
    """Large models by the model alone."""
    card = json.loads(CARD.read_text())
    rates, job = card_rates(card), card["sections"]["jobs"]["rows"]["llama-8b, 4 layers"]
    found: dict[str, Any] = {
        "assumed": {
            "TFLOP/s of a rank": {kind: round(rate / 1e12, 1) for kind, rate in rates.items()},
            "of which": f"measured for a layer of a Llama-8B, {CARD.name}; taken to hold for wider layers",
            "link": {name: f"{link / 1e9:.0f} GB/s" for name, link in LINKS.items()},
            "latency": f"{LATENCY * 1e6:.0f} us",
            "reading": f"{READING / 1e9:.0f} GB/s each rank",
            "samples": "256 of 512 tokens a task, none held out",
            "left out": "what comes before the first layer and after the last, hidden states that wait on the host, "
            "and what ranks do ahead while they wait. Layers of whole jobs take longer: those of a Llama-8B, "
            f"{job['seconds_in_layers'] / 4:.1f} s each on that card, {job['tasks']} tasks of {job['samples']} samples",
        }
    }
    for name, tasks in TASKS.items():
        for size, shards in GPUS:
            plan = plan_holes(LLAMAS[name], tasks, folder / name, size, shards)
            for place, link in LINKS.items():
                if size > 1 and (size <= 8 or place != "within a machine"):
                    key = f"Llama {name}, K = {tasks}, {size} ranks, {shards} shards, {link / 1e9:.0f} GB/s"
                    found[key] = row_of(plan, size, Speeds(rates, link, LATENCY, READING))
            if size == 1:
                found[f"Llama {name}, K = {tasks}, alone"] = row_of(plan, 1, Speeds(rates, reading=READING))
    return found


def row_of(plan: Plan, size: int, speeds: Speeds) -> dict[str, Any]:
    """What the model says of a plan on its own number of ranks."""
    (row,) = scale(plan, (size,), speeds).rows
    widest = max(layer.system for layer in plan.layers)
    return {
        "ranks": size,
        "hours": round(row.seconds / 3600, 4),
        "speed_up": round(row.speed_up, 2),
        "efficiency": round(row.efficiency, 3),
        "received_GB": round(row.received / 1e9, 1),
        "device_GiB": round(plan.device_bytes / GIB, 1),
        "systems_GiB": round(widest / GIB, 2),
        "moments_GiB": round(max(layer.scratch for layer in plan.layers) / GIB, 2),
        "phases": {name: round(seconds, 2) for name, seconds in row.phases.items()},
    }


def card_rates(results: dict[str, Any]) -> dict[str, float]:
    """Operations a second by kind, of a layer on the GPU; what is none of these kinds slows all of them alike."""
    row = results["sections"]["layer"]["rows"]["engine, blocks compiled"]
    flops, ms = row["flops"], row["ms"]
    own = sum(seconds for kind, seconds in ms.items() if kind != "other")
    share = own / (own + ms["other"])
    forward = (flops["forward"] + flops["advance"]) / (ms["forward"] + ms["advance"])
    rates = {"forward": forward, **{kind: flops[kind] / ms[kind] for kind in KINDS[1:]}}
    return {kind: 1e3 * share * rate for kind, rate in rates.items()}


def plan_holes(config: LlamaConfig, tasks: int, folder: Path, size: int, shards: int) -> Plan:
    """A plan for models of which there are only headers: files that are all holes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file({"input_ids": torch.zeros(256, 512, dtype=torch.long)}, folder / "ids.safetensors")
    names = ["base", "merged", *(f"task{number}" for number in range(tasks))]
    write_holes(folder / names[0], config)
    for name in names[1:]:
        shutil.copytree(folder / names[0], folder / name, copy_function=_copy_holes)
    experts = {name: {"model": str(folder / name), "data": str(folder / "ids.safetensors")} for name in names[2:]}
    recipe = {
        "base_model": str(folder / "base"),
        "merged_model": str(folder / "merged"),
        "experts": experts,
        "held_out": 0,
        "settings": {"preset": "llm", "sample_shards": shards},
    }
    plan = ff.plan(recipe, device="cuda", gpus=size, device_memory=10**15, host_memory=10**15)
    shutil.rmtree(folder)
    return plan


def _copy_holes(source: str, target: str) -> None:
    """Files are linked: they are only read."""
    Path(target).hardlink_to(source)


if __name__ == "__main__":
    main()
