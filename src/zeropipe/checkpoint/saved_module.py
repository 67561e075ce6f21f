"""The state dict that a module gave when it was saved: put together from a checkpoint, tensors read when they are used.

It is needed where loading is more than copying values to their names: a module with hooks, with state of its own, or
that loads itself, gets what ``module.load_state_dict`` would give it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from zeropipe.checkpoint.save.records import ModelState, ModuleRest
from zeropipe.checkpoint.sources.data import Checkpoint, chosen

Read = Callable[[int, int], torch.Tensor]  # [start, stop) of the flattened tensor: 1D, new memory

_FACTS = frozenset(
    [
        "shape", "size", "dtype", "device", "layout", "numel", "nelement", "dim", "ndim", "ndimension", "__len__",
        "is_meta", "is_cpu", "is_cuda", "is_sparse", "is_quantized", "is_leaf", "requires_grad", "grad", "grad_fn",
        "is_floating_point", "is_complex", "element_size", "itemsize", "nbytes", "get_device", "is_nested",
        "__hash__", "__format__", "_is_param", "names", "has_names", "is_mps", "is_xpu", "is_mkldnn",
    ]
)  # fmt: skip


def saved_module(
    source: Checkpoint, model: ModelState, rest: ModuleRest, dtypes: Mapping[str, torch.dtype]
) -> dict[str, Any]:
    """Key -> tensor or extra state, for the keys inside of the regions of ``model`` (see there).

    ``rest``: the source's. ``dtypes``: of the parameters that will take the values; what was saved in another one is
    read from its master.
    """
    inside = Regions(model.regions)
    # A tensor comes under the name that it is kept by, under those that are tied to it, and under ours where DeepSpeed
    # calls it otherwise.
    names = dict.fromkeys((*source.values, *(n for n in source.holders if n not in rest.hidden)))
    aliases = {name: name for name in names}
    aliases |= {
        o: first for o, first in source.tied.items() if first in source.values or source.master(first)
    }
    aliases |= {ours: peer for peer, ours in model.peer_names.items() if peer in names and ours not in names}
    tensors: dict[str, Any] = {}
    for key, name in aliases.items():
        if inside.of(key) is not None:
            value = next(iter(source.values.get(name, ())), None)
            kept = None if value is None else getattr(torch, value.dtype)
            weight = chosen(name, value, source.master(name), dtypes.get(key, kept))
            if weight is not None:
                tensors[key] = stored(weight.shape, weight.dtype, weight.run)
    return tensors | {key: value for key, value in rest.extra.items() if inside.of(key) is not None}


class Regions:
    """Parts of a module tree by their prefixes, as in a state dict's keys: ``""`` is all, ``blocks.0.`` a block."""

    def __init__(self, prefixes: Iterable[str]) -> None:
        self._prefixes = frozenset(prefixes)

    def of(self, key: str) -> str | None:
        if not self._prefixes:
            return None
        return next((prefix for prefix in _prefixes_of(key) if prefix in self._prefixes), None)


def _prefixes_of(key: str) -> Iterator[str]:
    yield ""
    at = key.find(".")
    while at >= 0:
        yield key[: at + 1]
        at = key.find(".", at + 1)


class Stored(torch.Tensor):
    """A tensor of a checkpoint that is read when it is used, so that a state dict of a whole model costs no memory.

    ``shape``, ``dtype`` and ``device`` are known at once. Copying it into a parameter, or a run of its elements into a
    shard, reads what is copied and keeps nothing. Any other use reads the whole and keeps it, as it may be written to.
    """

    _read: Read
    _start: int  # of its elements in what ``_read`` counts
    _value: torch.Tensor | None  # once it was used as a whole

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Stored) else None
        with torch._C.DisableTorchFunctionSubclass():
            if name in _FACTS:
                return func(*args, **kwargs)
            if first is not None and first._value is None:
                if name == "detach":
                    return first
                if name in ("reshape", "view", "flatten") and args[1:] in ((-1,), ((-1,),), ()):
                    return _made((first.numel(),), first.dtype, first._read, first._start)
                run = args[1] if name == "__getitem__" and first.dim() == 1 else None
                if isinstance(run, slice) and run.step in (None, 1):
                    start, stop, _ = run.indices(len(first))
                    return first._read(first._start + start, first._start + max(start, stop))
            copied = name == "copy_" and first is None
            args, kwargs = tree_map_only(Stored, _once if copied else real, (args, kwargs))
            return func(*args, **kwargs)


def stored(shape: tuple[int, ...], dtype: torch.dtype, read: Read) -> Stored:
    """A tensor of that shape whose elements ``read`` gives."""
    return _made(shape, dtype, read, 0)


def real(value: torch.Tensor) -> torch.Tensor:
    """The tensor itself, in memory; the same one each time. Any other tensor is given back."""
    if not isinstance(value, Stored):
        return value
    if value._value is None:
        value._value = _once(value)
    return value._value


def _made(shape: tuple[int, ...], dtype: torch.dtype, read: Read, start: int) -> Stored:
    made = torch.empty((), dtype=dtype).expand(shape).as_subclass(Stored)
    made._read, made._start, made._value = read, start, None
    return made


def _once(value: Stored) -> torch.Tensor:
    if value._value is not None:
        return value._value
    shape = tuple(value.shape)
    return value._read(value._start, value._start + torch.Size(shape).numel()).view(shape)
