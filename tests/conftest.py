"""What all tests share."""

from __future__ import annotations

import os

# Two threads that wait for each other on two busy cores slow everything down many times over.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest_plugins = ("browser",)

# The same examples each time, however slow the machine is. Loaded before the modules' own `@settings`, which build on
# it; a database would bring examples of other runs back.
settings.register_profile(
    "echelon", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("echelon")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Each test starts with one torch thread, whatever the last one set."""
    torch.set_num_threads(1)
