"""``.data`` of a parameter that is away, and what is made from it: shape [0], and never taken for a value.

Its dtype, its device and copies to another place are free. To write to it or to sum it up raises, instead of doing
nothing or giving 0; where torch would speak of a size of 0 the error names the parameter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from zeropipe.errors import UnavailableParameterError

# What may be asked of a parameter that is away: bookkeeping, and facts that its shards know.
HARMLESS = frozenset(
    [
        "__hash__",
        "__repr__",
        "__format__",
        "__dir__",
        "__setstate__",
        "__reduce_ex__",
        "__deepcopy__",
        "__set__",
        "__delete__",
        "dtype",
        "device",
        "layout",
        "requires_grad",
        "grad",
        "grad_fn",
        "is_leaf",
        "names",
        "output_nr",
        "retains_grad",
        "volatile",
        "is_meta",
        "is_cuda",
        "is_cpu",
        "is_sparse",
        "is_sparse_csr",
        "is_quantized",
        "is_mkldnn",
        "is_nested",
        "is_mtia",
        "is_mps",
        "is_xpu",
        "is_xla",
        "is_ipu",
        "is_maia",
        "is_vulkan",
        "itemsize",
        "nbytes",
        "_version",
        "_base",
        "_cdata",
        "_grad",
        "_grad_fn",
        "_backward_hooks",
        "_post_accumulate_grad_hooks",
        "_is_param",
        "element_size",
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "is_shared",
        "is_pinned",
        "is_inference",
        "is_conj",
        "is_neg",
        "get_device",
        "type",
        "is_set_to",
        "storage_offset",
        "stride",
        "_is_view",
        "is_same_size",
        "has_names",
        "has_torch_function",
        "is_tensor",
        "is_storage",
        "_has_compatible_shallow_copy_type",
        "requires_grad_",
        "detach_",
        "set_",
        "retain_grad",
        "register_hook",
        "register_post_accumulate_grad_hook",
    ]
)
# What says something of all elements: of none of them it would be said without a word.
_SUMMARIES = frozenset(
    [
        "norm",
        "vector_norm",
        "linalg_norm",
        "linalg_vector_norm",
        "sum",
        "mean",
        "std",
        "var",
        "max",
        "min",
        "amax",
        "amin",
        "any",
        "all",
        "isnan",
        "isinf",
        "isfinite",
        "item",
        "tolist",
        "numpy",
    ]
)
# What makes a plain tensor of it: clients put these into files and compare them.
_COPIES = frozenset(
    [
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
        "__deepcopy__",
    ]
)


class AwayValue(torch.Tensor):
    """No elements of parameter ``of``."""

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
        if name == "detach" and makes_a_parameter():
            raise UnavailableParameterError(
                f"torch.nn.Parameter(...) of the value of parameter '{getattr(args[0], 'of', '?')}', which is sharded "
                "and not here. Fix: make it from a clone inside 'with zero.GatheredParameters(param):'"
            )
        writes = name == "__setitem__" or (
            name.endswith("_") and not name.startswith("_") and name not in HARMLESS
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
            result = plainly(func, args, kwargs or {})
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise UnavailableParameterError(
                f"torch function '{name}' met the value of parameter '{of}', which is sharded and not here. Fix: take "
                "the value inside 'with zero.GatheredParameters(param):', or, in the forward of another module than "
                "its own, call zero.register_external_parameter(module, param) first"
            ) from error
        if not isinstance(result, torch.Tensor):
            return result
        # What takes part in a graph is not on its way to a file.
        if (name in _COPIES and not result.requires_grad) or result.numel():
            return result.as_subclass(torch.Tensor) if isinstance(result, AwayValue) else result
        return away_value(result, of)


def away_value(nothing: torch.Tensor, of: str) -> torch.Tensor:
    """``nothing`` (no elements), guarded as the value of parameter ``of``."""
    value = nothing.as_subclass(AwayValue)
    value.of = of
    return value


def makes_a_parameter() -> bool:
    """Whether the caller's caller is the constructor of nn.Parameter, whose own error speaks of torch's insides."""
    return sys._getframe(2).f_code is torch.nn.Parameter.__new__.__code__


def plainly(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)
