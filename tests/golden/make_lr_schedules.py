"""Writes lr_schedules.json: the numbers that DeepSpeed 0.19.8 produces, for tests/unit/test_lr_schedules.py.

Run it where DeepSpeed is installed; the project itself does not need it.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
STEPS = 14
GROUP_LRS = (0.1, 0.5)
CYCLE = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1}
LINEAR = {"warmup_type": "linear"}
RANGE = {"lr_range_test_min_lr": 1e-3, "lr_range_test_step_size": 3, "lr_range_test_step_rate": 2.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "log": ("WarmupLR", {"warmup_max_lr": 0.1, "warmup_num_steps": 5}),
    "linear": ("WarmupLR", {"warmup_min_lr": 0.01, "warmup_max_lr": 0.1, "warmup_num_steps": 5, **LINEAR}),
    "own lr": ("WarmupLR", {"warmup_num_steps": 4, **LINEAR}),
    "lists": ("WarmupLR", {"warmup_min_lr": [0.0, 0.1], "warmup_max_lr": [1.0, 2.0], "warmup_num_steps": 4}),
    "one step": ("WarmupLR", {"warmup_max_lr": 0.1, "warmup_num_steps": 1, **LINEAR}),
    "decay": (
        "WarmupDecayLR",
        {"total_num_steps": 10, "warmup_max_lr": 0.1, "warmup_num_steps": 4, **LINEAR},
    ),
    "decay to min": ("WarmupDecayLR", {"total_num_steps": 10, "warmup_min_lr": 0.01, "warmup_num_steps": 4}),
    "decay too short": ("WarmupDecayLR", {"total_num_steps": 3, "warmup_max_lr": 0.1, "warmup_num_steps": 6}),
    "cosine": (
        "WarmupCosineLR",
        {
            "total_num_steps": 10,
            "warmup_min_ratio": 0.1,
            "warmup_num_steps": 4,
            "cos_min_ratio": 0.01,
            **LINEAR,
        },
    ),
    "cosine log": ("WarmupCosineLR", {"total_num_steps": 10, "warmup_num_steps": 4}),
    "cosine too short": ("WarmupCosineLR", {"total_num_steps": 3, "warmup_num_steps": 6}),
    "cosine no room": ("WarmupCosineLR", {"total_num_steps": 4, "warmup_num_steps": 4}),
    "range": ("LRRangeTest", RANGE),
    "range stairs": ("LRRangeTest", {**RANGE, "lr_range_test_staircase": True}),
    "range list": ("LRRangeTest", {"lr_range_test_min_lr": [1e-3, 1e-2], "lr_range_test_step_size": 3}),
    "cycle": (
        "OneCycle",
        {
            **CYCLE,
            "cycle_first_step_size": 4,
            "cycle_second_step_size": 3,
            "decay_step_size": 2,
            "decay_lr_rate": 0.5,
            "decay_mom_rate": 0.01,
        },
    ),
    "cycle without decay": ("OneCycle", {**CYCLE, "cycle_first_step_size": 4}),
    "cycle stairs": (
        "OneCycle",
        {
            **CYCLE,
            "cycle_first_step_size": 4,
            "cycle_first_stair_count": 2,
            "decay_step_size": 2,
            "decay_lr_rate": 0.5,
        },
    ),
    "cycle without momentum": ("OneCycle", {**CYCLE, "cycle_first_step_size": 3, "cycle_momentum": False}),
}


def adam(lrs: tuple[float, ...] = GROUP_LRS) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    return torch.optim.Adam(groups, betas=(0.9, 0.999))


def trace(module: Any, name: str, params: dict[str, Any]) -> dict[str, list[list[float]]]:
    """lr and first beta of both groups: at construction, then after each step."""
    optimizer = adam()
    schedule = getattr(module, name)(optimizer, **params)
    rows: dict[str, list[list[float]]] = {"lr": [], "beta1": []}
    for step in range(STEPS + 1):
        if step:
            schedule.step()
        rows["lr"].append([group["lr"] for group in optimizer.param_groups])
        rows["beta1"].append([group["betas"][0] for group in optimizer.param_groups])
    return rows


if __name__ == "__main__":
    peer = importlib.import_module("deepspeed.runtime.lr_schedules")
    result = {key: trace(peer, name, params) for key, (name, params) in CASES.items()}
    lines = [f"{json.dumps(key)}: {json.dumps(rows)}" for key, rows in result.items()]
    (HERE / "lr_schedules.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
