"""Streamed second moments: Gram and cross-moment accumulation, and the products that fold them.

Useful to anyone who accumulates `X'X` over chunks of activations; imports nothing of featcal_fast.
"""

from featcal_kernels.cpu import allow_bf16_units
from featcal_kernels.ops import (
    add_scaled_,
    addmm_,
    cross_,
    frobenius,
    gram_,
    gram_cross_,
    pack,
    panel_rows,
    symmetrize_,
)

__all__ = [
    "add_scaled_",
    "addmm_",
    "allow_bf16_units",
    "cross_",
    "frobenius",
    "gram_",
    "gram_cross_",
    "pack",
    "panel_rows",
    "symmetrize_",
]
