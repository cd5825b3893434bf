"""Errors a user can act on: each message names the culprit, what was found, what was expected, what to do."""


class FeatCalError(Exception):
    """Base class of every error that featcal_fast raises on purpose."""


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


class MemoryBudgetError(FeatCalError):
    """The job needs more memory than there is, or than it was allowed."""
