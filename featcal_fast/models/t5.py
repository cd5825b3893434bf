"""T5 and FLAN-T5: the encoder's blocks, then the decoder's, teacher-forced on the targets given."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from featcal_fast.errors import DataError
from featcal_fast.models.family import Family, Stage


def target_mask(batch: Mapping[str, Tensor]) -> Tensor | None:
    """The decoder's tokens that count: not masked, and with a target where there are `labels` (-100 is none).

    Raises:
        DataError: mask and labels are not of one shape.
    """
    mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    if labels is None:
        return mask
    given = labels != -100
    if mask is None:
        return given
    if mask.shape != given.shape:
        found, expected = tuple(mask.shape), tuple(given.shape)
        raise DataError(f"decoder_attention_mask: found shape {found}, expected {expected}, that of labels")
    return given & (mask != 0)


T5 = Family(
    name="T5",
    models="T5, T5 v1.1, FLAN-T5",
    roots=("",),
    marks=("shared",),
    stages=(
        Stage(("encoder.block",)),
        Stage(("decoder.block",), mask=target_mask, memory=("EncDecAttention.k", "EncDecAttention.v")),
    ),
    forward_kwargs={"use_cache": False},
    needs=(("labels", "decoder_input_ids"), "the decoder is calibrated on given targets"),
    relays=2,
    note="encoder, then decoder on given `labels` or `decoder_input_ids`; biases of position and RMSNorms are kept",
)
