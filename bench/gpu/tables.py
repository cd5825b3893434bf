"""`bench.readme`'s name for them."""

from bench.harness.tables import table, text

__all__ = ["table", "text"]
