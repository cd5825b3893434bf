"""`bench.helps`: what it makes of its rows."""

from __future__ import annotations

import pytest

from bench import helps

NEAR = {"distance": 1e-7, "captured": 0.9, "drift": [1e-7, 1e-7], "merged": 1.0, "calibrated": 1.0, "experts": 1.0}


def row(captured: float, drift: float, score: float) -> helps.Row:
    """Of a merge that is 1 away from experts whose measure is 1; its own is 0."""
    said = {"captured": captured, "captured where fitted": captured, "in the middle": captured, "distance": drift}
    return {**said, "drift": [1.0, drift], "merged": 0.0, "calibrated": score, "experts": 1.0}


def test_rank_correlation() -> None:
    assert helps.rank_correlation([1, 2, 3, 4], [10, 20, 30, 45]) == 1
    assert helps.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert helps.rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)


def test_merges_that_are_their_experts_do_not_count() -> None:
    rows = [row(0.1, 0.8, 0.3), row(0.3, 0.6, 0.2), row(0.7, 0.4, 0.1), NEAR]
    assert helps.foretold(rows)["captured"] == {"drift removed": 1, "gap closed": -1}
    assert helps.foretold(rows)["distance"] == {"drift removed": -1, "gap closed": 1}
    found = helps.by_share(rows)
    assert [each["merges"] for each in found.values()] == [1, 1, 1]
    assert found["below 20%"]["median"] == pytest.approx(0.2)
    assert found["50% and more"]["most"] == pytest.approx(0.6)
