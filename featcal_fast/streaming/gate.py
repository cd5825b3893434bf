"""The gate: what a layer makes of held-out samples, calibrated against merged; what got worse keeps its merged weights.

Before that, of several updates, the one that is best by the same measure. All are given the same hidden states, those
of the calibrated layers before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from featcal_fast.layer.layout import Layout
from featcal_fast.layer.solve import Update, load_update, relative_changes
from featcal_fast.models.structure import Layer
from featcal_fast.reporting.report import AlphaReport, GateReport
from featcal_fast.streaming.paired import mean, paired
from featcal_fast.streaming.streams import Streams


class Loaded(NamedTuple):
    """The update that a layer has now.

    Attributes:
        update: that was best.
        changes: by group, `relative_changes`.
        alpha: what it was chosen by, if there was a choice.
        distances: every held-out sample's with it, by task, if there was a choice.
    """

    update: Update
    changes: list[Tensor]
    alpha: AlphaReport | None = None
    distances: list[list[float]] | None = None


def load_best(
    streams: Streams, layer: Layer, layout: Layout, block: nn.Module, updates: Mapping[float, Update]
) -> Loaded:
    """Load the update that is best on held-out samples into a layer.

    Args:
        streams: of the run.
        layer: that was solved.
        layout: of its block.
        block: with merged weights.
        updates: by teacher_alpha; a single one is loaded as it is.
    """
    changes = {alpha: relative_changes(layout, update, block) for alpha, update in updates.items()}
    if len(updates) == 1:
        ((alpha, update),) = updates.items()
        load_update(block, update)
        return Loaded(update, changes[alpha])
    tried, curve = {}, {}
    for alpha, update in updates.items():
        load_update(block, update)
        tried[alpha] = _read(streams, layer, block)
        curve[alpha] = mean(tried[alpha])
    # Numbers that are not finite are somebody else's to tell of.
    best = min(curve, key=lambda alpha: curve[alpha] if math.isfinite(curve[alpha]) else math.inf)
    load_update(block, updates[best])
    told = AlphaReport(best, {f"{alpha:g}": math.sqrt(value) for alpha, value in curve.items()})
    return Loaded(updates[best], changes[best], told, tried[best])


class Gate:
    """Judges one layer; made while its block still has the merged weights.

    Args:
        streams: of the run.
        layer: that was solved.
        layout: of its block.
        block: with merged weights.
    """

    def __init__(self, streams: Streams, layer: Layer, layout: Layout, block: nn.Module) -> None:
        self._streams, self._layer, self._layout, self._block = streams, layer, layout, block
        self._merged = _read(streams, layer, block)

    def keep_better(self, loaded: Loaded) -> GateReport:
        """Take merged weights back, of groups and norms as far as that helps or else of all, if the layer got worse.

        Args:
            loaded: into the block; of its update, what is taken back is no longer there.
        """
        update, distances = loaded.update, loaded.distances
        found = paired(self._merged, self._tried() if distances is None else distances)
        report = GateReport(math.sqrt(found.first), math.sqrt(found.second), found.spread)
        if not found.second > found.first:  # nor of numbers that are not finite: that is somebody else's to say
            return report
        kept: list[str] = []
        original = dict(self._streams.merged_block(self._layer).named_parameters())
        best = found.second
        for modules in self._parts():
            names = [name for name in update.parameters if name.rpartition(".")[0] in modules]
            new = self._exchange(names, original)
            tried = mean(self._tried())
            if tried < best:
                best = tried
                kept += modules
            else:
                self._exchange(names, new)
        if best > found.first:
            own = dict(self._block.named_parameters())
            for name in update.parameters:
                own[name].copy_(original[name])
            kept = [module for modules in self._parts() for module in modules]
        for name in [name for name in update.parameters if name.rpartition(".")[0] in kept]:
            del update.parameters[name]
        report.kept = kept
        return report

    def _parts(self) -> list[tuple[str, ...]]:
        return [group.modules for group in self._layout.groups] + [(name,) for name in self._layout.norms]

    def _tried(self) -> list[list[float]]:
        return _read(self._streams, self._layer, self._block)

    def _exchange(self, names: Iterable[str], values: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Give the block's parameters other values; those that they had."""
        own, before = dict(self._block.named_parameters()), {}
        for name in names:
            before[name] = nn.Parameter(own[name].clone(), requires_grad=False)
            own[name].copy_(values[name])
        return before


def _read(streams: Streams, layer: Layer, block: nn.Module) -> list[list[float]]:
    """Every held-out sample's distance with a block, by task, of all ranks; read from the device in one go."""
    own = streams.drift.trial(layer, block)
    sizes = [len(each.samples) for each in own.values()]
    read = torch.cat([each.samples for each in own.values()]).cpu().split(sizes) if own else ()
    every = streams.world.merge({task: part.tolist() for task, part in zip(own, read, strict=True)})
    return [every[task] for task in streams.tasks if task in every]
