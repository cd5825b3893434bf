"""What FeatCal is compared with: small modules behind a merged model, trained to take its features to the experts'.

Both stay in the model, one for each task, and take the task's name at inference. The tasks are independent, and are
trained side by side: a module's parameters, features and losses have the task as their first dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Training:
    """Adam on batches of 16 images a task, the same for both.

    Published: 500 steps at 1e-3, which underfits here with many images. On validation images, task arithmetic, 5 seeds,
    these values against the published: Surgery +0.7, -0.3, +2.2 points at 8, 32, 256 images, ProbSurgery -0.6, -0.8,
    +1.1.
    """

    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 3e-3


class Surgery(nn.Module):
    """Representation Surgery (Yang et al., arXiv 2402.02705): `f - U relu(D f)` of rank 16.

    Loss: the mean of `|f' - f_expert|`.
    """

    def __init__(self, tasks: int, width: int, generator: torch.Generator, rank: int = 16) -> None:
        super().__init__()
        self.generator = generator
        self.down = _linear(tasks, width, rank, generator)
        self.up = _linear(tasks, rank, width, generator)

    def forward(self, features: Tensor) -> Tensor:
        return features - F.relu(features @ self.down) @ self.up

    def loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """Of every task, `[tasks]`."""
        return (self(features) - targets).abs().mean((1, 2))


class ProbSurgery(nn.Module):
    """ProbSurgery (github 1998v7/ProbSurgery): `f - z` with `z` drawn from `N(mu, exp(logvar))`.

    `mu = M relu(D f)`, `logvar = V relu(D f)`.

    Loss: the mean of `|f - z - f_expert|` plus 1e-4 times KL(N(mu, exp(logvar)) || N(0, 1)), summed over features.
    Inference takes off `mu`. 128 hidden units; M and V start at 0, as in the authors' code.
    """

    def __init__(self, tasks: int, width: int, generator: torch.Generator, hidden: int = 128) -> None:
        super().__init__()
        self.generator = generator
        self.down = _linear(tasks, width, hidden, generator)
        self.mean = nn.Parameter(torch.zeros(tasks, hidden, width))
        self.logvar = nn.Parameter(torch.zeros(tasks, hidden, width))

    def forward(self, features: Tensor) -> Tensor:
        return features - F.relu(features @ self.down) @ self.mean

    def loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """Of every task, `[tasks]`."""
        hidden = F.relu(features @ self.down)
        mean, logvar = hidden @ self.mean, hidden @ self.logvar
        drawn = mean + torch.randn(mean.shape, generator=self.generator) * (logvar / 2).exp()
        divergence = (mean.square() + logvar.exp() - 1 - logvar).sum(-1).mean(1) / 2
        return (features - drawn - targets).abs().mean((1, 2)) + 1e-4 * divergence


MODULES: dict[str, type[Surgery] | type[ProbSurgery]] = {"Surgery": Surgery, "ProbSurgery": ProbSurgery}


def train(kind: str, features: Tensor, targets: Tensor, seed: int, training: Training = Training()) -> nn.Module:
    """A module trained on the merged model's and the experts' features of the same images, `[tasks, images, width]`."""
    generator = torch.Generator().manual_seed(seed)
    tasks, images, width = features.shape
    module = MODULES[kind](tasks, width, generator)
    adam = torch.optim.Adam(module.parameters(), lr=training.learning_rate)
    for _ in range(training.steps):
        rows = torch.randperm(images, generator=generator)[: training.batch_size]
        loss = module.loss(features[:, rows], targets[:, rows]).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return module


def _linear(tasks: int, inputs: int, outputs: int, generator: torch.Generator) -> nn.Parameter:
    """torch's initial values of a linear layer without bias."""
    return nn.Parameter((torch.rand(tasks, inputs, outputs, generator=generator) * 2 - 1) / inputs**0.5)
