"""What a checkpoint holds of optimizer state beside tensors, looked up tensor by tensor, each flat read once."""

from __future__ import annotations

from typing import Any

from zeropipe.checkpoint.manifest import FlatEntry
from zeropipe.checkpoint.source import Source
from zeropipe.checkpoint.state import FP32, PARAM
from zeropipe.layout.numbers import NEVER_STEPPED, number_of, split_numbers
from zeropipe.runtime.optimizers.state_kinds import Shared, of_one

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

    def of(self, entry: FlatEntry, tensor: str) -> Shared:
        """What the tensor has of the numbers that all share; None where it was never stepped."""
        known = self.shared(entry) or set(entry.keys) - {FP32, PARAM}
        return of_one(self.shared(entry), self.own(entry, tensor)) if known else None

    def all_of(self, entry: FlatEntry, tensor: str) -> dict[str, Any]:
        """Everything that is known of one tensor, named as in a flat that holds only it."""
        further = self.further(entry, tensor)
        shared = self.of(entry, tensor)
        if shared is None:
            return {number_of(NEVER_STEPPED, tensor): True} | further
        return shared | further

    def further(self, entry: FlatEntry, tensor: str, name: str | None = None) -> dict[str, Any]:
        """Those that only this tensor has, by their names in a flat where it is called ``name``."""
        shared = self.shared(entry)
        return {
            number_of(key, tensor if name is None else name): value
            for key, value in self.own(entry, tensor).items()
            if key not in shared and key != NEVER_STEPPED
        }

    def _of(self, entry: FlatEntry) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        if id(entry) not in self._split:
            names = (spec.name for spec in entry.layout.tensors)
            self._split[id(entry)] = (entry, *split_numbers(self._source.flat_scalars(entry), names))
        _, shared, own = self._split[id(entry)]
        return shared, own
