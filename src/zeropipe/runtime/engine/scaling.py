"""What factor a gradient carries when it arrives at a parameter, and what is missing to the one it should carry.

An engine takes gradients over in units of its *factor*: loss scale / accumulation steps. ``engine.backward`` puts
that factor on the loss. A plain ``loss.backward()`` puts none on, so the engine multiplies what arrives at its
parameters, and ``torch.autograd.grad``, ``torch.func`` and other models see true gradients.

What is under way      arrives as      multiplied by
nothing (plain)        true            factor; an error in fp16, whose small gradients are lost by then
own backward           x own factor    1
another engine's       x its factor    factor / its factor

What an engine is fed from outside (a leaf, or the output of a plain module) gets a true gradient: the factor of the
backward is taken off there.

So engines must know of each other's backwards, which one list per process holds (``BACKWARDS``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from zeropipe.errors import UsageError
from zeropipe.given import Tree
from zeropipe.runtime.zero.param import is_trained


@dataclass(slots=True, eq=False, weakref_slot=True)
class ScaledBackward:
    """A backward under way whose loss was multiplied by ``factor``; ``scale``: the loss scale in it.

    ``due``: the part of ``factor`` that is ``owner``'s own; another engine's ``scale`` may have added the rest.
    """

    owner: Scaling
    due: float
    factor: float
    scale: float
    known: object = None  # the node of the loss; if it is one of ``scale``, that is in ``factor``

    def __call__(self) -> None:
        BACKWARDS.end(self)


class Backwards:
    """The scaled backwards under way in this process."""

    def __init__(self) -> None:
        # Each lives as long as whoever started it holds it: one that raised inside of autograd has nobody to end it.
        self._running: list[weakref.ref[ScaledBackward]] = []

    def begin(self, backward: ScaledBackward) -> None:
        self._running.append(weakref.ref(backward))

    def end(self, backward: ScaledBackward) -> None:
        # Said, and not left to the reference: a traceback may still hold it.
        alive = [(one, one()) for one in self._running]
        self._running = [one for one, found in alive if found is not None and found is not backward]

    def latest(self) -> ScaledBackward | None:
        """The innermost; None while no scaled backward is under way."""
        alive = (found for one in reversed(self._running) if (found := one()) is not None)
        return next(alive, None)


BACKWARDS = Backwards()


class Scaling:
    """The factor of one engine. ``loss_scale`` and ``accumulation_steps`` are asked when they are needed."""

    def __init__(self, loss_scale: Callable[[], float], accumulation_steps: Callable[[], int]) -> None:
        self.loss_scale = loss_scale
        self.accumulation_steps = accumulation_steps

    @property
    def factor(self) -> float:
        return self.loss_scale() / self.accumulation_steps()

    def enter(self, inputs: Tree) -> None:
        """Have gradients leave through ``inputs`` (any nest of containers that torch's pytree knows) as true ones."""
        # What was computed from parameters of an engine is none of the outside: there they are converted on arrival.
        if self.factor == 1.0 or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad and not _leads_to_engine(tensor):
                hooks = tensor._backward_hooks
                if hooks is None or _take_off not in hooks.values():
                    tensor.register_hook(_take_off)

    def scaled(self, loss: torch.Tensor, factor: float) -> torch.Tensor:
        """``factor`` times ``loss``."""
        # In fp32 at least: the scaled loss of an fp16 model would overflow by itself.
        wide = loss if loss.dtype in (torch.float32, torch.float64) else loss.float()
        return loss if factor == 1.0 else wide * factor

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss as ``engine.backward`` would scale it; a backward through it is known to be scaled."""
        factor = self.factor
        scaled: torch.Tensor = _Mark.apply(self.scaled(loss, factor), self, factor, self.loss_scale())
        return scaled

    @contextmanager
    def running(self, factor: float, loss: torch.Tensor | None = None) -> Iterator[None]:
        """Around a backward of ``factor`` times ``loss``; raises UsageError if this engine scaled ``loss`` already."""
        node: Any = None if loss is None else loss.grad_fn
        backward = ScaledBackward(self, factor, factor, self.loss_scale(), node)
        if hasattr(node, "scaling"):  # made by ``scale``
            # Another engine's factor is in the loss already: what arrives here carries both.
            if node.scaling is self:
                raise UsageError(
                    "engine.backward: the loss went through engine.scale already and would be scaled twice. Fix: call "
                    "engine.backward(loss) on the loss itself, or engine.scale(loss).backward()"
                )
            backward.factor *= node.factor
            backward.scale = max(backward.scale, node.scale)
        BACKWARDS.begin(backward)
        try:
            yield
        finally:
            BACKWARDS.end(backward)

    def missing(self) -> float:
        """What a gradient that arrives now must be multiplied by.

        Raises UsageError if the loss scale was not in its loss.
        """
        running = BACKWARDS.latest()
        # [1] Its own backward: nothing is missing, but for what another engine's scale has put on top.
        if running is not None and running.owner is self:
            return running.due / running.factor
        # [2] Without the loss scale small gradients of fp16 are zero by now, and no factor brings them back.
        if self.loss_scale() != 1.0 and (running is None or running.scale == 1.0):
            whose = "a plain backward" if running is None else "the backward of an engine without loss scale"
            raise UsageError(
                f"{whose} reached parameters that train in fp16: its gradients were not scaled, and small ones "
                "are lost",
                expected=f"a loss times the loss scale {self.loss_scale():g}",
                found="a loss without it",
                fix="call engine.backward(loss), or engine.scale(loss) and then backward on what it returns; "
                "engine.zero_grad() forgets what was taken so far",
            )
        return self.factor if running is None else self.factor / running.factor


def _take_off(grad: torch.Tensor) -> torch.Tensor:
    """The hook of what comes from outside of all engines."""
    running = BACKWARDS.latest()
    return grad if running is None or running.factor == 1.0 else grad / running.factor


def _leads_to_engine(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is, or was computed from, a parameter that an engine trains."""
    if is_trained(tensor):
        return True
    # Autograd's graph backwards, by hand: a recursion would end at a thousand layers.
    found, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        variable = getattr(node, "variable", None)
        if variable is not None and is_trained(variable):
            return True
        found.add(node)
        waiting.extend(following for following, _ in node.next_functions)
    return False


class _Mark(torch.autograd.Function):
    """An identity; a backward through it is under way as a scaled one until it ends."""

    @staticmethod
    def forward(
        ctx: Any, scaled: torch.Tensor, scaling: Scaling, factor: float, scale: float
    ) -> torch.Tensor:
        ctx.scaling, ctx.factor, ctx.scale = scaling, factor, scale
        return scaled.detach()  # no view to autograd, which would refuse that a caller changes it in place

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        running = BACKWARDS.latest()
        # A plain backward that came through here is the scaled one; under ``engine.backward`` it is known already.
        if running is None:
            backward = ScaledBackward(ctx.scaling, ctx.factor, ctx.factor, ctx.scale)
            BACKWARDS.begin(backward)
            # Autograd alone holds it, so that it is gone with this backward, also where that raises.
            torch.autograd.Variable._execution_engine.queue_callback(backward)
        elif running.known is not ctx and (running.owner is not ctx.scaling or running.factor != ctx.factor):
            raise UsageError(
                "a backward runs through engine.scale(loss) of one engine and is scaled by another one (or twice by "
                "one): the parts of its gradients would have different factors. Fix: scale the whole loss once"
            )
        return grad, None, None, None
