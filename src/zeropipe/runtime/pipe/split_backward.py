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

A graph is divided only where that can be proved right (`_may_be_divided`); otherwise the first half is the whole,
ordinary backward and the second does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from zeropipe.errors import UsageError

Grads = tuple[torch.Tensor | None, ...]


class Entry(torch.autograd.Function):
    """Hands a stage's input to its first layer as what it is in an undivided model: no leaf, no view.

    A layer may then change it in place, as ``nn.ReLU(inplace=True)`` does. The memory is the same.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, leaf: torch.Tensor) -> torch.Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Any) -> Any:
        return grads[0]


class _Formulas(torch.autograd.Function):
    """A root whose backward calls ``work``: inside of a backward, a node computes only what that backward wants."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, work: Callable[[], None]) -> torch.Tensor:
        ctx.work = work
        return anchor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.work()
        return None, None


# Classes of the nodes that torch generates from its table of derivatives. CopySlices is none of them: it contains
# another node, of any class.
_FORMULAS = frozenset(
    kind for name, kind in vars(torch._C._functions).items() if "Backward" in name and name != "CopyBackwards"
) | {Entry._backward_cls}


@dataclass(slots=True)
class _Fork:
    node: Node
    edges: list[GradientEdge]  # to parameters alone
    arrived: Grads = ()  # gradients of the node's outputs, noted in the first half
    versions: tuple[int, ...] = ()  # of their values, to see that they are still the same


class Backward:
    """The backward of one stage and micro-batch, whole or in two halves.

    ``inputs``: leaves that require grad, in the order in which the stage before sent them (none for a first stage,
    whose second half is then the whole backward). What the first half does not need is kept until the second is done.
    """

    def __init__(self, inputs: Sequence[torch.Tensor] = ()) -> None:
        self.inputs = list(inputs)
        # Edges, not tensors: once sent, an output's memory is freed unless the graph itself saved it.
        self.outputs: list[GradientEdge] = []

        # Between the halves.
        self._noted: list[_Fork] = []  # in the order in which an undivided backward runs them
        self._pending: list[tuple[GradientEdge, torch.Tensor]] = []  # gradients on their way to parameters

    def expect(self, outputs: Sequence[torch.Tensor]) -> None:
        """Gradients will come for those of ``outputs`` that require grad."""
        self.outputs += [get_gradient_edge(tensor) for tensor in outputs if tensor.requires_grad]

    def whole(self, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The undivided backward; gradients of the inputs, zeros where no output depends on one."""
        inputs, outputs = self._let_go()
        # No output wants a gradient where a stage trains nothing and nobody before it does.
        if outputs:
            torch.autograd.backward(outputs, list(grads))
        return _or_zeros([leaf.grad for leaf in inputs], inputs)

    def first_half(self, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The gradients of the inputs alone."""
        inputs, outputs = self._let_go()
        ends = [get_gradient_edge(tensor) for tensor in inputs]
        forks, to_input = _walk(outputs, {edge.node for edge in ends})
        reached = to_input | {edge.node for edge in ends}
        # An output of weights alone passes no fork.
        pending = [(e, g) for e, g in zip(outputs, grads, strict=True) if e.node not in reached]
        found: Grads = (None,) * len(inputs)
        if len(pending) == len(outputs):
            pass  # nothing leads to an input: all of it is the second half's
        elif _may_be_divided(forks, to_input):
            handles = [fork.node.register_prehook(self._note(fork)) for fork in forks]
            try:
                found = torch.autograd.grad(outputs, ends, list(grads), retain_graph=True, allow_unused=True)
            finally:
                for handle in handles:
                    handle.remove()
        else:
            torch.autograd.backward(outputs, list(grads))
            found, pending = tuple(leaf.grad for leaf in inputs), []
        self._pending = pending
        return _or_zeros(self._apart(found), inputs)

    def second_half(self) -> None:
        """Add the gradients of all parameters into their ``.grad``; the graph is freed."""
        if self._noted:
            anchor = torch.zeros((), requires_grad=True)
            # The anchor's edge, so that the root is run; the others are what its work may compute.
            wanted = [get_gradient_edge(anchor)]
            wanted += [edge for fork in self._noted for edge in fork.edges]
            torch.autograd.grad([_Formulas.apply(anchor, self._run_forks)], wanted, allow_unused=True)
        pending, self._pending = self._pending, []
        if pending:
            torch.autograd.backward([edge for edge, _ in pending], [grad for _, grad in pending])

    def _let_go(self) -> tuple[list[torch.Tensor], list[GradientEdge]]:
        # From here on the graph is whose half uses it, to be freed piece by piece.
        inputs, outputs, self.inputs, self.outputs = self.inputs, self.outputs, [], []
        return inputs, outputs

    def _note(self, fork: _Fork) -> Callable[[Grads], None]:
        def hook(grads: Grads) -> None:
            fork.arrived = tuple(grads)
            fork.versions = tuple(grad._version for grad in grads if grad is not None)
            self._noted.append(fork)

        return hook

    def _apart(self, found: Grads) -> list[torch.Tensor | None]:
        # In memory of its own: whoever gets it may write there, and noted gradients must not change.
        noted = {
            grad.untyped_storage()._cdata
            for grads in (*(fork.arrived for fork in self._noted), [grad for _, grad in self._pending])
            for grad in grads
            if grad is not None
        }
        return [
            grad.clone() if grad is not None and grad.untyped_storage()._cdata in noted else grad
            for grad in found
        ]

    def _run_forks(self) -> None:
        """The forks' formulas, without the hooks around them; each fork is freed when it is done."""
        noted, self._noted = self._noted[::-1], []
        late: list[tuple[GradientEdge, torch.Tensor]] = []
        while noted:
            fork = noted.pop()
            if fork.versions != tuple(grad._version for grad in fork.arrived if grad is not None):
                raise UsageError(
                    f"a gradient that had arrived at {fork.node.name()} was changed in place afterwards",
                    fix="let hooks return a new tensor instead of changing the one they are given",
                )
            results = fork.node(*fork.arrived)  # type: ignore[operator]
            results = results if isinstance(results, tuple) else (results,)
            wanted = set(fork.edges)
            for target, grad in zip(fork.node.next_functions, results, strict=True):
                edge = None if target[0] is None else GradientEdge(target[0], target[1])
                if edge in wanted and grad is not None:
                    late.append((edge, _fit(grad, edge)))
        self._pending = late + self._pending


def _fit(grad: torch.Tensor, edge: GradientEdge) -> torch.Tensor:
    """``grad`` summed over what the node's forward has broadcast, as the engine does it behind every node."""
    shape = edge.node._input_metadata[edge.output_nr].shape  # type: ignore[attr-defined]
    return grad if grad.shape == shape else grad.sum_to_size(shape)


def _may_be_divided(forks: Sequence[_Fork], to_input: set[Node]) -> bool:
    """Whether two halves are proved to give what one backward gives."""
    # [1] Every node on a way to an input is one of torch's own, whose formula only reads what forward saved. A custom
    # function may change what it keeps, what it is given or what it has returned, when its backward runs: then running
    # it twice is wrong, and so is using later what it could have changed. It may also insist on an ordinary backward
    # (a reentrant checkpoint, a compiled function).
    if not all(type(node) in _FORMULAS for node in to_input):
        return False
    for fork in forks:
        # [2] No fork saved its tensors through hooks: a checkpoint would recompute its part of the model once more.
        for name in _saved_names(type(fork.node)):
            saved = getattr(fork.node, name)
            for tensor in saved if isinstance(saved, (tuple, list)) else (saved,):
                if tensor is not None and tensor.unpack_hook is not None:
                    return False
        # [3] Hooks run once, in the first half. What they made of a gradient has been noted, and the second half calls
        # a fork's formula alone. A hook that runs *behind* a fork could change a weight's gradient. torch keeps a
        # node's hooks in one dict and shows it to none but the handle of a hook, here one that is never run.
        handle = fork.node.register_hook(lambda *_: None)
        hooks = handle.hooks_dict_ref()
        handle.remove()
        if hooks:
            return False
    return True


def _or_zeros(grads: Sequence[torch.Tensor | None], like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    pairs = zip(grads, like, strict=True)
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in pairs]


@cache
def _saved_names(kind: type[Node]) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def _walk(outputs: Sequence[GradientEdge], ends: set[Node]) -> tuple[list[_Fork], set[Node]]:
    """The forks between ``outputs`` and ``ends``, and every node on a way to these, without themselves."""
    order = _post_order([edge.node for edge in outputs], ends)
    to_input: set[Node] = set()
    to_weight: set[Node] = set()
    # Children come first, so what is known of them is known when their parents are looked at.
    for node in order:
        children = [child for child, _ in node.next_functions if child is not None]
        if node in ends or any(child in to_input for child in children):
            to_input.add(node)
        is_parameter = not children and node not in ends
        if is_parameter or any(child in to_weight for child in children):
            to_weight.add(node)
    forks = []
    for node in order:
        if node not in to_input or node in ends:
            continue
        edges = dict.fromkeys(
            GradientEdge(child, nr)
            for child, nr in node.next_functions
            if child is not None and child in to_weight and child not in to_input
        )
        if edges:
            forks.append(_Fork(node, list(edges)))
    return forks, to_input - ends


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
