"""The command line: `featcal-fast calibrate | plan | merge | delta | drift | check | demo`."""

from __future__ import annotations

import math
import signal
import sys
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from featcal_fast.errors import shown
from featcal_fast.job.interrupts import ENDING
from featcal_fast.ranks.join import follows
from featcal_fast.ranks.start import start
from featcal_fast.reporting.progress import Progress
from featcal_fast.streaming.malloc import configure_process
from featcal_fast.terminal import BarProgress, Terminal, end, tell, trace
from featcal_fast.version import __version__

if TYPE_CHECKING:
    from featcal_fast.inputs.recipe import Recipe

EXAMPLE = """
Repair a merged model: pull its features toward the experts it was made from, layer by layer, in closed form.

A recipe says what to calibrate, with what, into what:

\b
    base_model: models/base
    merge: {method: task_arithmetic, scaling: 0.3}   # or merged_model: models/merged
    experts:
      math: {model: models/math, data: math.jsonl}
      code: {model: models/code, data: code.jsonl}
    settings: {preset: llm}
    out: models/calibrated

\b
    featcal-fast calibrate recipe.yaml

A folder that mergekit wrote says itself what it was made of:

\b
    featcal-fast calibrate --mergekit merged --data math=math.jsonl --data code=code.jsonl --out calibrated

No data at hand? `featcal-fast demo` makes four small experts from real scans of digits and repairs their merge.
"""

NOT_BETTER = 3  # exit code where it was required
DEBUG = "--debug"

app = typer.Typer(
    help=EXAMPLE, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)
RECIPE = typer.Argument(metavar="RECIPE.yaml", help="The job; paths in it are relative to it.")
RecipePath = Annotated[Path, RECIPE]
RecipeOrNone = Annotated[Path | None, RECIPE]
Mergekit = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="A folder that mergekit wrote, or its hub id, in place of RECIPE.yaml."),
]
Data = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=FILE", help="With --mergekit: calibration data of a merged model. One for each."),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="With --mergekit: a merged model that needs no data, and is left out."),
]
Base = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="With --mergekit: what the models were fine-tuned from. Default: as it says."),
]
RecipeOut = Annotated[
    Path | None, typer.Option(metavar="FILE", help="With --mergekit: write the recipe that it amounts to.")
]
Out = Annotated[Path | None, typer.Option(help="Folder to write, in place of the recipe's `out`.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted run left, if any.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Remove what an interrupted run left, and start over.")]
CheckpointEvery = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Layers after which what is done is made durable. Default: as often as takes a thirtieth of the time.",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Where to compute: cuda, cuda:1, cpu. Default: the first GPU, or the CPU.")
]
DeviceMemory = Annotated[
    str | None, typer.Option(help="Device memory that may be used, for example 22GiB. Default: what is free.")
]
HostMemory = Annotated[
    str | None, typer.Option(help="Host memory that may be used, for example 60GB. Default: what is free.")
]
Scratch = Annotated[
    Path | None,
    typer.Option(help="Folder on a fast disk for hidden states between layers. Default: GPU or host memory."),
]
NoCheckpoint = Annotated[
    bool, typer.Option("--no-checkpoint", help="Keep nothing to resume from: an interrupted run starts over.")
]
Scan = Annotated[
    bool, typer.Option("--scan", help="Read all weights of all models first, and see that they are finite.")
]
KeepBetter = Annotated[
    bool | None,
    typer.Option(
        "--keep-better/--no-keep-better",
        help="Whether layers that get worse on held-out samples keep merged weights. Default: the recipe's, yes.",
    ),
]
RequireBetter = Annotated[
    bool,
    typer.Option("--require-better", help="Exit code 3 if the model is worse than the merge on held-out samples."),
]
DeltaFolder = Annotated[
    Path | None, typer.Option(help="Folder to write, too: the calibration as a LoRA adapter of the merged model.")
]
Rate = Annotated[float | None, typer.Option(help="TFLOP/s, to estimate the time by. Default: what runs took here.")]
Link = Annotated[
    float,
    typer.Option(help="GB/s from rank to rank, for --gpus with --rate: a model says how much sooner several are done."),
]
Sample = Annotated[
    int | None,
    typer.Option(min=3, help="Samples of each task to pass through all models, to see whether it will help."),
]
Rank = Annotated[int | None, typer.Option(min=1, help="Rank of the adapter's factors. Default: 16.")]
Gpus = Annotated[
    int | None,
    typer.Option(min=1, help="GPUs of this machine to share the job; with --device cpu, processes. Default: one."),
]
Debug = Annotated[bool, typer.Option(DEBUG, help="Where an error is told, show the traceback too.")]  # see `main`


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
    debug: Debug = False,
) -> None:
    if show:
        typer.echo(f"featcal-fast {__version__}")
        raise typer.Exit


@app.command()
def calibrate(
    recipe: RecipeOrNone = None,
    mergekit: Mergekit = None,
    data: Data = None,
    skip: Skip = None,
    base: Base = None,
    recipe_out: RecipeOut = None,
    out: Out = None,
    device: Device = None,
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    scratch: Scratch = None,
    resume: Resume = False,
    fresh: Fresh = False,
    checkpoint_every: CheckpointEvery = None,
    no_checkpoint: NoCheckpoint = False,
    scan: Scan = False,
    keep_better: KeepBetter = None,
    require_better: RequireBetter = False,
    delta: DeltaFolder = None,
    delta_rank: Rank = None,
    gpus: Gpus = None,
    debug: Debug = False,
) -> None:
    """Calibrate what RECIPE.yaml describes, or mergekit made, and write it, with report.json, to a new folder.

    \b
    Examples:
        featcal-fast calibrate recipe.yaml --out models/calibrated --device cuda
        featcal-fast calibrate --mergekit merged --data math=math.jsonl --data code=code.jsonl --out calibrated
        torchrun --nproc-per-node 8 -m featcal_fast calibrate recipe.yaml   # or --gpus 8
    """
    from featcal_fast.job.delta import RANK
    from featcal_fast.job.run import calibrate as run

    _check_pairs(resume, fresh, no_checkpoint, checkpoint_every, delta is not None, delta_rank)
    if gpus is not None and gpus > 1:
        raise typer.Exit(start(gpus, device, sys.argv[1:]))
    configure_process()
    console = Terminal()
    with closing(Progress() if follows() else BarProgress(console)) as progress:
        report = run(
            _judged(_job(recipe, mergekit, data, skip, base, recipe_out, out), keep_better, require_better),
            out=out,
            device=device,
            progress=progress,
            device_memory=device_memory,
            host_memory=host_memory,
            scratch=scratch,
            resume=resume,
            fresh=fresh,
            checkpoint_every=0 if no_checkpoint else checkpoint_every,
            scan=scan,
            delta=delta,
            delta_rank=delta_rank or RANK,
        )
    if not follows():
        console.show(report.tables(), report.summary() + _delta_line(delta))
        console.next_steps(Path(report.out or ""))
    raise typer.Exit(NOT_BETTER if require_better and not report.better and not follows() else 0)


@app.command()
def plan(
    recipe: RecipeOrNone = None,
    mergekit: Mergekit = None,
    data: Data = None,
    skip: Skip = None,
    base: Base = None,
    recipe_out: RecipeOut = None,
    out: Out = None,
    device: Device = None,
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    scratch: Scratch = None,
    no_checkpoint: NoCheckpoint = False,
    scan: Scan = False,
    gpus: Gpus = None,
    debug: Debug = False,
    rate: Rate = None,
    link: Link = 25.0,
    sample: Sample = None,
) -> None:
    """Say what RECIPE.yaml will need (memory, disk, bytes read, arithmetic) and which weights will change.

    Nothing is run, unless by --sample. It takes what `calibrate` takes. Exit code 1: it cannot work, or will not fit.

    \b
    Example:
        featcal-fast plan recipe.yaml --device-memory 22GiB --rate 150 --gpus 8
        featcal-fast plan recipe.yaml --sample 8
    """
    from featcal_fast.inputs.recipe import with_out
    from featcal_fast.planning.planner import plan as make

    if rate is not None and not 0 < rate < math.inf:
        said = f"found {rate}, expected TFLOP/s above 0, such as a run's summary says"
        raise typer.BadParameter(said, param_hint="--rate")
    if not 0 < link < math.inf:
        raise typer.BadParameter(f"found {link}, expected GB/s above 0", param_hint="--link")
    configure_process()
    console = Terminal()
    job = with_out(_job(recipe, mergekit, data, skip, base, recipe_out, out), out)
    with closing(BarProgress(console)) as progress:
        found = make(
            job,
            device=device,
            device_memory=device_memory,
            host_memory=host_memory,
            scratch=scratch,
            checkpoint_every=0 if no_checkpoint else None,
            scan=scan,
            gpus=gpus,
            sample=sample,
            planned=partial(console.show_plan, job.folder, rate, link),
            progress=progress,
        )
    if found.sample is not None:
        console.show_sample(found.sample)
    found.check()


@app.command()
def merge(
    recipe: RecipePath,
    out: Out = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Write the merged model that RECIPE.yaml's `merge` describes, uncalibrated.

    \b
    Example:
        featcal-fast merge recipe.yaml --out models/merged
    """
    from featcal_fast.job.run import merge as run

    console = Terminal()
    with console.status("merging"):
        folder = run(recipe, out=out, device=device, progress=BarProgress(console))
    console.say(f"Wrote {folder}")


@app.command()
def delta(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder that `calibrate` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    rank: Rank = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Write what calibration changed in MODEL as a LoRA adapter of the merged model, for PEFT.

    The merged model must still be where the recipe in MODEL's report.json says, as it was.

    \b
    Example:
        featcal-fast delta models/calibrated --out models/delta --rank 32
    """
    from featcal_fast.job.delta import RANK
    from featcal_fast.job.delta import delta as run

    console = Terminal()
    with console.status("comparing"):
        made = run(model, out=out, rank=rank or RANK, device=device)
    console.say(f"Wrote {out}: {made.summary()}")


@app.command()
def drift(
    recipe: RecipePath,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Model to compare with the merged one: a folder that `calibrate` wrote, or any other like it."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write: drift.json, drift.html to look at, drift.png.")
    ] = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Measure how far the merged model of RECIPE.yaml is from its experts, layer by layer, and why.

    On samples that the recipe holds out, or all where it holds out none.

    \b
    Example:
        featcal-fast drift recipe.yaml --model models/calibrated --out drift
    """
    from featcal_fast.job.drift import PAGE
    from featcal_fast.job.drift import drift as run

    configure_process()
    console = Terminal()
    found = run(recipe, model=model, out=out, device=device, progress=BarProgress(console))
    console.show(found.tables(), found.summary() + ("" if out is None else f"\nWrote {out}; look at {out / PAGE}"))


@app.command()
def check(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `calibrate` wrote.")],
    debug: Debug = False,
) -> None:
    """Compare every tensor and file of a calibrated model with the hashes in its report.json, and see that it loads.

    Exit code 0: whole, and loads. 1: damaged, and what. 2: not a folder that `calibrate` wrote. 3: whole, but it does
    not load, and why.

    \b
    Example:
        featcal-fast check models/calibrated
    """
    from featcal_fast.job.check import NOT_OURS
    from featcal_fast.job.check import check as run
    from featcal_fast.job.resume import left_behind

    found = run(out)
    console = Terminal()
    besides = [f"not of the model: {name}" for name in found.unlisted]
    lines = [left_behind(out)] if found.status == NOT_OURS else [*found.problems, *besides]
    for line in (*filter(None, lines), found.summary()):
        console.say(line)
    raise typer.Exit(found.status)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for models, data, recipe and results; reused.")] = Path(
        "featcal-demo"
    ),
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Repair the merge of four small vision transformers, trained here on real scans of digits, in two minutes.

    \b
    Example:
        featcal-fast demo
        featcal-fast calibrate featcal-demo/recipe.yaml --out featcal-demo/mine
    """
    from featcal_fast.demo import run

    run(out, console=Console(), device=device)


def _check_pairs(resume: bool, fresh: bool, never: bool, every: int | None, delta: bool, rank: int | None) -> None:
    """Refuse options of `calibrate` that exclude each other."""
    if resume and fresh:
        raise typer.BadParameter("found --fresh too, expected one of the two", param_hint="--resume")
    if never and every:
        raise typer.BadParameter("found --no-checkpoint too, expected one of the two", param_hint="--checkpoint-every")
    if rank and not delta:
        raise typer.BadParameter("found no --delta, which it belongs to", param_hint="--delta-rank")


def _delta_line(delta: Path | None) -> str:
    """What was written beside the model."""
    from featcal_fast.job.delta import read_summary

    if delta is None:
        return ""
    return f"\nWrote {delta}: {read_summary(delta)}" if delta.exists() else "\nNo delta: all weights are the merge's"


def _judged(job: Path | Recipe, keep_better: bool | None, require_better: bool) -> Recipe:
    """What is to be done, as the options about held-out samples have it."""
    from featcal_fast.inputs.recipe import Recipe

    recipe = Recipe.load(job)
    if require_better and not recipe.held_out:
        raise typer.BadParameter("found held_out: 0, expected samples to judge by", param_hint="--require-better")
    if keep_better is None:
        return recipe
    return replace(recipe, settings=replace(recipe.settings, keep_better=keep_better))


def _job(
    recipe: Path | None,
    mergekit: Path | None,
    data: list[str] | None,
    skip: list[str] | None,
    base: str | None,
    recipe_out: Path | None,
    out: Path | None,
) -> Path | Recipe:
    """What is to be done: a recipe's path, or what a folder of mergekit's amounts to."""
    if mergekit is None:
        for option, value in {"--data": data, "--skip": skip, "--base": base, "--recipe-out": recipe_out}.items():
            if value:
                raise typer.BadParameter("found without --mergekit, which it belongs to", param_hint=option)
        if recipe is None:
            raise typer.BadParameter("missing; expected it, or --mergekit FOLDER", param_hint="RECIPE.yaml")
        return recipe
    if recipe is not None:
        raise typer.BadParameter("found --mergekit too, expected one of the two", param_hint="RECIPE.yaml")
    from featcal_fast.inputs.mergekit import from_mergekit

    pairs = [each.partition("=") for each in data or []]
    for name, _, file in pairs:
        if not name or not file:
            raise typer.BadParameter(f"found {shown(name or file)}, expected NAME=FILE", param_hint="--data")
    given = [(name, file) for name, _, file in pairs]
    return from_mergekit(mergekit, given, skip=skip or [], base=base, out=out, recipe_out=recipe_out)


def _exit(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def main() -> None:
    """Entry point: an expected error is one line on stderr and exit code 1, any other one too, and 70.

    With `--debug` the traceback comes before it.
    """
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _exit)  # an exception, so that what is being written is finished
    try:
        app()
    except SystemExit as error:
        end(int(error.code or 0))
    except Exception as error:
        if DEBUG in sys.argv:
            trace(error)
        end(tell(error, DEBUG))


if __name__ == "__main__":
    main()
