"""Initialize and loads make many objects that stay, and Python's collector would visit all of them again and again."""

import gc
from collections.abc import Iterator

import pytest

from zeropipe.runtime.utils import collecting_later


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("raises", [True, False])
def test_the_collector_is_as_it_was_afterwards(before: bool, raises: bool) -> None:
    (gc.enable if before else gc.disable)()

    @collecting_later()
    def work() -> None:
        assert not gc.isenabled()
        with collecting_later():
            pass
        assert not gc.isenabled()
        if raises:
            raise ValueError

    for _ in range(2):
        if raises:
            with pytest.raises(ValueError):
                work()
        else:
            work()
        assert gc.isenabled() is before
