"""Fixtures and settings that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before anything imports torch: the machine's few cores are shared by all ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.pool import Pools, start_server

# A shared machine makes timings meaningless, and a fixed seed makes failures repeat.
settings.register_profile(
    "zeropipe",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("zeropipe")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pools]:
    """``pool(world).run(function, *args)``: see ``tests/helpers/pool.py``."""
    pools = Pools()
    yield pools
    pools.close()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let torch load in the workers' server while other tests run."""
    if not session.config.option.collectonly and any(
        "pool" in getattr(item, "fixturenames", ()) for item in session.items
    ):
        start_server()
