"""Tests with the real clients; skipped where they, or zeropipe's distribution ``deepspeed``, are not installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests.clients.ranks import Ranks, start_server

CLIENTS = ("transformers", "accelerate", "peft", "trl", "lightning", "datasets")
HERE = Path(__file__).parent


def _missing() -> str | None:
    """Why the clients cannot be tested in this environment."""
    absent = [name for name in CLIENTS if _version(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}; `make test-clients` makes an environment that has them"
    found = _version("deepspeed")
    if found is None:
        return "the distribution deepspeed of compat/deepspeed is not installed; `make test-clients` does it"
    if "+zeropipe" not in found:
        return f"this environment has the real deepspeed {found}, not compat/deepspeed"
    return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _missing()
    if reason is not None:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=f"clients: {reason}"))


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    """``ranks.run("module.function", world, **kwargs)``: see ``ranks.py``."""
    start_server()
    return Ranks()
