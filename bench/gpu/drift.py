"""What was timed first, timed again at the end: how far the machine's clocks and neighbours moved in between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.gpu import layer
from bench.gpu.sections import Row, Section
from bench.gpu.timing import Run, measure_peak
from bench.harness.results import Results, Rows
from bench.harness.tables import table


def rows(run: Run, results: Results) -> Iterator[Row]:
    yield Row("product", lambda left: _ratio(run.peak, measure_peak(run)), 5.0, again=True)
    before = results.of("layer").get(layer.ENGINE)
    if before is not None:

        def again(left: float) -> dict[str, Any]:
            now = layer.engine(layer.Workload(run), run)
            return _ratio(1e3 / layer.total(before), 1e3 / layer.total(now))

        yield Row("layer", again, 8.0, 12 * 2**30 * (not run.dry), again=True)


def _ratio(first: float, last: float) -> dict[str, Any]:
    """Of two rates: above 1, the machine became faster."""
    return {"first": first, "last": last, "ratio": last / first}


def show(rows: Rows, run: Run, results: Results) -> str:
    title = "The first measurements again (TFLOP/s of a product, layers a second)"
    return table(title, [{"what": name, **row} for name, row in rows.items()])


DRIFT = Section("drift", 0.03, rows, show)
