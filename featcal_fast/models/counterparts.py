"""What the tensors of one checkpoint are called in another one of the same model."""

from __future__ import annotations

from collections.abc import Mapping

from featcal_fast.checkpoints import TensorSource, canonical
from featcal_fast.errors import UnsupportedModelError
from featcal_fast.models.meta import stored_names


def counterparts(ours: TensorSource, theirs: TensorSource) -> dict[str, str]:
    """For each tensor of a checkpoint, that is floating point, the other one's name of it; less what that has not.

    Layouts may differ in names, and in which of several names a tied weight is stored under.

    Raises:
        UnsupportedModelError: a parameter is one tensor in one of them, and several, or a part of one, in the other.
    """
    found = {name: theirs.names[known] for name in ours.tensors if (known := canonical(name)) in theirs.names}
    lacking = [name for name, info in ours.tensors.items() if name not in found and info.dtype.is_floating_point]
    if not lacking:
        return found
    try:
        own, other = stored_names(ours), stored_names(theirs)
    except UnsupportedModelError:  # of no model that can be built: nothing tells more of their names
        return found
    for name in lacking:
        there = [parameter for parameter in own.parameters(name) if parameter in other]
        if there and own.whole(there[0]) and other.whole(there[0]):
            found[name] = other.tensors(there[0])[0]
        elif there:
            raise UnsupportedModelError(
                f"{theirs.label}: {theirs.path} holds {other[there[0]]} where the {ours.label} ({ours.path}) has "
                f"{name}: layouts that differ in more than names cannot be merged; load one of them with transformers, "
                "and save it again (from_pretrained, save_pretrained)"
            )
    return found


def without_counterpart(ours: TensorSource, theirs: TensorSource, found: Mapping[str, str]) -> list[str]:
    """What a model of our class has and ours has not: weights of layers beyond ours, or of an output layer of its own.

    Args:
        ours: the checkpoint that another one is to be as.
        theirs: the other one; of another class it may well have another head.
        found: `counterparts` of the two.
    """
    known = set(found.values())
    others = [name for name, info in theirs.tensors.items() if info.dtype.is_floating_point and name not in known]
    if not others or getattr(ours.config, "architectures", None) != getattr(theirs.config, "architectures", None):
        return []
    try:
        stored = stored_names(theirs)
    except UnsupportedModelError:
        return others
    same = {parameter for name in known for own in stored.parameters(name) for parameter in stored.shared_by(own)}
    return [name for name in others if (own := stored.parameters(name)) and same.isdisjoint(own)]
