"""Schedules from the command line, and the learning rate that a scheduler section implies."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from zeropipe.runtime.lr_schedules import constants as c

# Per schedule: argument, type, value when not given. -1 and None stand for "as the
# constructor has it". (No --total_num_steps: many scripts have an option of that name already.)
_RANGE: tuple[tuple[str, type, Any], ...] = (
    (c.LR_RANGE_TEST_MIN_LR, float, 0.001),
    (c.LR_RANGE_TEST_STEP_RATE, float, 1.0),
    (c.LR_RANGE_TEST_STEP_SIZE, int, 1000),
    (c.LR_RANGE_TEST_STAIRCASE, bool, False),
)
_CYCLE: tuple[tuple[str, type, Any], ...] = (
    (c.CYCLE_FIRST_STEP_SIZE, int, 1000),
    (c.CYCLE_FIRST_STAIR_COUNT, int, -1),
    (c.CYCLE_SECOND_STEP_SIZE, int, -1),
    (c.CYCLE_SECOND_STAIR_COUNT, int, -1),
    (c.DECAY_STEP_SIZE, int, 1000),
    (c.CYCLE_MIN_LR, float, 0.01),
    (c.CYCLE_MAX_LR, float, 0.1),
    (c.DECAY_LR_RATE, float, 0.0),
    (c.CYCLE_MOMENTUM, bool, None),
    (c.CYCLE_MIN_MOM, float, 0.8),
    (c.CYCLE_MAX_MOM, float, 0.9),
    (c.DECAY_MOM_RATE, float, 0.0),
)
_WARMUP: tuple[tuple[str, type, Any], ...] = (
    (c.WARMUP_MIN_LR, float, 0.0),
    (c.WARMUP_MAX_LR, float, 0.001),
    (c.WARMUP_NUM_STEPS, int, 1000),
    (c.WARMUP_TYPE, str, c.WARMUP_LOG_RATE),
)
_COSINE: tuple[tuple[str, type, Any], ...] = (
    (c.WARMUP_MIN_RATIO, float, 0.01),
    (c.COS_MIN_RATIO, float, 0.01),
)

_USED_BY: Mapping[str, tuple[tuple[str, type, Any], ...]] = {
    c.LR_RANGE_TEST: _RANGE,
    c.ONE_CYCLE: _CYCLE,
    c.WARMUP_LR: _WARMUP,
    c.WARMUP_DECAY_LR: _WARMUP,
    c.WARMUP_COSINE_LR: _WARMUP[2:] + _COSINE,
}


def add_tuning_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--lr_schedule`` and an option for each argument of each schedule; returns ``parser``."""
    group = parser.add_argument_group("Learning rate schedule", "Learning rate schedule configurations")
    group.add_argument("--lr_schedule", default=None, help=f"one of {', '.join(c.VALID_LR_SCHEDULES)}")
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
    name = getattr(args, c.LR_SCHEDULE, None)
    if name is None:
        return None, "--lr_schedule not specified on command line"
    if name not in _USED_BY:
        return None, f"{name} is not supported LR schedule"
    given = ((key, getattr(args, key, None)) for key, _, _ in _USED_BY[name])
    return {"type": name, "params": {key: value for key, value in given if value is not None}}, None


def get_lr_from_config(config: Mapping[str, Any]) -> tuple[float | None, str]:
    """``(learning rate, "")`` that a scheduler section ends its warm-up with, or ``(None, reason)``."""
    if "type" not in config:
        return None, "LR schedule type not defined in config"
    if "params" not in config:
        return None, "LR schedule params not defined in config"
    name, params = config["type"], config["params"]
    if name not in c.VALID_LR_SCHEDULES:
        return None, f"{name} is not a valid LR schedule"
    if name == c.WARMUP_COSINE_LR:
        return None, f"{name} scales the optimizer's own learning rate, so its params have none"
    key = {c.LR_RANGE_TEST: c.LR_RANGE_TEST_MIN_LR, c.ONE_CYCLE: c.CYCLE_MAX_LR}.get(name, c.WARMUP_MAX_LR)
    if key not in params:
        return None, f"{key} not defined in LR schedule params"
    return params[key], ""
