"""Decides what to gather when and what to keep: pure, from the recorded visits of a step and the budgets.

A *visit* is a unit (a module whose parameters are gathered together) about to run forward or backward. A plan
has one step per visit and prints as one line each:

    F0 fetch 0 1 | F1 fetch 2 | F2 keep | B2 fetch 1 | ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Phase(Enum):
    FORWARD = "F"
    BACKWARD = "B"


@dataclass(frozen=True, slots=True)
class Visit:
    """Unit ``unit`` is about to run; prints as ``F3`` or ``B3``."""

    phase: Phase
    unit: int

    def __str__(self) -> str:
        return f"{self.phase.value}{self.unit}"

    @classmethod
    def parse(cls, text: str) -> Visit:
        return cls(Phase(text[0]), int(text[1:]))


@dataclass(frozen=True, slots=True)
class Budget:
    """All in elements. The names are those of the ``stage3_`` keys of the config."""

    prefetch_bucket_size: int  # gathered ahead of use
    max_live_parameters: int  # gathered at one time
    max_reuse_distance: int  # a unit used again within this much is kept


@dataclass(frozen=True, slots=True)
class Step:
    """At ``visit``: start to gather ``fetch`` in this order, run, then free the unit unless ``keep``."""

    visit: Visit
    fetch: tuple[int, ...]
    keep: bool

    def __str__(self) -> str:
        words = [str(self.visit)]
        if self.fetch:
            words.append("fetch " + " ".join(map(str, self.fetch)))
        if self.keep:
            words.append("keep")
        return " ".join(words)

    @classmethod
    def parse(cls, text: str) -> Step:
        words = text.split()
        keep = words[-1] == "keep"
        numbers = words[2:-1] if keep and len(words) > 2 else words[2:]
        return cls(Visit.parse(words[0]), tuple(map(int, numbers)), keep)


def show_plan(steps: Sequence[Step]) -> str:
    """The plan in one line."""
    return " | ".join(map(str, steps))


def parse_plan(text: str) -> tuple[Step, ...]:
    """The plan that ``show_plan`` wrote."""
    return tuple(Step.parse(step) for step in text.split("|") if step.strip())


def plan(visits: Sequence[Visit], numel: Sequence[int], budget: Budget) -> tuple[Step, ...]:
    """The steps for ``visits``; ``numel[u]`` is the number of elements of unit ``u``.

    A unit is always fetched by its visit. Ahead of that, units are fetched in the order of their visits while
    what is fetched and not yet used fits ``prefetch_bucket_size`` and what is live fits ``max_live_parameters``.
    So what is live is at most ``max_live_parameters`` and the visited unit.
    """
    following = _next_visits(visits)
    live: set[int] = set()
    waiting: set[int] = set()  # fetched ahead, not visited yet
    ahead = 0  # the next visit to consider for fetching ahead
    steps = []
    for at, visit in enumerate(visits):
        fetch = []
        waiting.discard(visit.unit)
        if visit.unit not in live:
            fetch.append(visit.unit)
            live.add(visit.unit)
        ahead = max(ahead, at + 1)
        while ahead < len(visits):
            unit = visits[ahead].unit
            if unit not in live:
                in_flight = sum(numel[u] for u in waiting) + numel[unit]
                total = sum(numel[u] for u in live) + numel[unit]
                if in_flight > budget.prefetch_bucket_size or total > budget.max_live_parameters:
                    break
                fetch.append(unit)
                live.add(unit)
                waiting.add(unit)
            ahead += 1
        keep = _keeps(at, visits, following, numel, budget, live)
        if not keep:
            live.discard(visit.unit)
            # Whatever was skipped over because it was live has to be looked at again.
            again = following[at]
            if again is not None and again < ahead:
                ahead = again
        steps.append(Step(visit, tuple(fetch), keep))
    return tuple(steps)


def _next_visits(visits: Sequence[Visit]) -> list[int | None]:
    """For each visit, the index of the next visit of the same unit."""
    following: list[int | None] = [None] * len(visits)
    latest: dict[int, int] = {}
    for at in reversed(range(len(visits))):
        following[at] = latest.get(visits[at].unit)
        latest[visits[at].unit] = at
    return following


def _keeps(
    at: int,
    visits: Sequence[Visit],
    following: Sequence[int | None],
    numel: Sequence[int],
    budget: Budget,
    live: set[int],
) -> bool:
    again = following[at]
    if again is None or sum(numel[u] for u in live) > budget.max_live_parameters:
        return False
    if again == at + 1:
        return True
    between = {visit.unit for visit in visits[at + 1 : again]}
    return sum(numel[u] for u in between) <= budget.max_reuse_distance
