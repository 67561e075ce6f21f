"""Parts of a module tree by their prefixes, as in a state dict's keys: ``""`` is the whole, ``blocks.0.`` a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class Regions:
    """Prefixes of modules, and which of them a key is in."""

    def __init__(self, prefixes: Iterable[str]) -> None:
        self._prefixes = frozenset(prefixes)

    def of(self, key: str) -> str | None:
        if not self._prefixes:
            return None
        return next((prefix for prefix in _prefixes_of(key) if prefix in self._prefixes), None)


def _prefixes_of(key: str) -> Iterator[str]:
    yield ""
    at = key.find(".")
    while at >= 0:
        yield key[: at + 1]
        at = key.find(".", at + 1)
