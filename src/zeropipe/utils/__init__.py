"""Small things that users import from here; all but the logger are loaded when they are first asked for."""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from zeropipe.utils.logging import logger as logger

if TYPE_CHECKING:
    from zeropipe.runtime.dataloader import RepeatingLoader as RepeatingLoader

# public name -> module that defines it: by path, as most of them live above this one in the layers.
_LAZY = MappingProxyType({"RepeatingLoader": "zeropipe.runtime.dataloader"})


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
