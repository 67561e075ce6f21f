"""The names that users import from this path, and the functions here that other libraries exchange for their own.

``zero.Init`` asks this module, each time it is entered, for ``zero_wrapper_for_fp_tensor_constructor``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zeropipe.runtime.zero.external import register_external_parameter, unregister_external_parameter
from zeropipe.runtime.zero.gather import GatheredParameters
from zeropipe.runtime.zero.init import Init
from zeropipe.runtime.zero.status import ZeroParamStatus, ZeroParamType

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

_orig_torch_arange = torch.arange


def zero_wrapper_for_fp_tensor_constructor(
    fn: Callable[..., torch.Tensor], target_fp_dtype: torch.dtype, target_device: torch.device | None = None
) -> Callable[..., torch.Tensor]:
    """What replaces ``fn``, one of torch's tensor constructors, inside ``zero.Init``: ``fn`` itself.

    The dtype is torch's default dtype, which ``Init`` sets, so that an explicit ``dtype=`` is respected.
    """
    return fn


class _Accelerator:
    """The two questions that replacements of the above ask of a device."""

    def device_name(self, device_index: int | str | None = None) -> str:
        """``cuda``, ``cuda:1`` or ``cpu``."""
        if not torch.cuda.is_available():
            return "cpu"
        return "cuda" if device_index is None else f"cuda:{int(device_index)}"

    def current_device_name(self) -> str:
        return self.device_name(torch.cuda.current_device() if torch.cuda.is_available() else None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda if torch.cuda.is_available() else torch.cpu, name)


def get_accelerator() -> _Accelerator:
    """The device that this process computes on."""
    return _Accelerator()
