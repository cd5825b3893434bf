"""What the moment ops must compute, in float64, and how close to it they must come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from featcal_kernels import blas
from torch import Tensor

SLACK = 1e-6


@dataclass(frozen=True)
class Problem:
    """Features with an offset (as activations have), so that errors of one sign would add up."""

    x: Tensor
    y: Tensor
    weights: Tensor | None

    @staticmethod
    def random(
        n: int, d: int, m: int, dtype: torch.dtype, *, weights: str = "none", strided: bool = False, device: str = "cpu"
    ) -> Problem:
        """
        Args:
            weights: "none", "mask" (zeros and ones) or "any".
            strided: rows further apart than they are long, and not aligned.
        """
        generator = torch.Generator().manual_seed(n + 31 * d + 977 * m)

        def features(columns: int) -> Tensor:
            wide = torch.randn(n, columns + 7 * strided, generator=generator) + 0.2
            return wide.to(device, dtype)[:, 3 * strided :][:, :columns]

        x, y = features(d), features(m)
        w = torch.rand(n, generator=generator)
        chosen = {"none": None, "mask": (w > 0.3).float(), "any": w}[weights]
        return Problem(x, y, None if chosen is None else chosen.to(device))

    def chunks(self, sizes: list[int]) -> list[Problem]:
        weights = [None] * len(sizes) if self.weights is None else self.weights.split(sizes)
        return [Problem(*parts) for parts in zip(self.x.split(sizes), self.y.split(sizes), weights, strict=True)]

    def moments(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`x' D x` and `y' D x` by torch in `dtype`."""
        x, y = self.x.to(dtype), self.y.to(dtype)
        right = x if self.weights is None else x * self.weights.to(dtype)[:, None]
        return x.mT @ right, y.mT @ right

    @property
    def on_units(self) -> bool:
        """Whether matrix units sum up the 16-bit features as they are."""
        return self.x.is_cuda and self.x.dtype.itemsize == 2 and self.weights is None

    @property
    def cut_off(self) -> float:
        """What matrix units lose of a sum, cut off at 24 bits every 16 tokens. Torch may split its own sums."""
        return len(self.x) / 16 * 2.0**-24 if self.on_units else 0.0

    def plain(self) -> tuple[Tensor, Tensor]:
        """The same as torch has them in float32: of 16-bit features on a GPU, from its matrix units."""
        if not self.on_units or not blas.available(self.x.device):
            return self.moments(torch.float32)
        d, m = self.x.shape[1], self.y.shape[1]
        s, h = torch.zeros(d, d, device=self.x.device), torch.zeros(m, d, device=self.x.device)
        return blas.add_product_(s, self.x, self.x), blas.add_product_(h, self.y, self.x)


def error(actual: Tensor, exact: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def assert_as_good(actual: Tensor, plain: Tensor, exact: Tensor, slack: float = SLACK) -> None:
    """`actual` is at most twice as far from `exact` as `plain`, torch's own result, is."""
    assert actual.shape == exact.shape
    found, allowed = error(actual, exact), 2 * error(plain, exact) + slack
    assert found < allowed, f"relative error {found:.2e}, allowed {allowed:.2e}"


def assert_moments(s: Tensor, h: Tensor, problem: Problem, *, times: int = 1, slack: float = SLACK) -> None:
    """`s` (upper triangle) and `h` are `times` the moments of `problem`."""
    for actual, plain, exact, triangle in zip(
        (s, h), problem.plain(), problem.moments(torch.float64), (True, False), strict=True
    ):
        if triangle:
            actual, plain, exact = actual.triu(), plain.triu(), exact.triu()
        assert_as_good(actual / times, plain, exact, slack + problem.cut_off)


def poisoned(d: int, device: str = "cpu") -> Tensor:
    """A square sum that is zero in the upper triangle and NaN below it."""
    below = torch.ones(d, d, dtype=torch.bool, device=device).tril(-1)
    return torch.zeros(d, d, device=device).masked_fill_(below, torch.nan)
