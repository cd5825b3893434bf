"""A merge, formed in parts: the sums of a whole, and no more memory than it says."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from featcal_fast.merging.merged import METHODS, PART, merge_tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_parts_add_up(method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base, *experts = torch.randn(4, 3, PART // 2 + 1).to(dtype)
    total = sum(e.float() - base.float() for e in experts)
    expected = base.float() + 0.3 * total if method == "task_arithmetic" else sum(e.float() for e in experts) / 3
    before = base.clone()
    found = merge_tensor(METHODS[method], base, experts, 0.3, 3)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), expected, atol=1e-6 if dtype == torch.float32 else 1e-2)
    assert torch.equal(base, before)


def test_one_expert_at_a_time() -> None:
    last: list[weakref.ref[Tensor]] = []

    def experts() -> Iterator[Tensor]:
        for _ in range(3):
            assert all(each() is None for each in last)
            expert = torch.randn(4, 4)
            last.append(weakref.ref(expert.untyped_storage()))
            yield expert
            del expert

    merge_tensor(METHODS["average"], torch.randn(4, 4), experts(), 1.0, 3)
