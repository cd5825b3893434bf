"""Pico models are too small for more than one thread: threads would cost more than they bring."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
