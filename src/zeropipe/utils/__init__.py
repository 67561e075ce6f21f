"""Small things that users import from here; all but the logger are loaded when they are first asked for."""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from zeropipe.utils.logging import logger as logger

if TYPE_CHECKING:
    from zeropipe.runtime.dataloader import RepeatingLoader as RepeatingLoader
    from zeropipe.runtime.zero.access import safe_get_full_fp32_param as safe_get_full_fp32_param
    from zeropipe.runtime.zero.access import safe_get_full_grad as safe_get_full_grad
    from zeropipe.runtime.zero.access import safe_get_full_optimizer_state as safe_get_full_optimizer_state
    from zeropipe.runtime.zero.access import safe_get_local_fp32_param as safe_get_local_fp32_param
    from zeropipe.runtime.zero.access import safe_get_local_grad as safe_get_local_grad
    from zeropipe.runtime.zero.access import safe_get_local_optimizer_state as safe_get_local_optimizer_state
    from zeropipe.runtime.zero.access import safe_set_full_fp32_param as safe_set_full_fp32_param
    from zeropipe.runtime.zero.access import safe_set_full_grad as safe_set_full_grad
    from zeropipe.runtime.zero.access import safe_set_full_optimizer_state as safe_set_full_optimizer_state
    from zeropipe.runtime.zero.access import safe_set_local_fp32_param as safe_set_local_fp32_param
    from zeropipe.runtime.zero.access import safe_set_local_grad as safe_set_local_grad
    from zeropipe.runtime.zero.access import safe_set_local_optimizer_state as safe_set_local_optimizer_state
    from zeropipe.runtime.zero.leaf import get_z3_leaf_modules as get_z3_leaf_modules
    from zeropipe.runtime.zero.leaf import set_z3_leaf_module as set_z3_leaf_module
    from zeropipe.runtime.zero.leaf import set_z3_leaf_modules as set_z3_leaf_modules
    from zeropipe.runtime.zero.leaf import unset_z3_leaf_modules as unset_z3_leaf_modules
    from zeropipe.runtime.zero.leaf import z3_leaf_module as z3_leaf_module
    from zeropipe.runtime.zero.leaf import z3_leaf_parameter as z3_leaf_parameter
    from zeropipe.utils.init_on_device import OnDevice as OnDevice
    from zeropipe.utils.logging import log_dist as log_dist

# public name -> module that defines it: by path, as most of them live above this one in the layers.
_ACCESS = "zeropipe.runtime.zero.access"
_LEAF = "zeropipe.runtime.zero.leaf"
_LAZY = MappingProxyType(
    {
        "get_z3_leaf_modules": _LEAF,
        "set_z3_leaf_module": _LEAF,
        "set_z3_leaf_modules": _LEAF,
        "unset_z3_leaf_modules": _LEAF,
        "z3_leaf_module": _LEAF,
        "z3_leaf_parameter": _LEAF,
        "OnDevice": "zeropipe.utils.init_on_device",
        "RepeatingLoader": "zeropipe.runtime.dataloader",
        "log_dist": "zeropipe.utils.logging",
        **{
            f"safe_{verb}_{extent}_{what}": _ACCESS
            for verb in ("get", "set")
            for extent in ("full", "local")
            for what in ("fp32_param", "grad", "optimizer_state")
        },
    }
)
_MODULES = ("groups", "init_on_device", "logging", "tensor_fragment", "zero_to_fp32")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_MODULES})
