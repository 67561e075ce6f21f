"""Learning-rate schedules by the names, arguments and numbers that DeepSpeed users know."""

from zeropipe.runtime.lr_schedules.base import Schedule, get_torch_optimizer, step_schedule
from zeropipe.runtime.lr_schedules.config import *  # noqa: F403
from zeropipe.runtime.lr_schedules.config import (
    VALID_LR_SCHEDULES,
    add_tuning_arguments,
    get_config_from_args,
    get_lr_from_config,
    parse_arguments,
)
from zeropipe.runtime.lr_schedules.kinds import (
    LRRangeTest,
    OneCycle,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
    build,
)

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
    "step_schedule",
]
