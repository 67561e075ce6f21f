"""Gathers the parameters of each unit before it runs and frees them after, along a plan made from the last step.

The first step records the order of visits; later steps replay it with gathers started ahead of use. A step that
visits something else goes on without the plan, and its own order is the next plan.

No rank waits for ever. Ranks tell each other in one sequence what they are about to do: gather a parameter, begin
forward or backward, reduce what is left, step, or raise an error (``meet``, ``guarded``). A rank that hears
another word than its own stops with a DesyncError. Whatever else blocks on a peer (reductions, the norm of a step)
comes after such a meeting, so that every peer is on its way to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Protocol

import torch
from torch.utils.hooks import RemovableHandle

from zeropipe.comm.agreement import leave, meet
from zeropipe.comm.group import Group
from zeropipe.errors import CommunicationError, DesyncError, UsageError
from zeropipe.runtime.zero.gather.fetch_plan import Budget, Phase, Step, Visit, plan
from zeropipe.runtime.zero.gather.shards import GATHER, Shards
from zeropipe.runtime.zero.gather.unit import Unit, Use, gradient_sinks
from zeropipe.runtime.zero.gather.writes import join

# For peers to come to where this rank raised an error, so that it can hand on what they will then wait for.
PATIENCE = timedelta(seconds=30)
# Elements that backward used without a gather in which ranks hear of each other.
REDUCTIONS_COMPARED_EVERY = 2**21


class Reductions(Protocol):
    """What the coordinator asks of the reducer, which must not wait for reductions that a peer has not started:
    that peer may be waiting for this rank in a gather."""

    @property
    def progress(self) -> int: ...
    def reached_by_all(self, progress: int) -> None: ...


class Coordinator:
    """Owns the units of one model, the plan, and who is running. All calls come from hooks, in program order.

    ``group``: the ranks that share one copy of the shards; ``everyone``: all that train together.
    """

    def __init__(self, group: Group, budget: Budget, everyone: Group | None = None) -> None:
        self.group = group
        self.circles = [group] if everyone is None or everyone == group else [group, everyone]
        self.budget = budget
        self.reductions: Reductions | None = None
        self._unmet = 0  # elements used in backward since the ranks last compared their reductions
        self.units: list[Unit] = []
        self.running: list[Use] = []  # forwards in progress, innermost last
        self._plans: dict[bool, tuple[Step, ...]] = {}  # with gradients or without -> the plan
        self._grad = False
        self._visits: list[Visit] = []  # of the pass in progress
        self._replaying = False
        self._backward: list[Use] = []  # backward uses that have not ended
        self._loose: list[Use] = []  # hold what a root returned of its parameters
        # What graphs read that were made outside of any module, and whether they still may.
        self._kept: list[tuple[Shards, Callable[[], bool]]] = []
        self._silent = 0  # contexts in which every parameter is held whole
        self._sinks: list[object] = []  # see ``gradient_sinks``
        self.until_settled: list[RemovableHandle] = []  # hooks on tensors that outlive their pass
        self._told: list[Callable[[], int]] = []  # an error told to the peers: whether they have the same
        self._parted = False  # the last meeting ended in an error, of which everyone knows
        self._written: set[Shards] = (
            set()
        )  # what forwards wrote to on this rank, not joined with the others yet

    def add_unit(self, name: str, shards: Iterable[Shards]) -> Unit:
        unit = Unit(len(self.units), name, [])
        for one in shards:
            unit.add(one)
            one.fetch_for_use, one.keep_for_graph = self.fetch_for_use, self.keep_for_graph
        self.units.append(unit)
        return unit

    @property
    def fetch_plan(self) -> tuple[Step, ...]:
        """The plan of a training step; empty before the first one is over."""
        return self._plans.get(True, ())

    def begin_pass(self, root: str) -> None:
        """The root module is about to run forward; nothing to do where that is inside a pass (recursion, or a
        checkpoint's second forward)."""
        if self.running or in_backward():
            return
        try:
            self.settle()
            self.meet(f"forward of {root}")
        except BaseException as error:
            self.tell(error, root)
            raise
        self._close_trace()
        self._grad = torch.is_grad_enabled()
        self._replaying = self._grad in self._plans and not self._silent
        if self._grad and self._grad not in self._plans:
            self._sinks = gradient_sinks(self.units)

    def meet(self, what: str) -> None:
        """Go on when every rank is about to do ``what``; DesyncError when one is not."""
        if self._silent:
            return
        told, self._told, self._parted = self._told, [], False
        for same in told:
            same()
        wrote = not self._written
        for circle in self.circles:
            try:
                wrote = min(wrote, bool(meet(what, circle, channel=GATHER, note=int(not self._written))))
            except DesyncError:
                self._parted = circle is self.circles[-1]
                raise
        if not wrote:
            self._join()

    def _join(self) -> None:
        """Somebody's forward wrote to parameters: give every rank what was written."""
        written, self._written = self._written, set()
        known = {shards.ident: shards for unit in self.units for shards in unit.shards}
        join(written, [known[ident] for ident in sorted(known)], self.circles[-1])

    def end_pass(self, root: str) -> None:
        """The root module has run forward. Without gradients no meeting follows in which ranks join what it wrote."""
        if not self._grad and not self.running and not in_backward():
            self.meet(f"end of {root}")

    @contextmanager
    def silent(self) -> Iterator[None]:
        """While every parameter is held whole, ranks need not agree on what they run."""
        self._silent += 1
        try:
            yield
        finally:
            self._silent -= 1

    def start(self, unit: Unit, phase: Phase) -> Use:
        """Make the unit's parameters available; they stay so until the use ends."""
        if phase is Phase.BACKWARD and not self._backward:
            self._unmet = 0  # a backward that raised may have left ranks with different counts
            self.meet(f"backward of {unit.name}")
        use = Use(unit)
        (self.running if phase is Phase.FORWARD else self._backward).append(use)
        try:
            self._fetch(use, phase)
        except BaseException as error:
            use.keep = False
            if phase is Phase.FORWARD:
                self.failed(use, error)
            else:
                self.end(use)
                self.tell(error, f"backward of {unit.name}")
            raise
        return use

    def _fetch(self, use: Use, phase: Phase) -> None:
        """Gather for ``use``, and ahead of those that follow it."""
        unit = use.unit
        step = self._advance(Visit(phase, unit.index))
        use.keep = step is not None and step.keep
        note = 0 if self.reductions is None else self.reductions.progress
        for shards in unit.shards:
            shards.start_gather(note)
        for other in () if step is None else step.fetch:
            for shards in self.units[other].shards:
                shards.start_gather(note)
        if step is not None:
            self._read_ahead()
        heard: int | None = None
        for shards in unit.shards:
            found = shards.finish_gather()
            heard = heard if found is None else found
            shards.hold()
            use.held.append(shards)
        if phase is Phase.BACKWARD and self.reductions is not None:
            self._compare_reductions(unit, self.reductions, heard)

    def _read_ahead(self) -> None:
        """Shards that live in files: let those that the next visit gathers be read while this unit runs."""
        steps, at = self._plans[self._grad], len(self._visits)
        if at < len(steps):
            for index in (steps[at].visit.unit, *steps[at].fetch):
                for shards in self.units[index].shards:
                    shards.read_ahead(shards.source)

    def is_open(self, use: Use) -> bool:
        return use in self.running or use in self._backward

    def _compare_reductions(self, unit: Unit, reductions: Reductions, heard: int | None) -> None:
        """Tell the reducer which reductions every rank has started: as ``heard`` in a gather, or asked now and then."""
        self._unmet = 0 if heard is not None else self._unmet + unit.numel
        if self._unmet >= REDUCTIONS_COMPARED_EVERY and self.group.speaks:
            self._unmet = 0
            heard = meet("backward goes on", self.group, channel=GATHER, note=reductions.progress)
        if heard is not None:
            reductions.reached_by_all(heard)

    def end(self, use: Use, returned: Iterable[Shards] = ()) -> None:
        """The use is over; frees what nobody holds, unless the plan keeps it or backward will soon read it.

        ``returned``: those of which the module gave a view to its caller, which holds them from now on.
        """
        if not self.is_open(use):
            return
        forward = use in self.running
        (self.running if forward else self._backward).remove(use)
        for shards in returned:
            self._hand_up(shards)
        if not forward and torch.is_grad_enabled():
            # The gradients have a graph of their own (a penalty on them follows), which reads the values again.
            for shards in use.held:
                self.keep_for_graph(shards, lambda: False)
        recomputed = forward and in_backward()  # its backward comes next
        self._let_go(use, free=not use.keep and not recomputed)

    def failed(self, use: Use, error: BaseException) -> None:
        """A forward raised: end it and, if nothing is left running, tell the peers."""
        depth = self.running.index(use) if use in self.running else len(self.running)
        self.unwind(depth, error, use.unit.name)

    def unwind(self, depth: int, error: BaseException, where: str) -> None:
        """As ``failed`` for all forwards in progress but the outermost ``depth``: compiled code skips the hooks that
        would have ended them."""
        while len(self.running) > depth:
            self.end(self.running[-1])
        if not self.running and not in_backward():
            self.tell(error, where)

    def tell(self, error: BaseException, where: str) -> None:
        """Tell the peers, who would wait for this rank, that it has raised; they may have, too."""
        if self._told or self._silent:
            return
        for circle in self._unaware(error):
            with suppress(RuntimeError):  # connections may be gone; the error itself says more
                said = f"{type(error).__name__} raised in {where}"
                self._told.append(leave(said, circle, channel=GATHER, patience=PATIENCE))

    def _unaware(self, error: BaseException) -> list[Group]:
        """The circles in which somebody waits for this rank and does not have ``error`` itself."""
        if isinstance(error, DesyncError):
            return (
                [] if self._parted else self.circles[1:]
            )  # heard in a gather, among those who share the shards
        if isinstance(error, CommunicationError) and self.group.hops is None:
            return self.circles[1:]  # every rank of the gather has it; in two hops only those of one node may
        return self.circles

    def fetch_for_use(self, shards: Shards, ask: bool = False) -> bool:
        """A function met ``shards`` while they are away: gather them if a module is running forward, and remember
        that it uses them. False outside of any forward. ``ask``: only say so."""
        if not self.running or ask:
            return bool(self.running)
        use = self.running[-1]
        use.unit.add(shards)
        shards.gather()
        shards.hold()
        use.held.append(shards)
        return True

    def expect_gradient(self, shards: Shards) -> None:
        """Backward is about to make the gradient of ``shards`` without its value."""
        use = Use(Unit(-1, "", []), [shards])
        shards.hold()
        shards.show_shape()
        self._loose.append(use)

        def arrived(_: torch.Tensor | None = None) -> None:
            if use in self._loose:
                self._loose.remove(use)
                self._let_go(use, free=True)

        self.until_settled.append(shards.param.register_post_accumulate_grad_hook(arrived))
        torch.autograd.Variable._execution_engine.queue_callback(arrived)  # if none comes

    def keep_for_graph(self, shards: Shards, needed: Callable[[], bool]) -> None:
        """A graph reads the value in its backward: inside a forward it is that module's from now on, else it stays,
        on every rank, while it is ``needed``, at most to the end of the micro-step."""
        if self.running:
            self.running[-1].unit.add(shards)
            return
        shards.holds += 1
        self._kept.append((shards, needed))

    def end_backward(self, step: bool = False) -> None:
        """A whole backward is over, or the micro-step is (``step``): as ``settle``, also for what graphs needed."""
        kept, self._kept = self._kept, []
        for shards, needed in kept:
            if not step and needed():
                self._kept.append((shards, needed))
            else:
                shards.holds -= 1
        self.settle()

    def settle(self) -> None:
        """End what backward or a forward that raised left open, and free what was fetched ahead and not used."""
        for use in (*self._backward, *self.running, *self._loose):
            self._let_go(use, free=False)
        for uses in (self._backward, self.running, self._loose):
            uses.clear()
        for unit in self.units:
            for shards in unit.shards:
                shards.release_if_idle()
        while self.until_settled:
            self.until_settled.pop().remove()
        self._sinks.clear()

    def _hand_up(self, shards: Shards) -> None:
        """Let the caller of a module hold what that module returned of a parameter."""
        if self.running:
            use = self.running[-1]
            use.unit.add(shards)
        else:
            use = Use(Unit(-1, "", []))
            self._loose.append(use)
        shards.hold()
        use.held.append(shards)

    def _let_go(self, use: Use, free: bool) -> None:
        for shards in use.held:
            if shards.writes.end(shards):
                self._wrote(shards)
            shards.holds -= 1
            shards.uses -= 1
            if free:
                shards.release_if_idle()
        use.held.clear()

    def _wrote(self, shards: Shards) -> None:
        everyone = self.circles[-1]
        if everyone.size > 1 and not everyone.speaks:
            shards.writes.edits = None
            raise UsageError(
                f"forward wrote into parameter '{shards.name}', and ranks have no gloo by which to tell each other. "
                "Fix: start with the backend 'cpu:gloo,cuda:nccl', keep the value in a buffer, or write between steps "
                "inside zero.GatheredParameters(param, modifier_rank=0)"
            )
        self._written.add(shards)

    def _advance(self, visit: Visit) -> Step | None:
        """Note the visit; the plan's step for it, or None where there is no plan (any more)."""
        if self._silent:  # ranks may differ in what they run here, and must not in their plans
            return None
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


def in_backward() -> bool:
    """Whether autograd is running a backward in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)
