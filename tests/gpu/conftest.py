"""The device of these tests: a GPU where there is one, or the CPU where ZEROPIPE_TEST_DEVICE says so (`make gpu`).

They need pytest and torch alone, and not the fixtures of the tests around them.
"""

from __future__ import annotations

import os

import pytest
import torch

WANTED = os.environ.get("ZEROPIPE_TEST_DEVICE", "")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if WANTED == "cpu" or torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if WANTED == "cpu" else "cuda")
