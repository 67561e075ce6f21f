"""File names of a checkpoint, as users know them, and trees of tensors as ``torch.save`` should get them."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from zeropipe.checkpoint.constants import (
    LAYER_FILE_PREFIX,
    MODEL_FILE_PREFIX,
    MODEL_FILE_SUFFIX,
    OPTIM_FILE_SUFFIX,
    ZERO_FILE_PREFIX,
)
from zeropipe.given import Tree

_MAX_WASTE = 1.25  # a hull may be this much larger than its views before they are copied apart

# The small script that stands beside every checkpoint, where users look for it.
SCRIPT_NAME: Final = "zero_to_fp32.py"
SCRIPT: Final = '''\
#!/usr/bin/env python
"""Write the fp32 weights of a checkpoint in this folder as ordinary files.

    python zero_to_fp32.py . OUTPUT_FOLDER [--tag TAG] [--safe_serialization] [--max_shard_size 5GB]
"""

from zeropipe.utils.zero_to_fp32 import main

if __name__ == "__main__":
    main()
'''


def get_model_ckpt_name_for_rank(base_folder: str, mp_rank_str: str) -> str:
    """``mp_rank_XX_model_states.pt``; ``mp_rank_str`` is the two-digit number."""
    return os.path.join(base_folder, MODEL_FILE_PREFIX + mp_rank_str + MODEL_FILE_SUFFIX)


def get_zero_ckpt_name_for_rank(base_folder: str, dp_rank: int, mp_rank: int) -> str:
    """``zero_pp_rank_D_mp_rank_XX_optim_states.pt``."""
    name = f"{ZERO_FILE_PREFIX}{dp_rank}_{MODEL_FILE_PREFIX}{mp_rank:02d}{OPTIM_FILE_SUFFIX}"
    return os.path.join(base_folder, name)


def get_layer_ckpt_name_for_rank(base_folder: str, layer_id: str | int, tp_rank: int) -> str:
    """``layer_NN-model_TT_model_states.pt``; ``layer_id`` is a number, or a prefix such as ``layer_03``."""
    prefix = f"{LAYER_FILE_PREFIX}{layer_id:02d}" if isinstance(layer_id, int) else str(layer_id)
    return os.path.join(base_folder, f"{prefix}-model_{tp_rank:02d}{MODEL_FILE_SUFFIX}")


def get_zero3_model_ckpt_name_for_rank(base_folder: str, dp_rank: int, mp_rank: int) -> str:
    """``zero_pp_rank_D_mp_rank_XX_model_states.pt``, stage 3 only."""
    name = f"{ZERO_FILE_PREFIX}{dp_rank}_{MODEL_FILE_PREFIX}{mp_rank:02d}{MODEL_FILE_SUFFIX}"
    return os.path.join(base_folder, name)


def clone_tensors_for_torch_save(item: Tree, device: torch.device | str = "cpu") -> Any:
    """A copy of ``item`` whose tensors own exactly their elements, on ``device``.

    ``torch.save`` of a view into a flat buffer would write the whole buffer. Containers keep their types.
    """

    def clone(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        own = leaf.detach()
        dense = own.layout == torch.strided
        return (own.clone(memory_format=torch.contiguous_format) if dense else own.clone()).to(device)

    return mapped(item, clone)


def mapped(tree: Tree, leaf: Callable[[Any], Any]) -> Any:
    """A copy of ``tree`` with new containers of the same types and ``leaf`` of everything in them but sets' members."""
    kind = type(tree)
    if isinstance(tree, dict):
        items = {key: mapped(value, leaf) for key, value in tree.items()}
        if kind is dict:
            return items
        if isinstance(tree, defaultdict):
            return kind(tree.default_factory, items)
        try:
            return kind(items)
        except TypeError:
            return items
    if kind is torch.Size:
        return tree
    if isinstance(tree, (list, tuple)):
        values = [mapped(value, leaf) for value in tree]
        if hasattr(tree, "_fields"):
            return kind(*values)
        return values if kind is list else kind(values)
    if isinstance(tree, deque):
        return kind((mapped(value, leaf) for value in tree), tree.maxlen)
    return tree.copy() if kind is set else leaf(tree)


# On the host, without the parts of a storage that nobody asked for. Parameters are views into large flat buffers, and
# ``torch.save`` writes whole storages. Here each storage is narrowed to the hull of the views that are saved; views of
# one storage still share it, so tied tensors stay tied and nothing is written twice:
#
#     storage   |......aaaaaaaabbbb..cccc............|        a, b, c: views that the tree holds
#     hull            |aaaaaaaabbbb..cccc|                    what is saved
#
# Views that lie far apart would drag along what is between them, so these are copied one by one.


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

    @property
    def is_dense(self) -> bool:
        return self.stop - self.start <= _MAX_WASTE * self.numel

    def base(self, copy: bool, buffers: HostBuffers | None) -> torch.Tensor:
        """As a 1D tensor with a storage of exactly its size."""
        tensor = self.tensor.detach()
        size, numel = tensor.element_size(), self.stop - self.start
        if not copy and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            if numel * size != storage.nbytes():
                storage = storage[self.start * size : self.stop * size]  # aliases the memory
            return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (numel,), (1,))
        flat = tensor.as_strided((numel,), (1,), self.start)
        if buffers is None:
            return flat.to("cpu", copy=True)
        host = buffers.take(numel * size, pin=tensor.is_cuda).view(tensor.dtype)
        return host.copy_(flat, non_blocking=True)


def snapshot(tree: Tree, *, copy: bool, buffers: HostBuffers | None = None) -> Any:
    """``tree`` (containers and leaves) with host tensors whose storages hold only what is saved.

    ``copy=False`` may alias live CPU memory, so it must be written before anything changes it;
    ``copy=True`` shares nothing with it and takes its memory from ``buffers`` where given.
    """
    hulls = _hulls(tree)
    alone: dict[Any, torch.Tensor] = {}

    def host(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if not _is_plain(leaf):
            return leaf.detach().clone().cpu() if copy else leaf.detach().cpu()
        of = _storage(leaf)
        if of in bases and leaf.numel():
            return bases[of].as_strided(leaf.shape, leaf.stride(), leaf.storage_offset() - hulls[of].start)
        view = (*of, leaf.storage_offset(), tuple(leaf.shape), tuple(leaf.stride()))
        if view not in alone:  # the same view twice is a tied tensor
            alone[view] = leaf.detach().cpu().clone(memory_format=torch.contiguous_format)
        return alone[view]

    # [1] What of each storage is wanted; [2] these parts, on the host; [3] the tree, of views of them.
    dense = {of: hull for of, hull in hulls.items() if hull.is_dense}
    bases = {of: hull.base(copy, buffers) for of, hull in dense.items()}
    # The copies to pinned memory do not wait; what follows reads them.
    if any(hull.tensor.is_cuda for hull in hulls.values()):
        torch.cuda.synchronize()
    return mapped(tree, host)


def footprint(tree: Tree) -> int:
    """Bytes that ``snapshot`` of it holds in tensors, which are nearly all of its file."""
    return sum(
        (hull.stop - hull.start if hull.is_dense else hull.numel) * hull.tensor.element_size()
        for hull in _hulls(tree).values()
    )


def _hulls(tree: Tree) -> dict[Any, _Hull]:
    """What of each storage the tree's views take, by storage, device and dtype."""
    hulls: dict[Any, _Hull] = {}

    def see(leaf: Any) -> None:
        if isinstance(leaf, torch.Tensor) and _is_plain(leaf) and leaf.numel():
            first = int(leaf.storage_offset())
            last = first + sum((n - 1) * s for n, s in zip(leaf.shape, leaf.stride(), strict=True)) + 1
            hull = hulls.setdefault(_storage(leaf), _Hull(first, last, 0, leaf))
            hull.start, hull.stop = min(hull.start, first), max(hull.stop, last)
            hull.numel += leaf.numel()

    mapped(tree, see)
    return hulls


def _storage(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage().data_ptr(), tensor.device, tensor.dtype


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether dtype, sizes and strides say all of it, so that another view of the memory is as good."""
    return tensor.layout == torch.strided and not tensor.is_quantized
