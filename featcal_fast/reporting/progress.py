"""What the loop tells whoever is watching."""

from __future__ import annotations

from featcal_fast.reporting.report import LayerReport


class Progress:
    """Receives a run's events; this one ignores them. The command line has one that draws."""

    def stage(self, layers: int, tokens: int) -> None:
        """The model, or its decoder after its encoder, begins: so many layers are left, so many tokens in each.

        Tokens are all tasks', student and expert counted once.
        """

    def task(self, layer: int, task: str) -> None:
        """A task's turn in a layer begins."""

    def tokens(self, count: int) -> None:
        """So many more tokens of the layer are done."""

    def layer(self, report: LayerReport) -> None:
        """A layer is done."""

    def close(self) -> None:
        """The run ended, well or badly."""
