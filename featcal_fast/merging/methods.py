"""All upstream mergers, by the names that recipes have for them."""

from __future__ import annotations

from featcal_fast.merging.average import AVERAGE
from featcal_fast.merging.dare import DARE_LINEAR, DARE_TIES
from featcal_fast.merging.iso_c import iso_c, iso_c_bytes
from featcal_fast.merging.matrices import matrix_method
from featcal_fast.merging.method import Method
from featcal_fast.merging.model_stock import MODEL_STOCK
from featcal_fast.merging.slerp import SLERP
from featcal_fast.merging.task_arithmetic import TASK_ARITHMETIC
from featcal_fast.merging.ties import TIES
from featcal_fast.merging.tsv import tsv, tsv_bytes
from featcal_fast.merging.wudi import STEPS, wudi, wudi_bytes

METHODS: dict[str, Method] = {
    "average": AVERAGE,
    "task_arithmetic": TASK_ARITHMETIC,
    "ties": TIES,
    "dare_linear": DARE_LINEAR,
    "dare_ties": DARE_TIES,
    "slerp": SLERP,
    "model_stock": MODEL_STOCK,
    "wudi": matrix_method(lambda deltas, count, options: wudi(deltas, count, options.steps), wudi_bytes, steps=STEPS),
    "iso_c": matrix_method(lambda deltas, count, _options: iso_c(deltas, count), iso_c_bytes),
    "tsv": matrix_method(lambda deltas, count, _options: tsv(deltas, count), tsv_bytes),
}
