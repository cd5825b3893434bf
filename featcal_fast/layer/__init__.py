"""One layer's mathematics: which tokens count, what modules are given, the sums of that, and the solve."""
