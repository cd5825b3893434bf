"""What the loop tells whoever is watching."""

from __future__ import annotations

from featcal_fast.reporting.report import LayerReport


class Progress:
    """Receives a run's events; this one ignores them. The command line has one that draws."""

    def warning(self, text: str) -> None:
        """Something that should be known before the first layer: a sentence, `text`, which the report holds too."""

    def scanned(self, model: str, done: int, total: int) -> None:
        """A tensor was read and is finite, of those that all are before the first layer, where that was asked for.

        Args:
            model: whose it is.
            done: bytes that were read, all models' together.
            total: bytes that will be.
        """

    def stage(self, layers: int, tokens: int) -> None:
        """The model, or its decoder after its encoder, begins.

        Args:
            layers: that are left, the decoder's counted.
            tokens: number of tokens in each of them, all tasks' together, student and expert counted once.
        """

    def task(self, layer: int, task: str) -> None:
        """A task's turn in a layer begins.

        Args:
            layer: the layer's index.
            task: its name.
        """

    def tokens(self, count: int) -> None:
        """So many more tokens of the layer are done: `count`."""

    def layer(self, report: LayerReport) -> None:
        """A layer is done; `report` says how it went."""

    def resumed(self, layers: int) -> None:
        """So many `layers` were done by runs before this one."""

    def interrupted(self, left: str) -> None:
        """A signal ends the run; `left` says what it leaves and what can be done with that, or is empty."""

    def close(self) -> None:
        """The run ended, well or badly."""
