"""Takes gradients as backward produces them and reduces them in buckets, in one order on all ranks.

A *window* is the time between two optimizer steps, a *pass* one backward in it. Stages 0 and 1 keep whole
gradients and reduce once per window; stages 2 and 3 reduce in every pass, add into their shard and free the rest.
Buckets are launched in one order on all ranks, whatever order backward takes: the last parameters first, and
from stage 2 on, where what waits costs memory, in the order in which the first backward of rank 0 completed them.

At stage 3 ranks also wait for each other in gathers, so in the middle of backward a reduction is waited for only
when every rank is known to have started it; a rank that lacks a gradient starts it at the end.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from zeropipe.comm.collectives import Work, broadcast
from zeropipe.comm.group import SELF, Group
from zeropipe.errors import UsageError
from zeropipe.layout.buckets import Bucket, Key, launch_order
from zeropipe.runtime.zero.hold.autograd import Arrivals, Watch, at_end_of_backward
from zeropipe.runtime.zero.hold.grads import GradStore
from zeropipe.runtime.zero.hold.partition import Partition
from zeropipe.runtime.zero.hold.policy import Conductor, Policy
from zeropipe.runtime.zero.hold.window import NEXT_PHASES, Phase
from zeropipe.runtime.zero.marks import z3_leaf_parameter
from zeropipe.runtime.zero.slot_stores import store_of
from zeropipe.runtime.zero.slots import Turn

_BUCKETS_PER_PASS = 2**24  # more than there are


@dataclass(slots=True)
class _Open:
    """A bucket of the current pass: the parameters it still waits for."""

    key: Key
    store: GradStore
    bucket: Bucket
    waiting: set[int] = field(default_factory=set)


class Reducer:
    """Hooks every trained parameter and drives the stores' buckets in one fixed order.

    ``is_boundary`` tells, when a pass begins, whether an optimizer step follows it. ``watch`` sees every local
    gradient before it is reduced. ``replicas``: the ranks that hold this rank's very shards (MiCS); their
    gradients are averaged once, when the window ends. ``keeps_own``: whether the window's gradients stay on their rank,
    for an optimizer that exchanges something else. ``before_clear`` may refuse that gradients are forgotten. ``turn``:
    where sums go by slots, which one's gradients arrive.
    """

    def __init__(
        self,
        policy: Policy,
        is_boundary: Callable[[], bool],
        watch: Watch | None = None,
        replicas: Group = SELF,
        keeps_own: Callable[[], bool] = lambda: False,
        before_clear: Callable[[], None] = lambda: None,
        turn: Turn | None = None,
    ) -> None:
        self.policy = policy
        self.watch = watch
        self.replicas = replicas
        self.turn = turn
        self.is_boundary = is_boundary
        self.keeps_own = keeps_own
        self._before_clear = before_clear
        self.stores: list[GradStore] = []
        self.arrivals: Arrivals[GradStore] = Arrivals(self)

        # What those add who are made later, see ``serve``.
        self._missing_factor: Callable[[], float] = lambda: 1.0
        self._at_boundary: Callable[[], None] = lambda: None
        self._conductor: Conductor | None = None

        # The window: what happened since the last step.
        self._phase = Phase.IDLE
        self.passes = 0  # finished ones, ever
        self._window_start = 0  # passes when the window began
        self._owes = True  # something may not have been reduced yet; the same on all ranks
        self._apart = False  # replicas hold different averages
        self._broken = ""  # the backward that raised

        # The pass in progress, and how it was begun: a plain backward says by itself when it ends.
        self._local_only = False
        self._explicit = False
        self._missing = 1.0  # factor of what arrives
        self._ending: weakref.ref[partial[None]] | None = None  # of a plain backward

        # Its buckets, in launch order; many on their way would hold more gradients than they hide.
        self._order: list[_Open] = []
        self._place: dict[GradStore, dict[int, _Open]] = {}  # store, parameter -> its bucket
        self._next = 0  # the first that is not launched
        self._in_flight: deque[Work] = deque()
        self._at_once = self._waited = 0  # how many may be; how many are reduced
        self._common = 0  # stage 3: how many every rank is known to have launched
        self._complete: list[Key] = []  # in the order in which they became so
        self._learned: tuple[Key, ...] = ()  # the same on rank 0 in an earlier pass
        self._reduced_passes = 0  # that reduced, ever: ranks share those

    @property
    def window_is_empty(self) -> bool:
        """Whether no backward ran since the last step; the same on all ranks."""
        return self.passes == self._window_start and not self._open

    @property
    def progress(self) -> int:
        """A number that grows with each bucket launched, over all passes that reduce: ranks share those."""
        return self._reduced_passes * _BUCKETS_PER_PASS + (self._next if self._phase is Phase.REDUCING else 0)

    def reached_by_all(self, progress: int) -> None:
        """Every rank has come as far as ``progress``, then or since."""
        passes, launched = divmod(progress, _BUCKETS_PER_PASS)
        if passes == self._reduced_passes:
            self._common = max(self._common, launched)
            self._wait_down_to(self._at_once)

    @property
    def _open(self) -> bool:
        """Whether a pass is in progress."""
        return self._phase in (Phase.ADDING, Phase.REDUCING)

    def _turn(self, to: Phase) -> None:
        assert to in NEXT_PHASES[self._phase], f"{self._phase} cannot become {to}"
        self._phase = to

    def use(self, begins: bool) -> None:
        """A step begins to use the gradients, so that no backward may add to them; or it is over, if one had begun."""
        if begins or self._phase is Phase.IN_USE:
            self._turn(Phase.IN_USE if begins else Phase.IDLE)

    def serve(
        self,
        missing_factor: Callable[[], float] | None = None,
        at_boundary: Callable[[], None] | None = None,
        conductor: Conductor | None = None,
    ) -> None:
        """What those add who are made later. ``missing_factor``: what gradients that nobody scaled for this optimizer
        must be multiplied by, asked as a pass begins. ``at_boundary`` is called, on all ranks, once a window is
        reduced. ``conductor``: stage 3's order among gathers."""
        self._missing_factor = missing_factor or self._missing_factor
        self._at_boundary = at_boundary or self._at_boundary
        self._conductor = conductor or self._conductor

    def add(self, partition: Partition) -> GradStore:
        """Hook the partition's parameters and return the store of their gradients."""
        store = store_of(partition, self.policy, self.turn)
        self.stores.append(store)
        self._order, self._learned = [], ()
        self.arrivals.listen(store, partition.params)
        return store

    @contextmanager
    def local_only(self) -> Iterator[None]:
        """Inside, gradients accumulate on this rank and nothing is reduced."""
        self.settle()
        before, self._local_only = self._local_only, True
        try:
            yield
        finally:
            self._local_only = before

    def reduce_now(self) -> None:
        """Reduce what is left on this rank. Collective; nothing to do where no backward ran since the last step."""
        if not self.window_is_empty:
            self.refuse_broken()
            self.finish_window()

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Around one backward: the pass ends with the block, also when no parameter got a gradient."""
        self.settle()
        before, self._explicit, passes = self._explicit, True, self.passes
        try:
            yield
            self._begin()
            self.finish_pass()
        except BaseException as error:
            if self._open or self.passes != passes:  # else no pass has begun, and nothing was added
                self._broken = type(error).__name__
            if self._conductor is not None:
                self._conductor.tell(error, "backward")
            raise
        finally:
            self._explicit = before
            self.arrivals.stop()

    def settle(self) -> None:
        """End a pass that is still open, which outside of a backward it only is where that has raised."""
        if not self._open:
            return
        if not _in_backward() or not (self._explicit or self._ends()):
            self._broken = self._broken or "an exception"
        self.finish_pass()

    def refuse_broken(self) -> None:
        """Raise UsageError if a backward of the window raised: nobody knows what it has added."""
        self.settle()
        if self._broken:
            raise UsageError(
                f"a backward since the last step ended with {self._broken}, and its gradients are incomplete",
                fix="call engine.zero_grad(), on every rank, and run the forwards and backwards since that step again",
            )

    def finish_pass(self) -> None:
        """End the pass in progress, if any: launch what is left, wait for all."""
        if not self._open:
            return
        self.arrivals.stop()
        reduced = self._phase is Phase.REDUCING
        if reduced:
            # Where it raises the pass is still open: some reductions are under way.
            if self._conductor is not None:
                self._conductor.meet("end of backward")
            self._reduced_passes += 1
            self._common = len(self._order)
            while self._next < len(self._order):
                self._launch_next()
            self._wait_down_to(0)
            self._learn()
            for store in self.stores:
                store.settle()
        for store in self.stores:
            store.show(reduced)
        self._turn(Phase.IDLE)
        self._owes = not reduced
        self._apart = self._apart or reduced
        self.passes += 1

    def finish_window(self) -> None:
        """Leave the reduced gradients of the whole window in the stores' shards.

        Also where a backward has raised: in a pipeline that rank joins what the others reduce, and then says so.
        """
        self.settle()
        for store in self.stores:
            store.take_changes()
        if self._conductor is not None:
            self._conductor.meet("gradients of a step")
        if self.turn is not None:
            self._owes = self.turn.end_window(self.keeps_own()) or self._owes
        if self._owes:
            self._begin(force=True)
            self.finish_pass()
        if self._apart:
            for store in self.stores:
                store.average_over(self.replicas)
            self._apart = False
        self._at_boundary()

    def clear(self) -> None:
        """Forget the window's gradients."""
        self._before_clear()
        self.settle()
        self._broken = ""
        self._owes, self._apart = True, False
        self._window_start = self.passes
        if self.watch is not None:
            self.watch.clear()
        for store in self.stores:
            store.clear()

    def is_ready(self, store: GradStore, index: int) -> bool:
        """Whether a gradient may be added to ``.grad`` as it is."""
        if not self._open or self._missing != 1.0:
            return False
        if not self._explicit and not self._ends():
            return False
        return self._phase is Phase.ADDING or index in self._place[store][index].waiting

    def expect(self, store: GradStore, index: int) -> float:
        """A gradient is about to be added to ``.grad``; returns what it must be multiplied by."""
        if self._open and not self._explicit and not self._ends():
            self.settle()
        if self._phase is Phase.REDUCING and index not in self._place[store][index].waiting:
            self.finish_pass()  # a second gradient in one pass: re-entrant backward
        self._begin()
        return self._missing

    def take(self, store: GradStore, index: int, grad: torch.Tensor | None) -> None:
        """Take over what is in ``.grad``; None: this rank adds nothing to the sum."""
        if self.watch is not None and grad is not None:
            self.watch.look(store.partition.names[index], grad)
        if self._phase is not Phase.REDUCING:
            # Where the dtype is the parameter's own, autograd itself adds up a sharded store's gradients.
            if grad is not None and (store.takes_all or store.dtype != store.partition.dtype):
                store.accept(index, grad, keep_grad=store.keeps_whole)
            return
        if grad is not None:
            store.accept(index, grad, keep_grad=False)
        bucket = self._place[store][index]
        bucket.waiting.discard(index)
        if bucket.waiting:
            return
        # It may go, but only as the next of the one order: what is complete before its turn waits.
        self._complete.append(bucket.key)
        while self._next < len(self._order) and not self._order[self._next].waiting:
            self._launch_next()

    def _ends(self) -> bool:
        """Whether the plain backward that opened the pass is still to end."""
        return self._ending is not None and self._ending() is not None

    def _begin(self, force: bool = False) -> None:
        if self._open:
            return
        if self._phase is Phase.IN_USE:
            raise UsageError(
                "backward: the last step raised before it was done, and its gradients are in use",
                fix="call step() again, which goes on where it stopped, or zero_grad() to give it up",
            )
        inside = _in_backward()
        self._missing = self._missing_factor() if inside else 1.0
        self._ending = None
        if inside and not self._explicit:
            self._ending = at_end_of_backward(self.finish_pass, self.arrivals.stop)
        if inside and self._missing == 1.0:
            self.arrivals.let_through()
        local = self._local_only
        wanted = force or not (self.stores[0].waits(local, self.is_boundary()) if self.stores else local)
        if self.turn is not None and not force:
            self.turn.begin_pass()
        self._turn(Phase.REDUCING if wanted and not self.keeps_own() else Phase.ADDING)
        for store in self.stores:
            store.reopen()
        if self._phase is not Phase.REDUCING:
            return
        if not self._order:
            self._plan()
        for entry in self._order:
            entry.waiting.update(entry.bucket.tensors)
        self._next, self._waited, self._common, self._complete = 0, 0, 0, []

    def _plan(self) -> None:
        """Lay down the order of the buckets for this pass and those that follow it."""
        late = {
            (at, number)
            for at, store in enumerate(self.stores)
            for number, bucket in enumerate(store.buckets)
            if any(z3_leaf_parameter(store.partition.params[index]) for index in bucket.tensors)
        }
        for key in launch_order([len(store.buckets) for store in self.stores], late, self._learned):
            self._order.append(_Open(key, self.stores[key[0]], self.stores[key[0]].buckets[key[1]]))
        of = [(store, [entry for entry in self._order if entry.store is store]) for store in self.stores]
        self._place = {store: {index: o for o in own for index in o.bucket.tensors} for store, own in of}
        self._at_once = min((o.store.most_in_flight(o.bucket) for o in self._order), default=2)

    def _launch_next(self) -> None:
        entry = self._order[self._next]
        self._next += 1
        for index in sorted(entry.waiting):  # no gradient in this pass; maybe an earlier, unreduced one
            grad = entry.store.partition.params[index].grad
            if grad is not None:
                entry.store.accept(index, grad, keep_grad=False)
        self._wait_down_to(self._at_once - 1)
        self._in_flight.append(entry.store.launch(entry.bucket, self.is_boundary()))
        if not self.policy.overlap_comm:
            self._wait_down_to(0)

    def _wait_down_to(self, left: int) -> None:
        """Wait until no more than ``left`` reductions are in flight, or the next one may lack a peer."""
        # Why it may be waited for: all ranks launch in one order, so who has launched it needs nobody who waits for a
        # later one. At stage 3 a peer may stand in a gather before it launches, which waits for this rank: there only
        # what all are known to have launched ends by itself, and the rest is left for the end of the pass.
        while len(self._in_flight) > left:
            # Where ranks tell each other nothing (no gloo), the backend knows at least what has arrived.
            sure = self._conductor is None or self._waited < self._common
            if not (sure or self._in_flight[0].done()):
                return
            self._in_flight.popleft().wait()
            self._waited += 1

    def _learn(self) -> None:
        """Take over the order in which rank 0's backward completed its buckets, once."""
        if self._learned or not self.policy.shards_gradients or len(self._order) < 2:
            return
        store = self.stores[0]
        keys = [entry.key for entry in self._order]
        places = {key: at for at, key in enumerate(keys)}
        order = torch.full((len(keys),), -1, dtype=torch.int64, device=store.partition.device)
        came = [places[key] for key in self._complete]
        order[: len(came)] = torch.tensor(came, dtype=torch.int64)
        broadcast(order, 0, store.partition.group, label="order of gradients")
        self._learned = tuple(keys[place] for place in order.tolist() if place >= 0)
        self._order = []


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
