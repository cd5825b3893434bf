"""`W = (1/K) sum_k W_k`: the plain mean of K experts."""

from featcal_fast.merging.method import Method

AVERAGE = Method(
    add=lambda expert, _base: expert,
    finish=lambda _base, total, _scaling, count: total.div_(count),
)
