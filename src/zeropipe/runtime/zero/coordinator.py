"""Gathers the parameters of each unit before it runs and frees them after, along a plan made from the last step.

The first step records the order of visits; later steps replay it with gathers started ahead of use. A step that
visits something else goes on without the plan, and its own order is the next plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from zeropipe.comm.collectives import meet
from zeropipe.comm.group import Group
from zeropipe.runtime.zero.fetch_plan import Budget, Phase, Step, Visit, plan
from zeropipe.runtime.zero.shards import GATHER, Shards


@dataclass(slots=True, eq=False)
class Unit:
    """A module whose sharded parameters are gathered together."""

    index: int
    name: str
    shards: list[Shards]  # own ones, and external ones that it was seen to use

    @property
    def numel(self) -> int:
        return sum(s.numel for s in self.shards if not s.persist)

    def add(self, shards: Shards) -> None:
        if not any(shards is known for known in self.shards):
            self.shards.append(shards)


@dataclass(slots=True, eq=False)
class Use:
    """One run of a unit, forward or backward: what it holds until it ends."""

    unit: Unit
    held: list[Shards] = field(default_factory=list)
    keep: bool = False


class Coordinator:
    """Owns the units of one model, the plan, and who is running. All calls come from hooks, in program order."""

    def __init__(self, group: Group, budget: Budget) -> None:
        self.group = group
        self.budget = budget
        self.units: list[Unit] = []
        self.running: list[Use] = []  # forwards in progress, innermost last
        self._plans: dict[bool, tuple[Step, ...]] = {}  # with gradients or without -> the plan
        self._grad = False
        self._visits: list[Visit] = []  # of the pass in progress
        self._replaying = False
        self._backward: list[Use] = []  # backward uses that have not ended
        self._ahead: set[int] = set()  # units fetched ahead in this pass

    def add_unit(self, name: str, shards: Iterable[Shards]) -> Unit:
        unit = Unit(len(self.units), name, [])
        for one in shards:
            unit.add(one)
            one.fetch_for_use = self.fetch_for_use
        self.units.append(unit)
        return unit

    @property
    def fetch_plan(self) -> tuple[Step, ...]:
        """The plan of a training step; empty before the first one is over."""
        return self._plans.get(True, ())

    def begin_pass(self) -> None:
        """The root module is about to run forward."""
        self.settle()
        meet("forward", self.group, channel=GATHER)
        self._close_trace()
        self._grad = torch.is_grad_enabled()
        self._replaying = self._grad in self._plans

    def start(self, unit: Unit, phase: Phase) -> Use:
        """Make the unit's parameters available; they stay so until the use ends."""
        if phase is Phase.BACKWARD and not self._backward:
            meet("backward", self.group, channel=GATHER)
        use = Use(unit)
        step = self._advance(Visit(phase, unit.index))
        use.keep = step is not None and step.keep
        for shards in unit.shards:
            shards.start_gather()
        for other in () if step is None else step.fetch:
            if other != unit.index:
                self._ahead.add(other)
                for shards in self.units[other].shards:
                    shards.start_gather()
        self._ahead.discard(unit.index)
        for shards in unit.shards:
            shards.finish_gather()
            shards.holds += 1
            use.held.append(shards)
        (self.running if phase is Phase.FORWARD else self._backward).append(use)
        return use

    def end(self, use: Use) -> None:
        """The use is over; frees what nobody holds, unless the plan keeps it or backward will soon read it."""
        forward = use in self.running
        (self.running if forward else self._backward).remove(use)
        recomputed = forward and torch._C._current_graph_task_id() != -1  # its backward comes next
        for shards in use.held:
            shards.holds -= 1
            if not use.keep and not recomputed:
                shards.release_if_idle()
        use.held.clear()

    def end_if_open(self, use: Use) -> None:
        """``end``, unless that was done for it already."""
        if use in self.running or use in self._backward:
            self.end(use)

    def fetch_for_use(self, shards: Shards) -> bool:
        """A function met ``shards`` while they are away: gather them if a module is running forward, and remember
        that it uses them. False outside of any forward."""
        if not self.running:
            return False
        use = self.running[-1]
        use.unit.add(shards)
        shards.gather()
        shards.holds += 1
        use.held.append(shards)
        return True

    def settle(self) -> None:
        """End what backward left open and free what was fetched ahead and not used."""
        for use in list(self._backward):
            self.end(use)
        for use in list(self.running):  # a forward that raised
            self.end(use)
        for unit in self.units:
            for shards in unit.shards:
                shards.release_if_idle()
        self._ahead.clear()

    def end_backward(self) -> None:
        """A whole backward is over."""
        if self._grad:
            self.settle()

    def _advance(self, visit: Visit) -> Step | None:
        """Note the visit; the plan's step for it, or None where there is no plan (any more)."""
        at = len(self._visits)
        self._visits.append(visit)
        if not self._replaying:
            return None
        steps = self._plans[self._grad]
        if at < len(steps) and steps[at].visit == visit:
            return steps[at]
        self._replaying = False
        return None

    def _close_trace(self) -> None:
        """Make the plan for the next pass of this kind from the one that is over."""
        visits, self._visits = self._visits, []
        known = self._plans.get(self._grad)
        if not visits or (known is not None and [step.visit for step in known] == visits):
            return
        self._plans[self._grad] = plan(visits, [unit.numel for unit in self.units], self.budget)
