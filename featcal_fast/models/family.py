"""What a family is: where its blocks are, how to tell it, which of its tokens weigh less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LastLayerWeights:
    """Token weights of the last block: the first token counts 1, the others `rest`, except for some modules.

    The published CLIP setting (official demo): only the CLS token is read out after the last block, so the others
    weigh 0.01, save for the keys and values that the CLS token attends to.
    """

    rest: float
    except_modules: tuple[str, ...]  # name suffixes

    def applies_to(self, module: str) -> bool:
        return not module.endswith(self.except_modules)


@dataclass(frozen=True)
class Family:
    """One architecture family, as data.

    Attributes:
        name: what reports and errors call it.
        blocks: dotted paths at which the list of blocks may sit; the first that exists counts.
        matches: tells from the module tree whether a model is of this family.
        forward_kwargs: passed to the model's forward besides the batch.
        last_layer: token weights of the last block, or None.
    """

    name: str
    blocks: tuple[str, ...]
    matches: Callable[[nn.Module], bool]
    forward_kwargs: dict[str, Any] = field(default_factory=dict)
    last_layer: LastLayerWeights | None = None

    def block_path(self, model: nn.Module) -> str | None:
        """The dotted path of the block list in `model`, or None."""
        for path in self.blocks:
            module = submodule(model, path)
            if isinstance(module, nn.ModuleList) and len(module):
                return path
        return None


def submodule(model: nn.Module, path: str) -> nn.Module | None:
    """What sits at dotted `path` of `model` (a module or a parameter), or None."""
    found: Any = model
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    return found
