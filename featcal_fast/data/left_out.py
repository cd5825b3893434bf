"""Samples that an expert would not read as its own tokenizer has them: found, counted by reason, and left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from featcal_fast.data.samples import Sample
from featcal_fast.errors import DataError, shown
from featcal_fast.models.tokens import OwnTokens, counted, token_inputs


class LeftOut:
    """Which of a task's samples its expert can be given.

    Args:
        own: the expert's tokens.
        config: the merged model's, which says what of its inputs are tokens.
    """

    def __init__(self, own: OwnTokens, config: Any) -> None:
        self.own, self._config = own, config
        self._count: Counter[str] = Counter()
        self._example: dict[str, str] = {}
        self._kept = 0

    def keeps(self, sample: Sample) -> bool:
        """Whether the expert has all tokens of a sample, whose ids are rows of the merged model's embedding."""
        if lacking := self._lacking(sample):
            self._add(f"with a token that {self.own.label} does not have", lacking)
            return False
        self._kept += 1
        return True

    def add_split(self, told: Sequence[str]) -> None:
        """Texts that the expert's own tokenizer splits differently: where each does."""
        for where in told:
            self._add(f"that the tokenizer of {self.own.label} splits differently", where)

    def by_reason(self) -> dict[str, int]:
        """How many were left out, by the reason, with an example in it."""
        return {f"{reason}, such as {self._example[reason]}": count for reason, count in self._count.items()}

    def check(self, source: object) -> None:
        """Raises:
        DataError: they are more than half of all."""
        out = self._count.total()
        if 2 * out > out + self._kept:
            reasons = "; ".join(f"{count} {reason}" for reason, count in self.by_reason().items())
            raise DataError(
                f"{source}: {out} of {out + self._kept} samples cannot be given to {self.own.label} as they are to the "
                f"merged model: {reasons}. Expected at most half of them; take other samples, or see that the merged "
                f"model has the tokenizer that its merge should have (now that of {self.own.merged})"
            )

    def _lacking(self, sample: Sample) -> str:
        """The first token that the expert has not, and where it is; empty if it has all."""
        table = self.own.table
        if table is None:
            return ""
        for name in token_inputs(self._config, sample.values):
            ids = sample.values[name]
            places = ((table[ids.clamp(min=0)] < 0) & counted(name, sample.values)).nonzero()
            if len(places):
                token = int(ids[place := int(places[0, 0])])
                text = shown(self.own.lacking[token]) if token in self.own.lacking else "a token"
                return f"{text} (id {token}) at position {place} of {name} of {sample.where}"
        return ""

    def _add(self, reason: str, where: str) -> None:
        self._count[reason] += 1
        self._example.setdefault(reason, where)
