"""The fastest choice that fits, with few looks: which to look at next, and which need no look, is decided here, purely.

A look is a rehearsal. What spares most of them holds for the model of memory and time that rehearsals have:

[1] Bytes grow with the micro-batch. So in a family (choices that differ in it alone) one that is refused refuses all
    that are larger, and between a size that fits and one that does not their chord says where to look next: the peak is
    the most of sums that grow evenly with the micro-batch, so it lies below the chord.
[2] For the same global batch a larger micro-batch is never slower: a kernel's time is the most of its launch, its
    arithmetic and its bytes, each of which grows at most as fast as the batch; what is sent once in a micro-step is
    sent less often. So of a family only its largest size that fits counts, and a refused size tells how fast the family
    is at most.
[3] Recomputing and offloading take time. So a family that does is no faster than the same without.
[4] What a rank holds between steps hangs on neither the micro-batch nor recomputing, and sharding or offloading less
    does not make it less. Where that alone is too much, all such choices are refused with one look.

A pipeline's bubble grows with the micro-batch, so [2] does not hold for it. There each size is a family of its own, and
how much slower it is than another is asked of the schedules, played with even stages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from zeropipe.planning.fitting.choices import OFFLOADS, Choice
from zeropipe.runtime.pipe.schedule import make_schedule
from zeropipe.runtime.pipe.simulate import UNIT, simulate

_SURE = 0.9  # how much of the time of a pipeline that was not looked at is believed
_PACKS = 4  # micro-batches a rank, after which each takes as long as the one before


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look has found. Bytes, seconds of a step; ``why``: what to say where it is too much."""

    needed: int
    resting: int  # of ``needed``, what is there between two steps
    seconds: float
    why: str = ""
    fails: bool = False  # it cannot be run; ``why`` says how


@dataclass(frozen=True, slots=True)
class Refusal:
    """A choice that would have been faster, as far as is known, and why it was not taken."""

    choice: Choice
    seconds: float  # at least
    why: str


@dataclass(slots=True)
class _Family:
    sizes: list[Choice]  # ascending by micro-batch
    fits: int = -1  # the largest place that is known to fit
    high: int = 0  # the largest that is not refused
    seen: dict[int, Seen] = field(default_factory=dict)
    why: str = ""  # it is refused as a whole

    @property
    def settled(self) -> bool:
        return self.fits == self.high >= 0

    @property
    def over(self) -> bool:
        return self.high < 0

    def next(self, memory: int) -> int:
        """The place to look at: first the largest, which says how fast the family is at most; then the smallest; then
        where the chord of what is known meets the limit."""
        if self.high not in self.seen and self.high == len(self.sizes) - 1:
            return self.high
        low = max(self.fits, 0)
        if low not in self.seen:
            return low
        above = self.high + 1
        (x0, y0), (x1, y1) = ((self.sizes[i].micro, self.seen[i].needed) for i in (low, above))
        reach = x0 + (memory - y0) / max((y1 - y0) / (x1 - x0), 1e-9)
        # Never nearer than the next, nor farther than the last.
        return max([i for i in range(low + 1, self.high + 1) if self.sizes[i].micro <= reach] or [low + 1])


class Search:
    """Looks at ``choices`` until the fastest that fits ``memory`` (bytes) is known."""

    def __init__(self, choices: Iterable[Choice], memory: int, look: Callable[[Choice], Seen]) -> None:
        self._memory, self._look = memory, look
        groups: dict[Choice, list[Choice]] = defaultdict(list)
        for one in choices:
            groups[one if one.cut else one.family].append(one)
        self._families = {
            name: _Family(sorted(sizes, key=lambda one: one.micro), high=len(sizes) - 1)
            for name, sizes in groups.items()
        }

    def run(self) -> Choice | None:
        """The fastest that fits; None where nothing does."""
        while open_ := [name for name, family in self._families.items() if not family.over]:
            best = min(open_, key=self._rank)
            family = self._families[best]
            if family.settled:
                return family.sizes[family.high]
            place = family.next(self._memory)
            self._enter(best, place, self._look(family.sizes[place]))
        return None

    def _rank(self, name: Choice) -> tuple[Any, ...]:
        # Among equals: what is known; then what offload leaves on the device; then what holds less there, see [4].
        family = self._families[name]
        bound = self.bound(family.sizes[family.high])
        return bound, not family.settled, OFFLOADS.index(name.offload), -name.stage, name.shard, str(name)

    def refuse(self, choice: Choice, seen: Seen) -> None:
        """``choice`` was found to fit, and a better look says that it does not."""
        name = choice if choice.cut else choice.family
        family = self._families[name]
        place = family.sizes.index(choice)
        # What was seen of smaller ones stands, until one of them is looked at better.
        family.fits = max(
            (i for i, one in family.seen.items() if i < place and one.needed <= self._memory), default=-1
        )
        self._enter(name, place, seen)

    def _enter(self, name: Choice, place: int, seen: Seen) -> None:
        family = self._families[name]
        family.seen[place] = seen
        if seen.fails:
            family.high, family.why = -1, seen.why
        elif seen.needed <= self._memory:
            family.fits = place
        else:
            family.high = place - 1
        if seen.resting > self._memory and not seen.fails:
            for other, one in self._families.items():
                if holds_no_less(other, name) and not one.over:
                    one.high = -1
                    one.why = f"what lies between steps alone is too much, as of {name.states}: {seen.why}"
                    if other.states == name.states:
                        one.why = f"what lies between steps alone is too much: {seen.why}"

    # What is known of the time of a choice.

    def bound(self, choice: Choice) -> float:
        """Seconds that ``choice`` takes at least."""
        known = [self._known(one, choice) for one in self._relatives(choice)]
        return max([*known, self._guessed(choice) if choice.cut else 0.0])

    def _relatives(self, choice: Choice) -> Iterable[Choice]:
        """Itself, and the same that recomputes or offloads less."""
        for recompute in {False, choice.recompute}:
            for offload in OFFLOADS[: OFFLOADS.index(choice.offload) + 1]:
                yield replace(choice, recompute=recompute, offload=offload)

    def _known(self, relative: Choice, choice: Choice) -> float:
        family = self._families.get(relative if relative.cut else relative.family)
        if family is None:
            return 0.0
        larger = (i for i, seen in family.seen.items() if not seen.fails)
        return max(
            (family.seen[i].seconds for i in larger if family.sizes[i].micro >= choice.micro), default=0.0
        )

    def _guessed(self, choice: Choice) -> float:
        """By the schedules alone, from any that was looked at with the same stages and recomputing."""
        assert choice.cut is not None
        found = [
            seen.seconds * self._units(choice) / self._units(name)
            for name, family in self._families.items()
            if name.cut and name.cut.ranks == choice.cut.ranks and name.recompute == choice.recompute
            for seen in family.seen.values()
            if not seen.fails
        ]
        return _SURE * min(found, default=0.0)

    @staticmethod
    def _units(choice: Choice) -> float:
        assert choice.cut is not None
        cut = choice.cut
        return choice.micro * _length(cut.schedule, cut.ranks, cut.chunks, choice.accumulation)

    # What there is to say in the end.

    def refusals(self, taken: Choice | None) -> list[Refusal]:
        """Of each family that could have been faster than what was ``taken``: its smallest that was refused."""
        limit = float("inf") if taken is None else self.bound(taken)
        found = []
        for family in self._families.values():
            lost = [i for i, seen in family.seen.items() if seen.fails or seen.needed > self._memory]
            choice = family.sizes[min(lost, default=-1)]
            if (lost or family.why) and self.bound(choice) <= limit:
                why = family.why or family.seen[min(lost)].why
                found.append(Refusal(choice, self.bound(choice), why))
        return sorted(found, key=lambda one: (one.seconds, str(one.choice)))


def holds_no_less(one: Choice, other: Choice) -> bool:
    """Whether a rank with ``one`` has no fewer bytes between steps than with ``other``."""
    if (one.cut and one.cut.ranks) != (other.cut and other.cut.ranks):
        return False
    if OFFLOADS.index(one.offload) > OFFLOADS.index(other.offload) or one.stage > other.stage:
        return False
    if one.stage < 3:
        return other.shard == 0
    return one.shard == other.shard or (one.shard > 0 and (other.shard == 0 or one.shard <= other.shard))


@cache
def _length(schedule: str, ranks: int, chunks: int, micro_batches: int) -> float:
    """Of a batch, in units of one micro-batch's forward through a rank."""
    played = min(micro_batches, _PACKS * ranks)
    share = UNIT.share(chunks)
    made = simulate(make_schedule(schedule, ranks, played, chunks, share), share).makespan
    # F, and both halves of B, for each that was not played.
    return made + 3.0 * (micro_batches - played)
