"""Errors a user can act on: each message names the culprit, what was found, what was expected, what to do."""

from __future__ import annotations

import reprlib
import unicodedata
from textwrap import shorten

LONGEST = 4000  # characters of a message
REPEATED = 400  # characters of another's that are repeated in it


class FeatCalError(Exception):
    """Base class of every error that featcal_fast raises on purpose.

    Args:
        message: may hold names and values of a stranger's: what would act on a terminal, begin a line, or cannot be
            written at all, is shown by its number, and no more than 4,000 characters of it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class RecipeError(FeatCalError):
    """The recipe does not describe a job: an unknown key, a missing field, a value out of range."""


class CheckpointError(FeatCalError):
    """A model folder cannot be read: missing, truncated, unsafe, incomplete or not finite."""


class ModelMismatchError(FeatCalError):
    """Two models that must have the same architecture do not."""


class UnsupportedModelError(FeatCalError):
    """The architecture is not one that can be calibrated completely."""


class DataError(FeatCalError):
    """Calibration data is missing, empty or does not fit the model."""


class OutputError(FeatCalError):
    """The output folder cannot be written: it holds something, or the disk is full."""


class ResumeError(FeatCalError):
    """What an interrupted run left cannot be gone on with, or nobody said what to do with it."""


class SolveError(FeatCalError):
    """A ridge system could not be solved, or its statistics are not finite."""


class DeviceError(FeatCalError):
    """The device asked for is not there, or not one to compute on."""


class RankError(FeatCalError):
    """Another process of the same job has failed, or does not have the same job."""


class MemoryBudgetError(FeatCalError):
    """The job needs more memory than there is, or than it was allowed."""


_shorter = reprlib.Repr()
_shorter.maxlevel, _shorter.maxstring, _shorter.maxother, _shorter.maxlong = 3, 80, 80, 40


def shown(value: object) -> str:
    """A value for a message, as `repr` has it, but never long: texts, lists and numbers are cut in the middle."""
    try:
        return _shorter.repr(value)
    except ValueError:  # Python refuses to write out an integer of 5,000 digits
        return f"<{type(value).__name__} of too many digits to show>"


def named(value: object) -> str:
    """A name for a message, as it is; one that is long, cannot be shown or is no text, as `shown` has it."""
    return value if isinstance(value, str) and len(value) <= 200 and value.isprintable() else shown(value)


def told(error: BaseException) -> str:
    """What a library raised: its type and text, in one line that is not too long."""
    text = shorten(str(error), REPEATED, placeholder=" ...")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def printable(text: str) -> str:
    """A text without control characters, marks that turn its direction, and halves of characters."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        each.encode("unicode_escape").decode() if each != "\n" and unicodedata.category(each) in _HIDDEN else each
        for each in text
    )


def one_line(text: str) -> str:
    """A printable text without line feeds: a name in it may be a stranger's."""
    return printable(text).replace("\n", "\\n")


_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
