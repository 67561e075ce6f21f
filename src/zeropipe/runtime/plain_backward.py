"""Makes a plain ``loss.backward()`` give the gradients that ``engine.backward(loss)`` gives.

The engine scales the loss (loss scale, 1 / accumulation steps). When the user calls backward himself, the same
factor has to enter where gradients enter the model, at its outputs, and to leave where they leave it, at its
inputs. So outputs pass through an identity whose backward multiplies (unless the engine's own backward has
scaled already), inputs through one whose backward divides. Gradients outside the model are then plain, whatever
produced them: a model may be fed its own outputs, and engines may be chained.
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
        return self._map(_Leave, inputs)

    def leave(self, outputs: Any) -> Any:
        """``outputs``, as ``enter`` for what the model returns."""
        return self._map(_Enter, outputs)

    def _map(self, function: type[torch.autograd.Function], tree: Any) -> Any:
        if self.factor() == 1.0 or not torch.is_grad_enabled():
            return tree

        def through(tensor: torch.Tensor) -> torch.Tensor:
            return function.apply(tensor, self) if tensor.requires_grad else tensor

        return through(tree) if isinstance(tree, torch.Tensor) else tree_map_only(torch.Tensor, through, tree)


class _Enter(torch.autograd.Function):
    """Gradients enter the model here."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, gate: Gate) -> torch.Tensor:
        ctx.gate = gate
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return (grad if ctx.gate.closed else grad * ctx.gate.factor()), None


class _Leave(torch.autograd.Function):
    """Gradients leave the model here."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, gate: Gate) -> torch.Tensor:
        ctx.gate = gate
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad / ctx.gate.factor(), None
