"""Decides what to gather when and what to keep: pure, from the recorded visits of a step and the budgets.

    first pass of a kind    every visit is recorded                       the plan is made when the next pass begins
    later ones              every visit is recorded, and the plan's step followed until the pass visits something else

A *visit* is a unit (a module whose parameters are gathered together) about to run forward or backward. A plan
has one step per visit and prints as one line each:

    F0 fetch 0 1 | F1 fetch 2 keep | F2 keep | B2 | B1 fetch 0 | B0

Units of one size, with a prefetch of one:

    visit        F0     F1     F2     B2     B1     B0
    sent         0 1    2                    0               1 and 2 are not sent again: they stay
    whole        0 1    1 2    2 1    2 1    1 0    0        first the one that runs, then what waits for its visit
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from heapq import heapify, heappop, heappush


class Phase(Enum):
    FORWARD = "F"
    BACKWARD = "B"

    __hash__ = object.__hash__  # looked up in every visit; Enum's own is a call in Python


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
    together: int = 0  # small neighbours of at most this much are gathered as one message


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
    """The steps for ``visits``; ``numel[u]`` is the number of elements of unit ``u``. Takes O(n log n).

    A unit is always fetched by its visit. Ahead of that, units are fetched in the order of their visits while
    what is fetched and not yet used fits ``prefetch_bucket_size`` and what is live fits ``max_live_parameters``.
    So what is live is at most ``max_live_parameters`` and the visited unit.
    """
    first, following, between = _next_visits(visits, numel)
    live: set[int] = set()
    waiting: set[int] = set()  # fetched ahead, not visited yet
    live_numel = waiting_numel = 0
    absent_numel = sum(numel[unit] for unit in first)
    # (next visit, unit) of those that are not live: what is to be fetched next stands first.
    absent = [(at, unit) for unit, at in first.items()]
    heapify(absent)
    steps = []
    for at, visit in enumerate(visits):
        fetch = []
        if visit.unit in waiting:
            waiting.discard(visit.unit)
            waiting_numel -= numel[visit.unit]
        # [1] It must be here. It stands first among the absent: no other visit is nearer.
        if visit.unit not in live:
            heappop(absent)
            fetch.append(visit.unit)
            live.add(visit.unit)
            live_numel += numel[visit.unit]
            absent_numel -= numel[visit.unit]
        # [2] Ahead of need, in the order of need: a unit that does not fit is not overtaken, or it would come late.
        # Small units wait until they are one message, unless something is gathered anyway, or needed next.
        room = min(budget.prefetch_bucket_size - waiting_numel, budget.max_live_parameters - live_numel)
        now = fetch or min(room, absent_numel) >= budget.together or (absent and absent[0][0] == at + 1)
        while now and absent and numel[absent[0][1]] <= room:
            unit = heappop(absent)[1]
            room -= numel[unit]
            absent_numel -= numel[unit]
            fetch.append(unit)
            live.add(unit)
            waiting.add(unit)
            live_numel += numel[unit]
            waiting_numel += numel[unit]
        # [3] It is freed, unless it is used again soon.
        again = following[at]
        keep = again is not None and live_numel <= budget.max_live_parameters
        reused = keep and (again == at + 1 or between[at] <= budget.max_reuse_distance)
        # What the next visit would fetch again stays too: nothing nearer is missing, and then there is room for it. To
        # free and to gather it would hold as much, and send it once more.
        coming = numel[visits[at + 1].unit] if keep and visits[at + 1].unit in waiting else 0
        nearest = again is not None and (not absent or again < absent[0][0])
        fits = waiting_numel - coming + numel[visit.unit] <= budget.prefetch_bucket_size
        keep = reused or (keep and nearest and fits)
        if keep and nearest and fits:
            waiting.add(visit.unit)
            waiting_numel += numel[visit.unit]
        if not keep:
            live.discard(visit.unit)
            live_numel -= numel[visit.unit]
            if again is not None:
                heappush(absent, (again, visit.unit))
                absent_numel += numel[visit.unit]
        steps.append(Step(visit, tuple(fetch), keep))
    return tuple(steps)


def _next_visits(
    visits: Sequence[Visit], numel: Sequence[int]
) -> tuple[dict[int, int], list[int | None], list[int]]:
    """Each unit's first visit; and for each visit the next one of its unit, and the elements of the units that are
    visited between the two, each counted once."""
    nearest: dict[int, int] = {}
    following: list[int | None] = [None] * len(visits)
    between = [0] * len(visits)
    # A Fenwick tree over visits, in which the first one of each unit from here on counts: O(log n) to move one.
    sums = [0] * (len(visits) + 1)

    def add(place: int, value: int) -> None:
        place += 1
        while place < len(sums):
            sums[place] += value
            place += place & -place

    def up_to(place: int) -> int:
        total = 0
        while place:
            total += sums[place]
            place -= place & -place
        return total

    for at in reversed(range(len(visits))):
        unit = visits[at].unit
        again = following[at] = nearest.get(unit)
        nearest[unit] = at
        if again is not None:
            between[at] = up_to(again)
            add(again, -numel[unit])
        add(at, numel[unit])
    return nearest, following, between


class Recorder:
    """The plans of one model, with gradients and without, and the pass that is recorded."""

    def __init__(self) -> None:
        self.plans: dict[bool, tuple[Step, ...]] = {}  # with gradients or without -> the plan
        self.grad = False  # of the pass in progress
        self._visits: list[Visit] = []
        self._following: tuple[Step, ...] | None = None  # the plan, until the pass visits something else

    def begin(self, grad: bool, replay: bool, numel: Callable[[], Sequence[int]], budget: Budget) -> None:
        """A pass begins, and so the one before is over: that makes the plan for the next of its kind."""
        visits, self._visits = self._visits, []
        known = self.plans.get(self.grad)
        if visits and (known is None or [step.visit for step in known] != visits):
            self.plans[self.grad] = plan(visits, numel(), budget)
        self.grad = grad
        self._following = self.plans.get(grad) if replay else None

    def visit(self, visit: Visit) -> Step | None:
        """Note the visit; the plan's step for it, or None where there is no plan (any more)."""
        at, steps = len(self._visits), self._following
        self._visits.append(visit)
        if steps is None:
            return None
        # The plan has the very objects that units visit with; to compare their fields would take longer.
        if at < len(steps) and (steps[at].visit is visit or steps[at].visit == visit):
            return steps[at]
        self._following = None
        return None

    def next_fetched(self) -> tuple[int, ...]:
        """The units that the plan gathers at the visit after this one."""
        steps, at = self._following or (), len(self._visits)
        return steps[at].fetch if at < len(steps) else ()
