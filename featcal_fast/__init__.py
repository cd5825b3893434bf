"""featcal_fast: repair merged models by FeatCal feature calibration (arXiv 2605.13030), streamed layer by layer.

`calibrate.py` is the loop, `reference.py` the specification that it is held to; CONTRIBUTING.md shows the rooms below.
"""

from featcal_fast import reference
from featcal_fast.calibrate import calibrate_model
from featcal_fast.errors import FeatCalError
from featcal_fast.inputs.merge_recipe import MergeRecipe
from featcal_fast.inputs.mergekit import from_mergekit
from featcal_fast.inputs.recipe import ExpertRecipe, Recipe
from featcal_fast.job.check import Check, check
from featcal_fast.job.delta import Delta, delta
from featcal_fast.job.drift import drift
from featcal_fast.job.run import calibrate, merge
from featcal_fast.planning.plan import Plan
from featcal_fast.planning.planner import plan
from featcal_fast.reporting.drift_report import DriftReport
from featcal_fast.reporting.report import Report
from featcal_fast.settings import PRESETS, Settings
from featcal_fast.version import __version__

__all__ = [
    "PRESETS",
    "Check",
    "Delta",
    "DriftReport",
    "ExpertRecipe",
    "FeatCalError",
    "MergeRecipe",
    "Plan",
    "Recipe",
    "Report",
    "Settings",
    "__version__",
    "calibrate",
    "calibrate_model",
    "check",
    "delta",
    "drift",
    "from_mergekit",
    "merge",
    "plan",
    "reference",
]
