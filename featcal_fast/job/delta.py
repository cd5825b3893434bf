"""A calibration as a LoRA adapter of the merged model, as PEFT reads one: beside the calibrated model, much smaller.

A folder holds

    adapter_config.json, adapter_model.safetensors    `B A` close to W' - W_merged for each linear weight, in float32;
                                                      biases and norms that changed as they are, in their own dtype
    delta.json                                        the energy that is kept, by module and in all
    README.md                                         a card
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor, nn

from featcal_fast import files
from featcal_fast.checkpoints import (
    REPORT,
    Checkpoint,
    TensorSource,
    WorkFolder,
    check_output,
    find_checkpoint,
    held_bytes,
    nearest_existing,
    work_path,
    write_errors,
)
from featcal_fast.checkpoints.adapter import WEIGHTS
from featcal_fast.checkpoints.find import split_revision
from featcal_fast.checkpoints.nested import model_folder
from featcal_fast.checkpoints.reader import ADAPTER_CONFIG
from featcal_fast.errors import DeviceError, ModelMismatchError, OutputError, RecipeError, shown
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.inputs.paths import checked_path
from featcal_fast.inputs.recipe import Recipe
from featcal_fast.job.adapter_files import adapter_config, card, tensor_names, write_safetensors
from featcal_fast.job.check import MAX_REPORT
from featcal_fast.job.interrupts import finish_first
from featcal_fast.job.loads import check_tensors
from featcal_fast.job.resume import read_past
from featcal_fast.layer.low_rank import energies, low_rank
from featcal_fast.models.linear import is_linear, is_transposed
from featcal_fast.planning.models import MetaCheckpoint
from featcal_fast.planning.plan import format_bytes
from featcal_fast.streaming.hidden_states import HOST
from featcal_fast.streaming.machine import find_device
from featcal_fast.streaming.sources import CheckpointSource, StoredParameter
from featcal_fast.untrusted.documents import DocumentError, parse_json

RANK = 16  # as much as vLLM takes where nobody tells it more (`--max-lora-rank`)
SUMMARY = "delta.json"


@dataclass
class ModuleDelta:
    """One linear module.

    Attributes:
        rank: of its factors.
        change: `||W' - W||_F`, W of the merged model.
        energy: `1 - ||W' - W - B A||_F^2 / ||W' - W||_F^2`; 1 where nothing changed.
    """

    rank: int
    change: float
    energy: float


@dataclass
class Delta:
    """What a calibration's adapter keeps of it, as `delta.json` has it.

    Attributes:
        rank: that was asked for; of a weight with fewer rows or columns it is their number.
        energy: kept of all linear weights' changes together: 1 minus the sum of what is lost over that of what was.
        nbytes: bytes of `adapter_model.safetensors`.
        model_bytes: bytes of the calibrated model's tensors.
        merged: the merged model: its folder, or its name on the hub; None where it was merged on the fly.
        modules: by name in the model's class.
        exact: names of biases and norms that changed, which are kept as they are.
    """

    rank: int
    energy: float
    nbytes: int
    model_bytes: int
    merged: str | None
    modules: dict[str, ModuleDelta] = field(default_factory=dict)
    exact: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line."""
        sizes = f"{format_bytes(self.nbytes)} beside the model's {format_bytes(self.model_bytes)}"
        return (
            f"rank {self.rank} keeps {self.energy:.1%} of the energy of what calibration changed in "
            f"{len(self.modules)} linear weights; {sizes}"
        )

    def to_json(self) -> str:
        """All of it as a JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"


def delta(model: str | Path, *, out: str | Path, rank: int = RANK, device: torch.device | str | None = None) -> Delta:
    """Write the adapter that makes a calibrated model of its merged model, at any time after a run.

    The merged model is the one that the recipe in `report.json` names, and must be as it was.

    Args:
        model: the calibrated model's folder; it is only read.
        out: the folder to write; new or empty.
        rank: of the factors, from 1 on; for weights with fewer rows or columns, their number.
        device: where to decompose; by default the first GPU, or the CPU.

    Returns:
        What is kept.

    Raises:
        FeatCalError: `model` is no calibrated model, its merged model is not to be had or another one, or `out` cannot
            be written. It is not there, then.
    """
    folder, device = checked_path("model", model).absolute(), find_device(device)
    recipe, merged_on = _read_report(folder)
    merged = _merged_model(recipe, merged_on)
    target = check_delta(out, merged, folder, recipe, rank)
    return write_delta(merged, recipe, folder, target, rank, device)


def check_delta(to: str | Path, merged: TensorSource, out: Path, recipe: Recipe, rank: int, written: int = 0) -> Path:
    """Refuse a rank, or a folder to write, before any work is done.

    Args:
        to: the folder.
        merged: the merged model.
        out: the calibrated model's folder, which need not be there yet.
        recipe: that names the merged model.
        rank: of the factors.
        written: bytes that `out` will take.

    Returns:
        The folder.

    Raises:
        RecipeError: the rank is none that a weight of the model can have.
        OutputError: the folder cannot be written, holds something, or lies in or around one that must stay as it is.
    """
    sides = [min(info.shape) for info in merged.tensors.values() if len(info.shape) == 2]
    if type(rank) is not int or not 1 <= rank <= max(sides, default=1):
        raise RecipeError(
            f"delta: found rank {shown(rank)}, expected a number from 1 to {max(sides, default=1)}, as many rows or "
            "columns as a weight has"
        )
    folder = checked_path("delta", to).absolute()
    models = {"base model": recipe.base_model}
    models |= {f"expert {task}": expert.model for task, expert in recipe.experts.items()}
    inputs = {"merged model": merged.path, "calibrated model": out}
    inputs |= {label: recipe.path(reference) for label, reference in models.items()}
    nbytes = sum(4 * rank * sum(info.shape) for info in merged.tensors.values() if len(info.shape) == 2)
    with _named(), write_errors(folder):
        inputs["calibrated model in the making"] = work_path(out)
        places = {files.stat(nearest_existing(path.parent)).st_dev for path in (folder, out)}
        besides = max(0, written - held_bytes(work_path(out))) if len(places) == 1 else 0
        check_output(folder, inputs, nbytes + besides)
        if files.resolve(folder) in files.resolve(out).parents:
            raise OutputError(f"out: {folder} holds {out}, the calibrated model; choose another folder")
    return folder


def write_delta(merged: TensorSource, recipe: Recipe, out: Path, to: Path, rank: int, device: torch.device) -> Delta:
    """Write the adapter, with what `check_delta` has let through.

    Args:
        merged: the merged model.
        recipe: that names it.
        out: the calibrated model's folder.
        to: the folder to write.
        rank: of the factors.
        device: where to decompose.
    """
    with _named(), WorkFolder(to) as work:
        if not work.published and (work.finished or read_past(work.manifest).layers):  # of a calibration
            raise OutputError(f"out: {work.path} is what a calibration into {to} has left; choose another folder")
        with write_errors(to):
            work.clear()
            base = _reference(recipe, merged)
        change = _Change(merged, Checkpoint(out, "calibrated model"), rank, device)
        model, found = change.model, change.found
        found.merged = base.get("base_model_name_or_path")
        config = adapter_config(model, base, rank, change.ranks, change.saved, change.biases)
        with write_errors(to):
            files.make_folder(work.model)
            found.nbytes = write_safetensors(work.model / WEIGHTS, change.tensors)
            texts = {
                ADAPTER_CONFIG: json.dumps(config, indent=2) + "\n",
                SUMMARY: found.to_json(),
                "README.md": card(model, found.summary(), base, to.name, len(found.exact)),
            }
            for name, text in texts.items():
                files.write_bytes(work.model / name, text.encode(errors="backslashreplace"))
            files.sync_folder(work.model)
        with finish_first():
            work.publish()
    return found


class _Change:
    """What calibration changed, a tensor at a time, as an adapter holds it.

    Args:
        merged: the merged model.
        calibrated: the calibrated one.
        rank: of the factors.
        device: where to decompose.

    Attributes:
        model: the class that is adapted, parameters on meta.
        tensors: the adapter's, by its names.
        ranks: of adapted linear modules, by full name.
        saved: full names of modules that are stored whole.
        biases: whether biases of linear modules are stored.
        found: what is kept.

    Raises:
        ModelMismatchError: the models differ in what calibration never changes.
        OutputError: they differ in no linear weight.
    """

    def __init__(self, merged: TensorSource, calibrated: Checkpoint, rank: int, device: torch.device) -> None:
        check_tensors(calibrated, merged)
        self.merged, self.calibrated, self.rank, self.device = merged, calibrated, rank, device
        source = CheckpointSource(MetaCheckpoint(calibrated), HOST)
        self.model: nn.Module = source.model
        self.tensors: dict[str, Tensor] = {}
        self.ranks: dict[str, int] = {}
        self.saved: list[str] = []
        self.biases = False
        size = sum(info.nbytes for info in calibrated.tensors.values())
        self.found = Delta(rank, 1.0, 0, size, None)
        self._total = self._lost = 0.0
        rest = dict.fromkeys(calibrated.tensors)
        for layer, block in zip(source.structure.layers, source.structure.blocks, strict=True):
            for name, module in block.named_modules():
                own = {part: source.parameter(layer.index, f"{name}.{part}") for part in _parts(module)}
                self._take(f"{layer.path}.{name}", module, own)
                for parameter in own.values():
                    for each in parameter.tensors:
                        rest.pop(each, None)
        for name in rest:
            self._read(StoredParameter([name], itemgetter(name)), same=True)
        if not self.ranks:
            raise OutputError(
                f"delta: calibration changed no linear weight of {merged.path}; there is nothing to adapt"
            )
        self.found.energy = 1 - self._lost / self._total if self._total else 1.0

    def _take(self, name: str, module: nn.Module, own: Mapping[str, StoredParameter]) -> None:
        """A module with parameters of its own: `own` says how they are stored."""
        changed = {part: pair for part, each in own.items() if (pair := self._read(each)) is not None}
        names = tensor_names(name, is_linear(module))
        if changed and not is_linear(module):
            self.saved.append(name)
            for part in changed:
                self._add_exact(own[part])
            for part, each in own.items():
                self.tensors[names[part]] = each.read(self.calibrated)
        elif changed:
            self._factor(name, module, changed.get("weight"), tuple(module.get_parameter("weight").shape))
            if "bias" in changed:
                self.biases = True
                self._add_exact(own["bias"])
                self.tensors[names["bias"]] = changed["bias"][1]

    def _add_exact(self, parameter: StoredParameter) -> None:
        self.found.exact += [each for each in parameter.tensors if each not in self.found.exact]

    def _factor(self, name: str, module: nn.Module, pair: tuple[Tensor, Tensor] | None, shape: tuple[int, ...]) -> None:
        rank = min(self.rank, *shape)
        change = torch.zeros(shape, device=self.device)  # where only its bias changed
        if pair is not None:
            change = pair[1].to(self.device).float() - pair[0].to(self.device).float()
        change = change.mT if is_transposed(module) else change
        b, a = low_rank(change, rank)
        total, lost = energies(change, b, a)
        names = tensor_names(name, linear=True)
        self.tensors |= {names["A"]: a.cpu().contiguous(), names["B"]: b.cpu().contiguous()}
        self.ranks[name] = rank
        self.found.modules[name] = ModuleDelta(rank, total**0.5, 1 - lost / total if total else 1.0)
        self._total, self._lost = self._total + total, self._lost + lost

    def _read(self, parameter: StoredParameter, same: bool = False) -> tuple[Tensor, Tensor] | None:
        """A parameter of the merged and of the calibrated model; None where it is the same in both."""
        before, after = parameter.read(self.merged), parameter.read(self.calibrated)
        if torch.equal(before, after):
            return None
        if same:
            raise ModelMismatchError(
                f"{self.merged.label}: {self.merged.path}: tensor {shown(parameter.tensors[0])} is not that of the "
                f"calibrated model ({self.calibrated.path}), though calibration never changes it; this is not the "
                "merged model that was calibrated"
            )
        return before, after


def _parts(module: nn.Module) -> list[str]:
    """Of a module that is linear or a norm: what calibration may change."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    return (
        own if "weight" in own and {"weight", "bias"}.issuperset(own) and not isinstance(module, nn.Embedding) else []
    )


def read_summary(folder: str | Path) -> str:
    """What the `delta.json` of a folder amounts to, in a line."""
    return Delta(**json.loads(files.read_text(Path(folder) / SUMMARY, MAX_REPORT))).summary()


def _read_report(out: Path) -> tuple[Recipe, torch.device]:
    """The recipe in a calibrated model's report, and where a model was merged: there it has the same bits again."""
    where = f"model: {out} is no folder that calibrate wrote: {REPORT}"
    try:
        report = parse_json(files.read_bytes(out / REPORT, MAX_REPORT))
    except OSError as error:
        raise RecipeError(f"{where} cannot be read: {error.strerror or error}") from error
    except DocumentError as error:
        raise RecipeError(f"{where} is not valid JSON: {error}") from error
    recipe = report.get("recipe") if isinstance(report, dict) else None
    if not isinstance(recipe, dict) or not isinstance(recipe.get("root"), str):
        raise RecipeError(f"{where} holds no recipe")
    root = checked_path("root", recipe.pop("root"))
    try:
        device = find_device(report.get("device"))
    except DeviceError:  # it was another machine's
        device = HOST
    return replace(Recipe.load(recipe), root=root), device


def _merged_model(recipe: Recipe, device: torch.device) -> TensorSource:
    if recipe.merged_model is not None:
        return find_checkpoint(recipe.merged_model, recipe.root, "merged model")
    return RecipeModels(replace(recipe, expert_storage="disk"), device).merged


def _reference(recipe: Recipe, merged: TensorSource) -> dict[str, str]:
    """What others find the merged model by: its folder, or its name on the hub; nothing where there is neither."""
    if recipe.merged_model is None:
        return {}
    name, revision = split_revision(recipe.merged_model)
    if any(recipe.path(each).exists() for each in (recipe.merged_model, name)):
        return {"base_model_name_or_path": str(files.resolve(model_folder(merged.path)))}
    return {"base_model_name_or_path": name} | ({"revision": revision} if revision else {})


@contextmanager
def _named() -> Iterator[None]:
    """What is said of an output is here said of the delta."""
    try:
        yield
    except OutputError as error:
        raise OutputError(re.sub(r"^out: ", "delta: ", str(error))) from error.__cause__
