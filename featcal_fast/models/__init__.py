"""The families that can be calibrated; adding one is adding a `Family` here."""

from __future__ import annotations

from torch import nn

from featcal_fast.errors import UnsupportedModelError
from featcal_fast.models.clip import CLIP_VISION
from featcal_fast.models.decoder import DECODER
from featcal_fast.models.family import Family

FAMILIES: tuple[Family, ...] = (CLIP_VISION, DECODER)


def find_family(model: nn.Module, label: str) -> tuple[Family, str]:
    """The family of `model` and the path of its blocks.

    Args:
        model: parameters may be on the meta device.
        label: what to call the model in an error.

    Raises:
        UnsupportedModelError: no family fits, or a block holds weight matrices outside of `nn.Linear`.
    """
    for family in FAMILIES:
        path = family.block_path(model)
        if path is not None and family.matches(model):
            _check_blocks(model.get_submodule(path), path, label)
            return family, path
    known = ", ".join(family.name for family in FAMILIES)
    raise UnsupportedModelError(
        f"{label}: found a {type(model).__name__}, expected one of the families that can be calibrated: {known}"
    )


def _check_blocks(blocks: nn.Module, path: str, label: str) -> None:
    """Refuse a model that would be calibrated in part only."""
    for name, parameter in blocks.named_parameters():
        owner = blocks.get_submodule(name.rpartition(".")[0])
        if parameter.ndim >= 2 and type(owner) is not nn.Linear:
            raise UnsupportedModelError(
                f"{label}: {path}.{name} is a weight of shape {tuple(parameter.shape)} in a "
                f"{type(owner).__name__}; only "
                "nn.Linear weights can be calibrated (no mixture of experts, no quantised or fused matrices)"
            )
