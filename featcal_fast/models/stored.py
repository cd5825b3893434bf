"""What a model's parameters are called in a checkpoint: some are renamed, made of several tensors, or shared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from featcal_fast.checkpoints import TensorSource, canonical
from featcal_fast.checkpoints.renamed import in_order
from featcal_fast.errors import CheckpointError, told
from featcal_fast.models.conversions import Conversion, renamings_in


class StoredNames:
    """Which tensors of a checkpoint make up each parameter of a model, by the parameter's canonical name.

    Args:
        model: on the meta device, with its parameters tied as its config says.
        checkpoint: whose config describes the model.

    Attributes:
        unknown: tensors of no parameter, with what their names may mean.

    Raises:
        CheckpointError: two tensors are the same parameter.
    """

    def __init__(self, model: nn.Module, checkpoint: TensorSource) -> None:
        self._model, self._checkpoint = model, checkpoint
        self._renamings = renamings_in(model)
        names = list(model.state_dict())
        self._full = {canonical(name): name for name in names}
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._inner = {canonical(name.removeprefix(self._prefix)): canonical(name) for name in names}
        self._whole: dict[str, str] = {}
        self._made: dict[str, Conversion] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}  # of what is made
        self._broken: dict[str, str] = {}  # why a parameter's tensors cannot be made into it
        self._shared: dict[str, str] = {}  # of parameters that are tied and not there: which is
        self.unknown: dict[str, list[str]] = {}
        self._find()
        self._tied = {canonical(name): group for group in tied(model) for name in group}
        for name, group in self._tied.items():
            there = [own for own in map(canonical, group) if self.has_own(own)]
            if there and name not in there:
                self._shared[name] = there[0]

    def __contains__(self, parameter: str) -> bool:
        return self.has_own(self.resolved(parameter))

    def __getitem__(self, parameter: str) -> str:
        """The tensor that is this parameter, or one of those that make it up."""
        return self.tensors(parameter)[0]

    def has_own(self, parameter: str) -> bool:
        """Whether it is stored under its own name, not only under that of one that it shares its values with."""
        return parameter in self._whole or parameter in self._made

    def resolved(self, parameter: str) -> str:
        """The parameter itself, or the one that it is tied to and that is stored."""
        return self._shared.get(parameter, parameter)

    def shared_by(self, parameter: str) -> list[str]:
        """All parameters that its config says are the same one, whatever is stored; none where it is by itself."""
        return [canonical(name) for name in self._tied.get(parameter, ())]

    def whole(self, parameter: str) -> bool:
        """Whether it is one tensor, and that tensor nothing else."""
        return self.resolved(parameter) in self._whole

    def tensors(self, parameter: str) -> list[str]:
        """All tensors that make up a parameter."""
        name = self.resolved(parameter)
        return [self._whole[name]] if name in self._whole else self._made[name].tensors

    def shape(self, parameter: str) -> tuple[int, ...]:
        """The shape that the parameter has by its tensors' shapes."""
        name = self.resolved(parameter)
        return self._checkpoint.tensors[self._whole[name]].shape if name in self._whole else self._shapes[name]

    def assemble(self, parameter: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The parameter, from tensors by their own names."""
        name = self.resolved(parameter)
        if name in self._whole:
            return tensors[self._whole[name]]
        return self._made[name].convert(tensors)[self._full[name]]

    def beside(self, parameters: Iterable[str]) -> list[str]:
        """What else is in the tensors that make up these parameters: other parameters."""
        given = set(parameters)
        found = {
            canonical(name)
            for conversion in self._conversions_of(given)
            for name, made in self._made.items()
            if made is conversion
        }
        return sorted(found - given)

    def disassemble(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by their own names, from parameters; with `beside` them, where a tensor is made of several."""
        found = {self._whole[name]: value for name, value in parameters.items() if name in self._whole}
        full = {self._full[name]: value for name, value in parameters.items()}
        for conversion in self._conversions_of(parameters):
            found |= conversion.revert(full)
        return found

    def parameters(self, own: str) -> list[str]:
        """The parameters that a tensor is, or has a part of."""
        whole = [name for name, each in self._whole.items() if each == own]
        return whole + [name for name, made in self._made.items() if own in made.tensors]

    def why_missing(self, parameter: str) -> str:
        """What is the matter with a parameter that is not there, or has no shape."""
        name, cls = self._full.get(parameter, parameter), type(self._model).__name__
        if parameter in self._broken:
            return f"tensor {name}: {self._broken[parameter]}"
        others = [each for each in self._tied.get(parameter, ()) if each != name]
        reason = "; the download is incomplete, or config.json is another model's"
        if others:
            reason = f" under this name and others that a {cls} has for it ({', '.join(others)}){reason}"
        elif name in (getattr(self._model, "_tied_weights_keys", None) or ()):
            reason = f"; config.json does not say tie_word_embeddings, by which a {cls} would share it{reason}"
        elif self._is_of_head(name):
            reason = (
                f", which is of the head of a {cls} and would begin with random values; the download is incomplete, or "
                "config.json names other architectures than the weights are of"
            )
        return f"tensor {name} is missing from the checkpoint{reason}"

    def _is_of_head(self, name: str) -> bool:
        prefix = getattr(self._model, "base_model_prefix", "")
        return bool(prefix) and hasattr(self._model, prefix) and not name.startswith(f"{prefix}.")

    def _conversions_of(self, parameters: Iterable[str]) -> list[Conversion]:
        made = [self._made[name] for name in parameters if name in self._made]
        return list({id(each): each for each in made}.values())

    def _find(self) -> None:
        parts: dict[str, Conversion] = {}
        for own in sorted(self._checkpoint.names.values(), key=in_order):
            renamed, match = self._renamings.apply(own)
            parameter = self._known(renamed)
            if parameter is None:  # it was not that model's, then
                parameter, match = self._known(own), None
            if parameter is None:
                self.unknown[own] = [canonical(own), canonical(renamed)]
            elif match is None:
                self._check_single(parameter, [own])
                self._whole[parameter] = own
            else:
                converter, pattern = match
                new = Conversion(self._model, converter, self._full[parameter])
                parts.setdefault(parameter, new).sources.setdefault(pattern, []).append(own)
        forms: dict[tuple[int, ...], Tensor] = {}
        for parameter, conversion in parts.items():
            self._make(parameter, conversion, forms)

    def _make(self, parameter: str, conversion: Conversion, forms: dict[tuple[int, ...], Tensor]) -> None:
        """What comes of a conversion: found by doing it, without values."""
        shapes = {own: self._checkpoint.tensors[own].shape for own in conversion.tensors}
        for shape in shapes.values():
            if shape not in forms:
                forms[shape] = torch.empty(shape, device="meta")
        try:
            made = conversion.convert({own: forms[shape] for own, shape in shapes.items()})
        except Exception as error:  # whatever its operations make of what they were not made for
            self._broken[parameter] = (
                f"found {len(shapes)} tensors for it ({min(shapes)} among them), of which {conversion} make none, "
                f"expected {tuple(self._model.state_dict()[self._full[parameter]].shape)}; some are missing, or this "
                f"layout is not supported ({told(error)})"
            )
            return
        for full, value in made.items():
            name = canonical(full)
            if name in self._full:
                self._check_single(name, conversion.tensors)
                self._made[name], self._shapes[name] = conversion, tuple(value.shape)

    def _known(self, name: str) -> str | None:
        """The parameter of this name, with or without what comes before the names of a model without a head."""
        for each in (canonical(name), canonical(name.removeprefix(self._prefix))):
            if each in self._full or each in self._inner:
                return each if each in self._full else self._inner[each]
        return None

    def _check_single(self, parameter: str, owns: list[str]) -> None:
        if self.has_own(parameter):
            raise CheckpointError(
                f"{self._checkpoint.label}: {self._checkpoint.path} holds tensors {self[parameter]} and {owns[0]}, "
                f"which are both {self._full[parameter]} of a model; nobody can tell which of them counts"
            )


def tied(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several; first those that transformers ties the others to, in its order."""
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    order = {name: place for place, name in enumerate(getattr(model, "all_tied_weights_keys", None) or ())}
    return [sorted(names, key=lambda name: order.get(name, -1)) for names in shared.values() if len(names) > 1]
