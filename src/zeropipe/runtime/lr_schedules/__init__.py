"""Learning-rate schedules by the names, arguments and numbers that DeepSpeed users know."""

from __future__ import annotations

from zeropipe.runtime.lr_schedules.arguments import (
    add_tuning_arguments,
    get_config_from_args,
    get_lr_from_config,
    parse_arguments,
)
from zeropipe.runtime.lr_schedules.base import Schedule, get_torch_optimizer
from zeropipe.runtime.lr_schedules.constants import *  # noqa: F403
from zeropipe.runtime.lr_schedules.constants import VALID_LR_SCHEDULES
from zeropipe.runtime.lr_schedules.cycles import LRRangeTest, OneCycle
from zeropipe.runtime.lr_schedules.factory import build
from zeropipe.runtime.lr_schedules.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = [
    "VALID_LR_SCHEDULES",
    "LRRangeTest",
    "OneCycle",
    "Schedule",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "add_tuning_arguments",
    "build",
    "get_config_from_args",
    "get_lr_from_config",
    "get_torch_optimizer",
    "parse_arguments",
]
