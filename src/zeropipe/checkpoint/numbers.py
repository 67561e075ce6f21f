"""What a checkpoint holds of optimizer state beside tensors, looked up tensor by tensor, each flat read once."""

from __future__ import annotations

from typing import Any

from zeropipe.checkpoint.manifest import FlatEntry
from zeropipe.checkpoint.source import Source
from zeropipe.layout.numbers import number_of, split_numbers

STEP = "step"  # the one number that other formats have a place for


class Numbers:
    """The numbers of one source's flats; ``layout.numbers`` says which of them belong to one tensor."""

    def __init__(self, source: Source) -> None:
        self._source = source
        # By identity: two flats of one name may lie on different pipeline stages. The entry is kept so that it lives.
        self._split: dict[int, tuple[FlatEntry, dict[str, Any], dict[str, dict[str, Any]]]] = {}

    def shared(self, entry: FlatEntry) -> dict[str, Any]:
        """Those that hold for all tensors of the flat."""
        return self._of(entry)[0]

    def own(self, entry: FlatEntry, tensor: str) -> dict[str, Any]:
        """Those of one tensor alone, by their keys."""
        return self._of(entry)[1].get(tensor, {})

    def all_of(self, entry: FlatEntry, tensor: str) -> dict[str, Any]:
        """Everything that is known of one tensor, named as in a flat that holds only it."""
        own = {number_of(key, tensor): value for key, value in self.own(entry, tensor).items()}
        return self.shared(entry) | own

    def _of(self, entry: FlatEntry) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        if id(entry) not in self._split:
            names = (spec.name for spec in entry.layout.tensors)
            self._split[id(entry)] = (entry, *split_numbers(self._source.flat_scalars(entry), names))
        _, shared, own = self._split[id(entry)]
        return shared, own
