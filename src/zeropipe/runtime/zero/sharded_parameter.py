"""The class of a sharded parameter: the ``ds_*`` names that users read, and a guard against use while it is away.

While the whole value is gathered the parameter behaves as any ``nn.Parameter``. While it is not, every torch
function on it comes to ``_Away.__torch_function__`` first: inside the forward of a module under ZeRO-3 the
parameter is fetched and the module remembered as its user; anywhere else a clear error is raised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from zeropipe.errors import UnavailableParameterError
from zeropipe.runtime.zero.status import ZeroParamStatus

if TYPE_CHECKING:
    from zeropipe.runtime.zero.shards import Shards


class ShardedParameter(torch.nn.Parameter):
    """A parameter whose elements are divided among ranks. The names are DeepSpeed's."""

    _zero: Any

    @property
    def _shards(self) -> Shards:
        shards = self._zero.shards
        assert shards is not None
        return shards

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
        """A plain parameter with a copy of the gathered value."""
        if self._shards.status is not ZeroParamStatus.AVAILABLE:
            raise _unavailable(self._shards, "copy.deepcopy")
        copy = torch.nn.Parameter(self.data.clone(), self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._shards.status is not ZeroParamStatus.AVAILABLE:
            raise _unavailable(self._shards, "pickling")
        return torch.nn.Parameter(self.data, self.requires_grad).__reduce_ex__(protocol)


# What may be asked of a parameter that is away: facts and bookkeeping, nothing that reads elements.
_HARMLESS = frozenset(
    [
        "numel",
        "size",
        "dim",
        "ndimension",
        "element_size",
        "stride",
        "storage_offset",
        "data_ptr",
        "untyped_storage",
        "nelement",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "is_shared",
        "is_pinned",
        "get_device",
        "type",
        "dtype",
        "requires_grad_",
        "detach",
        "detach_",
        "register_hook",
        "register_post_accumulate_grad_hook",
        "__hash__",
        "__repr__",
        "__format__",
        "__len__",
        "to",
        "cpu",
        "cuda",
        "float",
        "half",
        "bfloat16",
        "double",
        "clone",
        "pin_memory",
        "_is_view",
        "is_same_size",
        "_typed_storage",
        "storage",
        "retain_grad",
        "has_names",
        "is_inference",
        "is_sparse",
        "set_",
        "is_set_to",
        "is_conj",
        "is_neg",
        "is_quantized",
        "__reduce_ex__",
        "__deepcopy__",
        "_has_compatible_shallow_copy_type",
        "has_torch_function",
        "is_tensor",
        "is_storage",
        "__dir__",
        "__setstate__",
    ]
)


class _Away(ShardedParameter):
    """The class of a sharded parameter while its whole value is not here."""

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
        if name not in _HARMLESS and not name.endswith("__get__") and name not in ("__set__", "__delete__"):
            for value in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(value, _Away):
                    shards = value._shards
                    if shards.fetch_for_use is None or not shards.fetch_for_use(shards):
                        raise _unavailable(shards, f"torch function '{name}'")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


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
    param.data = value


def mark_unavailable(param: torch.nn.Parameter, nothing: torch.Tensor) -> None:
    """Let ``param`` be ``nothing`` (shape [0]), guarded against use."""
    param.data = nothing
    param.__class__ = _Away
