"""What models make of held-out samples in the end: their own norms and heads, on their last hidden states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from featcal_fast.errors import told
from featcal_fast.forward.outputs import NoOutputs, Outputs
from featcal_fast.layer.tokens import Tokens
from featcal_fast.models.decoder import DECODER, GPT2
from featcal_fast.models.tokens import vocabulary_size
from featcal_fast.reporting.outcome import DRIFT, KL, OUTPUTS, Outcome, TaskOutcome
from featcal_fast.streaming.chunks import Chunks
from featcal_fast.streaming.hidden_states import HiddenStates
from featcal_fast.streaming.paired import Paired, paired
from featcal_fast.streaming.sources import Source

LOGITS = 2**24  # of a model, that are made at a time (one sample's at least): 64 MiB of float32
PIECE = 2**22  # of these, that are float32 at a time
NONE = -100  # of a token without a target, as torch and transformers have it

MODELS = ("merged", "calibrated")
Sums = dict[str, Tensor]  # by what they are of: `[samples]` each, float64, on the device


class Followed(NamedTuple):
    """One task's samples, which three models have passed.

    Attributes:
        batches: inputs of the models' forward.
        tokens: of each batch, in the last stage.
        merged, calibrated, expert: hidden states that leave the last block.
    """

    batches: Sequence[Mapping[str, Tensor]]
    tokens: Sequence[Tokens]
    merged: HiddenStates
    calibrated: HiddenStates
    expert: HiddenStates


class Compared(NamedTuple):
    """What the models make of one task's samples.

    Attributes:
        values: by what they are of, a number for each sample.
        reason: why there are none of the outputs, where that is so.
    """

    values: dict[str, list[float]]
    reason: str


def measure_outcome(
    student: Source,
    experts: Mapping[str, Source],
    followed: Mapping[str, Followed],
    device: torch.device,
    forward_dtype: str = "auto",
) -> Outcome:
    """Compare the merged and the calibrated model with the experts, by features and by outputs.

    The models' heads run on as many samples at a time as make at most 2^24 logits. The host waits for the device once a
    task. What a model cannot be run for is left out, with the reason.

    Args:
        student: the merged model, whose own head reads both chains of its hidden states.
        experts: by task.
        followed: samples by task, of one at least.
        device: where to compute.
        forward_dtype: as in `Settings`.

    Returns:
        All numbers, and the judgement; `kept` is left to whoever decides.
    """
    return judge_outputs(compare_outputs(student, experts, followed, device, forward_dtype))


@torch.no_grad()
def compare_outputs(
    student: Source,
    experts: Mapping[str, Source],
    followed: Mapping[str, Followed],
    device: torch.device,
    forward_dtype: str = "auto",
) -> dict[str, Compared]:
    """The numbers that `measure_outcome` judges by, of each task; arguments are the same."""
    found: dict[str, Compared] = {}
    for task, each in followed.items():
        expert = experts[task]
        sums, reason = _compare(student, expert, each, device, forward_dtype)
        expert.release_stage_inputs()
        names = list(sums)
        values = zip(names, torch.stack([sums[name] for name in names]).tolist(), strict=True)
        found[task] = Compared(dict(values), reason)
    student.release_stage_inputs()
    return found


def judge_outputs(compared: Mapping[str, Compared]) -> Outcome:
    """All tasks' numbers as one outcome; `kept` is left to whoever decides.

    Args:
        compared: by task, of one at least.
    """
    tasks: dict[str, TaskOutcome] = {}
    features: list[list[list[float]]] = []
    outputs: list[list[list[float]]] = []
    divergences: list[list[list[float]]] = []
    for task, (values, reason) in compared.items():
        tasks[task] = _outcome(values, reason)
        features.append(_scaled(values, "drift", "energy"))
        if "kl_merged" in values:
            divergences.append(_scaled(values, "kl", "count"))
        if "output_drift_merged" in values:
            outputs.append(_scaled(values, "output_drift", "output_energy"))
    if len(divergences) == len(tasks):
        return _judged(tasks, divergences, KL)
    return _judged(tasks, outputs, OUTPUTS) if len(outputs) == len(tasks) else _judged(tasks, features, DRIFT)


def _compare(
    student: Source, expert: Source, followed: Followed, device: torch.device, forward_dtype: str
) -> tuple[Sums, str]:
    """A task's sums, sample by sample, and why there are none of the outputs, where that is so."""
    reason = ""
    try:
        return _all_sums(_Heads(student, expert), followed, device, forward_dtype), ""
    except NoOutputs as error:
        reason = str(error)
    except torch.OutOfMemoryError as error:  # not even for one sample; its frames are gone once this is over
        reason = f"the outputs of one sample need more memory than there is: {told(error)}"
    return _all_sums(None, followed, device, forward_dtype), reason


def _all_sums(heads: _Heads | None, followed: Followed, device: torch.device, forward_dtype: str) -> Sums:
    limit = max(1, LOGITS // heads.vocabulary) if heads and heads.vocabulary else None
    chunks, parts = Chunks(device, limit, forward_dtype), list[Sums]()
    for number, batch in enumerate(followed.batches):
        for chunk in chunks.of(number, followed.tokens[number]):
            found: Sums = {}
            with chunk:
                loaded = [states.load(number, chunk.rows)[0] for states in followed[2:]]
                found = _feature_sums(loaded, chunk.tokens)
                if heads is not None:
                    rows = {name: value[chunk.rows] for name, value in batch.items()}
                    found |= heads.sums(rows, loaded, chunk.tokens)
            if not chunk.failed:
                parts.append(found)
    names = set.intersection(*(set(part) for part in parts))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name in names}


def _feature_sums(loaded: Sequence[Tensor], tokens: Tokens) -> Sums:
    """`||h - h_e||^2` of both models, and `||h_e||^2`."""
    found: dict[str, list[Tensor]] = {"drift_merged": [], "drift_calibrated": [], "energy": []}
    step = max(1, PIECE // loaded[0][0].numel())
    for start in range(0, len(loaded[0]), step):
        merged, calibrated, expert = (each[start : start + step].double() for each in loaded)
        for name, value in zip(found, (merged - expert, calibrated - expert, expert), strict=True):
            found[name].append(value.square().sum(2))
    return {name: tokens.sums(torch.cat(values)) for name, values in found.items()}


class _Heads:
    """The heads of a merged model and of an expert, on the same samples.

    Args:
        student: the merged model.
        expert: of the task.
    """

    def __init__(self, student: Source, expert: Source) -> None:
        self._student, self._expert, self._family = student, expert, student.structure.family
        self.vocabulary = vocabulary_size(expert.structure.config)
        kind = getattr(getattr(expert.structure.model, "config", None), "problem_type", None)
        self._regression = kind == "regression"

    def sums(self, batch: Mapping[str, Tensor], loaded: Sequence[Tensor], tokens: Tokens) -> Sums:
        """What belongs to the kind of the expert's outputs.

        Args:
            batch: of some samples.
            loaded: final hidden states of the merged, the calibrated and the expert's model, each
                `[samples, tokens, width]`.
            tokens: theirs.

        Raises:
            NoOutputs: there is nothing to compare.
        """
        final = loaded[2]
        own = self._expert.outputs(batch, final)
        of_tokens = own.values.ndim == 3 and own.values.shape[:2] == final.shape[:2]
        if own.name == "logits" and not self._regression:
            classes = own.values.shape[-1]
            if not of_tokens or classes != self.vocabulary:
                if classes > 1:
                    both = [self._expert.outputs(batch, each.to(final.dtype)).values for each in loaded[:2]]
                    return _agreement([*both, own.values], tokens if of_tokens else None)
            else:
                return self._of_language(batch, [*self._of_student(batch, loaded[:2], own), own.values], tokens)
        values = [*self._of_student(batch, loaded[:2], own), own.values]
        if of_tokens:
            values = [_mean(each, self._counted(batch, each)) for each in values]
        if len({each.shape for each in values}) > 1:
            raise NoOutputs(f"the merged model gives {tuple(values[0].shape)}, the expert {tuple(values[2].shape)}")
        merged, calibrated, expert = (each.double().flatten(1) for each in values)
        errors = (merged - expert, calibrated - expert, expert)
        names = ("output_drift_merged", "output_drift_calibrated", "output_energy")
        return {name: each.square().sum(1) for name, each in zip(names, errors, strict=True)}

    def _of_student(self, batch: Mapping[str, Tensor], finals: Sequence[Tensor], own: Outputs) -> list[Tensor]:
        """What the merged model's head makes of both its chains; it must be what the expert gives."""
        found = [self._student.outputs(batch, each) for each in finals]
        if found[0].name != own.name:
            raise NoOutputs(f"the merged model gives {found[0].name}, the expert {own.name}")
        return [each.values for each in found]

    def _counted(self, batch: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Which tokens count: bool, `[samples, tokens]`, on the device of `like`."""
        mask = self._family.stages[-1].mask(batch)
        counted = torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
        return counted if mask is None else mask.to(like.device) != 0

    def _of_language(self, batch: Mapping[str, Tensor], logits: Sequence[Tensor], tokens: Tokens) -> Sums:
        """KL and cross entropies of three models' `[samples, tokens, vocabulary]`, the expert's last."""
        shape, device = logits[2].shape[:2], logits[2].device
        targets = self._next(batch, logits[2])
        table = None if self._expert.tokens is None else self._expert.tokens.to(device)
        common = _Common(table, logits[0].shape[2], logits[2].shape[2], device)
        theirs = targets if targets is None or table is None else _translated(targets, table)
        flat = [each.flatten(0, 1) for each in logits]
        found: dict[str, list[Tensor]] = {}
        step = max(1, PIECE // max(each.shape[1] for each in flat))
        for rows in (slice(start, start + step) for start in range(0, len(flat[0]), step)):
            merged, calibrated, expert = (each[rows].float() for each in flat)
            numbers = common.divergences(merged, calibrated, expert)
            if targets is not None and theirs is not None:
                own = targets.flatten()[rows]
                numbers |= {
                    "loss_merged": _cross_entropy(merged, own),
                    "loss_calibrated": _cross_entropy(calibrated, own),
                }
                numbers["loss_expert"] = _cross_entropy(expert, theirs.flatten()[rows])
            for name, value in numbers.items():
                found.setdefault(name, []).append(value.double())
        sums = {name: tokens.sums(torch.cat(values).view(shape)) for name, values in found.items()}
        sums["count"] = tokens.sums(torch.ones(shape, dtype=torch.float64, device=device))
        if targets is not None and theirs is not None:
            sums["targets"] = (targets != NONE).sum(1).double()
            sums["expert_targets"] = (theirs != NONE).sum(1).double()
        return sums

    def _next(self, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor | None:
        """The token that is to come at each position, -100 where there is none: int64, `[samples, tokens]`.

        None of what has no texts to follow: an encoder, and a decoder that is given embeddings.
        """
        counted, labels = self._counted(batch, logits), batch.get("labels")
        if len(self._family.stages) > 1:
            return None if labels is None else labels.to(logits.device).masked_fill(~counted, NONE)
        ids = labels if labels is not None and labels.shape == counted.shape else batch.get("input_ids")
        if self._family not in (DECODER, GPT2) or ids is None:
            return None
        targets = torch.full(counted.shape, NONE, device=logits.device)
        both = counted[:, :-1] & counted[:, 1:]  # what follows padding is not told by anything
        targets[:, :-1] = ids.to(logits.device)[:, 1:].masked_fill(~both, NONE)
        return targets


class _Common:
    """The tokens that a merged model and an expert both have.

    Args:
        table: for each token of the merged model the expert's own, or -1; None where they are the same.
        ours, theirs: sizes of the vocabularies.
        device: of logits.
    """

    def __init__(self, table: Tensor | None, ours: int, theirs: int, device: torch.device) -> None:
        self._ours = self._theirs = None
        if table is not None or ours != theirs:
            own = torch.arange(ours, device=device) if table is None else table[:ours]
            self._ours = ((own >= 0) & (own < theirs)).nonzero()[:, 0]
            self._theirs = own[self._ours]

    def divergences(self, merged: Tensor, calibrated: Tensor, expert: Tensor) -> Sums:
        """`KL(expert || model)` of both models at each position, in nats, of distributions over these tokens."""
        expert = _log_softmax(expert, self._theirs)
        weights, found = expert.exp(), Sums()
        for name, logits in (("kl_merged", merged), ("kl_calibrated", calibrated)):
            ratio = (expert - _log_softmax(logits, self._ours)).masked_fill_(weights == 0, 0)  # 0 log 0 is 0
            found[name] = (weights * ratio).sum(1).clamp_min(0)  # below it is rounding
        return found


def _log_softmax(logits: Tensor, columns: Tensor | None) -> Tensor:
    return (logits if columns is None else logits.index_select(1, columns)).log_softmax(1)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets, ignore_index=NONE, reduction="none")


def _translated(targets: Tensor, table: Tensor) -> Tensor:
    """Targets as the expert's own tokens; none where it lacks one."""
    own = table[targets.clamp(min=0)]
    return own.masked_fill((targets < 0) | (own < 0), NONE)


def _agreement(logits: Sequence[Tensor], tokens: Tokens | None) -> Sums:
    """How many samples (or, with `tokens`, how many of these that count) have the expert's class, of how many."""
    merged, calibrated, expert = (each.argmax(-1) for each in logits)
    names = ("agreement_merged", "agreement_calibrated", "classes")
    same = [(each == expert).double() for each in (merged, calibrated, expert)]
    sums = [each.view(len(each), -1).mean(1) if tokens is None else tokens.sums(each) for each in same]
    return dict(zip(names, sums, strict=True))


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Of `[samples, tokens, width]`, over the tokens that count: float64, `[samples, width]`."""
    total = values.double().masked_fill(~counted[..., None], 0).sum(1)
    return total / counted.sum(1, keepdim=True).clamp(min=1)


def _outcome(values: Mapping[str, list[float]], reason: str) -> TaskOutcome:
    """A task's numbers from its sums by sample."""
    total = {name: math.fsum(each) if all(map(math.isfinite, each)) else math.nan for name, each in values.items()}

    def ratio(name: str, over: str) -> float | None:
        return total[name] / total[over] if name in total and total[over] else None

    def drift(name: str, over: str) -> float | None:
        found = ratio(name, over)
        return None if found is None else math.sqrt(found)

    return TaskOutcome(
        samples=len(values["energy"]),
        drift_merged=drift("drift_merged", "energy") or 0.0,
        drift_calibrated=drift("drift_calibrated", "energy") or 0.0,
        kl_merged=ratio("kl_merged", "count"),
        kl_calibrated=ratio("kl_calibrated", "count"),
        loss_merged=ratio("loss_merged", "targets"),
        loss_calibrated=ratio("loss_calibrated", "targets"),
        loss_expert=ratio("loss_expert", "expert_targets"),
        agreement_merged=ratio("agreement_merged", "classes"),
        agreement_calibrated=ratio("agreement_calibrated", "classes"),
        output_drift_merged=drift("output_drift_merged", "output_energy"),
        output_drift_calibrated=drift("output_drift_calibrated", "output_energy"),
        reason=reason,
    )


def _scaled(values: Mapping[str, list[float]], name: str, over: str) -> list[list[float]]:
    """The merged and the calibrated model's sums by sample; their means are the sum of all over that of `over`."""
    mean = math.fsum(values[over]) / len(values[over]) or 1.0
    return [[each / mean for each in values[f"{name}_{model}"]] for model in MODELS]


def _judged(tasks: dict[str, TaskOutcome], numbers: Sequence[list[list[float]]], measure: str) -> Outcome:
    """The judgement on `numbers`: each task's samples of both models; KLs, or squares of drifts."""
    merged, calibrated = ([each[i] for each in numbers] for i in range(2))
    sound = [all(math.isfinite(value) for one in each for value in one) for each in (merged, calibrated)]
    if not all(sound):
        return Outcome(tasks, measure, worse=sound[0])
    found: Paired = paired(merged, calibrated)
    if measure == KL:
        return Outcome(tasks, measure, *found, worse=found.worse)
    roots = math.sqrt(found.first), math.sqrt(found.second)
    spread = found.spread / (sum(roots) or 1.0)  # that of the roots' difference, since b^2 - a^2 = (b - a) (b + a)
    return Outcome(tasks, measure, *roots, spread, worse=found.worse)
