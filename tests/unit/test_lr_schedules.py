"""Schedules: DeepSpeed's numbers, exact resume, several param groups, and the mistakes users make."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.golden.make_lr_schedules import CASES, STEPS, adam, trace
from zeropipe.errors import CheckpointError, ConfigError, UsageError
from zeropipe.runtime import lr_schedules
from zeropipe.runtime.lr_schedules import (
    VALID_LR_SCHEDULES,
    LRRangeTest,
    OneCycle,
    WarmupCosineLR,
    WarmupLR,
    add_tuning_arguments,
    build,
    get_config_from_args,
    get_lr_from_config,
)

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "lr_schedules.json").read_text())
# DeepSpeed finds the place in a cycle by subtracting whole cycles in floating point; we count steps.
CYCLE_ROUNDING = 1e-14


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_of_deepspeed(case: str) -> None:
    ours = trace(lr_schedules, *CASES[case])
    for key in ("lr", "beta1"):
        if CASES[case][0] == "OneCycle":
            for mine, theirs in zip(ours[key], GOLDEN[case][key], strict=True):
                assert mine == pytest.approx(theirs, rel=CYCLE_ROUNDING, abs=0)
        else:
            assert ours[key] == GOLDEN[case][key]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stop", [0, 1, 3, 9])
def test_a_loaded_schedule_goes_on_with_the_same_bits(case: str, stop: int) -> None:
    name, params = CASES[case]
    first, second = adam(), adam()
    whole, before = build(name, first, params), build(name, second, params)
    for _ in range(stop):
        whole.step()
        before.step()
    state = json.loads(json.dumps(before.state_dict()))

    fresh = adam()
    after = build(name, fresh, params)
    after.load_state_dict(state)
    for step in range(STEPS - stop):
        assert [g["lr"] for g in fresh.param_groups] == [g["lr"] for g in first.param_groups], step
        assert [g["betas"] for g in fresh.param_groups] == [g["betas"] for g in first.param_groups], step
        if stop + step:
            assert after.get_last_lr() == whole.get_last_lr()
        whole.step()
        after.step()


@pytest.mark.parametrize("case", CASES)
def test_no_last_lr_before_the_first_step(case: str) -> None:
    name, params = CASES[case]
    optimizer = adam()
    schedule = build(name, optimizer, params)
    with pytest.raises(AssertionError, match="need to call step"):
        schedule.get_last_lr()
    assert schedule.get_lr() == [g["lr"] for g in optimizer.param_groups]
    schedule.step()
    assert schedule.get_last_lr() == [g["lr"] for g in optimizer.param_groups]
    # Loading a state from before the first step gives that state, not a step that never was.
    schedule.load_state_dict(build(name, adam(), params).state_dict())
    with pytest.raises(AssertionError, match="need to call step"):
        schedule.get_last_lr()


def test_last_lr_is_a_copy() -> None:
    schedule = WarmupLR(adam(), warmup_num_steps=4)
    schedule.step()
    schedule.get_last_lr().clear()
    assert len(schedule.get_last_lr()) == 2


@pytest.mark.parametrize("steps", [0, 1, 2, 0.0, 1.0])
def test_a_warmup_of_no_steps_is_the_shortest_one(steps: float) -> None:
    lrs = []
    for n in (steps, 2):
        optimizer = adam()
        schedule = WarmupLR(optimizer, warmup_max_lr=0.1, warmup_num_steps=n)  # type: ignore[arg-type]
        for _ in range(3):
            schedule.step()
            lrs.append(optimizer.param_groups[0]["lr"])
    assert lrs[:3] == lrs[3:]
    assert lrs[-1] == 0.1


def test_step_takes_an_iteration() -> None:
    one, other = adam(), adam()
    counted, jumped = WarmupLR(one, warmup_num_steps=9), WarmupLR(other, warmup_num_steps=9)
    for _ in range(6):
        counted.step()
    jumped.step(5)
    assert counted.get_last_lr() == jumped.get_last_lr()
    assert counted.state_dict() == jumped.state_dict() == {"last_batch_iteration": 5}
    jumped.step(last_batch_iteration=2)
    assert jumped.last_batch_iteration == 2


def test_a_start_at_a_later_iteration_leaves_the_optimizer_alone_until_step() -> None:
    optimizer = adam()
    schedule = WarmupLR(optimizer, warmup_max_lr=1.0, warmup_num_steps=9, last_batch_iteration=5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.5]
    schedule.step()
    assert schedule.last_batch_iteration == 6
    assert optimizer.param_groups[0]["lr"] == 1 / math.log(9) * math.log(7)


@given(
    first=st.integers(1, 40),
    second=st.integers(1, 40),
    stairs=st.integers(0, 7),
    low=st.floats(1e-6, 1e-2),
    high=st.floats(1e-2, 10),
)
def test_one_cycle_meets_its_ends_and_stays_between(
    first: int, second: int, stairs: int, low: float, high: float
) -> None:
    schedule = OneCycle(
        adam((0.1,)),
        low,
        high,
        cycle_first_step_size=first,
        cycle_second_step_size=second,
        cycle_first_stair_count=stairs,
    )
    lrs, moms = [], []
    for _ in range(first + second):
        schedule.step()
        lrs.append(schedule.get_lr()[0])
        moms.append(schedule.get_mom()[0])
    assert lrs[first - 1] == pytest.approx(high, rel=1e-15)
    assert moms[first - 1] == pytest.approx(0.8, rel=1e-15)
    assert lrs[-1] == low
    assert moms[-1] == 0.9
    assert lrs[:first] == sorted(lrs[:first])
    assert lrs[first:] == sorted(lrs[first:], reverse=True)
    if stairs:
        assert len({round(lr, 12) for lr in lrs}) <= stairs + 1


def test_one_cycle_touches_momentum_only_where_there_is_one() -> None:
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    with_momentum = torch.optim.SGD([params[0]], lr=0.1, momentum=0.5)
    without = torch.optim.SGD([params[1]], lr=0.1)
    betas = torch.optim.Adam([params[0]], betas=(0.9, 0.95))
    for optimizer in (with_momentum, without, betas):
        OneCycle(optimizer, 0.01, 0.1, cycle_first_step_size=4).step()
    assert with_momentum.param_groups[0]["momentum"] == 0.875
    assert without.param_groups[0]["momentum"] == 0
    assert betas.param_groups[0]["betas"] == (0.875, 0.95)  # the second one is the user's


def test_a_tensor_lr_is_filled_in_place() -> None:
    lr = torch.tensor(0.5)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=lr, capturable=True, foreach=False)
    schedule = WarmupLR(optimizer, warmup_max_lr=0.25, warmup_num_steps=2)
    for _ in range(3):
        schedule.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.25


def test_a_wrapper_of_an_optimizer_will_do() -> None:
    inner = adam()
    wrapper = argparse.Namespace(optimizer=inner)
    WarmupLR(wrapper, warmup_min_lr=0.03)
    assert inner.param_groups[0]["lr"] == 0.03
    with pytest.raises(UsageError, match=r"torch\.optim\.Optimizer.*list"):
        WarmupLR([inner])


def test_the_names() -> None:
    assert VALID_LR_SCHEDULES == ["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]
    assert isinstance(VALID_LR_SCHEDULES, list)
    for name in VALID_LR_SCHEDULES:
        assert hasattr(lr_schedules, name)


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("WarmupLr", {}, "'WarmupLR'"),
        ("Nonsense", {}, "LRRangeTest, OneCycle"),
        ("WarmupLR", {"warmup_steps": 3}, "warmup_num_steps"),
        ("WarmupDecayLR", {}, "total_num_steps"),
        ("OneCycle", {"cycle_min_lr": 0.1}, "cycle_max_lr"),
        ("WarmupLR", {"warmup_num_steps": -1}, "warmup_num_steps.*-1"),
        ("WarmupLR", {"warmup_num_steps": 1.5}, "1.5"),
        ("WarmupLR", {"warmup_num_steps": "auto"}, "'auto'"),
        ("WarmupLR", {"warmup_num_steps": math.inf}, "inf"),
        ("WarmupLR", {"warmup_type": "cosine"}, "'log' or 'linear'"),
        ("WarmupLR", {"warmup_max_lr": [1.0]}, "one per param group"),
        ("LRRangeTest", {"lr_range_test_step_size": 0}, "lr_range_test_step_size"),
        ("LambdaLR", {"lr_lambda": None}, "needs a function"),
        ("ReduceLROnPlateau", {}, "metric"),
        ("StepLR", {"gama": 0.1, "step_size": 1}, "gamma"),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "mode": "no"}, "CyclicLR refuses"),
    ],
)
def test_a_mistake_in_the_scheduler_section(name: str, params: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(name, adam(), params)


def test_torch_schedules_by_name() -> None:
    optimizer = adam()
    schedule = build("StepLR", optimizer, {"step_size": 1, "gamma": 0.5})
    optimizer.step()
    schedule.step()
    assert isinstance(schedule, torch.optim.lr_scheduler.StepLR)
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.25]


def test_the_state_of_another_scheduler_is_refused() -> None:
    optimizer = adam()
    state = torch.optim.lr_scheduler.StepLR(optimizer, 1).state_dict()
    with pytest.raises(CheckpointError, match=r"state of a WarmupLR.*last_batch_iteration"):
        WarmupLR(optimizer).load_state_dict(state)


def test_a_group_added_later_is_named() -> None:
    optimizer = adam()
    schedule = WarmupCosineLR(optimizer, 10)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    with pytest.raises(UsageError, match="expected 2 param groups, found 3"):
        schedule.step()


def test_lr_of_a_section() -> None:
    assert get_lr_from_config({"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}) == (0.1, "")
    assert get_lr_from_config({"type": "OneCycle", "params": {"cycle_max_lr": 0.2}}) == (0.2, "")
    assert get_lr_from_config({"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 0.3}}) == (0.3, "")
    for section in (
        {},
        {"type": "WarmupLR"},
        {"type": "Foo", "params": {}},
        {"type": "WarmupCosineLR", "params": {}},
        {"type": "WarmupLR", "params": {}},
    ):
        lr, reason = get_lr_from_config(section)
        assert lr is None and reason


@pytest.mark.parametrize("name", VALID_LR_SCHEDULES)
def test_the_command_line_describes_each_schedule(name: str) -> None:
    parser = add_tuning_arguments(argparse.ArgumentParser())
    parser.add_argument("--total_num_steps", type=int)  # a script's own option does not clash
    section, reason = get_config_from_args(parser.parse_args(["--lr_schedule", name]))
    assert reason is None and section is not None
    if name in ("WarmupDecayLR", "WarmupCosineLR"):
        section["params"]["total_num_steps"] = 50
    optimizer = adam()
    build(section["type"], optimizer, section["params"]).step()
    assert all(math.isfinite(g["lr"]) for g in optimizer.param_groups)


def test_the_command_line_without_a_schedule() -> None:
    parser = add_tuning_arguments(argparse.ArgumentParser())
    assert get_config_from_args(parser.parse_args([]))[0] is None
    assert "zz" in str(get_config_from_args(parser.parse_args(["--lr_schedule", "zz"]))[1])


def test_range_test_has_no_end() -> None:
    schedule = LRRangeTest(adam(), lr_range_test_min_lr=1e-3, lr_range_test_step_size=10)
    schedule.step(10_000 - 1)
    assert schedule.get_last_lr() == [1e-3 * 1001] * 2
