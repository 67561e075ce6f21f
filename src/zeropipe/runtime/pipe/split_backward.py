"""Splits the backward of one stage in two: gradients of its inputs now, gradients of its weights later.

A node of the autograd graph that leads to an input *and*, by another edge, to parameters alone is a *fork* (a
matrix product: one edge to its input, one through a transpose to its weight)::

      outputs --> [fork] --> ... --> [fork] --> ... --> inputs        first half: along this line,
                     |                  |                             noting what arrives at each fork
                   [T]                [T]
                     |                  |
                  weight             weight                           second half: each fork again, but
                                                                      only its edges to parameters

Nothing is computed twice: a node computes only the gradients that are asked of it. The second half ends in the
parameters' own accumulation, so hooks on them run as ever, and sums are those of an undivided backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Grads = tuple[torch.Tensor | None, ...]


@dataclass(slots=True)
class _Fork:
    node: Node
    edges: list[GradientEdge]  # to parameters alone, and to no other fork's
    arrived: Grads = ()  # gradients of the node's outputs, noted in the first half


@dataclass(slots=True)
class _Graph:
    """What a walk over the graph finds."""

    forks: list[_Fork] = field(default_factory=list)
    shared: list[GradientEdge] = field(default_factory=list)  # to parameters, from several forks
    to_input: set[Node] = field(default_factory=set)  # nodes on a way to an input


class SplitBackward:
    """The two halves of the backward of one stage and micro-batch.

    ``outputs`` with their gradients ``grads``; ``inputs``: leaves that require grad (none for a first stage, whose
    second half is then the whole backward). The graph is kept until the second half is done.
    """

    def __init__(
        self,
        outputs: Sequence[GradientEdge],
        grads: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
    ) -> None:
        self._outputs, self._grads, self._inputs = list(outputs), list(grads), list(inputs)
        self._forks: list[_Fork] = []
        self._pending: list[tuple[GradientEdge, torch.Tensor]] = []  # gradients on their way to parameters
        self._rest_is_whole = False

    def backward_input(self) -> list[torch.Tensor | None]:
        """The gradients of ``inputs``, None for one that no output depends on."""
        graph = _walk(self._outputs, self._inputs)
        if not any(edge.node in graph.to_input for edge in self._outputs):
            self._rest_is_whole = True
            return [None] * len(self._inputs)
        handles = [fork.node.register_prehook(_note(fork)) for fork in graph.forks]
        wanted = [get_gradient_edge(tensor) for tensor in self._inputs] + graph.shared
        try:
            found = torch.autograd.grad(
                self._outputs, wanted, self._grads, retain_graph=True, allow_unused=True
            )
        finally:
            for handle in handles:
                handle.remove()
        count = len(self._inputs)
        self._forks = graph.forks
        self._keep(graph.shared, found[count:])
        for edge, grad in zip(self._outputs, self._grads, strict=True):
            if edge.node not in graph.to_input:  # an output of weights alone passes no fork
                self._pending.append((edge, grad))
        self._outputs, self._grads = [], []
        return list(found[:count])

    def backward_weight(self) -> None:
        """Add the gradients of all parameters into their ``.grad``; the graph is freed."""
        if self._rest_is_whole:
            torch.autograd.backward(self._outputs, self._grads)
        for fork in self._forks:
            arrived = [(i, grad) for i, grad in enumerate(fork.arrived) if grad is not None]
            if not arrived or not fork.edges:
                continue
            roots = [GradientEdge(fork.node, i) for i, _ in arrived]
            grads = torch.autograd.grad(roots, fork.edges, [g for _, g in arrived], allow_unused=True)
            self._keep(fork.edges, grads)
        if self._pending:
            torch.autograd.backward([edge for edge, _ in self._pending], [grad for _, grad in self._pending])
        self._outputs, self._grads, self._forks, self._pending = [], [], [], []

    def _keep(self, edges: Sequence[GradientEdge], grads: Sequence[torch.Tensor | None]) -> None:
        self._pending += [(edge, grad) for edge, grad in zip(edges, grads, strict=True) if grad is not None]


def _note(fork: _Fork) -> Callable[[Grads], None]:
    def hook(grads: Grads) -> None:
        fork.arrived = tuple(grads)

    return hook


def _walk(outputs: Sequence[GradientEdge], inputs: Sequence[torch.Tensor]) -> _Graph:
    """Find the forks between ``outputs`` and ``inputs``."""
    ends = {get_gradient_edge(tensor).node for tensor in inputs}
    order = _post_order([edge.node for edge in outputs], ends)
    to_input: set[Node] = set()
    to_weight: set[Node] = set()
    for node in order:
        children = [child for child, _ in node.next_functions if child is not None]
        if node in ends or any(child in to_input for child in children):
            to_input.add(node)
        is_parameter = not children and node not in ends
        if is_parameter or any(child in to_weight for child in children):
            to_weight.add(node)
    graph = _Graph(to_input=to_input)
    parents: dict[tuple[Node, int], Node] = {}
    shared: set[tuple[Node, int]] = set()
    branches: dict[Node, list[tuple[Node, int]]] = {}
    for node in order:
        if node not in to_input or node in ends:
            continue
        edges = dict.fromkeys(
            (child, nr)
            for child, nr in node.next_functions
            if child is not None and child in to_weight and child not in to_input
        )
        if edges:
            branches[node] = list(edges)
        for edge in edges:
            if parents.setdefault(edge, node) is not node:
                shared.add(edge)
    for node, found in branches.items():
        own = [GradientEdge(*edge) for edge in found if edge not in shared]
        if own:
            graph.forks.append(_Fork(node, own))
    graph.shared = [GradientEdge(*edge) for edge in shared]
    return graph


def _post_order(roots: Sequence[Node], ends: set[Node]) -> list[Node]:
    """Every node reachable from ``roots``, children before parents; the walk stops at ``ends``."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
            continue
        if node in seen:
            continue
        seen.add(node)
        stack.append((node, True))
        if node not in ends:
            stack += [(child, False) for child, _ in node.next_functions if child is not None]
    return order
