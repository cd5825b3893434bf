"""FeatCal in plain torch, straight from the equations, in the models' own dtype: what everything else is held to.

No tricks: every linear module has its own moments, target features are formed, all tasks' statistics are kept, the
solve is `torch.linalg.solve`. Give it float64 models and it is the judge. Equations are the paper's (arXiv 2605.13030).
Tensors have the models' dtype, and vectors one value a feature.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featcal_fast.errors import SolveError
from featcal_fast.forward.calls import BatchCalls, stage_inputs
from featcal_fast.layer.precision import ieee_float32
from featcal_fast.layer.selection import reason_to_keep
from featcal_fast.models import Layer, Structure, find_structure
from featcal_fast.models.linear import is_linear, oriented
from featcal_fast.settings import Settings


@dataclass
class LinearStats:
    """One linear module, one task: eq. 13, and the means of appendix G. Tensors have the models' dtype.

    Attributes:
        s: `Xs' D Xs / n`, `[in, in]`.
        c: `Xs' D Xt / n`, `[in, in]`, with the target `Xt = alpha Xe + (1 - alpha) Xs` of eq. 10.
        mean_student: of `Xs`, `[in]`.
        mean_target: of `Xt`, `[in]`.
    """

    s: Tensor
    c: Tensor
    mean_student: Tensor
    mean_target: Tensor


@dataclass
class NormStats:
    """One LayerNorm, one task: what appendix G takes of the student's affine-free normalised input `z`.

    Tensors have the models' dtype.

    Attributes:
        mean: of `z`, `[features]`.
        energy: mean of `z^2`, `[features]`.
    """

    mean: Tensor
    energy: Tensor


@dataclass
class LayerStats:
    """One layer, one task: what its modules are updated from (eq. 13, appendix G).

    Attributes:
        linear: of linear modules, by name.
        norms: of LayerNorms, by name.
    """

    linear: dict[str, LinearStats] = field(default_factory=dict)
    norms: dict[str, NormStats] = field(default_factory=dict)


def solve_weight(
    stats: Sequence[LinearStats], experts: Sequence[Tensor], merged: Tensor, base: Tensor, settings: Settings
) -> Tensor:
    """Eq. 17: `W' = (sum_t w_t S_t + (lambda + eps) I)^-1 (sum_t w_t C_t W_t' + lambda W_a')`.

    Tensors are all of one dtype.

    Args:
        stats: one a task.
        experts: the experts' weights, `[out, in]`, in the same order.
        merged, base: of the anchor `W_a` (eq. 11), `[out, in]`.
        settings: for `lambda`, `rho` and `eps`.

    Returns:
        The calibrated weight, `[out, in]`.
    """
    anchor, ridge = settings.anchor_rho * merged + (1 - settings.anchor_rho) * base, ridge_of(stats, settings)
    left = (ridge + settings.covariance_eps) * torch.eye(len(stats[0].s)).to(stats[0].s)
    right = ridge * anchor.mT
    for task, weight in zip(stats, experts, strict=True):
        w = task_weight(task.s, settings)
        left = left + w * task.s
        right = right + w * task.c @ weight.mT
    solved: Tensor = torch.linalg.solve(left, right).mT
    if settings.max_change is not None:
        distance = torch.stack([(weight - anchor).norm() for weight in experts]).mean()
        share = (settings.max_change * distance / (solved - anchor).norm()).clamp(max=1)
        solved = anchor + share * (solved - anchor)
    return solved


def solve_bias(
    stats: Sequence[LinearStats],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    solved: Tensor,
    merged: Tensor,
    base: Tensor,
    settings: Settings,
) -> Tensor:
    """Appendix G: `b = (sum_t w_t (b_t + W_t m_t - W m_s) + lambda b_a) / (sum_t w_t + lambda)`.

    Tensors are all of one dtype.

    Args:
        stats: one a task; `m_s` and `m_t` are their means.
        weights: the experts' weights, `[out, in]`, in the same order.
        biases: the experts' biases, `[out]`, likewise.
        solved: the calibrated weight `W`, `[out, in]`.
        merged, base: biases, of the anchor `b_a` (eq. 11), `[out]`.
        settings: for `lambda`, `rho` and `eps`.

    Returns:
        The calibrated bias, `[out]`.
    """
    anchor = settings.anchor_rho * merged + (1 - settings.anchor_rho) * base
    left = torch.as_tensor(ridge_of(stats, settings), dtype=anchor.dtype)
    right = left * anchor
    for task, weight, bias in zip(stats, weights, biases, strict=True):
        w = task_weight(task.s, settings)
        right = right + w * (bias + weight @ task.mean_target - solved @ task.mean_student)
        left = left + w
    return right / left


def solve_layernorm(
    stats: Sequence[NormStats],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    merged: tuple[Tensor, Tensor],
    base: tuple[Tensor, Tensor],
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Appendix G: the two-by-two system of each channel, in which tasks weigh the same.

    Tensors are all of one dtype.

    Args:
        stats: one a task.
        weights: the experts' weights, `[features]`, in the same order.
        biases: the experts' biases, `[features]`, likewise.
        merged, base: weight and bias, of the anchor (eq. 11), `[features]` each.
        settings: for `lambda`, `rho` and `eps`.

    Returns:
        The calibrated weight and bias, `[features]` each.
    """
    rho, ridge = settings.anchor_rho, settings.ridge_lambda
    gamma_a, beta_a = (rho * m + (1 - rho) * b for m, b in zip(merged, base, strict=True))
    a11, a12, a22 = ridge + 0 * gamma_a, 0 * gamma_a, len(stats) + ridge
    r1, r2 = ridge * gamma_a, ridge * beta_a
    for task, gamma, beta in zip(stats, weights, biases, strict=True):
        a11, a12 = a11 + task.energy, a12 + task.mean
        r1, r2 = r1 + task.energy * gamma + task.mean * beta, r2 + task.mean * gamma + beta
    det = (a11 * a22 - a12 * a12).clamp_min(settings.covariance_eps)
    return (a22 * r1 - a12 * r2) / det, (a11 * r2 - a12 * r1) / det


def ridge_of(stats: Sequence[LinearStats], settings: Settings) -> float | Tensor:
    """What `ridge_lambda` of eq. 12 amounts to: itself, or relative to the mean diagonal of `sum_t w_t S_t`.

    Args:
        stats: one a task.
        settings: for `lambda`, `ridge_scale` and `eps`.

    Returns:
        A number, or a scalar of the dtype of the statistics.
    """
    if settings.ridge_scale == "absolute":
        return settings.ridge_lambda
    return settings.ridge_lambda * sum(task_weight(task.s, settings) * task.s.diagonal().mean() for task in stats)


def task_weight(s: Tensor, settings: Settings) -> Tensor:
    """The weight of a task in eq. 17, `w_t = 1 / max(||S_t||_F, eps)`.

    Args:
        s: `S_t` of eq. 13, `[in, in]`, any floating dtype.
        settings: for `eps`.

    Returns:
        A scalar of the dtype of `s`.
    """
    norm: Tensor = torch.linalg.matrix_norm(s)
    return norm.clamp_min(settings.covariance_eps).reciprocal()


@torch.no_grad()
@ieee_float32()
def calibrate_model(
    merged: nn.Module,
    *,
    base: nn.Module,
    experts: Mapping[str, nn.Module],
    batches: Mapping[str, Iterable[Mapping[str, Tensor]]],
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Calibrate `merged` in place, in the models' own dtype: eq. 10 to 17 and appendix G, layer by layer.

    Args:
        merged: the model to repair.
        base: the model that the experts were fine-tuned from.
        experts: by task. Moved to the device, otherwise never changed.
        batches: by task, dicts of the models' keyword arguments (`pixel_values`, or `input_ids` and
            `attention_mask`, ...): tensors of the models' dtype or integers, `[samples, ...]`.
        settings: the method's constants.
        device: where to compute; by default where the models are, which must be one device.

    Returns:
        Seconds by layer, `{"layer 0": 1.2, ...}`.

    Raises:
        UnsupportedModelError: no family fits.
        SolveError: a parameter comes out NaN or Inf: a judge must be finite.
    """
    models = {"merged": merged, "base": base, **experts}
    for model in models.values():
        model.to(device).eval()
    found = {name: find_structure(model, name) for name, model in models.items()}
    data = {task: list(items) for task, items in batches.items()}
    student: dict[str, list[State]] = {task: [] for task in experts}
    teacher: dict[str, list[State]] = {task: [] for task in experts}

    seconds = {}
    for layer, block in zip(found["merged"].layers, found["merged"].blocks, strict=True):
        started = time.perf_counter()
        if layer.number == 0:
            for task in experts:
                student[task] = _enter(found["merged"], layer.stage, data[task], student[task])
                teacher[task] = _enter(found[task], layer.stage, data[task], teacher[task])
        expert_blocks = [found[task].blocks[layer.index] for task in experts]
        stats = [
            layer_stats(layer, block, expert, student[task], teacher[task], settings)
            for task, expert in zip(experts, expert_blocks, strict=True)
        ]
        old = {name: value.clone() for name, value in oriented(block).items()}
        others, anchor = [oriented(expert) for expert in expert_blocks], oriented(found["base"].blocks[layer.index])
        for name in stats[0].linear:
            _update_linear(name, [task.linear[name] for task in stats], others, old, anchor, oriented(block), settings)
        for name in stats[0].norms:
            _update_norm(name, [task.norms[name] for task in stats], others, old, anchor, oriented(block), settings)
        _check_finite(layer, block)
        for states in student.values():
            for state in states:
                state.hidden = _passed(layer.number, block, state)
        seconds[f"layer {layer.index}"] = time.perf_counter() - started
    return seconds


def _check_finite(layer: Layer, block: nn.Module) -> None:
    for name, value in block.named_parameters():
        if not value.isfinite().all():
            raise SolveError(f"reference: {layer.path}.{name} came out as NaN or Inf, expected finite values")


@dataclass
class State:
    """One batch between two layers of one model.

    Attributes:
        hidden: hidden states, `[samples, tokens, features]`, in the models' dtype.
        calls: what a block is called with besides them.
        mask: `[samples, tokens]`, bool or integer, 0 for padding; None where nothing is padded.
        memory: the mask of the previous stage, `[samples, tokens]`, bool or integer; None likewise.
    """

    hidden: Tensor
    calls: BatchCalls
    mask: Tensor | None
    memory: Tensor | None


def _enter(
    structure: Structure, stage: int, batches: Sequence[Mapping[str, Tensor]], before: Sequence[State]
) -> list[State]:
    """Each batch's hidden states as they enter a stage of a model, on top of those that left the stage before."""
    states = []
    for number, batch in enumerate(batches):
        previous = before[number] if before else None
        hidden, calls = stage_inputs(structure, batch, stage, previous.hidden if previous else None)
        mask = structure.family.stages[stage].mask(batch)
        states.append(State(hidden, calls, mask, previous.mask if previous else None))
    return states


def layer_stats(
    layer: Layer, block: nn.Module, expert: nn.Module, student: list[State], teacher: list[State], settings: Settings
) -> LayerStats:
    """Run the student's and the expert's block over a task's batches: eq. 13, and what appendix G takes.

    Args:
        layer: where the blocks are in their models.
        block: the student's.
        expert: the expert's.
        student: the student's batches, as they enter the layer.
        teacher: the expert's, likewise; they advance through its block.
        settings: for `alpha`, and which modules are calibrated.

    Returns:
        The statistics of the modules that are calibrated and saw a token.
    """
    names = [name for name, module in block.named_modules() if _calibrated(layer, name, module, settings)]
    xs: dict[str, list[Tensor]] = {name: [] for name in names}
    xe: dict[str, list[Tensor]] = {name: [] for name in names}
    ds: dict[str, list[Tensor]] = {name: [] for name in names}
    for ours_state, theirs_state in zip(student, teacher, strict=True):
        ours = _inputs(layer.number, block, ours_state, names)[0]
        theirs, theirs_state.hidden = _inputs(layer.number, expert, theirs_state, names)
        for name in ours:
            d = _token_weights(layer, name, ours[name], ours_state)
            if d is not None:
                counts = d != 0  # padding may hold NaN, and 0 * NaN is NaN
                xs[name].append(ours[name].flatten(0, -2)[counts])
                xe[name].append(theirs[name].flatten(0, -2)[counts])
                ds[name].append(d[counts])
    stats = LayerStats()
    for name in names:
        if not xs[name]:
            continue
        module = block.get_submodule(name)
        s, e, d = torch.cat(xs[name]), torch.cat(xe[name]), torch.cat(ds[name])
        n, d = d.sum(), d[:, None]
        if isinstance(module, nn.LayerNorm):
            z = F.layer_norm(s, module.normalized_shape, eps=module.eps)
            stats.norms[name] = NormStats((d * z).sum(0) / n, (d * z * z).sum(0) / n)
        else:
            t = settings.teacher_alpha * e + (1 - settings.teacher_alpha) * s
            means = (d * s).sum(0) / n, (d * t).sum(0) / n
            stats.linear[name] = LinearStats(s.mT @ (d * s) / n, s.mT @ (d * t) / n, *means)
    return stats


def _calibrated(layer: Layer, name: str, module: nn.Module, settings: Settings) -> bool:
    """Whether a module of a block is one that the method updates, and the settings and the family agree."""
    norm = isinstance(module, nn.LayerNorm)
    return (
        (norm or is_linear(module))
        and reason_to_keep(f"{layer.path}.{name}", settings) is None
        and layer.family.reason_to_keep(f"{name}.weight") is None
    )


def _token_weights(layer: Layer, name: str, x: Tensor, state: State) -> Tensor | None:
    """The diagonal of D for input `x` of a module, `[batch * tokens]`; None where `x` has not one row a token."""
    mask = state.memory if layer.reads_memory(name) else state.mask
    if mask is None:
        batch = state.hidden.shape[0]
        tokens = x.shape[1] if layer.reads_memory(name) else state.hidden.shape[1]
        d = torch.ones(batch, tokens, dtype=x.dtype, device=x.device)
    else:
        d = mask.to(x)
    if x.shape[:-1] not in (d.shape, (d.numel(),)):
        return None
    rule = layer.token_weights
    if rule is not None and rule.applies_to(name):
        d = torch.cat([d[:, :1], d[:, 1:] * rule.rest], dim=1)
    return d.flatten()


def _inputs(number: int, block: nn.Module, state: State, names: list[str]) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of the named modules, and the block's output."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: inputs.update({name: args[0]})

    handles = [block.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    out = _passed(number, block, state)
    for handle in handles:
        handle.remove()
    return inputs, out


def _passed(number: int, block: nn.Module, state: State) -> Tensor:
    """The block's output. Where padding makes NaN (rows of attention that are masked all over), it is 0.

    The next block gives padding the weight 0, and 0 * NaN is NaN.
    """
    out = state.calls.run(number, block, state.hidden)
    return out if state.mask is None else torch.where(state.mask[..., None] != 0, out, out.nan_to_num(0.0, 0.0, 0.0))


def _update_linear(
    name: str,
    stats: Sequence[LinearStats],
    experts: Sequence[Mapping[str, Tensor]],
    old: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    settings: Settings,
) -> None:
    """Solve one linear module from the layer's snapshot `old`, and load it. All by name, weights `[out, in]`."""
    weight, bias = f"{name}.weight", f"{name}.bias"
    if weight not in old:  # another module's, and named as such
        return
    weights = [expert[weight] for expert in experts]
    solved = solve_weight(stats, weights, old[weight], base[weight], settings)
    new[weight].copy_(solved)
    if settings.calibrate_bias and bias in old:
        biases = [expert[bias] for expert in experts]
        new[bias].copy_(solve_bias(stats, weights, biases, solved, old[bias], base[bias], settings))


def _update_norm(
    name: str,
    stats: Sequence[NormStats],
    experts: Sequence[Mapping[str, Tensor]],
    old: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    settings: Settings,
) -> None:
    """The same for a LayerNorm; one without weight or bias is left alone."""
    weight, bias = f"{name}.weight", f"{name}.bias"
    if not settings.calibrate_layernorm or weight not in old or bias not in old:
        return
    weights, biases = [expert[weight] for expert in experts], [expert[bias] for expert in experts]
    pairs = (old[weight], old[bias]), (base[weight], base[bias])
    for parameter, value in zip((weight, bias), solve_layernorm(stats, weights, biases, *pairs, settings), strict=True):
        new[parameter].copy_(value)
