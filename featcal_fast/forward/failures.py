"""What a model's own code raises, told as an error that says whose it is and what was being done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import featcal_kernels
import torch

from featcal_fast.errors import FeatCalError, UnsupportedModelError, told

OURS = tuple(f"{folder}/" for folder in (Path(__file__).parents[1], Path(featcal_kernels.__file__).parent))
MODES = ("__torch_function__", "__torch_dispatch__")  # a plan's meter, which hands on what the model's code calls


class Passing(Exception):
    """Raised by a hook of ours to end a model's forward where no more of it is needed."""


class Refused(UnsupportedModelError):
    """A model was seen to do what cannot be calibrated; `ModelCode` adds which one it is."""


class ModelCode:
    """Within the context a model's own code runs, and nothing else.

    What it raises becomes a `FeatCalError`, its cause. All else passes as it is: memory that ran out, an interrupt, and
    whatever our own hooks raise in the middle of a model's forward, on purpose or by mistake.

    Args:
        kind: of the error. Entering a stage it is `DataError`: other samples may pass. In a layer it is
            `UnsupportedModelError`: what enters is what the model itself made.
        doing: tells whose code it is, and what for.
    """

    def __init__(self, kind: type[FeatCalError], doing: Callable[[], str]) -> None:
        self._kind, self._doing = kind, doing

    def __enter__(self) -> None: ...

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Passing):
            return
        if isinstance(error, Refused):
            raise self._kind(f"{self._doing()}: {error}") from None
        if not isinstance(error, Exception) or isinstance(error, (FeatCalError, torch.OutOfMemoryError)):
            return
        if not _in_our_code(traceback):
            raise self._kind(f"{self._doing()}: {told(error)}") from error


def _in_our_code(traceback: TracebackType | None) -> bool:
    """Whether the model had called us back: a frame of ours comes after the one that the context is in."""
    step = traceback and traceback.tb_next
    while step is not None:
        code = step.tb_frame.f_code
        if code.co_filename.startswith(OURS) and code.co_name not in MODES:
            return True
        step = step.tb_next
    return False
