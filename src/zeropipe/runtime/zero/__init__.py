"""What users call ``zeropipe.zero``: names are loaded when they are first asked for."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zeropipe.runtime.zero.description import describe as describe
    from zeropipe.runtime.zero.external import register_external_parameter as register_external_parameter
    from zeropipe.runtime.zero.external import unregister_external_parameter as unregister_external_parameter
    from zeropipe.runtime.zero.gather import GatheredParameters as GatheredParameters
    from zeropipe.runtime.zero.init import Init as Init
    from zeropipe.runtime.zero.status import ZeroParamStatus as ZeroParamStatus
    from zeropipe.runtime.zero.status import ZeroParamType as ZeroParamType
    from zeropipe.runtime.zero.unsharding import reshard as reshard
    from zeropipe.runtime.zero.unsharding import unshard as unshard
    from zeropipe.runtime.zero.unsharding import unshard_module as unshard_module
    from zeropipe.runtime.zero.unsharding import unsharded as unsharded

# public name -> file of this package that defines it
_NAMES = MappingProxyType(
    {
        "Init": "init",
        "GatheredParameters": "gather",
        "register_external_parameter": "external",
        "unregister_external_parameter": "external",
        "ZeroParamStatus": "status",
        "ZeroParamType": "status",
        "TiledLinear": "tiling",
        "TiledLinearReturnBias": "tiling",
        "MiCS_Init": "mics",
        "unsharded": "unsharding",
        "unshard": "unsharding",
        "reshard": "unsharding",
        "unshard_module": "unsharding",
        "describe": "description",
        "set_z3_leaf_modules": "leaf",
        "unset_z3_leaf_modules": "leaf",
        "set_z3_leaf_module": "leaf",
        "get_z3_leaf_modules": "leaf",
        "z3_leaf_module": "leaf",
        "z3_leaf_parameter": "leaf",
    }
)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
    if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
