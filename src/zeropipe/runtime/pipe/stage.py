"""One stage at work: forward, and backward whole or in two halves, for each micro-batch under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from zeropipe.errors import UsageError
from zeropipe.runtime.pipe.containers import flatten, rebuild
from zeropipe.runtime.pipe.split_backward import Entry, SplitBackward

Run = Callable[[Any], Any]


@dataclass(slots=True)
class _Alive:
    """What a micro-batch leaves on a stage between forward and the last of its backward."""

    inputs: list[torch.Tensor]  # leaves that require grad, in the order in which the stage before sent them
    # Edges, not tensors: once sent, an output's memory is freed unless the graph itself saved it.
    outputs: list[GradientEdge] = field(default_factory=list)
    split: SplitBackward | None = None


class Stage:
    """Runs the layers of stage ``number``; ``run``: their forward."""

    def __init__(self, number: int, run: Run) -> None:
        self.number, self._run = number, run
        self._alive: dict[int, _Alive] = {}

    @property
    def alive(self) -> int:
        """Micro-batches whose activations are held."""
        return len(self._alive)

    def forward(self, micro_batch: int, value: Any, needs_grad: Sequence[bool] | None, train: bool) -> Any:
        """Run ``value`` through the layers.

        ``needs_grad``: for each tensor of ``value``, whether the stage before wants its gradient; None where
        the value comes from the data and nobody does.
        """
        tree, tensors = (
            flatten(value, f"the input of stage {self.number}") if needs_grad is not None else ("", [])
        )
        if needs_grad is None:
            leaves: list[torch.Tensor] = []
        else:
            flags = zip(tensors, needs_grad, strict=True)
            tensors = [t.detach().requires_grad_(train and wanted) for t, wanted in flags]
            leaves = [t for t in tensors if t.requires_grad]
            value = rebuild(tree, [Entry.apply(t) if t.requires_grad else t for t in tensors])
        with torch.set_grad_enabled(train):
            output = self._run(value)
        if train:
            self._alive[micro_batch] = _Alive(leaves)
        return output

    def hold_output(self, micro_batch: int, tensors: Sequence[torch.Tensor]) -> None:
        """Remember the outputs that gradients will come for: those of ``tensors`` that require grad."""
        alive = self._alive[micro_batch]
        for tensor in tensors:
            if tensor.requires_grad:
                alive.outputs.append(get_gradient_edge(tensor))

    def backward(self, micro_batch: int, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The whole backward; gradients of the inputs that wanted one (zeros where nothing depends on it)."""
        alive = self._alive.pop(micro_batch)
        self._check(micro_batch, alive, grads)
        if alive.outputs:
            torch.autograd.backward(alive.outputs, list(grads))
        return [_or_zeros(leaf.grad, leaf) for leaf in alive.inputs]

    def backward_input(self, micro_batch: int, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The first half: gradients of the inputs alone."""
        alive = self._alive[micro_batch]
        self._check(micro_batch, alive, grads)
        alive.split = SplitBackward(alive.outputs, list(grads), alive.inputs)
        found_or_none = alive.split.backward_input() if alive.outputs else [None] * len(alive.inputs)
        inputs, alive.outputs, alive.inputs = alive.inputs, [], []
        return [_or_zeros(grad, leaf) for grad, leaf in zip(found_or_none, inputs, strict=True)]

    def backward_weight(self, micro_batch: int) -> None:
        """The second half: gradients of the weights."""
        alive = self._alive.pop(micro_batch)
        if alive.split is not None:
            alive.split.backward_weight()

    def drop(self) -> None:
        """Forget every micro-batch under way, after a failure."""
        self._alive.clear()

    def _check(self, micro_batch: int, alive: _Alive, grads: Sequence[torch.Tensor]) -> None:
        if len(grads) != len(alive.outputs):
            raise UsageError(
                f"stage {self.number} got gradients for another number of outputs (micro-batch {micro_batch})",
                expected=len(alive.outputs),
                found=len(grads),
                fix="let the layers return the same tensors on every call",
            )


def _or_zeros(grad: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if grad is None else grad
