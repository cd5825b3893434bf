"""Families of models as data: where their blocks are; adding one is adding a `Family` here."""

from __future__ import annotations

from torch import nn

from featcal_fast.errors import UnsupportedModelError
from featcal_fast.models.clip import CLIP_VISION
from featcal_fast.models.decoder import DECODER, GPT2
from featcal_fast.models.encoder import BERT, VIT
from featcal_fast.models.family import Family
from featcal_fast.models.linear import is_linear
from featcal_fast.models.structure import Layer, Structure
from featcal_fast.models.t5 import T5

__all__ = ["FAMILIES", "Family", "Layer", "Structure", "families_table", "find_structure", "not_supported"]

FAMILIES: tuple[Family, ...] = (CLIP_VISION, DECODER, GPT2, T5, VIT, BERT)


def find_structure(model: nn.Module, label: str) -> Structure:
    """The family of `model`, and where its blocks are.

    Args:
        model: parameters may be on the meta device.
        label: what to call the model in an error.

    Raises:
        UnsupportedModelError: no family fits, or a block holds weight matrices that nobody knows how to calibrate.
    """
    for family in FAMILIES:
        root = family.root(model)
        if root is not None:
            structure = Structure(model, family, root)
            _check_blocks(structure, label)
            return structure
    raise not_supported(model, label, "its modules are not those of any")


def not_supported(model: nn.Module | type, label: str, reason: str) -> UnsupportedModelError:
    """An error that names an architecture, and those that can be calibrated.

    Args:
        model: of that architecture.
        label: what to call the model.
        reason: why it is none of those.
    """
    name = (model if isinstance(model, type) else type(model)).__name__
    known = ", ".join(family.name for family in FAMILIES)
    return UnsupportedModelError(
        f"{label}: found a {name}, expected one of the families that can be calibrated: {known}; it is not supported: "
        f"{reason}"
    )


def families_table() -> str:
    """The families as a Markdown table, for `docs/families.md`."""
    rows = [(family.name, family.models, family.note) for family in FAMILIES]
    lines = [f"| {' | '.join(row)} |" for row in (("Family", "Models", "Notes"), ("---",) * 3, *rows)]
    return "\n".join(lines) + "\n"


def _check_blocks(structure: Structure, label: str) -> None:
    """Refuse a model that would be calibrated in part only, save for what its family says it keeps."""
    for layer, block in zip(structure.layers, structure.blocks, strict=True):
        for name, parameter in block.named_parameters():
            owner = block.get_submodule(name.rpartition(".")[0])
            known = is_linear(owner) or isinstance(owner, nn.Embedding) or structure.family.reason_to_keep(name)
            if parameter.ndim >= 2 and not known:
                raise not_supported(
                    structure.model,
                    label,
                    f"{layer.path}.{name} is a weight of shape {tuple(parameter.shape)} in a {type(owner).__name__}, "
                    "and only linear weights can be calibrated (no quantised or fused matrices, no mixture of experts "
                    "of an unknown kind)",
                )
