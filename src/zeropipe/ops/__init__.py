"""Optimizer classes under the paths that DeepSpeed users import; they are defined in ``runtime/optimizers``."""

from importlib import import_module
from typing import Any

_MODULES = ("adagrad", "adam", "lamb", "lion")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
