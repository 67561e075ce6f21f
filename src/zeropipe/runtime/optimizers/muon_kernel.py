"""Muon's arithmetic on one matrix, the same calls whether the matrix was ever cut or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import torch

from zeropipe.runtime.optimizers.shard_view import ShardView

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest slope at 0 that still lands near 1, by K. Jordan
# The iteration is stable in it, so pieces travel in it too: half the bytes, same bits.
NS_DTYPE = torch.bfloat16


def newton_schulz(
    matrix: torch.Tensor, steps: int, coefficients: Sequence[float], eps: float
) -> torch.Tensor:
    """Approximately ``U V^T`` of ``matrix = U S V^T`` (2-D, any dtype): same shape, ``NS_DTYPE``.

    The quintic iteration ``X = a X + (b A + c A A) X`` with ``A = X X^T``, started at unit Frobenius norm
    (K. Jordan, https://kellerjordan.github.io/posts/muon). It runs on the wide side up, where ``A`` is smaller.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(NS_DTYPE)
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=eps)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        mix = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, mix, x, beta=a)
    return x.mT if tall else x


def rows_and_cols(shape: Sequence[int]) -> tuple[int, int]:
    """The matrix that a tensor of at least two dims is taken as: first dim by all others."""
    return shape[0], prod(shape[1:])


def adjusted_lr(lr: float, shape: Sequence[int], adjust_lr_fn: str) -> float:
    rows, cols = rows_and_cols(shape)
    if adjust_lr_fn == "match_rms_adamw":
        return lr * 0.2 * sqrt(max(rows, cols))
    return lr * sqrt(max(1.0, rows / cols))


@dataclass(slots=True)
class MatrixSlot:
    """One parameter (or master) in the middle of a step."""

    param: torch.Tensor
    view: ShardView
    group: dict[str, Any]
    matrices: frozenset[int]  # tensors of the layout that Muon takes; AdamW takes the others
    value: torch.Tensor  # 1-D, the parameter's elements
    grad: torch.Tensor  # 1-D, the same elements
    momentum: torch.Tensor | None  # 1-D; None where nothing in the layout is a matrix

    def direction(self, run: slice) -> torch.Tensor:  # 1-D, NS_DTYPE
        """What of the momentum goes into the iteration: elementwise, so pieces equal the whole."""
        assert self.momentum is not None
        momentum = self.momentum[run]
        if self.group["nesterov"]:
            momentum = self.grad[run].lerp(momentum, self.group["momentum"])
        return momentum.to(NS_DTYPE)

    def orthogonal(self, tensor: int, direction: torch.Tensor) -> torch.Tensor:  # 1-D, NS_DTYPE
        """The orthogonalised whole of ``tensor``, from its whole ``direction`` (1-D)."""
        matrix = direction.view(rows_and_cols(self.view.layout.tensors[tensor].shape))
        result = newton_schulz(
            matrix, self.group["ns_steps"], self.group["ns_coefficients"], self.group["ns_eps"]
        )
        return result.reshape(-1)

    def apply(self, tensor: int, run: slice, result: torch.Tensor) -> None:
        """Step the elements ``run`` of the shard, which are ``tensor``'s, along ``result`` (1-D, as long)."""
        shape = self.view.layout.tensors[tensor].shape
        lr = adjusted_lr(float(self.group["lr"]), shape, self.group["adjust_lr_fn"])
        self.value[run].add_(result, alpha=-lr)
