"""The drift of every layer, before and after, as a picture for a card."""

from __future__ import annotations

import math
from collections.abc import Sequence

from featcal_fast.reporting.charts import drift_panel
from featcal_fast.reporting.report import LayerReport
from featcal_fast.reporting.svg import panel_svg


def drift_svg(layers: Sequence[LayerReport]) -> str:
    """Each layer's distance to the experts.

    Args:
        layers: of a report, at least one.

    Returns:
        A document in SVG; empty where a drift is not finite, of which there is no picture.
    """
    before, after = ([layer.drift_before for layer in layers], [layer.drift_after for layer in layers])
    if not all(map(math.isfinite, before + after)):
        return ""
    return panel_svg(drift_panel([layer.index for layer in layers], before, after), alone=True, hover=False)
