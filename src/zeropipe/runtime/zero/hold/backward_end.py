"""Calls back when a backward ends: the outermost one, where a re-entrant checkpoint runs others inside of it.

loss.backward()                     autograd calls back at the end of the backward in which one asks:
  CheckpointFunction.backward       a hook in here would be called at the end of
    torch.autograd.backward         this one, once per checkpoint
      hook of a parameter
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward

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
