"""Tells whether tensors lie on one memory: a tie that torch keeps by address is lost where values are laid anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from zeropipe.errors import describe


def overlapping(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, str]]:
    """The names of each two that share an element.

    What has no memory to speak of does not count: empty, on meta, sparse, subclasses that wrap others. One pass over
    the tensors in the order of their addresses, so 10,000 take milliseconds.
    """
    spans = []
    for name, tensor in tensors:
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if plain and tensor.numel() and not tensor.is_meta:
            last = sum(
                (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            first = tensor.data_ptr()
            spans.append((str(tensor.device), first, first + (last + 1) * tensor.itemsize, name, tensor))
    spans.sort(key=lambda span: span[:3])
    # Those that reach beyond the start of the next: few, and none in an ordinary model.
    reaching: list[tuple[str, int, int, str, torch.Tensor]] = []
    for span in spans:
        reaching = [other for other in reaching if other[0] == span[0] and other[2] > span[1]]
        for other in reaching:
            if _share_an_element(other[4], span[4], span[1] - other[1]):
                yield other[3], span[3]
        reaching.append(span)


def shared_memory(where: str, pair: tuple[str, str]) -> str:
    """The message for two tensors that would part."""
    return describe(
        f"{where}: '{pair[0]}' and '{pair[1]}' are two tensors on one memory, as an assignment to .data makes them",
        expected="one Parameter under both names, or memory for each",
        fix="tie the object itself (b.weight = a.weight), or part them (b.weight.data = b.weight.data.clone())",
    )


def _share_an_element(a: torch.Tensor, b: torch.Tensor, apart: int) -> bool:
    """For tensors whose ranges of addresses overlap, ``b`` starting ``apart`` bytes behind ``a``.

    The columns of a matrix, cut in two, overlap as ranges and share nothing.
    """
    # Not if only one is contiguous: it may lie in a hole of the other, as a single element does between two.
    if (a.is_contiguous() and b.is_contiguous()) or a.itemsize != b.itemsize or apart % a.itemsize:
        return True
    start = apart // a.itemsize
    ends = [sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 for t in (a, b)]
    taken = torch.zeros(max(ends[0], start + ends[1]), dtype=torch.bool)
    taken.as_strided(a.shape, a.stride()).fill_(True)
    return bool(taken.as_strided(b.shape, b.stride(), start).any())
