"""The class of a sharded parameter: the ``ds_*`` names that users read, and a guard against use while it is away.

While the whole value is gathered the parameter behaves as any ``nn.Parameter``. While it is not, every torch
function on it comes to ``_Away.__torch_function__`` first: inside the forward of a module under ZeRO-3 the
parameter is fetched and the module remembered as its user; anywhere else a clear error is raised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from zeropipe.errors import UnavailableParameterError, UsageError
from zeropipe.runtime.zero.gather.away_value import HARMLESS, away_value, makes_a_parameter, plainly
from zeropipe.runtime.zero.status import ZeroParamStatus

if TYPE_CHECKING:
    from zeropipe.runtime.zero.gather.shards import Shards


_DATA: Any = torch.Tensor.data  # type: ignore[misc]  # what reads and sets it without telling anybody


class ShardedParameter(torch.nn.Parameter):
    """A parameter whose elements are divided among ranks. The names are DeepSpeed's."""

    _zero: Any

    @property
    def _shards(self) -> Shards:
        shards = self._zero.shards
        assert shards is not None
        return shards

    @property  # type: ignore[override]
    def data(self) -> torch.Tensor:
        zero = self.__dict__.get("_zero")
        if zero is not None and zero.shards is not None:
            zero.shards.writes.look(zero.shards)
        value: torch.Tensor = _DATA.__get__(self)
        return value

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        zero = self.__dict__.get("_zero")
        if zero is not None and zero.shards is not None:
            zero.shards.writes.move(zero.shards)
        _DATA.__set__(self, value)

    def set_(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """As torch's, which asks no subclass: parametrizations assign values with it."""
        self._shards.writes.move(self._shards)
        return plainly(torch.Tensor.set_, (self, *args), kwargs)  # type: ignore[no-any-return]

    @property
    def ds_id(self) -> int:
        return self._shards.ident

    @property
    def ds_status(self) -> ZeroParamStatus:
        return self._shards.status

    @property
    def ds_shape(self) -> torch.Size:
        """The shape of the whole parameter."""
        return self._shards.shape

    @property
    def ds_numel(self) -> int:
        return self._shards.numel

    @property
    def ds_tensor(self) -> torch.Tensor:
        """This rank's shard: 1D, partition_numel() elements, in the parameter's dtype."""
        return self._shards.source.to(self._shards.dtype)

    @property
    def ds_persist(self) -> bool:
        return self._shards.persist

    @ds_persist.setter
    def ds_persist(self, value: bool) -> None:
        self._shards.persist = value

    @property
    def ds_active_sub_modules(self) -> set[int]:
        return self._shards.active_modules

    @property
    def ds_process_group(self) -> Any:
        return self._shards.group.pg

    def partition_numel(self) -> int:
        """Elements of one shard, padding included: ceil(ds_numel / ranks)."""
        return self._shards.shard_numel

    def all_gather(self, param_list: list[torch.nn.Parameter] | None = None, async_op: bool = False) -> None:
        """Make the whole value (of all in ``param_list``) available on every rank; collective."""
        listed = [self] if param_list is None else param_list
        for param in listed:
            param._zero.shards.start_gather()  # type: ignore[attr-defined]
        for param in listed:
            param._zero.shards.finish_gather()  # type: ignore[attr-defined]

    def partition(
        self, param_list: list[torch.nn.Parameter] | None = None, has_been_updated: bool = False
    ) -> None:
        """Free the whole value; with ``has_been_updated`` the shards are taken anew from it first."""
        for param in [self] if param_list is None else param_list:
            shards: Shards = param._zero.shards  # type: ignore[attr-defined]
            if has_been_updated and shards.status is ZeroParamStatus.AVAILABLE:
                shards.write_back()
            shards.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.nn.Parameter:
        """Of a gathered one a plain parameter; of one away a sharded copy, unless an engine's hooks gather it."""
        shards = self._shards
        if shards.status is ZeroParamStatus.AVAILABLE:
            copy = torch.nn.Parameter(self.data.clone(), self.requires_grad)
        elif shards.fetch_for_use is None or shards.building:
            copy = shards.duplicate(self)
        else:
            raise _unavailable(shards, "copy.deepcopy")
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._shards.status is not ZeroParamStatus.AVAILABLE:
            raise _unavailable(self._shards, "pickling")
        return torch.nn.Parameter(self.data, self.requires_grad).__reduce_ex__(protocol)


# What says where the elements lie; code that asks for it in a forward is about to read them.
_ADDRESSES = frozenset(["data_ptr", "storage", "untyped_storage", "_typed_storage"])
# What gives the shape; in zero.Init and in a forward the whole parameter's, elsewhere that of the value here: [0].
_SHAPES = frozenset(["shape", "size", "numel", "nelement", "dim", "ndimension", "ndim", "__len__"])
# What gives another tensor of the same elements; of a parameter that is away it is one of shape [0], but in a forward.
_EMPTY = frozenset(
    [
        "data",
        "detach",
        "clone",
        "to",
        "cpu",
        "cuda",
        "float",
        "half",
        "bfloat16",
        "double",
        "pin_memory",
        "contiguous",
    ]
)


class _Away(ShardedParameter):
    """The class of a sharded parameter while its whole value is not here."""

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        shards = self._shards
        held = f"away: {shards.shard_numel} elements on this rank"
        return f"Parameter '{shards.name}' {tuple(shards.shape)} {shards.dtype}, {held}"

    def set_(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return self.__torch_function__(torch.Tensor.set_, (type(self),), (self, *args), kwargs)  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        first = args[0] if args and isinstance(args[0], _Away) else None
        if first is not None and _gives_memory(name, func, args):
            if first._shards.building:
                first._shards.builder.fetch(first._shards)  # type: ignore[union-attr]  # which takes it over later
                return plainly(func, args, kwargs)
            if name == "set_" or args[1].numel():
                raise _unavailable(first._shards, "giving it another value")
            if _converts(first, args[1]):
                first._shards.cast(args[1].dtype, args[1].device)
                return None
        if first is not None and (name in _EMPTY or name in _ADDRESSES) and first._shards.fetch_in_forward():
            first._shards.writes.look(first._shards)
            return plainly(func, args, kwargs)
        if name in HARMLESS or name in _ADDRESSES:
            return plainly(func, args, kwargs)
        if first is not None and name in _SHAPES:
            shards = first._shards
            if shards.building or shards.fetch_in_forward(ask=True):
                return _shape_fact(shards.shape, name, *args[1:], **kwargs)
            return plainly(func, args, kwargs)
        if first is not None and name == "detach" and makes_a_parameter():
            builder = first._shards.builder
            if builder is None or not builder.active:
                raise _unavailable(first._shards, "torch.nn.Parameter(...)")
            builder.fetch(first._shards)
            return plainly(func, args, kwargs).as_subclass(
                torch.nn.Parameter
            )  # the class that ``first`` has now
        if first is not None and name in _EMPTY and not first._shards.building:
            empty = plainly(func, args, kwargs)
            if name not in ("data", "detach"):
                return empty
            return away_value(empty, first._shards.name)
        if first is not None and name == "copy_" and first._shards.loading:
            first._shards.end_loading()
            first._shards.write(args[1])
            return first
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, _Away):
                shards = value._shards
                if shards.builder is not None and shards.builder.active:
                    shards.builder.fetch(shards)
                elif not shards.fetch_in_forward():
                    raise _unavailable(shards, f"torch function '{name}'")
        return plainly(func, args, kwargs)


def _gives_memory(name: str, func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether the call is ``param.data = tensor`` or ``param.set_(tensor)``."""
    if len(args) < 2 or not isinstance(args[1], torch.Tensor):
        return False
    return name == "set_" or (name == "__set__" and getattr(func.__self__, "__name__", "") == "data")  # type: ignore[attr-defined]


def _converts(param: _Away, value: torch.Tensor) -> bool:
    """Whether ``param.data = value`` is what ``module.to(...)`` does to give the parameter a dtype or a device."""
    shards = param._shards
    if value.dtype == shards.dtype and value.device == shards.full.device:
        return False
    if param._zero.trained is not None:
        raise UsageError(
            f"parameter '{shards.name}' is trained in {shards.dtype} on {shards.full.device} and cannot become "
            f"{value.dtype} on {value.device}. Fix: choose the precision in the config (bf16 or fp16)"
        )
    return True


def _shape_fact(shape: torch.Size, name: str, dim: int | None = None) -> Any:
    if name in ("shape", "size"):
        return shape if dim is None else shape[dim]
    if name == "__len__":
        return shape[0]
    return shape.numel() if name in ("numel", "nelement") else len(shape)


def _unavailable(shards: Shards, use: str) -> UnavailableParameterError:
    rank = shards.group.ranks[shards.group.rank]
    return UnavailableParameterError(
        f"[rank {rank}] {use} needs the whole of parameter '{shards.name}' (shape {tuple(shards.shape)}), of which "
        f"this rank holds a shard of {shards.shard_numel} elements. Fix: read it inside 'with "
        "zero.GatheredParameters(param):', or, in the forward of another module than its own, call "
        "zero.register_external_parameter(module, param) first"
    )


def mark_available(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Let ``param`` be ``value`` (its own shape)."""
    param.__class__ = ShardedParameter
    _DATA.__set__(param, value)


def mark_unavailable(param: torch.nn.Parameter, nothing: torch.Tensor) -> None:
    """Let ``param`` be ``nothing`` (shape [0]), guarded against use."""
    param.__class__ = ShardedParameter
    _DATA.__set__(param, nothing)
    param.__class__ = _Away


def show_shape(param: torch.nn.Parameter, shape: torch.Size) -> None:
    """Let autograd see ``shape`` on a parameter that is away; a use of it still meets the guard."""
    param.__class__ = ShardedParameter
    _DATA.__set__(param, param.detach().new_full((), torch.nan).expand(shape))
    param.__class__ = _Away
