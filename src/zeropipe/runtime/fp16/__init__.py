"""16-bit training: loss scaling and the helpers for hand-written fp16 loops.

``DeepSpeedEngine`` is reachable here because users import it from here; it lives two layers up, so it is
looked up only when asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zeropipe.names import lazy
from zeropipe.runtime.fp16 import fp16_utils
from zeropipe.runtime.fp16.loss_scaler import (
    CreateLossScaler,
    DynamicLossScaler,
    LossScaler,
    get_loss_scaler,
)

if TYPE_CHECKING:
    from zeropipe.runtime.engine import DeepSpeedEngine

__all__ = [
    "CreateLossScaler",
    "DeepSpeedEngine",
    "DynamicLossScaler",
    "LossScaler",
    "fp16_utils",
    "get_loss_scaler",
]

__getattr__, __dir__ = lazy(__name__)
