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
def gloo_pool() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def native_pool() -> Iterator[Pools]:
    """The native rung: every collective takes the path that it takes on NCCL, over gloo's own algorithms."""
    pools = Pools(native=True)
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def pool(request: pytest.FixtureRequest) -> Pools:
    """``pool(world).run(function, *args)``: see ``tests/helpers/pool.py``. A test that is marked ``native`` runs a
    second time on the native rung, and with the option ``--native`` every test runs there alone."""
    usual = "native_pool" if request.config.getoption("--native") else "gloo_pool"
    found: Pools = request.getfixturevalue(getattr(request, "param", usual))
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--native", action="store_true", help="run what uses the pool on the native rung alone")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    both = metafunc.definition.get_closest_marker("native") and not metafunc.config.getoption("--native")
    if "pool" in metafunc.fixturenames and both:
        metafunc.parametrize(
            "pool", ["gloo_pool", "native_pool"], ids=["gloo", "native"], indirect=True, scope="session"
        )


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let torch load in the workers' server while other tests run."""
    if not session.config.option.collectonly and any(
        "pool" in getattr(item, "fixturenames", ()) for item in session.items
    ):
        start_server()
