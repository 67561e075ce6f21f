"""The two hooks on each trained parameter: before autograd adds a gradient to ``.grad``, and after.

    gradient arrives          expect(): the pass is opened, room is made in ``.grad``, and it gets the factor it lacks
    autograd adds it up
    it is in ``.grad``        take(): it is taken over

Most gradients need nothing of the kind: while a pass says so, one look into a set lets the first of each parameter
through (``let_through``). Neither hook is seen by the garbage collector: it must not be what keeps an optimizer alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch.autograd.graph import get_gradient_edge

from zeropipe.runtime.zero.hold.grads import GradStore


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
