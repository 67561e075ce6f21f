"""Gathers the parameters of each unit before it runs and frees them after, along a plan made from the last step.

The first step records the order of visits; later steps replay it with gathers started ahead of use. A step that
visits something else goes on without the plan, and its own order is the next plan.

No rank waits for ever. Ranks tell each other in one sequence what they are about to do: gather a parameter, begin
forward or backward, reduce what is left, step, or raise an error (``meet``, ``guarded``). A rank that hears
another word than its own stops with a DesyncError. Whatever else blocks on a peer (reductions, the norm of a step)
comes after such a meeting, so that every peer is on its way to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from zeropipe.comm.agreement import meet
from zeropipe.comm.group import Group
from zeropipe.errors import UsageError
from zeropipe.runtime.zero.gather.edits import join
from zeropipe.runtime.zero.gather.fetch_plan import Budget, Phase, Recorder, Step, Visit
from zeropipe.runtime.zero.gather.own_shard import start_gathers
from zeropipe.runtime.zero.gather.shards import Hold, Shards, begin_uses, end_uses
from zeropipe.runtime.zero.param import GATHER, State
from zeropipe.runtime.zero.peers import Peers

# Elements that backward used without a gather in which ranks hear of each other.
REDUCTIONS_COMPARED_EVERY = 2**21


class Unit:
    """A module whose sharded parameters are gathered together."""

    def __init__(self, index: int, name: str) -> None:
        self.index, self.name = index, name
        self.shards: dict[Shards, None] = {}  # own ones, and external ones that it was seen to use, in order
        self.numel = 0  # of those that are gathered for it
        self.visits = {phase: Visit(phase, index) for phase in Phase}

    def add(self, shards: Shards) -> None:
        if shards not in self.shards:
            self.shards[shards] = None
            self.measure()

    def measure(self) -> int:
        self.numel = sum(s.numel for s in self.shards if not s.persist)
        return self.numel


class Use:
    """One run of a unit, forward or backward: what it holds until it ends."""

    __slots__ = ("held", "keep", "open", "unit")

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.held: list[Shards] = []
        self.keep = False  # what it holds is used again soon
        self.open = True

    def hold(self, shards: Shards) -> None:
        self.held.append(shards)
        begin_uses((shards,))


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
        self.everyone = group if everyone is None else everyone
        self.budget = budget
        self.units: list[Unit] = []
        self._recorder = Recorder()

        # What ranks have to agree on: where they are, which reductions they have started, what forwards wrote.
        self.peers = Peers(group, self.everyone)
        self.tell, self.silent = self.peers.tell, self.peers.silence
        self.reductions: Reductions | None = None
        self._met_backward = False  # in which they are now
        self._unmet = 0  # elements used in backward since the ranks last compared their reductions
        self._written: set[Shards] = set()  # on this rank, not joined with the others yet

        # Who holds what. A use ends by a hook or, after an error, when the micro-step settles.
        self.running: list[Use] = []  # forwards in progress, innermost last
        self._backward: list[Use] = []  # backward uses that have not ended
        self._loose: list[Use] = []  # hold what a root returned of its parameters, or what awaits a gradient
        # What graphs read that were made outside of any module, and whether they still may.
        self._kept: list[tuple[Hold, Callable[[], bool]]] = []

        # What autograd holds for one pass; hooks, on tensors that outlive it.
        self._sinks: list[object] = []  # see ``_gradient_sink``
        self.until_settled: list[RemovableHandle] = []

    def add_unit(self, name: str, shards: Iterable[Shards]) -> Unit:
        unit = Unit(len(self.units), name)
        for one in shards:
            unit.add(one)
            one.conduct(self)
        self.units.append(unit)
        return unit

    @property
    def fetch_plan(self) -> tuple[Step, ...]:
        """The plan of a training step; empty before the first one is over."""
        return self._recorder.plans.get(True, ())

    # ---- a pass, and where ranks meet in it ----

    def begin_pass(self, root: str) -> None:
        """The root is about to run forward; nothing to do inside a pass (recursion, a second forward)."""
        if self.running or in_backward():
            return
        try:
            self.settle()
            self.meet(f"forward of {root}")
            self.peers.promise()
        except BaseException as error:
            self.tell(error, root)
            raise
        grad, replay = torch.is_grad_enabled(), not self.peers.silent
        self._recorder.begin(grad, replay, lambda: [unit.measure() for unit in self.units], self.budget)
        if grad and not self.fetch_plan:
            # Needed in the first pass only: later ones gather such a parameter before its user runs.
            every = (shards for unit in self.units for shards in unit.shards)
            self._sinks = [_gradient_sink(shards) for shards in every if shards.param.requires_grad]

    def end_pass(self, root: str) -> None:
        """The root module has run forward. Without gradients no meeting follows in which ranks join what it wrote."""
        if not self._recorder.grad and not self.running and not in_backward():
            self.meet(f"end of {root}")

    def meet(self, what: str) -> None:
        """Go on when every rank is about to do ``what``; DesyncError when one is not."""
        self._met_backward = False
        if self.peers.silent or self.peers.meet(what, note=int(not self._written)):
            return
        # Somebody's forward wrote to parameters: give every rank what was written.
        written, self._written = self._written, set()
        known = {shards.ident: shards for unit in self.units for shards in unit.shards}
        join(written, [known[ident] for ident in sorted(known)], self.everyone)

    # ---- a use of a unit ----

    def start(self, unit: Unit, phase: Phase) -> Use:
        """Make the unit's parameters available; they stay so until the use ends."""
        if phase is Phase.BACKWARD and not self._met_backward:
            # The word names no unit: ranks may begin with others whose parameters stay gathered. A backward that raised
            # may have left them with different counts.
            self.meet("backward")
            self._met_backward, self._unmet = True, 0
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
        unit, heard = use.unit, None
        # In silence ranks may differ in what they run here, and must not in their plans. A unit for which nothing is
        # gathered is no visit either: ranks may differ in which modules with persistent parameters they run.
        planned = unit.numel > 0 and not self.peers.silent
        step = self._recorder.visit(unit.visits[phase]) if planned else None
        fetch, use.keep = ((), False) if step is None else (step.fetch, step.keep)
        every = list(unit.shards)
        away = [shards for shards in every if shards.state is not State.WHOLE]
        if away or fetch:
            # [1] All of it is under way before any is waited for. The note tells peers which reductions have begun.
            note = 0 if self.reductions is None else self.reductions.progress
            wanted = [every, *(self.units[index].shards for index in fetch)]
            start_gathers(wanted, note, self.budget.together, early=True)
            # [2] Shards that live in files: let those that the next visit gathers be read while this unit runs.
            for index in self._recorder.next_fetched():
                for shards in self.units[index].shards:
                    shards.own.read_ahead(shards.source)
            # [3] Waiting is safe: a gather first compares words, and a peer that goes elsewhere says another one or
            # leaves. What peers need of this rank in gathers that it has started is handed on as it meets them.
            for shards in away:
                found = shards.finish_gather()
                heard = heard if found is None else found
        # [4] From here on writes are noticed, and nobody frees it.
        use.held = every
        begin_uses(every)
        if phase is Phase.BACKWARD and self.reductions is not None:
            self._compare_reductions(unit, self.reductions, heard)

    def _compare_reductions(self, unit: Unit, reductions: Reductions, heard: int | None) -> None:
        """Tell the reducer which reductions every rank has started: as ``heard`` in a gather, or asked now and then."""
        # Only a reduction that every rank has started may be waited for: of a later one a peer, which waits for this
        # rank in a gather, may not have sent its part. Where nothing is gathered for long gradients would pile up; not
        # on backends that know what has arrived, where a host that waits for all others would leave its device idle.
        self._unmet = 0 if heard is not None else self._unmet + unit.numel
        if self._unmet >= REDUCTIONS_COMPARED_EVERY and self.group.has_tags:
            self._unmet = 0
            heard = meet("backward goes on", self.group, channel=GATHER, note=reductions.progress)
        if heard is not None:
            reductions.reached_by_all(heard)

    def end(self, use: Use, returned: Iterable[Shards] = ()) -> None:
        """The use is over; frees what nobody holds, unless the plan keeps it or backward will soon read it.

        ``returned``: those of which the module gave a view to its caller, which holds them from now on.
        """
        if not use.open:
            return
        forward = use in self.running
        (self.running if forward else self._backward).remove(use)
        for shards in returned:  # by the caller's module, which so uses them, or by whoever called the root
            outer = self.running[-1] if self.running else Use(Unit(-1, ""))
            outer.unit.add(shards)
            outer.hold(shards)
            if not self.running:
                self._loose.append(outer)
        if not forward and torch.is_grad_enabled():
            # The gradients have a graph of their own (a penalty on them follows), which reads the values again.
            for shards in use.held:
                self.keep_for_graph(shards, lambda: False)
        # A checkpoint runs this forward inside the backward: that of the unit comes next.
        self._let_go(use, free=not use.keep and not (forward and in_backward()))

    def failed(self, use: Use, error: BaseException) -> None:
        """A forward raised: end it and, if nothing is left running, tell the peers."""
        self.unwind(self.running.index(use) if use in self.running else None, error, use.unit.name)

    def unwind(self, depth: int | None, error: BaseException, where: str) -> None:
        """As ``failed`` for all forwards in progress but the outermost ``depth``: compiled code skips the hooks that
        would have ended them."""
        # Peers are told by the outermost alone: an exception that a module handles inside is nobody's business.
        while depth is not None and len(self.running) > depth:
            self.end(self.running[-1])
        if not self.running and not in_backward():
            self.tell(error, where)

    # ---- uses that no hook foresees ----

    def fetch_for_use(self, shards: Shards) -> bool:
        """A function met ``shards`` while they are away: gather them if a module is running forward, and remember
        that it uses them. False outside of any forward."""
        if not self.running:
            return False
        use = self.running[-1]
        use.unit.add(shards)
        shards.gather()
        use.hold(shards)
        return True

    def expect_gradient(self, shards: Shards) -> None:
        """Backward is about to make the gradient of ``shards`` without its value."""
        use = Use(Unit(-1, ""))
        use.hold(shards)
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
        self._kept.append((shards.hold(), needed))

    def end_backward(self, step: bool = False) -> None:
        """A whole backward is over, or the micro-step is (``step``): as ``settle``, also for what graphs needed."""
        # Every rank asks here, and ranks run the same graphs, so that they free the same.
        kept, self._kept = self._kept, []
        for hold, needed in kept:
            if not step and needed():
                self._kept.append((hold, needed))
            else:
                hold.release(free=False)
        self.settle()

    def settle(self) -> None:
        """End what backward or a forward that raised left open, and free what was fetched ahead and not used."""
        for uses in (self._backward, self.running, self._loose):
            for use in uses:
                self._let_go(use, free=False)
            uses.clear()
        self._met_backward = False
        self.peers.withdraw()
        # All units, not those of this pass: users gather parameters by hand, too.
        here = [one for unit in self.units for one in unit.shards if one.state is not State.AWAY]
        for shards in here:
            shards.release_if_idle()
        while self.until_settled:
            self.until_settled.pop().remove()
        self._sinks.clear()

    def _let_go(self, use: Use, free: bool) -> None:
        held, use.held, use.open = use.held, [], False
        end_uses(held, free, self._wrote)

    def _wrote(self, shards: Shards) -> None:
        if self.everyone.size > 1 and not self.everyone.speaks:
            shards.own_writes.drop()
            raise UsageError(
                f"forward wrote into parameter '{shards.name}', and ranks have no gloo by which to tell each other",
                fix="start with the backend 'cpu:gloo,cuda:nccl', keep the value in a buffer, or write between steps "
                "inside zero.GatheredParameters(param, modifier_rank=0)",
            )
        self._written.add(shards)


def _gradient_sink(shards: Shards) -> object:
    """Autograd's node for a parameter's gradient, made while it shows its whole shape.

    A custom function is bound to the node of a parameter before its forward asks for the value, and autograd checks
    the gradient against the shape that the node was made with. As long as somebody keeps a node it is the one that
    is used.
    """
    shards.show_shape()
    try:
        with torch._C.DisableTorchFunctionSubclass():
            return get_gradient_edge(shards.param).node
    finally:
        shards.release_if_idle()


def in_backward() -> bool:
    """Whether autograd is running a backward in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)
