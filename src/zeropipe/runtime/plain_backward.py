"""Makes a plain ``loss.backward()`` give the gradients that ``engine.backward(loss)`` gives.

The engine scales the loss (loss scale, 1 / accumulation steps). When the user calls backward himself, the same
factor has to enter where gradients enter the model: at its outputs. The outputs are therefore passed through
an identity whose backward multiplies, unless the engine's own backward has scaled already.
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

    def wrap(self, output: Any) -> Any:
        """``output`` (any nest of containers that torch's pytree knows) with its tensors passed through."""
        if self.factor() == 1.0 or not torch.is_grad_enabled():
            return output
        return tree_map_only(torch.Tensor, self._pass, output)

    def _pass(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.requires_grad:
            return tensor
        return _Scale.apply(tensor, self)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, gate: Gate) -> torch.Tensor:
        ctx.gate = gate
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return (grad if ctx.gate.closed else grad * ctx.gate.factor()), None
