"""What a user should know before a result is trusted: a sentence a kind, with numbers, and what to do about it.

A good run has none of these. What can be known before the first layer is said there too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from featcal_fast.errors import one_line
from featcal_fast.reporting.outcome import LAYER_WORSE, MODEL_WORSE
from featcal_fast.reporting.report import GroupReport, Report, drift_text, percent_text
from featcal_fast.settings import Settings

SMALL_RIDGE = 1e-4  # rounding to bfloat16, divided by so small a lambda, is larger than what is calibrated
LARGE_EPS = 0.1  # of lambda: covariance_eps pulls weights to zero, lambda to the anchor
WORSE = 1.01  # times the drift before; it is taken on a few samples a task, which tell no smaller difference
ROUNDING = 1e-3  # drift that may be nothing but rounding, of hidden states in bfloat16
MEANINGLESS = 1e3  # relative distances are of the order of 1, unless there is nothing to relate to
LARGE_CHANGE = 1.0  # of a weight's own norm: what is left of the merge is less than what is new
FEW_TOKENS = 32  # of a task, which weighs as much as one with thousands
LARGE_STORAGE_ERROR = 0.02  # of a weight; fine-tuning often changes no more of it. 8 bits make about 0.01
NAMED = 3  # modules, tasks or reasons that a sentence names

# Reasons to keep a weight that are the recipe's own, and those of what is never calibrated.
EXPECTED = (
    *("not included", "excluded", "outside of the layers", "the text tower keeps its merged values"),
    *(LAYER_WORSE, MODEL_WORSE),
)


def about_settings(settings: Settings, condition: float, trusted: float) -> list[str]:
    """Settings that do not go together.

    Args:
        settings: the method's constants.
        condition: a bound on the condition number of the systems that they make.
        trusted: the largest for which a solve in float32 is accurate.

    Returns:
        A sentence each.
    """
    ridge, found = settings.ridge_lambda, []
    for name in ("forward_dtype", "moment_dtype"):
        if getattr(settings, name) == "bfloat16" and ridge <= SMALL_RIDGE:
            found.append(
                f"settings: ridge_lambda {ridge:g} with {name} bfloat16: the rounding changes weights more than the "
                f"calibration does; leave {name} at auto, or take a ridge_lambda above {SMALL_RIDGE:g}"
            )
    if settings.solve_dtype == "float32" and condition > trusted:
        found.append(
            f"settings: solve_dtype float32 with ridge_lambda {ridge:g}: systems may have a condition number of "
            f"{condition:.0e}, float32 is accurate up to {trusted:.0e}; leave solve_dtype at auto"
        )
    if ridge == 0:
        found.append(
            "settings: ridge_lambda 0: nothing pulls weights to the anchor, and directions that few samples use are "
            "fitted to noise; take one above 0, such as 0.05"
        )
    elif settings.covariance_eps > LARGE_EPS * ridge:
        found.append(
            f"settings: covariance_eps {settings.covariance_eps:g} beside ridge_lambda {ridge:g}: it pulls weights to "
            "zero; leave it at 1e-8"
        )
    if settings.teacher_alpha == 0 and not settings.auto:
        found.append(
            "settings: teacher_alpha 0: the experts' features are not used, only their weights; take one above 0, "
            "such as 0.3"
        )
    return found


def about_samples(samples: Mapping[str, tuple[int, int]]) -> list[str]:
    """Fewer samples than were asked for.

    Args:
        samples: how many there are and how many were asked for, by task.

    Returns:
        A sentence, or none.
    """
    short = [f"{task} {found:,} of {asked:,}" for task, (found, asked) in samples.items() if found < asked]
    if not short:
        return []
    told = f"fewer samples than asked for: {_listed(short)}; add data, or ask for fewer (samples)"
    return [one_line(told)]


def about_held_out(share: float, samples: Mapping[str, tuple[int, int]]) -> list[str]:
    """Tasks of which some samples were to be held out, but none are.

    Args:
        share: that was to be.
        samples: how many each task has, and how many of these are held out: none, if they are too few, or if those
            that were to be are all among the others too.

    Returns:
        A sentence, or none.
    """
    without = [f"{task} ({count:,} samples)" for task, (count, held_out) in samples.items() if not held_out]
    if not share or not without:
        return []
    told = f"nothing is held out of {_listed(without)}: they are too few, or too many are the same; drift is that of "
    return [one_line(told + "samples that were fitted to; add other samples")]


def about_ignored(notes: Iterable[str]) -> list[str]:
    """Keys, columns and files of the data that are not read.

    Args:
        notes: what is read of a source, and what is not, for each of which something is ignored.

    Returns:
        A sentence, or none.
    """
    told = list(dict.fromkeys(notes))
    return [one_line(f"parts of the data are ignored: {'; '.join(told[:NAMED])}" + _more(told))] if told else []


def about_left_out(samples: Mapping[str, tuple[Mapping[str, int], int]]) -> list[str]:
    """Samples that a task's expert cannot be given as they are to the merged model.

    Args:
        samples: by task, how many were left out by reason, and how many were drawn.

    Returns:
        A sentence, or none.
    """
    told = []
    for task, (reasons, drawn) in samples.items():
        if count := sum(reasons.values()):
            why = "; ".join(f"{number:,} {reason}" for reason, number in reasons.items())
            told.append(f"{task} {count:,} of {drawn:,} ({why})")
    if not told:
        return []
    advice = "they count for nothing; take other texts where that is too many"
    return [one_line(f"samples left out, which experts would read otherwise: {_listed(told)}; {advice}")]


def about_dequantised(label: str, stored: int, nbytes: int) -> list[str]:
    """A calibrated model that is larger than what it is made of, because that is quantised.

    Args:
        label: what the model is called whose layout it takes.
        stored: bytes of that one's tensors in its files; as many as `nbytes` where it is not quantised.
        nbytes: of its own tensors.

    Returns:
        A sentence, or none.
    """
    if stored >= nbytes:
        return []
    sizes = f"{nbytes / 2**30:.3g} GiB of plain weights, for {stored / 2**30:.3g} GiB"
    told = f"the {label} is quantised, and the calibrated model is written dequantised: {sizes}"
    return [f"{told}; quantise it again where that is too large"]


def about_same_model(experts: Iterable[str]) -> list[str]:
    """Experts that are the base model.

    Args:
        experts: their tasks.

    Returns:
        A sentence, or none.
    """
    same = list(experts)
    if not same:
        return []
    told = f"nothing was learned by the experts of {_listed(same)}: their weights look like the base model's"
    return [one_line(f"{told}, toward which the result is pulled; check which models the recipe names")]


def about_base(same: bool) -> list[str]:
    """A merge without a base model.

    Args:
        same: whether the base model is the merged model itself.

    Returns:
        A sentence, or none.
    """
    if not same:
        return []
    return [
        "no base model: base_model is the merged model itself, so that the anchor is the merge alone, whatever "
        "anchor_rho says; name what the experts were fine-tuned from (--base MODEL, or base_model in a recipe)"
    ]


def about_merged(calibrated: bool, rows: tuple[int, int] | None) -> list[str]:
    """A merged model that may be another one than was meant, or lacks a part.

    Args:
        calibrated: whether it was calibrated before.
        rows: of its embedding and of the base model's, where it has no tokenizer of its own.

    Returns:
        A sentence each.
    """
    found = []
    if calibrated:
        found.append(
            "calibrated before: the merged model's report.json says that featcal_fast wrote it, so that what was "
            "calibrated already is taken for the merge; name the merge itself, unless that is meant"
        )
    if rows is not None and rows[0] != rows[1]:
        found.append(
            "no tokenizer in the merged model's folder: the base model's is taken, though the embedding has "
            f"{rows[0]:,} rows and the base model's {rows[1]:,}, so that ids may mean other tokens; copy the merge's "
            "tokenizer there"
        )
    return found


def about_not_merged(weights: Mapping[str, Sequence[str]]) -> list[str]:
    """Experts' weights that a merge on the fly is without.

    Args:
        weights: their names, by task.

    Returns:
        A sentence, or none.
    """
    if not weights:
        return []
    told = [
        f"{task} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "") for task, names in weights.items()
    ]
    advice = "the merge is without them; experts must have the base's layers, and to merge output layers of their own"
    return [
        one_line(
            f"weights that the base model has not: {_listed(told)}; {advice}, save the base model untied too "
            "(tie_word_embeddings false)"
        )
    ]


def about_run(report: Report) -> list[str]:
    """What a finished run says of its own result.

    Args:
        report: with all of its layers.

    Returns:
        Sentences, each of another kind; none where nothing is to be said.
    """
    kinds = (_worse, _drift, _undefined_drift, _change, _raised, _rank, _few_tokens, _calibrated, _storage)
    return [one_line(sentence) for kind in kinds if (sentence := kind(report))]


def _worse(report: Report) -> str:
    found = report.outcome
    if found is None or not found.worse:
        return ""
    kept = "all weights keep their merged values" if found.kept == "merged" else "it was written all the same"
    return (
        f"the calibrated model is worse than the merge on held-out samples ({found.measure} "
        f"{drift_text(found.merged)} -> {drift_text(found.calibrated)}, spread {drift_text(found.spread)}): {kept}; "
        "see that each task's data is its expert's kind, and try `settings: auto` or more samples"
    )


def _drift(report: Report) -> str:
    layers = [layer for layer in report.layers if _meaningful(layer.drift_before, layer.drift_after)]
    worse = [layer for layer in layers if layer.drift_after > max(WORSE * layer.drift_before, ROUNDING)]
    if not worse:
        return ""
    most, last = max(worse, key=lambda layer: layer.drift_after - layer.drift_before), layers[-1]
    end = f"{drift_text(last.drift_before)} -> {drift_text(last.drift_after)}"
    return (
        f"drift got worse in {len(worse)} of {len(report.layers)} layers (most: layer {most.index}, "
        f"{drift_text(most.drift_before)} -> {drift_text(most.drift_after)}), "
        f"{'and' if last is worse[-1] else 'but not'} after the last one ({end}); compare the result with the merge "
        "on data of your own, or take more samples or a larger ridge_lambda"
    )


def _undefined_drift(report: Report) -> str:
    bad = [layer for layer in report.layers if not _meaningful(layer.drift_before, layer.drift_after)]
    if not bad:
        return ""
    first = bad[0]
    return (
        f"drift means nothing in {len(bad)} of {len(report.layers)} layers (first: layer {first.index}, "
        f"{drift_text(first.drift_before)} -> {drift_text(first.drift_after)}): features of an expert are next to "
        "zero there; check the experts' weights"
    )


def _change(report: Report) -> str:
    groups = _groups(report)
    large = [(where, group) for where, group in groups if not group.change <= LARGE_CHANGE]
    if not large or report.better:  # held-out samples say that it is no noise
        return ""
    where, most = max(large, key=lambda each: each[1].change)
    return (
        f"weights changed by more than {LARGE_CHANGE:.0%} in {len(large)} of {len(groups)} groups (most: {where}, "
        f"{percent_text(most.change)}): at ridge_lambda {report.settings.ridge_lambda:g} they follow the samples "
        "rather than the merge; check the result on data of your own, or take a larger ridge_lambda or more samples"
    )


def _raised(report: Report) -> str:
    groups = _groups(report)
    raised = [(where, group) for where, group in groups if group.raised > 0]
    if not raised:
        return ""
    where, most = max(raised, key=lambda each: each[1].raised)
    return (
        f"the diagonal was raised in {len(raised)} of {len(groups)} groups (most: {where}, by {most.raised:.0e} of its "
        "mean), as the systems could not be solved without; take a larger ridge_lambda or more samples"
    )


def _rank(report: Report) -> str:
    groups = _groups(report)
    short = [(where, group) for where, group in groups if 0 < group.tokens < group.in_features]
    if not short:
        return ""
    where, least = min(short, key=lambda each: each[1].tokens / each[1].in_features)
    return (
        f"fewer tokens than input features in {len(short)} of {len(groups)} groups (least: {where}, "
        f"{least.tokens:,} for {least.in_features:,}): in most directions only the anchor says what weights become; "
        "take more or longer samples"
    )


def _few_tokens(report: Report) -> str:
    few = [f"{task} {count:,}" for task, count in report.tokens.items() if count < FEW_TOKENS]
    if not few:
        return ""
    return (
        f"tasks of very few tokens: {_listed(few)}; each weighs as much as one of thousands: add samples, or leave it "
        "out"
    )


def _calibrated(report: Report) -> str:
    if report.outcome is not None and report.outcome.kept == "merged":
        return ""  # which says more
    kept = Counter(report.kept.values())
    total = report.calibrated + kept.total()
    others = Counter({reason: count for reason, count in kept.items() if reason not in EXPECTED})
    if total == 0 or (report.calibrated and others.total() <= report.calibrated):
        return ""
    reasons = [f"{count:,} {reason}" for reason, count in (kept if not report.calibrated else others).most_common()]
    return (
        f"{report.calibrated:,} of {total:,} linear weights were calibrated; the rest keep their merged values: "
        f"{_listed(reasons)}; check include and exclude, and what plan lists"
    )


def _storage(report: Report) -> str:
    large = {task: error for task, error in report.storage_error.items() if not error <= LARGE_STORAGE_ERROR}
    if not large:
        return ""
    task = max(large, key=lambda each: large[each])
    return (
        f"expert_storage changed the weights of {len(large)} of {len(report.storage_error)} experts by more than "
        f"{LARGE_STORAGE_ERROR:.0%} (most: {task}, {percent_text(large[task])}), which may be more than what they "
        "learned; use host-int8, host or disk"
    )


def _meaningful(*drifts: float) -> bool:
    return all(drift < MEANINGLESS for drift in drifts)


def _groups(report: Report) -> list[tuple[str, GroupReport]]:
    """All groups, each with what to call it."""
    return [
        (f"layer {layer.index}, {_listed(group.modules)}", group) for layer in report.layers for group in layer.groups
    ]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + _more(names)


def _more(names: list[str]) -> str:
    return f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
