"""Harmless stand-ins for the three classes that DeepSpeed's files name, so that those load without running code.

They carry the saved values and do nothing. ``STAND_INS`` is given to torch's weights-only unpickler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class LossScalerValues:
    """``deepspeed.runtime.fp16.loss_scaler.LossScaler`` and ``DynamicLossScaler``: their fields, by name."""

    def __init__(self, *args: Any) -> None:
        if args:
            self.cur_scale = args[0]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def values(self) -> dict[str, Any]:
        return dict(self.__dict__)


class StageValue(int):
    """``deepspeed.runtime.zero.config.ZeroStageEnum``: an int."""


class FragmentAddress:
    """``deepspeed.utils.tensor_fragment.fragment_address``: where a shard holds a parameter, in elements."""

    def __init__(self, numel: int = 0, start: int = 0) -> None:
        self.numel = numel
        self.start = start


STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (LossScalerValues, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (LossScalerValues, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (StageValue, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
]
