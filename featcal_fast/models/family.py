"""What a family is: where its blocks are, how to tell it, which of its tokens count and how much."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class LastLayerWeights:
    """Token weights of the last block: the first token counts 1, the others `rest`, except for some modules.

    The published CLIP setting (official demo): only the CLS token is read out after the last block, so the others
    weigh 0.01, save for the keys and values that the CLS token attends to.

    Attributes:
        rest: weight of every token but the first.
        except_modules: name suffixes of the modules for which all tokens weigh 1.
    """

    rest: float
    except_modules: tuple[str, ...]

    def applies_to(self, module: str) -> bool:
        """Whether the weights are for the inputs of the module of this name."""
        return not module.endswith(self.except_modules)


def attention_mask(batch: Mapping[str, Tensor]) -> Tensor | None:
    """The tokens of `input_ids` that count, `[batch, tokens]`; None where all do."""
    return batch.get("attention_mask")


@dataclass(frozen=True)
class Stage:
    """A list of blocks through which one stream of hidden states runs; an encoder-decoder has two.

    Attributes:
        blocks: dotted paths, below the family's root, at which the list may sit; the first that exists counts.
        mask: which tokens of a batch count, `[batch, tokens]`, 0 where they do not; None where all do.
        memory: name suffixes of the modules that are given the previous stage's final output, and so its tokens.
    """

    blocks: tuple[str, ...]
    mask: Callable[[Mapping[str, Tensor]], Tensor | None] = attention_mask
    memory: tuple[str, ...] = ()

    def reads_memory(self, module: str) -> bool:
        """Whether the module of this name is given the previous stage's final output."""
        return bool(self.memory) and module.endswith(self.memory)

    def path(self, root: nn.Module) -> str | None:
        """The dotted path of the block list below `root`, or None."""
        for path in self.blocks:
            module = find_attribute(root, path)
            if isinstance(module, nn.ModuleList) and len(module):
                return path
        return None


@dataclass(frozen=True)
class Family:
    """One architecture family, as data.

    Attributes:
        name: what reports and errors call it.
        models: well-known members, for the table of families.
        roots: dotted paths at which the transformer may sit in a model; "" is the model itself.
        marks: what must sit below the root, besides the blocks.
        stages: lists of blocks, in forward order.
        calls_root: the root is called, not the whole model (which needs inputs for more than the root).
        forward_kwargs: passed to the forward besides the batch.
        needs: keys of which every batch must have one, and why; or None.
        relays: how many more values a block returns besides hidden states, of which those of the first block of a
            stage are handed to the ones after it (T5's position biases).
        last_layer: token weights of the last block, or None.
        keeps: name suffixes of weights inside of blocks that keep their merged values, with the reason.
        outside: prefixes of modules outside of blocks, with the reason that they keep their merged values.
        note: for the table, what is particular to the family.
    """

    name: str
    models: str
    roots: tuple[str, ...]
    marks: tuple[str, ...]
    stages: tuple[Stage, ...]
    calls_root: bool = False
    forward_kwargs: dict[str, Any] = field(default_factory=dict)
    needs: tuple[tuple[str, ...], str] | None = None
    relays: int = 0
    last_layer: LastLayerWeights | None = None
    keeps: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def root(self, model: nn.Module) -> str | None:
        """Where the family's transformer sits in `model`; None if it is not of this family."""
        for path in self.roots:
            root = find_attribute(model, path) if path else model
            if (
                isinstance(root, nn.Module)
                and all(stage.path(root) is not None for stage in self.stages)
                and all(find_attribute(root, mark) is not None for mark in self.marks)
            ):
                return path
        return None

    def reason_to_keep(self, weight: str) -> str | None:
        """Why the weight of this name inside a block keeps its merged value, or None."""
        return next((reason for suffix, reason in self.keeps.items() if weight.endswith(suffix)), None)


def find_attribute(model: nn.Module, path: str) -> object | None:
    """What is at dotted `path` of `model`, a module or a parameter; or None."""
    found: object | None = model
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    return found
