"""A tensor that is still in files, while a library says what is to be made of it.

transformers renames, stacks, joins, cuts and casts what a checkpoint holds (experts of one file each become one
parameter). It is given tensors of this class, on which its operations move no byte and leave a plan:

    gate_0, gate_1   stack   |
    up_0, up_1       stack   | cat    a mosaic of four tensors in files: each rank reads what its shard needs
    x                transpose        a call: made of whole values, one parameter at a time, on every rank
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from zeropipe.given import Anything, Tree
from zeropipe.layout.mosaic import Mosaic, joined
from zeropipe.runtime.zero.gather.weights import Loading
from zeropipe.tensor.weight_files import Stored


class Call:
    """An operation that mosaics have no word for: done once, when a result is asked for."""

    def __init__(self, func: Anything, args: Tree, kwargs: Tree) -> None:
        self._func, self._args, self._kwargs = func, args, kwargs
        self._results: list[Any] = []  # those that were not asked for yet, by their place

    def result(self, place: int) -> torch.Tensor:
        """One of its tensors; each can be asked for once. Collective."""
        if not self._results:
            args, kwargs = _now((self._args, self._kwargs))
            # Here everything looks contiguous, and so to whoever called: a view of what is not is a copy.
            views = self._func.overloadpacket in (_ATEN.view, _ATEN._unsafe_view)
            made = args[0].reshape(args[1]) if views else self._func(*args, **kwargs)
            self._results = tree_flatten(made)[0]
        result, self._results[place] = self._results[place], None
        if all(one is None for one in self._results):
            self._results = []
        assert isinstance(result, torch.Tensor)
        return result


class Planned(torch.Tensor):
    """Shape and dtype of a tensor, and a plan for its elements: ``mosaic``, or else a result of a call ``later``."""

    mosaic: Mosaic | None
    later: tuple[Call, int] | None
    loading: Loading

    @staticmethod
    def of(
        shape: Sequence[int],
        dtype: torch.dtype,
        loading: Loading,
        mosaic: Mosaic | None = None,
        later: tuple[Call, int] | None = None,
    ) -> Planned:
        made: Planned = torch.Tensor._make_wrapper_subclass(Planned, tuple(shape), dtype=dtype)  # type: ignore[attr-defined]
        made.mosaic, made.later, made.loading = mosaic, later, loading
        return made

    @staticmethod
    def stored(one: Stored, loading: Loading) -> Planned:
        return Planned.of(one.shape, one.dtype, loading, one.mosaic)

    def now(self) -> torch.Tensor:
        """The value, whole, on the CPU of every rank; collective."""
        if self.mosaic is not None:
            here = torch.empty(self.shape, dtype=self.dtype)
            return self.loading.whole("a part of the weights", self.mosaic, here)
        assert self.later is not None
        call, place = self.later
        return call.result(place)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Planned({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        plan = _PLANS.get(func.overloadpacket)
        made = None if plan is None else plan(*args, **kwargs)
        return _called(func, args, kwargs) if made is None else made


def _called(func: Any, args: Any, kwargs: Any) -> Any:
    """A call that is done later, or now where its shape depends on values, or it writes to a tensor that is here."""
    loading = next(
        found.loading for arg in tree_flatten((args, kwargs))[0] if (found := planned(arg)) is not None
    )
    if not func._schema.is_mutable:
        try:
            shapes = func(*_on_meta(args), **_on_meta(kwargs))
        except (RuntimeError, NotImplementedError):
            pass  # below, with values; what is wrong is said there
        else:
            call = Call(func, args, kwargs)
            tensors, _ = tree_flatten(shapes)
            places = {id(tensor): place for place, tensor in enumerate(tensors)}
            return tree_map(
                lambda like: Planned.of(like.shape, like.dtype, loading, later=(call, places[id(like)])),
                shapes,
            )
    args, kwargs = _now((args, kwargs))
    return func(*args, **kwargs)


def planned(value: object) -> Planned | None:
    """``value``, if it is one."""
    return value if type(value) is Planned else None


def _now(args: Any) -> Any:
    """``args`` with values in place of plans; collective."""
    return tree_map(lambda arg: arg if planned(arg) is None else arg.now(), args)


def _on_meta(args: Any) -> Any:
    def change(arg: Any) -> Any:
        if isinstance(arg, torch.Tensor):
            return torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device="meta")
        return torch.device("meta") if isinstance(arg, torch.device) else arg

    return tree_map(change, args)


# ---- what mosaics have words for; None from it: not so ----


def _like(x: Planned, mosaic: Mosaic | None, dtype: torch.dtype | None = None) -> Planned | None:
    if mosaic is None:
        return None
    return Planned.of(mosaic.shape, dtype or x.dtype, x.loading, mosaic)


def _same(x: Planned, **_: Any) -> Planned:
    return Planned.of(x.shape, x.dtype, x.loading, x.mosaic, x.later)


def _cast(x: Planned, dtype: torch.dtype | None = None, **_: Any) -> Planned | None:
    if dtype is None or dtype == x.dtype:
        return _same(x)
    if x.mosaic is None:
        return None

    def cast(source: Any) -> Stored:
        assert isinstance(source, Stored)
        return source.cast(dtype)

    return _like(x, x.mosaic.over(cast), dtype)


def _mosaics(tensors: Sequence[Any]) -> list[Mosaic] | None:
    """Those of tensors that can be joined."""
    found = [one.mosaic for x in tensors if (one := planned(x)) is not None and one.mosaic is not None]
    alike = len({x.dtype for x in tensors}) == 1 and len({x.dim() for x in tensors}) == 1
    return found if alike and len(found) == len(tensors) else None


def _cat(tensors: Sequence[Any], dim: int = 0) -> Planned | None:
    mosaics = _mosaics(tensors)
    if mosaics is None:
        return None
    at = dim % tensors[0].dim()
    others = {(*mosaic.shape[:at], *mosaic.shape[at + 1 :]) for mosaic in mosaics}
    return _like(tensors[0], joined(mosaics, at)) if len(others) == 1 else None


def _stack(tensors: Sequence[Any], dim: int = 0) -> Planned | None:
    mosaics = _mosaics(tensors)
    if mosaics is None or len({mosaic.shape for mosaic in mosaics}) > 1:
        return None
    at = dim % (tensors[0].dim() + 1)
    return _like(tensors[0], joined([mosaic.with_dim(at) for mosaic in mosaics], at))


def _slice(
    x: Planned, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Planned | None:
    if x.mosaic is None or step != 1:
        return None
    low, high, _ = slice(start, end).indices(x.size(dim))
    return _like(x, x.mosaic.cut(dim % x.dim(), low, max(low, high)))


def _select(x: Planned, dim: int, index: int) -> Planned | None:
    if x.mosaic is None:
        return None
    at, place = dim % x.dim(), index % x.size(dim)
    return _like(x, x.mosaic.cut(at, place, place + 1).without_dim(at))


def _split(x: Planned, size: int | Sequence[int], dim: int = 0) -> list[Planned | None] | None:
    if x.mosaic is None:
        return None
    total = x.size(dim)
    sizes = [min(size, total - at) for at in range(0, total, size)] if isinstance(size, int) else list(size)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [_slice(x, dim, end - one, end) for one, end in zip(sizes, ends, strict=True)]


def _unsqueeze(x: Planned, dim: int) -> Planned | None:
    return _like(x, x.mosaic.with_dim(dim % (x.dim() + 1))) if x.mosaic is not None else None


def _squeeze(x: Planned, dim: int | None = None) -> Planned | None:
    if x.mosaic is None or not isinstance(dim, int):
        return None
    return _like(x, x.mosaic.without_dim(dim % x.dim()) if x.size(dim) == 1 else x.mosaic)


def _view(x: Planned, shape: Sequence[int]) -> Planned | None:
    if x.mosaic is None:
        return None
    known = torch.empty(x.shape, device="meta").view(tuple(shape)).shape  # one of them may be -1
    return _like(x, x.mosaic.viewed(known))


_ATEN: Any = torch.ops.aten
_PLANS: Mapping[Any, Callable[..., Any]] = MappingProxyType(
    {
        _ATEN.alias: _same,
        _ATEN.detach: _same,
        _ATEN.clone: _same,
        _ATEN._to_copy: _cast,
        _ATEN.cat: _cat,
        _ATEN.stack: _stack,
        _ATEN.slice: _slice,
        _ATEN.select: _select,
        _ATEN.split: _split,
        _ATEN.split_with_sizes: _split,
        _ATEN.unsqueeze: _unsqueeze,
        _ATEN.squeeze: _squeeze,
        _ATEN.view: _view,
        _ATEN._unsafe_view: _view,
    }
)
