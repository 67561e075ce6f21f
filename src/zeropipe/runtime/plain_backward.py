"""Makes a plain ``loss.backward()`` give the gradients that ``engine.backward(loss)`` gives.

The engine scales the loss (loss scale, 1 / accumulation steps). When the user calls backward himself, the same
factor has to enter where gradients enter the model, at its outputs, and to leave where they leave it, at its
inputs. So outputs pass through an identity whose backward multiplies, inputs through one whose backward divides.
Gradients outside the model are then plain: a model may be fed its own outputs, and engines may be chained.

While the engine's own backward runs, the loss was scaled already: outputs pass gradients on as they are, and only
inputs that come from elsewhere divide.

What passes through is the same memory with the same version counter. An output is no view to autograd, which would
refuse to let a caller change it in place (``loss *= scale``). An input is one: a module that changes it in place is
refused, because the caller's own later use of it would miss that change in its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


class Gate:
    """``factor``: what a plain backward has to multiply by. ``closed`` while the engine's own backward runs."""

    def __init__(self, factor: Callable[[], float]) -> None:
        self.factor = factor
        self.closed = False

    def enter(self, inputs: Any) -> Any:
        """``inputs`` (any nest of containers that torch's pytree knows) with its tensors passed through."""
        return self._map(inputs, lambda tensor: _Leave.apply(tensor, self, self._is_own(tensor)))

    def leave(self, outputs: Any) -> Any:
        """``outputs``, as ``enter`` for what the model returns."""
        return self._map(outputs, lambda tensor: _Enter.apply(tensor, self))

    def _map(self, tree: Any, through: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        if not torch.is_grad_enabled() or self.factor() == 1.0:
            return tree
        return tree_map_only(torch.Tensor, lambda t: through(t) if t.requires_grad else t, tree)

    def _is_own(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` was computed from an output of this model."""
        found, waiting = set(), [tensor.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in found:
                continue
            if isinstance(node, _Enter._backward_cls) and node.gate is self:  # type: ignore[attr-defined]
                return True
            found.add(node)
            waiting.extend(following for following, _ in node.next_functions)
        return False


class _Enter(torch.autograd.Function):
    """Gradients enter the model here."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, gate: Gate) -> torch.Tensor:
        ctx.gate = gate
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return (grad if ctx.gate.closed else grad * ctx.gate.factor()), None


class _Leave(torch.autograd.Function):
    """Gradients leave the model here; ``own``: into another call of the same model."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, gate: Gate, own: bool) -> torch.Tensor:
        ctx.gate, ctx.own = gate, own
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        stays = ctx.gate.closed and ctx.own
        return (grad if stays else grad / ctx.gate.factor()), None, None
