"""The alias, installed for these tests and taken away after them, so that no other test sees a deepspeed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from zeropipe.compat.finder import ROOT, AliasFinder, install_as_deepspeed


def forget() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, AliasFinder)]
    for name in [name for name in sys.modules if name == ROOT or name.startswith(ROOT + ".")]:
        del sys.modules[name]


@pytest.fixture
def deepspeed() -> Iterator[ModuleType]:
    forget()
    try:
        yield install_as_deepspeed()
    finally:
        forget()
