"""What is computed: floating-point operations and bytes of each kernel that a program would run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
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


class Work:
    """Kernels by (phase, operator, floating-point operations, bytes read and written, dtype): how often."""

    def __init__(self) -> None:
        self.done: Counter[tuple[str, str, int, int, str]] = Counter()
        self._phase = ""

    def turn(self, phase: str) -> None:
        self._phase = phase

    def add(self, func: Anything, args: Tree, kwargs: Tree, result: Tree, nbytes: int, dtype: str) -> None:
        """One kernel of ``func`` (an operator of torch's), in the phase that runs."""
        packet = func._overloadpacket
        if packet.__name__ in _NOTHING:
            return
        if packet in _MORE:
            flops = _MORE[packet](args)
        elif packet in flop_registry:
            flops = int(flop_registry[packet](*args, **kwargs, out_val=result))
        else:
            flops = 0
        self.done[self._phase, packet.__name__, flops, nbytes, dtype] += 1

    def clear(self) -> None:
        self.done.clear()
