"""Loss scaling: DeepSpeed's sequences, the three policies at the minimum, exact resume, bad settings."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.errors import CheckpointError, ConfigError, LossScaleError
from zeropipe.runtime.fp16.loss_scaler import (
    CreateLossScaler,
    DynamicLossScaler,
    LossScaler,
    MinScalePolicy,
    get_loss_scaler,
)
from zeropipe.tensor.norms import NonFinite

# (scale, window, minimum, hysteresis, consecutive), overflows, then (scale, hysteresis left, last overflow)
# after each step, as DeepSpeed 0.19.8 has them.
SEQUENCES: list[tuple[tuple[float, int, float, int, bool], str, list[tuple[float, int, int]]]] = [
    (
        (16, 3, 1, 1, False),
        "0001000000",
        [(16, 1, -1)] * 3 + [(8, 1, 3)] * 4 + [(16, 1, 3)] * 3,
    ),
    (
        (16, 3, 1, 2, False),
        "10100011000001",
        [(16, 1, 0)] * 2 + [(8, 1, 2)] * 4 + [(4, 1, 6)] + [(2, 1, 7)] * 4 + [(4, 2, 7)] * 2 + [(4, 1, 13)],
    ),
    (
        (16, 3, 1, 2, True),
        "1010001100000",
        [(16, 1, 0), (16, 2, 0), (16, 1, 2)]
        + [(16, 2, 2)] * 3
        + [(16, 1, 6), (8, 1, 7)]
        + [(8, 2, 7)] * 3
        + [(16, 2, 7)] * 2,
    ),
    (
        (4, 2, 1, 3, False),
        "111111100001",
        [(4, 2, 0), (4, 1, 1), (2, 1, 2), (1, 1, 3), (1, 1, 4), (1, 1, 5), (1, 1, 6), (1, 1, 6), (1, 1, 6)]
        + [(2, 3, 6)] * 2
        + [(2, 2, 11)],
    ),
    (
        (3, 2, 1, 1, False),
        "1100000",
        [(1.5, 1, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1), (2, 1, 1), (2, 1, 1), (4, 1, 1)],
    ),
]


def make(scale: float, window: int, low: float, shift: int, consecutive: bool) -> DynamicLossScaler:
    return DynamicLossScaler(
        init_scale=scale,
        scale_window=window,
        min_scale=low,
        delayed_shift=shift,
        consecutive_hysteresis=consecutive,
        on_min_scale="skip",
    )


@pytest.mark.parametrize(("settings", "overflows", "expected"), SEQUENCES)
def test_the_sequences_of_deepspeed(
    settings: tuple[float, int, float, int, bool], overflows: str, expected: list[tuple[float, int, int]]
) -> None:
    scaler = make(*settings)
    seen = []
    for i, overflow in enumerate(overflows):
        scaler.update_scale(overflow == "1")
        seen.append((scaler.cur_scale, scaler.cur_hysteresis, scaler.last_overflow_iter))
        assert scaler.cur_iter == i + 1
        assert scaler.loss_scale == scaler.cur_scale
    assert seen == expected


@given(
    settings=st.tuples(
        st.sampled_from([2.0, 3.0, 64.0]),
        st.integers(1, 4),
        st.sampled_from([0.25, 1, 2]),
        st.integers(1, 3),
        st.booleans(),
    ),
    overflows=st.lists(st.booleans(), max_size=30),
    stop=st.integers(0, 30),
)
def test_stop_and_go_on(
    settings: tuple[float, int, float, int, bool], overflows: list[bool], stop: int
) -> None:
    whole, part = make(*settings), make(*settings)
    for overflow in overflows:
        whole.update_scale(overflow)
        assert whole.cur_scale >= settings[2]
        assert 1 <= whole.cur_hysteresis <= settings[3]
    for overflow in overflows[:stop]:
        part.update_scale(overflow)
    again = make(*settings)
    again.load_state_dict(json.loads(json.dumps(part.state_dict())))
    for overflow in overflows[stop:]:
        again.update_scale(overflow)
    assert again.state_dict() == whole.state_dict()


def at_minimum(**settings: Any) -> DynamicLossScaler:
    return DynamicLossScaler(init_scale=2, min_scale=2, **settings)


def test_the_minimum_raises_and_says_what_to_do() -> None:
    scaler = at_minimum()
    before = scaler.state_dict()
    where = NonFinite("h.3.mlp.weight", num_inf=4, num_nan=0, numel=64, rank=1, micro_step=2)
    with pytest.raises(LossScaleError) as error:
        scaler.update_scale(True, where)
    text = str(error.value)
    for part in (
        "minimum (2)",
        "h.3.mlp.weight",
        "4 inf",
        "rank 1",
        "micro-step 2",
        "bf16",
        "min_loss_scale",
    ):
        assert part in text
    assert scaler.state_dict() == before
    with pytest.raises(LossScaleError, match="Fix: "):
        scaler.update_scale(True)


def test_the_minimum_skips_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    for scaler in (at_minimum(on_min_scale="skip"), at_minimum(raise_error_at_min_scale=False)):
        for _ in range(3):
            scaler.update_scale(True, "x")
        assert (scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter) == (2, 3, 2)
    assert not caplog.records


def test_the_minimum_warns_each_time(caplog: pytest.LogCaptureFixture) -> None:
    scaler = at_minimum(on_min_scale=MinScalePolicy.WARN)
    with caplog.at_level(logging.WARNING):
        scaler.update_scale(True, "gradient of 'a'")
        scaler.update_scale(True)
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * 2
    assert "gradient of 'a'" in caplog.records[0].getMessage()


def test_hysteresis_is_used_up_before_the_minimum_raises() -> None:
    scaler = at_minimum(delayed_shift=2)
    scaler.update_scale(True)
    with pytest.raises(LossScaleError):
        scaler.update_scale(True)


def test_the_policy_is_chosen_by_either_argument() -> None:
    assert at_minimum().raise_error_at_min_scale
    assert not at_minimum(raise_error_at_min_scale=False).raise_error_at_min_scale
    assert at_minimum(raise_error_at_min_scale=False, on_min_scale="raise").raise_error_at_min_scale


def test_backward_multiplies_the_gradient() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    DynamicLossScaler(init_scale=2.0**10).backward((x * x).sum())
    assert x.grad is not None and x.grad.tolist() == [2048.0, 4096.0]
    loss = (x * x).sum()
    scaler = LossScaler(4)
    scaler.backward(loss, retain_graph=True)
    scaler.backward(loss)
    assert x.grad.tolist() == [2048.0 + 16, 4096.0 + 32]


def test_an_fp16_loss_is_scaled_in_fp32() -> None:
    loss = torch.tensor(8.0, dtype=torch.float16)
    assert DynamicLossScaler(init_scale=2.0**32).scale_loss(loss).item() == 8 * 2.0**32
    assert LossScaler(2).scale_loss(torch.tensor(1.0, dtype=torch.float64)).dtype == torch.float64


def test_scale_gradient_is_a_backward_hook() -> None:
    scaled = LossScaler(8).scale_gradient(None, (torch.ones(2), None), None)
    assert scaled[0] is not None and scaled[0].tolist() == [8, 8] and scaled[1] is None


def test_has_overflow_looks_at_gradients() -> None:
    params = [torch.nn.Parameter(torch.full((2,), math.nan)) for _ in range(3)]
    scaler = DynamicLossScaler()
    assert not scaler.has_overflow(params)  # no gradient yet
    params[1].grad = torch.tensor([1.0, -math.inf])
    assert scaler.has_overflow(params)
    assert scaler.has_overflow(iter(params))
    assert not LossScaler(1).has_overflow(params)


def test_a_static_scale_never_moves() -> None:
    scaler = LossScaler(128)
    scaler.update_scale(True)
    scaler.update_scale(False)
    assert scaler.loss_scale == 128 and not scaler.dynamic


def test_which_scaler() -> None:
    assert CreateLossScaler is get_loss_scaler
    static = get_loss_scaler(torch.float16, 128, False, None)
    assert type(static) is LossScaler and static.loss_scale == 128
    for dtype in (torch.bfloat16, torch.float32):
        plain = get_loss_scaler(dtype, 128, True, None)
        assert type(plain) is LossScaler and plain.loss_scale == 1
    default = get_loss_scaler(torch.float16, 0, True, None)
    assert isinstance(default, DynamicLossScaler) and default.cur_scale == 2.0**32
    args = {
        "init_scale": 8,
        "scale_window": 2,
        "min_scale": 0.5,
        "delayed_shift": 2,
        "consecutive_hysteresis": True,
    }
    dynamic = get_loss_scaler(torch.half, 0, True, args)
    assert isinstance(dynamic, DynamicLossScaler)
    assert (dynamic.cur_scale, dynamic.scale_window, dynamic.min_scale) == (8, 2, 0.5)
    assert (dynamic.delayed_shift, dynamic.consecutive_hysteresis, dynamic.dtype) == (2, True, torch.half)


def test_a_state_of_the_other_kind_leaves_the_configured_scale() -> None:
    dynamic, static = DynamicLossScaler(init_scale=2.0**8), LossScaler(32)
    static.load_state_dict(dynamic.state_dict())
    assert static.cur_scale == 32
    dynamic.load_state_dict(LossScaler(1).state_dict())
    assert dynamic.cur_scale == 2.0**8
    other = LossScaler(2)
    other.load_state_dict(static.state_dict())
    assert other.cur_scale == 32


def test_a_state_is_loaded_whole_or_not_at_all() -> None:
    scaler = DynamicLossScaler(init_scale=64)
    before = scaler.state_dict()
    with pytest.raises(CheckpointError, match=r"'cur_hysteresis'.*load_optimizer_states=False"):
        scaler.load_state_dict({"dynamic": True, "cur_scale": 2, "cur_iter": 7, "last_overflow_iter": 1})
    with pytest.raises(CheckpointError, match="'dynamic'"):
        scaler.load_state_dict({})
    assert scaler.state_dict() == before


def test_settings_changed_since_the_save_hold() -> None:
    saved = make(4, 2, 1, 3, False)
    saved.update_scale(False)
    now = make(64, 2, 16, 2, False)
    now.load_state_dict(saved.state_dict())
    assert (now.cur_scale, now.cur_hysteresis) == (16, 2)


@pytest.mark.parametrize(
    "settings",
    [
        {"init_scale": 0},
        {"init_scale": -2},
        {"init_scale": math.inf},
        {"init_scale": math.nan},
        {"scale_factor": 1},
        {"scale_window": 0},
        {"min_scale": -1},
        {"init_scale": 2, "min_scale": 4},
        {"delayed_shift": 0},
        {"on_min_scale": "stop"},
    ],
)
def test_settings_that_no_run_can_use(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        DynamicLossScaler(**settings)


@pytest.mark.parametrize("scale", [0, -1, math.inf, math.nan])
def test_a_static_scale_that_no_run_can_use(scale: float) -> None:
    with pytest.raises(ConfigError, match="loss_scale"):
        get_loss_scaler(torch.float16, scale, False, None)


def test_two_scalers_share_nothing() -> None:
    one, other = DynamicLossScaler(init_scale=4), DynamicLossScaler(init_scale=4)
    one.update_scale(True)
    assert (one.cur_scale, other.cur_scale, other.cur_iter) == (2, 4, 0)


def test_the_public_names() -> None:
    import zeropipe.runtime.fp16 as fp16

    assert fp16.LossScaler is LossScaler and fp16.DynamicLossScaler is DynamicLossScaler
    assert fp16.get_loss_scaler is fp16.CreateLossScaler is get_loss_scaler
    assert fp16.fp16_utils.to_python_float(torch.tensor([2.5])) == 2.5
    assert "DeepSpeedEngine" in dir(fp16)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = fp16.nonsense
