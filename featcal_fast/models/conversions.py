"""What transformers makes of a checkpoint's tensors as it loads them, by its own mapping, whichever version it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from featcal_fast.checkpoints.renamed import Renamings

Operations = Sequence[Any]  # of transformers: Chunk, Concatenate, MergeModulelist, ...


@dataclass
class Conversion:
    """Tensors of a checkpoint that make up parameters of a model: experts stacked, a matrix split in two, ...

    Attributes:
        model: on the meta device, which some operations ask for shapes.
        converter: a `WeightConverter` of transformers.
        target: the model's name of the first parameter that they make.
        sources: the checkpoint's names by pattern of the converter, in order.
    """

    model: Any
    converter: Any
    target: str
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def tensors(self) -> list[str]:
        """All of the checkpoint's names."""
        return [own for names in self.sources.values() for own in names]

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's parameters by full name, of tensors by the checkpoint's names."""
        found = {pattern: [tensors[own] for own in names] for pattern, names in self.sources.items()}
        made = self._run(self.converter.operations, found, reverse=False)
        return {self._full(pattern): value for pattern, value in made.items()}

    def revert(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors, of all parameters that they make, by full name."""
        operations = [each.reverse_op for each in reversed(self.converter.operations)]
        found = {
            pattern: [parameters[full]]
            for pattern in self.converter.target_patterns
            if (full := self._full(pattern)) in parameters
        }
        made = self._run(operations, found, reverse=True)
        names = {
            pattern.replace("*", str(number)) if "*" in pattern else pattern: own
            for pattern, owns in self.sources.items()
            for number, own in enumerate(owns)
        }
        return {names[pattern]: value for pattern, value in made.items()}

    def _run(self, operations: Operations, found: dict[str, Any], *, reverse: bool) -> dict[str, Tensor]:
        patterns = [self.converter.source_patterns, self.converter.target_patterns]
        sources, targets = reversed(patterns) if reverse else patterns
        for operation in operations:
            found = operation.convert(
                found,
                source_patterns=sources,
                target_patterns=targets,
                full_layer_name=self.target,
                model=self.model,
                config=self.model.config,
                missing_keys=None,
            )
        return {pattern: value[0] if isinstance(value, list) else value for pattern, value in found.items()}

    def _full(self, pattern: str) -> str:
        """The model's name of one of the parameters."""
        return self.target.replace(self.converter.target_patterns[0], pattern, 1)

    def __str__(self) -> str:
        return " and ".join(type(each).__name__ for each in self.converter.operations)


def renamings_in(model: nn.Module) -> Renamings:
    """What transformers renames and converts as it loads a checkpoint into a model, and into the models in that.

    Args:
        model: on the meta device.
    """
    import transformers

    if not isinstance(model, transformers.PreTrainedModel):
        return Renamings([])
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # a private module: without it, names are taken as they are
        return Renamings([])
    mapping: Callable[..., list[Any]] = get_model_conversion_mapping
    return Renamings(mapping(model))
