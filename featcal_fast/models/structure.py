"""Where everything is in one model of a family."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from featcal_fast.models.family import Family, LastLayerWeights
from featcal_fast.models.linear import is_linear


@dataclass(frozen=True)
class Layer:
    """One block of a model.

    Attributes:
        index: its number, in forward order, over all stages.
        number: its number within its stage.
        path: its full name in the model, `model.layers.3`.
        family: the model's.
        stage: the stage's number.
        last: whether it is the last one of its stage.
    """

    index: int
    number: int
    path: str
    family: Family
    stage: int
    last: bool

    @property
    def token_weights(self) -> LastLayerWeights | None:
        """What tokens weigh in it; None where all weigh the same."""
        return self.family.last_layer if self.last else None

    def reads_memory(self, module: str) -> bool:
        """Whether `module` is given the previous stage's final output."""
        return self.family.stages[self.stage].reads_memory(module)


class Structure:
    """A model, its family, and the blocks in it.

    Args:
        model: parameters may be on the meta device.
        family: that it is of.
        root: where, as `family.root` found it.

    Attributes:
        config: of transformers, of the part that has the blocks; None where a model in memory has none.
        paths: of the lists of blocks, one a stage.
        outside: linear modules that belong to no block, with the reason that they keep their merged values.
    """

    def __init__(self, model: nn.Module, family: Family, root: str) -> None:
        self.model, self.family = model, family
        node = model.get_submodule(root)
        self.entry = node if family.calls_root else model
        config = getattr(node, "config", None)
        self.config: Any = config if hasattr(config, "to_dict") else None
        prefix = f"{root}." if root else ""
        self.paths = [f"{prefix}{stage.path(node)}" for stage in family.stages]
        self.outside = self._outside()  # now: a head may no longer be tied once parameters were loaded

    @cached_property
    def layers(self) -> list[Layer]:
        """All blocks, in forward order."""
        layers: list[Layer] = []
        for stage, path in enumerate(self.paths):
            count = len(self.stage(stage))
            layers += [
                Layer(len(layers) + number, number, f"{path}.{number}", self.family, stage, number == count - 1)
                for number in range(count)
            ]
        return layers

    def stage(self, stage: int) -> nn.ModuleList:
        """The blocks of a stage."""
        blocks = self.model.get_submodule(self.paths[stage])
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in forward order."""
        return [self.model.get_submodule(layer.path) for layer in self.layers]

    def inside(self, name: str) -> bool:
        """Whether a module or parameter of this name belongs to a block."""
        return name.startswith(tuple(f"{path}." for path in self.paths))

    def _outside(self) -> dict[str, str]:
        embeddings = {id(module.weight) for module in self.model.modules() if isinstance(module, nn.Embedding)}
        kept = {}
        for name, module in self.model.named_modules():
            if is_linear(module) and not self.inside(name) and id(module.weight) not in embeddings:
                reasons = (reason for prefix, reason in self.family.outside.items() if name.startswith(prefix))
                kept[name] = next(reasons, "outside of the layers")
        return kept
