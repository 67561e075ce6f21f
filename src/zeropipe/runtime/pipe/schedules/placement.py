"""Which rank runs which stage: in a loop (0 1 2 0 1 2) or there and back (0 1 2 2 1 0)."""

from __future__ import annotations

from enum import Enum


class Placement(Enum):
    """How the stages of a model are dealt to the ranks of the pipeline."""

    LOOP = "loop"  # stage s on rank s mod p
    VEE = "vee"  # the odd passes run backwards, so the last rank also holds the next stage: no transfer there

    def rank(self, stage: int, ranks: int) -> int:
        lap, place = divmod(stage, ranks)
        return ranks - 1 - place if self is Placement.VEE and lap % 2 else place

    def stage(self, rank: int, chunk: int, ranks: int) -> int:
        """The stage that is chunk number ``chunk`` of ``rank``."""
        place = ranks - 1 - rank if self is Placement.VEE and chunk % 2 else rank
        return chunk * ranks + place
