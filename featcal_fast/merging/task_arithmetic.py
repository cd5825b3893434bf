"""`W = W_0 + scaling * sum_k (W_k - W_0)`: task arithmetic (arXiv 2212.04089)."""

from featcal_fast.merging.method import Method

TASK_ARITHMETIC = Method(
    add=lambda expert, base: expert.sub_(base),
    finish=lambda base, total, scaling, _count: total.mul_(scaling).add_(base),
)
