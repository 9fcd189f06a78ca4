"""What all tests share."""

from __future__ import annotations

import os

# Two threads that wait for each other on two busy cores slow everything down many times over.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

pytest_plugins = ("browser",)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Each test starts with one torch thread, whatever the last one set."""
    torch.set_num_threads(1)
