"""Schedules as a configuration and a command line know them: names, arguments, and the learning rate they imply."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

LR_SCHEDULE = "lr_schedule"
LR_RANGE_TEST = "LRRangeTest"
ONE_CYCLE = "OneCycle"
WARMUP_LR = "WarmupLR"
WARMUP_DECAY_LR = "WarmupDecayLR"
WARMUP_COSINE_LR = "WarmupCosineLR"
# A list, because clients read it as one; nothing here changes it.
VALID_LR_SCHEDULES = [LR_RANGE_TEST, ONE_CYCLE, WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR]

LR_RANGE_TEST_MIN_LR = "lr_range_test_min_lr"
LR_RANGE_TEST_STEP_RATE = "lr_range_test_step_rate"
LR_RANGE_TEST_STEP_SIZE = "lr_range_test_step_size"
LR_RANGE_TEST_STAIRCASE = "lr_range_test_staircase"

EDGE_VALUE = "edge_value"
MID_VALUE = "mid_value"
CYCLE_FIRST_STEP_SIZE = "cycle_first_step_size"
CYCLE_FIRST_STAIR_COUNT = "cycle_first_stair_count"
CYCLE_SECOND_STEP_SIZE = "cycle_second_step_size"
CYCLE_SECOND_STAIR_COUNT = "cycle_second_stair_count"
DECAY_STEP_SIZE = "decay_step_size"
CYCLE_MIN_LR = "cycle_min_lr"
CYCLE_MAX_LR = "cycle_max_lr"
DECAY_LR_RATE = "decay_lr_rate"
CYCLE_MOMENTUM = "cycle_momentum"
CYCLE_MIN_MOM = "cycle_min_mom"
CYCLE_MAX_MOM = "cycle_max_mom"
DECAY_MOM_RATE = "decay_mom_rate"

WARMUP_MIN_LR = "warmup_min_lr"
WARMUP_MAX_LR = "warmup_max_lr"
WARMUP_NUM_STEPS = "warmup_num_steps"
WARMUP_TYPE = "warmup_type"
WARMUP_LOG_RATE = "log"
WARMUP_LINEAR_RATE = "linear"
WARMUP_MIN_RATIO = "warmup_min_ratio"
COS_MIN_RATIO = "cos_min_ratio"
TOTAL_NUM_STEPS = "total_num_steps"

# Per schedule: argument, type, value when not given. -1 and None stand for "as the constructor has it".
# There is no --total_num_steps: many scripts have an option of that name already.
_Arguments = tuple[tuple[str, type, Any], ...]
_RANGE: _Arguments = (
    (LR_RANGE_TEST_MIN_LR, float, 0.001),
    (LR_RANGE_TEST_STEP_RATE, float, 1.0),
    (LR_RANGE_TEST_STEP_SIZE, int, 1000),
    (LR_RANGE_TEST_STAIRCASE, bool, False),
)
_CYCLE: _Arguments = (
    (CYCLE_FIRST_STEP_SIZE, int, 1000),
    (CYCLE_FIRST_STAIR_COUNT, int, -1),
    (CYCLE_SECOND_STEP_SIZE, int, -1),
    (CYCLE_SECOND_STAIR_COUNT, int, -1),
    (DECAY_STEP_SIZE, int, 1000),
    (CYCLE_MIN_LR, float, 0.01),
    (CYCLE_MAX_LR, float, 0.1),
    (DECAY_LR_RATE, float, 0.0),
    (CYCLE_MOMENTUM, bool, None),
    (CYCLE_MIN_MOM, float, 0.8),
    (CYCLE_MAX_MOM, float, 0.9),
    (DECAY_MOM_RATE, float, 0.0),
)
_WARMUP: _Arguments = (
    (WARMUP_MIN_LR, float, 0.0),
    (WARMUP_MAX_LR, float, 0.001),
    (WARMUP_NUM_STEPS, int, 1000),
    (WARMUP_TYPE, str, WARMUP_LOG_RATE),
)
_COSINE: _Arguments = (
    (WARMUP_MIN_RATIO, float, 0.01),
    (COS_MIN_RATIO, float, 0.01),
)

_USED_BY: Mapping[str, _Arguments] = {
    LR_RANGE_TEST: _RANGE,
    ONE_CYCLE: _CYCLE,
    WARMUP_LR: _WARMUP,
    WARMUP_DECAY_LR: _WARMUP,
    WARMUP_COSINE_LR: _WARMUP[2:] + _COSINE,
}


def add_tuning_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--lr_schedule`` and an option for each argument of each schedule; returns ``parser``."""
    group = parser.add_argument_group("Learning rate schedule", "Learning rate schedule configurations")
    group.add_argument("--lr_schedule", default=None, help=f"one of {', '.join(VALID_LR_SCHEDULES)}")
    for name, kind, default in (*_RANGE, *_CYCLE, *_WARMUP, *_COSINE):
        if kind is bool:
            group.add_argument(f"--{name}", action="store_true", default=default)
        else:
            group.add_argument(f"--{name}", type=kind, default=default)
    return parser


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The schedule options of this process's command line, and what is left of it."""
    return add_tuning_arguments(argparse.ArgumentParser()).parse_known_args()


def get_config_from_args(args: argparse.Namespace) -> tuple[dict[str, Any] | None, str | None]:
    """``(scheduler section, None)`` from parsed options, or ``(None, reason)``."""
    name = getattr(args, LR_SCHEDULE, None)
    if name is None:
        return None, "--lr_schedule not specified on command line"
    if name not in _USED_BY:
        return None, f"{name} is not supported LR schedule"
    # None stands for "not given", so that the constructor's own value holds.
    given = ((key, getattr(args, key, None)) for key, _, _ in _USED_BY[name])
    return {"type": name, "params": {key: value for key, value in given if value is not None}}, None


def get_lr_from_config(config: Mapping[str, Any]) -> tuple[float | None, str]:
    """``(learning rate, "")`` that a scheduler section ends its warm-up with, or ``(None, reason)``."""
    if "type" not in config:
        return None, "LR schedule type not defined in config"
    if "params" not in config:
        return None, "LR schedule params not defined in config"
    name, params = config["type"], config["params"]
    if name not in VALID_LR_SCHEDULES:
        return None, f"{name} is not a valid LR schedule"
    if name == WARMUP_COSINE_LR:
        return None, f"{name} scales the optimizer's own learning rate, so its params have none"
    # The rate that training begins with once the warm-up, or the search, is over.
    key = {LR_RANGE_TEST: LR_RANGE_TEST_MIN_LR, ONE_CYCLE: CYCLE_MAX_LR}.get(name, WARMUP_MAX_LR)
    if key not in params:
        return None, f"{key} not defined in LR schedule params"
    return params[key], ""
