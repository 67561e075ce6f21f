"""What happens as gradients arrive: the two hooks on each trained parameter, the end of a backward, and what is noted.

    gradient arrives          expect(): the pass is opened, room is made in ``.grad``, and it gets the factor it lacks
    autograd adds it up
    it is in ``.grad``        take(): it is taken over

Most gradients need nothing of the kind: while a pass says so, one look into a set lets the first of each parameter
through (``let_through``). Neither hook is seen by the garbage collector: it must not be what keeps an optimizer alive.

A backward ends where the outermost one does, if a re-entrant checkpoint runs others inside of it:

    loss.backward()                     autograd calls back at the end of the backward in which one asks:
      CheckpointFunction.backward       a hook in here would be called at the end of
        torch.autograd.backward         this one, once per checkpoint
          hook of a parameter

Nothing here decides what becomes of a gradient: that is the reducer's.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from enum import Enum
from typing import Any, Protocol

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward, get_gradient_edge

from zeropipe.comm.collectives import all_gather_object
from zeropipe.comm.group import Group
from zeropipe.runtime.zero.hold.grads import GradStore
from zeropipe.tensor.norms import NonFinite, all_finite, earliest


class Phase(Enum):
    """What may be done with the window's gradients now.

    IDLE --a backward begins--> ADDING or REDUCING --it ends--> IDLE --a step begins--> IN_USE --it is over--> IDLE
    """

    IDLE = "between backwards"
    ADDING = "a pass, whose gradients stay on their rank"
    REDUCING = "a pass, whose buckets leave as they are complete"
    IN_USE = "a step has begun to use them: none may be added"


NEXT_PHASES = {
    Phase.IDLE: {Phase.ADDING, Phase.REDUCING, Phase.IN_USE},
    Phase.ADDING: {Phase.IDLE},
    Phase.REDUCING: {Phase.IDLE},
    Phase.IN_USE: {Phase.IDLE},
}


class Taker(Protocol):
    """Who takes gradients over."""

    def is_ready(self, store: GradStore, index: int) -> bool:
        """Whether a gradient may be added as it is: there is nothing to ``expect``."""

    def expect(self, store: GradStore, index: int) -> float:
        """A gradient is about to be added; returns what it must be multiplied by."""

    def take(self, store: GradStore, index: int) -> None:
        """It is in ``.grad``."""


class Arrivals:
    """The hooks on the parameters of all stores of one ``taker``."""

    def __init__(self, taker: Taker) -> None:
        self._taker = weakref.ref(taker)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # By store: the parameters whose next gradient may be added as it is, and how many there are.
        self._free: list[tuple[set[int], int]] = []

    def listen(self, store: GradStore) -> None:
        params, free = store.partition.params, set[int]()
        self._free.append((free, len(params)))
        for index, param in enumerate(params):
            before, after = self._expect(store, index, free), self._take(store, index)
            self._handles.append(param.register_hook(before))
            self._handles.append(param.register_post_accumulate_grad_hook(after))

    def let_through(self) -> None:
        """The next gradient of each parameter lacks nothing, and finds the pass open."""
        for free, count in self._free:
            free.update(range(count))

    def stop(self) -> None:
        """The taker is asked about each gradient again."""
        for free, _ in self._free:
            free.clear()

    def remove(self) -> None:
        self._free.clear()
        while self._handles:
            self._handles.pop().remove()

    def _expect(
        self, store: GradStore, index: int, free: set[int]
    ) -> Callable[[torch.Tensor | None], torch.Tensor | None]:
        taker, store_of = self._taker, weakref.ref(store)

        # None: a custom function said that there is none.
        def before(grad: torch.Tensor | None) -> torch.Tensor | None:
            if index in free:
                free.remove(index)
                return None
            taken_by, store = taker(), store_of()
            if taken_by is None or store is None or taken_by.is_ready(store, index):
                return None
            if not _will_be_added(store.partition.params[index]):
                return None
            factor = taken_by.expect(store, index)
            # A new tensor: another parameter's gradient, or a user, may share autograd's memory.
            return None if grad is None or factor == 1.0 else grad * factor

        return before

    def _take(self, store: GradStore, index: int) -> Callable[[torch.nn.Parameter], None]:
        taker, store_of = self._taker, weakref.ref(store)

        def after(_: torch.nn.Parameter) -> None:
            taken_by, store = taker(), store_of()
            if taken_by is not None and store is not None:
                taken_by.take(store, index)

        return after


def _will_be_added(param: torch.nn.Parameter) -> bool:
    """Whether the gradient that is at ``param`` goes on into ``.grad``; ``torch.autograd.grad`` takes it before."""
    with torch._C.DisableTorchFunctionSubclass():
        node = get_gradient_edge(param).node
    try:
        will: bool = torch._C._will_engine_execute_node(node)  # type: ignore[attr-defined]
    except RuntimeError:  # how it says that this is torch.autograd.grad
        return False
    return will


_RUN = _engine_run_backward.__code__
_NODE = BackwardCFunction.apply.__code__


class Ending:
    """What is called. Autograd alone holds it, so that it is gone uncalled where the backward raises."""

    __slots__ = ("__weakref__", "_then")

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    def __call__(self) -> None:
        self._then()


def at_end_of_backward(then: Callable[[], None], gone: Callable[[], None]) -> weakref.ref[Ending]:
    """Inside a backward: call ``then`` when it ends, and ``gone`` after that or when it raised.

    Returns a reference that is dead from then on.
    """
    ending = Ending(then)
    _queue(ending)
    return weakref.ref(ending, lambda _: gone())


def _queue(ending: Ending) -> None:
    outer = _enclosing_node()
    following = [] if outer is None else [node for node, _ in outer.next_functions if node is not None]
    if not following:
        torch.autograd.Variable._execution_engine.queue_callback(ending)
        return

    # What autograd runs after the node in which this backward was started, it runs in the backward around it.
    def outside(_: Any) -> None:
        handle.remove()
        _queue(ending)

    handle = following[0].register_prehook(outside)


def _enclosing_node() -> Any:
    """The node of a custom function in whose backward the present backward was started; None at the outermost."""
    frame, inside = sys._getframe(), False
    while frame is not None:
        if frame.f_code is _RUN:
            inside = True
        elif inside and frame.f_code is _NODE:
            return frame.f_locals["self"]
        frame = frame.f_back  # type: ignore[assignment]
    return None


class Watch:
    """Looks at each local gradient of a window before it is reduced, so that the rank is still known."""

    def __init__(self, group: Group, micro_step: Callable[[], int]) -> None:
        self._group = group
        self._micro_step = micro_step
        self._seen: list[
            tuple[str, int, int, torch.Tensor]
        ] = []  # name, numel, micro-step, (inf, NaN) counts

    def look(self, name: str, grad: torch.Tensor) -> None:
        if grad.is_sparse:
            grad = grad.coalesce().values()  # of an embedding: repeated rows are added first
        if grad.device.type == "cpu" and bool(all_finite(grad)):
            return
        counts = torch.stack([torch.isinf(grad).sum(), torch.isnan(grad).sum()])
        self._seen.append((name, grad.numel(), self._micro_step(), counts))

    def clear(self) -> None:
        self._seen.clear()

    def find(self) -> NonFinite | None:
        """The earliest bad gradient of all ranks in this window; collective, the same on every rank."""
        rank = self._group.ranks[self._group.rank]
        mine = None
        for name, numel, micro_step, counts in self._seen:
            num_inf, num_nan = counts.tolist()
            if num_inf or num_nan:
                mine = NonFinite(name, num_inf, num_nan, numel, rank, micro_step)
                break
        return earliest(all_gather_object(mine, self._group, label="overflow"))
