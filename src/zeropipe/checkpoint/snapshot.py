"""Makes a tree of tensors fit to be saved: on the host, and without the parts of a storage that nobody asked for.

Parameters are views into large flat buffers, and ``torch.save`` writes whole storages. Here each storage is
narrowed to the hull of the views that are saved; views of one storage still share it, so tied tensors stay
tied and nothing is written twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from zeropipe.checkpoint.utils import mapped

_MAX_WASTE = 1.25  # a hull may be this much larger than its views before they are copied apart


class HostBuffers:
    """Host memory that an asynchronous save copies into, kept for the next one: first touching it costs most."""

    def __init__(self) -> None:
        self._free: dict[int, list[torch.Tensor]] = {}
        self._used: list[torch.Tensor] = []

    def take(self, nbytes: int, pin: bool) -> torch.Tensor:
        """``nbytes`` of memory, uint8 1D."""
        free = self._free.get(nbytes)
        buffer = free.pop() if free else torch.empty(nbytes, dtype=torch.uint8, pin_memory=pin)
        self._used.append(buffer)
        return buffer

    def give_back(self) -> None:
        """Nobody reads what was taken any more; sizes that were not needed this time are freed."""
        self._free = {}
        for buffer in self._used:
            self._free.setdefault(buffer.numel(), []).append(buffer)
        self._used = []


@dataclass(slots=True)
class _Hull:
    """The part of one storage that is saved, in elements of one dtype."""

    start: int
    stop: int
    numel: int  # sum over the views
    tensor: torch.Tensor  # one of the views


def snapshot(tree: Any, *, copy: bool, buffers: HostBuffers | None = None) -> Any:
    """``tree`` (dicts, lists, tuples, leaves) with host tensors whose storages hold only what is saved.

    ``copy=False`` may alias live CPU memory, so it must be written before anything changes it;
    ``copy=True`` shares nothing with it and takes its memory from ``buffers`` where given.
    """
    hulls: dict[tuple[Any, ...], _Hull] = {}
    for tensor in _tensors(tree):
        if tensor.numel() == 0:
            continue
        first = int(tensor.storage_offset())
        last = first + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        hull = hulls.setdefault(_key(tensor), _Hull(first, last, 0, tensor))
        hull.start, hull.stop = min(hull.start, first), max(hull.stop, last)
        hull.numel += tensor.numel()
    bases = {key: _base(hull, copy, buffers) for key, hull in hulls.items() if _dense(hull)}
    if any(hull.tensor.is_cuda for hull in hulls.values()):
        torch.cuda.synchronize()
    alone: dict[tuple[Any, ...], torch.Tensor] = {}

    def place(tensor: torch.Tensor) -> torch.Tensor:
        key = _key(tensor)
        base = bases.get(key)
        if base is not None and tensor.numel():
            offset = tensor.storage_offset() - hulls[key].start
            return base.as_strided(tensor.shape, tensor.stride(), offset)
        view = (*key, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
        if view not in alone:  # the same view twice is a tied tensor
            alone[view] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return alone[view]

    def host(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if _plain(leaf):
            return place(leaf)
        return leaf.detach().clone().cpu() if copy else leaf.detach().cpu()

    return mapped(tree, host)


def _plain(tensor: torch.Tensor) -> bool:
    """Whether dtype, sizes and strides say all of it, so that another view of the memory is as good."""
    return tensor.layout == torch.strided and not tensor.is_quantized


def _dense(hull: _Hull) -> bool:
    return hull.stop - hull.start <= _MAX_WASTE * hull.numel


def _key(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (tensor.untyped_storage().data_ptr(), tensor.device, tensor.dtype)


def _base(hull: _Hull, copy: bool, buffers: HostBuffers | None) -> torch.Tensor:
    """The hull as a 1D tensor with a storage of exactly its size."""
    tensor = hull.tensor.detach()
    size = tensor.element_size()
    numel = hull.stop - hull.start
    flat = tensor.as_strided((numel,), (1,), hull.start)
    if not copy and tensor.device.type == "cpu":
        storage = tensor.untyped_storage()
        if numel * size != storage.nbytes():
            storage = storage[hull.start * size : hull.stop * size]  # aliases the memory
        return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (numel,), (1,))
    if buffers is None:
        return flat.to("cpu", copy=True)
    host = buffers.take(numel * size, pin=tensor.is_cuda).view(tensor.dtype)
    return host.copy_(flat, non_blocking=True)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        if _plain(tree):
            yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)
