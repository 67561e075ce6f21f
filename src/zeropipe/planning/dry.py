"""Running a program without computing: every tensor has its shape, its dtype and its memory, and none is written to.

Memory that nobody touches costs address space only, so a tensor here is an ordinary CPU tensor: its class, its
storage, what it shares with views, and ``resize_`` are what they are in a run. Only the kernels are left out::

    operator     small tensors alone    runs: places, counts and flags have their true values
                 a view                 runs: it moves nothing
                 in place, or out=      left out: its result is its argument
                 anything else          its shapes from torch's own rules (the meta device), memory for them, no values

What was not computed is *unknown*. A number out of it is ``assume`` for us, and for the user's program only where he
said so: a program that decides by it would plan another run than the one that it makes.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from math import prod
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from zeropipe.comm.imagined import NAMESPACE, left_out
from zeropipe.errors import UsageError
from zeropipe.planning.ledger import Ledger
from zeropipe.planning.work import Work

_SMALL = 1 << 15  # elements: below it running a kernel takes less time than asking for its shapes
_TRUE = {"isfinite", "all", "eq", "equal", "ge", "le"}
_REAL = {
    "resize_",
    "set_",
    "as_strided_",
    "squeeze_",
    "unsqueeze_",
    "t_",
    "transpose_",
    "detach_",
    "swapaxes_",
}
_ASKED = {"_local_scalar_dense", "equal", "is_nonzero"}
_BY_VALUE = {
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "nonzero_static",
}


class Dry(TorchDispatchMode):
    """Inside the block no kernel of more than a few elements runs. ``ledger`` is told what is allocated."""

    def __init__(self, ledger: Ledger, work: Work, assume: float | None = None) -> None:
        super().__init__()
        self._ledger, self._work = ledger, work
        self._assume = assume
        self._shapes: dict[Any, Any] = {}  # of an operator's results, by its arguments
        self._kinds: dict[Any, str] = {}

    def __enter__(self) -> Dry:
        self._ledger.watch()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._ledger.unwatch()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind_of(func, name)
        flat, spec = tree_flatten((args, kwargs))
        given = [value for value in flat if isinstance(value, torch.Tensor)]
        if kind == "sent":
            return left_out(func, args)
        if kind == "view":
            return func(*args, **kwargs)
        unknown = any(map(self._ledger.is_unknown, given))
        if name in _ASKED:
            return self._number(name, given[0]) if unknown else func(*args, **kwargs)
        small = all(tensor.numel() <= _SMALL for tensor in given)
        if kind == "inplace":
            return self._in_place(func, args, kwargs, given, small, unknown)
        if name in _BY_VALUE and (unknown or not small):
            raise _shapeless(name)
        if small and given and not unknown:
            result = self._really(func, name, args, kwargs)
        else:
            result = self._left_out(func, name, flat, spec, given)
        self._work.add(func, args, kwargs, result)
        return result

    def _really(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        # What a message would have filled stays as it is: nothing, not what lay there before. So this rank's values
        # come out of a sum over ranks as they went in.
        if "empty" in name:
            result.zero_()
        self._ledger.made(result)
        return result

    def _in_place(
        self, func: Any, args: Any, kwargs: Any, given: list[torch.Tensor], small: bool, unknown: bool
    ) -> Any:
        self._work.add(func, args, kwargs, None)
        written = _written(func, args, kwargs)
        # Of few elements some may be known and stay so in truth: a flag beside a loss.
        if small:
            if unknown:
                for tensor in written:
                    self._ledger.overwritten(tensor)
            return func(*args, **kwargs)
        for tensor in written:
            self._ledger.overwritten(tensor)
            torch._C._autograd._unsafe_set_version_counter((tensor,), (tensor._version + 1,))
        return _results(func, args, kwargs)

    def _left_out(self, func: Any, name: str, flat: list[Any], spec: Any, given: list[torch.Tensor]) -> Any:
        key = (func, *(_key(value) for value in flat), spec)
        try:
            shapes = self._shapes.get(key)
        except TypeError:
            key, shapes = (), None
        if shapes is None:
            # torch has shapes of this one for the dtype of GPUs alone, and kernels for more.
            narrow = torch.bfloat16 if name == "_grouped_mm" and given[0].dtype != torch.bfloat16 else None
            moved = [_meta(value, narrow) for value in flat]
            args, kwargs = tree_unflatten(moved, spec)
            if "device" in kwargs:
                kwargs["device"] = torch.device("meta")
            try:
                made, made_spec = tree_flatten(func(*args, **kwargs))
            except NotImplementedError as error:  # index by a mask, and what else torch has no shapes for
                raise _shapeless(name) from error
            shapes = (
                [
                    (tuple(t.shape), t.stride(), given[0].dtype if narrow else t.dtype)
                    if isinstance(t, torch.Tensor)
                    else t
                    for t in made
                ],
                made_spec,
            )
            if key:
                self._shapes[key] = shapes
        if not given and all(prod(s[0]) <= _SMALL for s in shapes[0] if isinstance(s, tuple)):
            args, kwargs = tree_unflatten(flat, spec)
            return self._really(func, name, args, kwargs)
        outputs = []
        for shape in shapes[0]:
            if not isinstance(shape, tuple):
                outputs.append(shape)
                continue
            size, stride, dtype = shape
            outputs.append(self._memory(name, size, stride, dtype))
        result = tree_unflatten(outputs, shapes[1])
        self._ledger.made(result, unknown=True)
        return result

    def _memory(self, name: str, size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        extent = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if 0 not in size else 0
        try:
            out = torch.empty_strided(size, stride, dtype=dtype)
        except RuntimeError:
            return reserved(extent * dtype.itemsize).view(dtype).as_strided(size, stride)
        if out.numel() <= _SMALL:
            # So that what is done with it neither overflows nor is a NaN.
            out.fill_(1 if dtype.is_floating_point or name in _TRUE else 0)
        return out

    def _number(self, name: str, tensor: torch.Tensor) -> Any:
        ours, where = _asker()
        if not ours and self._assume is None:
            raise UsageError(
                "the program asks for a value that was not computed",
                found=where,
                fix="leave it out of what is planned, or say what it is: --assume 2.5",
            )
        value = 1.0 if self._assume is None else self._assume
        if name in ("equal", "is_nonzero") or tensor.dtype == torch.bool:
            return False
        return value if tensor.dtype.is_floating_point else 0


def reserved(nbytes: int) -> torch.Tensor:
    """``pages``, as a tensor."""
    return torch.frombuffer(pages(nbytes), dtype=torch.uint8)


def pages(nbytes: int) -> mmap.mmap:
    """Bytes of address space, zero, that no limit on memory counts until they are written to."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(-1, nbytes, flags=flags)


def _kind_of(func: Any, name: str) -> str:
    if func.namespace == NAMESPACE:
        return "sent"
    if name in _REAL or func.namespace == "profiler":
        return "view"
    returns, arguments = func._schema.returns, func._schema.arguments
    if any(a.alias_info is not None and a.alias_info.is_write for a in arguments):
        return "inplace"
    if any(r.alias_info is not None for r in returns):
        return "view"
    return "made"


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_flatten(value)[0] if isinstance(t, torch.Tensor)]
    return found


def _results(func: Any, args: Any, kwargs: Any) -> Any:
    """What ``func`` returns that writes to its arguments: the arguments themselves."""
    found = []
    for one in func._schema.returns:
        for place, argument in enumerate(func._schema.arguments):
            aliases = argument.alias_info
            if (
                aliases is not None
                and one.alias_info is not None
                and aliases.before_set == one.alias_info.before_set
            ):
                found.append(args[place] if place < len(args) else kwargs[argument.name])
                break
    if not found:
        return None
    return found[0] if len(found) == 1 else tuple(found)


def _key(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.stride(), value.dtype, value.requires_grad)
    return (type(value), value)


def _meta(value: Any, narrow: torch.dtype | None) -> Any:
    if isinstance(value, torch.Tensor):
        dtype = narrow if narrow and value.is_floating_point() else value.dtype
        return torch.empty_strided(value.shape, value.stride(), dtype=dtype, device="meta")
    return value


def _frames() -> Iterator[Any]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _asker() -> tuple[bool, str]:
    """Whether the nearest code that is not torch's is ours, and where it stands."""
    for frame in _frames():
        module = frame.f_globals.get("__name__", "")
        if module.startswith(str(__package__)):
            continue
        if module.partition(".")[0] == str(__package__).partition(".")[0]:
            return True, ""
        if module.partition(".")[0] not in ("torch", "contextlib", "functools"):
            return False, f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return False, "somewhere"


def _shapeless(name: str) -> UsageError:
    return UsageError(
        f"{name} of values that are not there: its shape depends on them",
        found=_asker()[1],
        fix="a program that computes with all elements, and masks them, has shapes that are known",
    )
