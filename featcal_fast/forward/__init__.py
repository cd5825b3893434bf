"""A block run outside of its model: how the model calls it, and what its modules are given."""
