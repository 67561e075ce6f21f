"""What is computed: floating-point operations and bytes of each kernel that a program would run."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from zeropipe.given import Anything, Tree

aten = torch.ops.aten


def _attention(args: Any) -> int:
    return int(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))


def _attention_backward(args: Any) -> int:
    return int(sdpa_backward_flop_count(args[0].shape, args[1].shape, args[2].shape, args[3].shape))


def _grouped(args: Any) -> int:
    """Rows (or columns) of one matrix, each times one of a stack of others: the experts of a layer."""
    (*_, rows, inner), columns = args[0].shape, args[1].shape[-1]
    stacks = args[0].shape[0] if args[0].dim() == args[1].dim() == 3 else 1
    return int(2 * stacks * rows * inner * columns)


# torch's registry has no entry for the CPU's attention, nor for products of many matrices at once.
_MORE = {
    aten._grouped_mm: _grouped,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"}
_GATHERS = {
    "embedding",
    "index_select",
    "gather",
    "index",
}  # read as much of the first argument as they return


class Kernel(NamedTuple):
    """One kernel of a phase: its operator, operations, bytes read and written, dtype."""

    phase: str
    op: str
    flops: int
    nbytes: int
    dtype: str


def kernel(phase: str, func: Anything, args: Tree, kwargs: Tree, result: Tree) -> Kernel | None:
    """What ``func`` (an operator of torch's) did for ``result``; None where that is nothing."""
    packet = func._overloadpacket
    name: str = packet.__name__
    if name in _NOTHING:
        return None
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    made = [value for value in tree_flatten(result)[0] if isinstance(value, torch.Tensor)]
    if packet in _MORE:
        flops = _MORE[packet](args)
    elif packet in flop_registry:
        flops = int(flop_registry[packet](*args, **kwargs, out_val=result))
    else:
        flops = 0
    dtypes = [tensor.dtype for tensor in (*made, *given) if tensor.dtype.is_floating_point]
    moved = (*made, *made) if name in _GATHERS else (*given, *made)
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in moved)
    return Kernel(phase, name, flops, nbytes, str(dtypes[0]).removeprefix("torch.") if dtypes else "int")


class Work:
    """Kernels: how often each."""

    def __init__(self) -> None:
        self.done: Counter[Kernel] = Counter()
        self._phase = ""

    def turn(self, phase: str) -> None:
        self._phase = phase

    def add(self, func: Anything, args: Tree, kwargs: Tree, result: Tree) -> None:
        """``func`` would have run, in the phase that runs."""
        # A pipeline runs backwards in what it calls its forward: the whole batch.
        back = self._phase == "forward" and torch._C._current_graph_task_id() != -1
        found = kernel("backward" if back else self._phase, func, args, kwargs, result)
        if found is not None:
            self.done[found] += 1

    def clear(self) -> None:
        self.done.clear()
