"""The names that users import from this path, and the functions here that other libraries exchange for their own.

``zero.Init`` asks this module, each time it is entered, for ``zero_wrapper_for_fp_tensor_constructor``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from zeropipe.accelerator import get_accelerator
from zeropipe.runtime.zero.gather.init import Init
from zeropipe.runtime.zero.gather.whole import GatheredParameters
from zeropipe.runtime.zero.marks import register_external_parameter, unregister_external_parameter
from zeropipe.runtime.zero.param import ZeroParamStatus, ZeroParamType

__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "ZeroParamType",
    "get_accelerator",
    "register_external_parameter",
    "unregister_external_parameter",
    "zero_wrapper_for_fp_tensor_constructor",
]

# By it wrappers of other libraries know which constructor they were given (transformers).
_orig_torch_arange = torch.arange


def zero_wrapper_for_fp_tensor_constructor(
    fn: Callable[..., torch.Tensor], target_fp_dtype: torch.dtype, target_device: torch.device | None = None
) -> Callable[..., torch.Tensor]:
    """What replaces ``fn``, one of torch's tensor constructors, inside ``zero.Init``: ``fn`` itself."""
    # Tensors are made as they are outside, because some become buffers; ``Init`` casts the parameters when it ends.
    return fn
