"""Checkpoints of any size that load at any other: writing, reading, checking and reshaping them.

Names are loaded when they are first asked for.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import Any, Final

from zeropipe.checkpoint import constants as _constants

_WHERE: Final = MappingProxyType(
    {
        "reshape_meg_2d_parallel": "reshape_meg_2d",
        "meg_2d_parallel_map": "reshape_meg_2d",
        "DeepSpeedCheckpoint": "deepspeed_checkpoint",
        "get_layer_ckpt_name_for_rank": "utils",
        "get_model_ckpt_name_for_rank": "utils",
        "get_zero_ckpt_name_for_rank": "utils",
        "merge_state": "reshape_utils",
        "model_3d_desc": "reshape_3d_utils",
        "get_model_3d_descriptor": "reshape_3d_utils",
        "ZeROCheckpoint": "zero_checkpoint",
        "enable_universal_checkpoint": "universal_checkpoint",
        "SubparamShape": "universal_checkpoint",
    }
)
_MODULES: Final = frozenset({"utils", *_WHERE.values()})  # reached as attributes, as DeepSpeed's are
_CONSTANTS: Final = tuple(name for name in vars(_constants) if name.isupper())
__all__ = [*_WHERE, *_CONSTANTS]


def __getattr__(name: str) -> Any:
    if name in _CONSTANTS:
        return getattr(_constants, name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
