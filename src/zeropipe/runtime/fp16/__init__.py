"""16-bit training: loss scaling and the helpers for hand-written fp16 loops.

``DeepSpeedEngine`` is reachable here because users import it from here; it lives two layers up, so it is
looked up only when asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

from zeropipe.runtime.fp16 import fp16_utils
from zeropipe.runtime.fp16.loss_scaler import (
    CreateLossScaler,
    DynamicLossScaler,
    LossScaler,
    get_loss_scaler,
)

__all__ = [
    "CreateLossScaler",
    "DeepSpeedEngine",
    "DynamicLossScaler",
    "LossScaler",
    "fp16_utils",
    "get_loss_scaler",
]


def __getattr__(name: str) -> Any:
    if name == "DeepSpeedEngine":
        return importlib.import_module("zeropipe.runtime.engine").DeepSpeedEngine
    if name == "onebit":
        return importlib.import_module(f"{__name__}.onebit")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
