"""``zero_grad`` of the torch optimizer that the user still holds: it clears what the engine has taken over too.

Its param groups hold the masters by now, whose gradients exist only in the middle of a step. The method is kept in the
optimizer's own ``__dict__``, so that its class stays as it is.
"""

from __future__ import annotations

import weakref
from functools import partial

import torch

from zeropipe.runtime.zero.hold.reducer import Reducer

_ZERO_GRAD = "zero_grad"


def install_zero_grad(optimizer: torch.optim.Optimizer, reducer: Reducer) -> None:
    """Let ``optimizer.zero_grad`` forget the window's gradients."""
    if _ZERO_GRAD not in optimizer.__dict__:
        # Users keep the optimizer longer than the engine.
        optimizer.__dict__[_ZERO_GRAD] = partial(_zero_grad, weakref.ref(optimizer), weakref.ref(reducer))


def remove_zero_grad(optimizer: torch.optim.Optimizer) -> None:
    """Undo ``install_zero_grad``."""
    if getattr(optimizer.__dict__.get(_ZERO_GRAD), "func", None) is _zero_grad:
        del optimizer.__dict__[_ZERO_GRAD]


def _zero_grad(
    optimizer_of: weakref.ref[torch.optim.Optimizer],
    reducer_of: weakref.ref[Reducer],
    set_to_none: bool = True,
) -> None:
    optimizer, reducer = optimizer_of(), reducer_of()
    if optimizer is not None:
        type(optimizer).zero_grad(optimizer, set_to_none)
    if reducer is not None:
        reducer.clear()
