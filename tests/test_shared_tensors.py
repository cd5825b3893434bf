"""What batches' calls share is kept once, and comes back with its bits."""

from __future__ import annotations

import pico
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from featcal_fast.forward.calls import BatchCalls, move, stage_inputs
from featcal_fast.forward.shared import SharedTensors, SharedView
from featcal_fast.models import find_structure

CPU = torch.device("cpu")
PADDED = [kind for kind in pico.KINDS if "input_ids" in pico.batches_for(kind, 0)[0]]


def leaves(calls: BatchCalls) -> list[object]:
    return [x for x in tree_leaves([calls.args, calls.kwargs]) if isinstance(x, (Tensor, SharedView))]


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", PADDED)
def test_calls_come_back_whole(kind: str, padding: str) -> None:
    """Of a batch and of parts of it, after batches of other lengths were kept too."""
    model, shared = pico.KINDS[kind](), SharedTensors()
    structure = find_structure(model, kind)
    batch = pico.batches_for(kind, 0, padding)[0]
    cuts = [slice(None), slice(0, -3), slice(3, None), slice(0, -5)]  # some shorter, some with columns nobody shows
    batches = [{name: value[:, cut] for name, value in batch.items()} for cut in cuts]
    kept = []
    with torch.no_grad():
        for each in batches:
            hidden, calls = stage_inputs(structure, each)
            kept.append((len(hidden), calls, calls.sharing(shared, len(hidden))))
    for samples, calls, own in kept:
        for rows in (slice(0, samples), slice(0, 1), slice(1, samples)):
            expected = leaves(calls.part(rows, samples) if rows != slice(0, samples) else calls)
            found = leaves(move(own.part(rows, samples) if rows != slice(0, samples) else own, CPU))
            assert len(expected) == len(found)
            for a, b in zip(expected, found, strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "t5", "bert"])
def test_no_batch_keeps_more_than_its_hidden_columns(kind: str) -> None:
    model, shared = pico.KINDS[kind](), SharedTensors()
    structure, sizes = find_structure(model, kind), []
    for seed in range(6):
        batch = pico.batches_for(kind, seed)[0]
        with torch.no_grad():
            hidden, calls = stage_inputs(structure, batch)
        own = calls.sharing(shared, len(hidden))
        columns = batch["input_ids"].numel()
        for leaf in leaves(own):
            assert isinstance(leaf, SharedView)
            assert leaf.nbytes in (0, columns)
        sizes.append(shared.nbytes)
    assert sizes[-1] == sizes[0]


def test_a_mask_of_another_form_is_kept_as_it_is() -> None:
    mask = torch.rand(3, 1, 8, 8) > 0.5  # of packed documents, say
    assert SharedTensors().share(mask, 3) is mask


def test_shared_tensors_grow_and_fill() -> None:
    shared, causal = SharedTensors(), torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    lengths = torch.tensor([[2], [3]])
    short = causal[..., :4, :4] & (torch.arange(4) < lengths)[:, None, None]  # nobody shows the last column
    kept = [(mask, shared.share(mask, len(mask))) for mask in (short, causal, causal[..., :5, :5].contiguous())]
    for mask, own in kept:
        assert torch.equal(own.tensor(), mask)
    assert shared.nbytes == causal.nbytes
