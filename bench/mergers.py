"""Upstream mergers that FeatCal is tried on: from a base and its experts, one state of parameters.

The average, task arithmetic and WUDI's descent are the package's own. TIES, which the paper trims over all parameters
as one vector, and AdaMerging are written here from their papers' formulas, with `tau_t` for task t's vector, `expert -
base`. Hyper-parameters are the published ones, but where a comment says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from featcal_fast.merging.merged import merge_tensor
from featcal_fast.merging.method import Options
from featcal_fast.merging.methods import METHODS
from featcal_fast.merging.wudi import wudi as packaged_wudi

State = dict[str, Tensor]


@dataclass(frozen=True)
class Pool:
    """What a merger may look at.

    Attributes:
        base: the model that the experts were trained from.
        experts: by task.
        heads: by task, the directions of its classes, `[classes, width]`.
        images: by task, unlabelled calibration images, which only AdaMerging looks at.
        seed: of AdaMerging's batches.
    """

    base: nn.Module
    experts: Mapping[str, nn.Module]
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    images: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0


def state(model: nn.Module) -> State:
    """The model's parameters, detached."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def with_state(model: nn.Module, values: State) -> nn.Module:
    """A copy of `model` with these parameters."""
    copy = deepcopy(model)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            parameter.copy_(values[name])
    return copy


def task_vectors(pool: Pool) -> State:
    """`tau_t` of every parameter, stacked along the tasks."""
    states = [state(expert) for expert in pool.experts.values()]
    return {name: torch.stack([s[name] for s in states]) - value for name, value in state(pool.base).items()}


def class_scores(features: Tensor, head: Tensor) -> Tensor:
    """Cosines of features with each class's direction: the demo's classifier."""
    return F.normalize(features, dim=-1) @ F.normalize(head, dim=-1).T


def average(pool: Pool) -> State:
    """Mean of the experts."""
    return _packaged(pool, "average")


def task_arithmetic(pool: Pool, scaling: float = 0.3) -> State:
    """`base + scaling * sum tau_t` (Ilharco et al., arXiv 2212.04089), with the demo's scaling."""
    return _packaged(pool, "task_arithmetic", scaling)


@dataclass(frozen=True)
class Ties:
    """Published values of TIES; on validation images scaling 1 was better than 0.5 and 1.5."""

    keep: float = 0.2
    scaling: float = 1.0


def ties(pool: Pool, options: Ties = Ties()) -> State:
    """`base + scaling * ties_vector` (Yadav et al., arXiv 2306.01708), over all parameters as one vector."""
    base, vectors = state(pool.base), task_vectors(pool)
    flat = torch.cat([vector.flatten(1) for vector in vectors.values()], dim=1)
    merged = ties_vector(flat, options.keep).split([value.numel() for value in base.values()])
    return {
        name: value + options.scaling * part.view_as(value)
        for (name, value), part in zip(base.items(), merged, strict=True)
    }


def ties_vector(vectors: Tensor, keep: float) -> Tensor:
    """Trim, elect and merge `[tasks, parameters]`.

    Trim: the share `keep` of each task's entries, the largest by magnitude. Elect: the sign of their sum. Merge: the
    mean of those kept entries that have the elected sign, 0 where there are none.
    """
    count = max(1, int(keep * vectors.shape[1]))
    threshold = vectors.abs().topk(count, dim=1).values[:, -1:]
    trimmed = vectors * (vectors.abs() >= threshold)
    agreeing = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return (trimmed * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


@dataclass(frozen=True)
class Wudi:
    """WUDI's descent. Published: learning rate 1e-5, 300 steps, for weights that fine-tuning moves by about 1e-4.

    The demo's experts are trained at a hundred times the usual learning rate, and Adam's step is absolute. So its rate
    is given as a share of the task vectors' root mean square, chosen on validation images.
    """

    steps: int = 300
    share: float = 0.03


def wudi(pool: Pool, options: Wudi = Wudi()) -> State:
    """Data-free descent for every linear weight (Cheng et al., arXiv 2503.08099), of one rate for those of a shape.

    Other parameters move by the mean of their task vectors.
    """
    base, vectors = state(pool.base), task_vectors(pool)
    merged = {name: value + vectors[name].mean(0) for name, value in base.items()}
    linear = [f"{name}.weight" for name, module in pool.base.named_modules() if isinstance(module, nn.Linear)]
    for shape in sorted({base[name].shape for name in linear}):
        names = [name for name in linear if base[name].shape == shape]
        rate = options.share * torch.stack([vectors[name] for name in names]).square().mean().sqrt().item()
        for name in names:
            merged[name] = base[name] + packaged_wudi(vectors[name], len(vectors[name]), options.steps, rate)
    return merged


@dataclass(frozen=True)
class AdaMerging:
    """AdaMerging's training; `temperature` is what the demo's cosines are multiplied by.

    Published: 500 steps at 1e-3. Fewer and larger steps take less time and came to the same
    on the validation images of one seed (70.8% against 70.6%).
    """

    steps: int = 200
    batch_size: int = 16
    learning_rate: float = 3e-3
    start: float = 0.3
    temperature: float = 20.0


def adamerging(pool: Pool, options: AdaMerging = AdaMerging()) -> State:
    """`base + sum_t c_{t,l} tau_t` with a coefficient for every task and parameter (Yang et al., arXiv 2310.02575).

    They minimise the entropy of what the merged model says of unlabelled images. The paper takes the test set's;
    these are the calibration images.
    """
    base, vectors = state(pool.base), task_vectors(pool)
    generator = torch.Generator().manual_seed(pool.seed)
    coefficients = torch.full((len(base), len(pool.experts)), options.start, requires_grad=True)
    adam = torch.optim.Adam([coefficients], lr=options.learning_rate)
    for _ in range(options.steps):
        batch = torch.cat([_draw(images, options.batch_size, generator) for images in pool.images.values()])
        merged = _combined(base, vectors, coefficients)
        features = functional_call(pool.base, merged, kwargs={"pixel_values": batch}).pooler_output
        loss = torch.zeros(())
        for rows, head in zip(features.chunk(len(pool.images)), pool.heads.values(), strict=True):
            said = (options.temperature * class_scores(rows, head)).log_softmax(-1)
            loss = loss - (said.exp() * said).sum(-1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return {name: value.detach() for name, value in _combined(base, vectors, coefficients).items()}


def _draw(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return images[torch.randint(len(images), (count,), generator=generator)]


def _combined(base: State, vectors: State, coefficients: Tensor) -> State:
    return {
        name: value + torch.tensordot(row, vectors[name], dims=1)
        for (name, value), row in zip(base.items(), coefficients, strict=True)
    }


def _packaged(pool: Pool, method: str, scaling: float = 1.0) -> State:
    states = {task: state(expert) for task, expert in pool.experts.items()}
    options = Options((1.0,) * len(states), scaling)
    return {
        name: merge_tensor(METHODS[method], options, value, {task: own[name] for task, own in states.items()})
        for name, value in state(pool.base).items()
    }


MERGERS: dict[str, Callable[[Pool], State]] = {
    "simple average": average,
    "task arithmetic": task_arithmetic,
    "TIES": ties,
    "WUDI": wudi,
    "AdaMerging": adamerging,
}
