"""The class of a sharded parameter: the ``ds_*`` names that users read, and a guard against use while it is away.

While the whole value is gathered the parameter behaves as any ``nn.Parameter``. While it is not, every torch function
on it comes to ``_Away`` first: inside the forward of a module under ZeRO-3 the parameter is fetched and the module
remembered as its user; anywhere else a clear error is raised. Its ``.data`` then is an ``AwayValue``: shape [0], and
never taken for a value. Dtype, device and copies to another place are free; to write to it or to sum it up raises,
instead of doing nothing or giving 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from zeropipe.comm.group import Group
from zeropipe.errors import UnavailableParameterError, UsageError
from zeropipe.runtime.zero.gather.clients import client_call
from zeropipe.runtime.zero.gather.shards import DATA, Builder, Shards
from zeropipe.runtime.zero.param import State, ZeroParam, ZeroParamStatus, carry


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What may be asked of a parameter that is away: bookkeeping, and facts that its shards know.
_HARMLESS = _names(
    "__hash__ __repr__ __format__ __dir__ __setstate__ __reduce_ex__ __deepcopy__ __set__ __delete__ "
    "dtype device layout requires_grad grad grad_fn is_leaf names output_nr retains_grad volatile is_meta is_cuda "
    "is_cpu is_sparse is_sparse_csr is_quantized is_mkldnn is_nested is_mtia is_mps is_xpu is_xla is_ipu is_maia "
    "is_vulkan itemsize nbytes _version _base _cdata _grad _grad_fn _backward_hooks _post_accumulate_grad_hooks "
    "_is_param element_size is_floating_point is_complex is_contiguous is_shared is_pinned is_inference is_conj is_neg "
    "get_device type is_set_to storage_offset stride _is_view is_same_size has_names has_torch_function is_tensor "
    "is_storage _has_compatible_shallow_copy_type requires_grad_ detach_ set_ retain_grad register_hook "
    "register_post_accumulate_grad_hook"
)
# The part of it that every step asks of every parameter.
_GRAD: Any = (torch.Tensor.grad.__get__, torch.Tensor.grad.__set__)  # type: ignore[union-attr]
# What says where the elements lie; code that asks for it in a forward is about to read them.
_ADDRESSES = _names("data_ptr storage untyped_storage _typed_storage")
# What gives the shape; in zero.Init and in a forward the whole parameter's, elsewhere that of the value here: [0].
_SHAPES = _names("shape size numel nelement dim ndimension ndim __len__")
# What makes a plain tensor of the value: clients put these into files and compare them.
_COPIES = _names("clone to cpu cuda float half bfloat16 double pin_memory contiguous")
# What gives another tensor of the same elements; of a parameter that is away it is one of shape [0], but in a forward.
_EMPTY = _COPIES | {"data", "detach"}
# What says something of all elements: of none of them it would be said without a word.
_SUMMARIES = _names(
    "norm vector_norm linalg_norm linalg_vector_norm sum mean std var max min amax amin any all isnan isinf isfinite "
    "item tolist numpy"
)


class ShardedParameter(torch.nn.Parameter):
    """A parameter whose elements are divided among ranks. The names are DeepSpeed's."""

    _zero: Any

    @property
    def _shards(self) -> Shards:
        shards: Shards | None = self._zero.shards
        assert shards is not None
        return shards

    @property  # type: ignore[override]
    def data(self) -> torch.Tensor:
        zero = self.__dict__.get("_zero")
        if zero is not None and zero.shards is not None:
            zero.shards.own_writes.look(zero.shards)
        value: torch.Tensor = DATA.__get__(self)
        return value

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        zero = self.__dict__.get("_zero")
        if zero is not None and zero.shards is not None:
            zero.shards.own_writes.move(zero.shards)
        DATA.__set__(self, value)

    def set_(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """As torch's, which asks no subclass: parametrizations assign values with it."""
        self._shards.own_writes.move(self._shards)
        return _plainly(torch.Tensor.set_, (self, *args), kwargs)  # type: ignore[no-any-return]

    @property
    def ds_id(self) -> int:
        return self._shards.ident

    @property
    def ds_status(self) -> ZeroParamStatus:
        return self._shards.state.status

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
        self._shards.stay(value)

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
        every: list[Shards] = [param._zero.shards for param in listed]  # type: ignore[attr-defined]
        for shards in every:
            shards.start_gather()
        for shards in every:
            shards.finish_gather()

    def partition(
        self, param_list: list[torch.nn.Parameter] | None = None, has_been_updated: bool = False
    ) -> None:
        """Free the whole value; with ``has_been_updated`` the shards are taken anew from it first."""
        for param in [self] if param_list is None else param_list:
            shards: Shards = param._zero.shards  # type: ignore[attr-defined]
            if has_been_updated and shards.gathered:
                shards.write_back()
            shards.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.nn.Parameter:
        """Of a gathered one a plain parameter; of one away a sharded copy, unless an engine's hooks gather it."""
        shards = self._shards
        if shards.gathered:
            copy = torch.nn.Parameter(self.data.clone(), self.requires_grad)
        elif shards.conductor is None or shards.building:
            empty = torch.empty(0, dtype=shards.dtype, device=shards.full.device)
            copy = torch.nn.Parameter(empty, self.requires_grad)
            carry(copy, ZeroParam(shards.name, shards=shards.twin(copy)))
        else:
            raise _unavailable(shards, "copy.deepcopy")
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self._shards.gathered:
            raise _unavailable(self._shards, "pickling")
        return torch.nn.Parameter(self.data, self.requires_grad).__reduce_ex__(protocol)


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
        if func in _GRAD:
            return _plainly(func, args, {})
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        if not args or not isinstance(args[0], _Away):
            if name not in _HARMLESS and name not in _ADDRESSES:
                cls._fetch_all(name, args, kwargs)
            return _plainly(func, args, kwargs)
        first: _Away = args[0]
        shards = first._shards
        # [1] It is given another value: a builder takes that over when its constructor ends.
        if _gives_memory(name, func, args):
            if _fetch_in_build(shards):
                return _plainly(func, args, kwargs)
            if name == "set_" or args[1].numel():
                raise _unavailable(shards, "giving it another value")
            if first._converts_to(args[1]):
                shards.cast(args[1].dtype, args[1].device)
                return None
        # [2] What is free to ask, which in a forward is often the beginning of a use.
        if (name in _EMPTY or name in _ADDRESSES) and _fetch_in_forward(shards):
            shards.own_writes.look(shards)
            return _plainly(func, args, kwargs)
        if name in _HARMLESS or name in _ADDRESSES:
            return _plainly(func, args, kwargs)
        if name in _SHAPES:
            whole = shards.building or bool(shards.conductor and shards.conductor.running)
            # A client that is about to resize or to merge would go on with the shape of nothing.
            if not whole and shards.conductor is not None and client_call() is not None:
                raise _unavailable(shards, f"'{name}'")
            return (
                _shape_fact(shards.shape, name, *args[1:], **kwargs)
                if whole
                else _plainly(func, args, kwargs)
            )
        # [3] Another parameter, or a tensor without elements, is made of it.
        if name == "detach" and _makes_a_parameter():
            if not _fetch_in_build(shards):
                raise _unavailable(shards, "torch.nn.Parameter(...)")
            return _plainly(func, args, kwargs).as_subclass(torch.nn.Parameter)  # the class that it has now
        if name in _EMPTY and not shards.building:
            empty = _plainly(func, args, kwargs)
            return _away_value(empty, shards.name) if name in ("data", "detach") else empty
        # [4] A state dict is loaded, which cuts the value; anything else needs it.
        if name == "copy_" and shards.state is State.LOADING:
            shards.release_if_idle()
            shards.write(args[1])
            return first
        cls._fetch_all(name, args, kwargs)
        return _plainly(func, args, kwargs)

    @staticmethod
    def _fetch_all(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, _Away):
                shards = value._shards
                if not _fetch_in_build(shards) and not _fetch_in_forward(shards):
                    raise _unavailable(shards, f"torch function '{name}'")

    def _converts_to(self, value: torch.Tensor) -> bool:
        """Whether ``param.data = value`` is what ``module.to(...)`` does to give the parameter a dtype or a device."""
        shards = self._shards
        if value.dtype == shards.dtype and value.device == shards.full.device:
            return False
        if self._zero.trained is not None:
            raise UsageError(
                f"parameter '{shards.name}' is trained in {shards.dtype} on {shards.full.device} and cannot become "
                f"{value.dtype} on {value.device}. Fix: choose the precision in the config (bf16 or fp16)"
            )
        return True


def _fetch_in_build(shards: Shards) -> bool:
    """Gather for a use under a builder; False where there is none."""
    if shards.builder is None or not shards.builder.active:
        return False
    shards.builder.fetch(shards)
    return True


def _fetch_in_forward(shards: Shards) -> bool:
    """Gather for a use in the forward of some module; False outside of any."""
    return shards.conductor is not None and shards.conductor.fetch_for_use(shards)


def _gives_memory(name: str, func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether the call is ``param.data = tensor`` or ``param.set_(tensor)``."""
    if len(args) < 2 or not isinstance(args[1], torch.Tensor):
        return False
    return name == "set_" or (name == "__set__" and getattr(func.__self__, "__name__", "") == "data")  # type: ignore[attr-defined]


def _shape_fact(shape: torch.Size, name: str, dim: int | None = None) -> Any:
    if name in ("shape", "size"):
        return shape if dim is None else shape[dim]
    if name == "__len__":
        return shape[0]
    return shape.numel() if name in ("numel", "nelement") else len(shape)


def _unavailable(shards: Shards, use: str) -> UnavailableParameterError:
    rank = shards.group.ranks[shards.group.rank]
    inside, fix = client_call() or (
        "",
        "read it inside 'with zero.GatheredParameters(param):', or, in the forward of another module than its own, "
        "call zero.register_external_parameter(module, param) first",
    )
    return UnavailableParameterError(
        f"[rank {rank}] {f'{inside}: ' if inside else ''}{use} needs the whole of parameter '{shards.name}' (shape "
        f"{tuple(shards.shape)}), of which this rank holds a shard of {shards.shard_numel} elements. Fix: {fix}"
    )


class AwayValue(torch.Tensor):
    """No elements of parameter ``of``; where torch would speak of a size of 0 the error names the parameter."""

    of: str

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "detach" and _makes_a_parameter():
            raise UnavailableParameterError(
                f"torch.nn.Parameter(...) of the value of parameter '{getattr(args[0], 'of', '?')}', which is sharded "
                "and not here. Fix: make it from a clone inside 'with zero.GatheredParameters(param):'"
            )
        writes = name == "__setitem__" or (
            name.endswith("_") and not name.startswith("_") and name not in _HARMLESS
        )
        if name in _SUMMARIES and args and isinstance(args[0], AwayValue):
            raise UnavailableParameterError(
                f"'{name}' of the value of parameter '{getattr(args[0], 'of', '?')}', which is sharded and not here, "
                "would be that of an empty tensor. Fix: read it inside 'with zero.GatheredParameters(param):'"
            )
        if writes and args and isinstance(args[0], AwayValue):
            raise UnavailableParameterError(
                f"'{name}' would write to the value of parameter '{getattr(args[0], 'of', '?')}', which is sharded and "
                "not here, and so do nothing. Fix: write inside 'with zero.GatheredParameters(param, modifier_rank=0):'"
            )
        of = next((leaf.of for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, AwayValue)), "?")
        try:
            result = _plainly(func, args, kwargs or {})
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise UnavailableParameterError(
                f"torch function '{name}' met the value of parameter '{of}', which is sharded and not here. Fix: take "
                "the value inside 'with zero.GatheredParameters(param):', or, in the forward of another module than "
                "its own, call zero.register_external_parameter(module, param) first"
            ) from error
        if not isinstance(result, torch.Tensor):
            return result
        # What takes part in a graph is not on its way to a file.
        copied = name in _COPIES or name == "__deepcopy__"
        if (copied and not result.requires_grad) or result.numel():
            return result.as_subclass(torch.Tensor) if isinstance(result, AwayValue) else result
        return _away_value(result, of)


def _away_value(nothing: torch.Tensor, of: str) -> torch.Tensor:
    """``nothing`` (no elements), guarded as the value of parameter ``of``."""
    value = nothing.as_subclass(AwayValue)
    value.of = of
    return value


def _makes_a_parameter() -> bool:
    """Whether the caller's caller is the constructor of nn.Parameter, whose own error speaks of torch's insides."""
    return sys._getframe(2).f_code is torch.nn.Parameter.__new__.__code__


def _plainly(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def shard_parameter(
    param: torch.nn.Parameter,
    name: str,
    ident: int,
    group: Group,
    everyone: Group | None = None,
    builder: Builder | None = None,
) -> Shards:
    """Cut ``param`` (the same value on every rank) into shards and free the whole. Not collective."""
    shards = Shards(param, (ShardedParameter, _Away), name, ident, group, everyone, builder)
    carry(param, ZeroParam(name, shards=shards))
    return shards
