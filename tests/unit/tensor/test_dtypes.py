"""The rule that decides which parameters of a 16-bit run are cast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zeropipe.runtime.fp16 import fp16_utils
from zeropipe.tensor.model import was_prepared, working_dtypes

HALVES = [torch.bfloat16, torch.float16]


def rule(model: nn.Module, dtype: torch.dtype, buffers: torch.dtype | None = None) -> dict[str, torch.dtype]:
    wanted = working_dtypes(model.modules(), dtype, was_prepared(model.parameters()), buffers)
    return {name: wanted.get(param, param.dtype) for name, param in model.named_parameters()}


@pytest.mark.parametrize("half", HALVES)
def test_a_model_that_nobody_prepared_is_cast(half: torch.dtype):
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2, dtype=torch.float64))
    assert set(rule(model, half).values()) == {half}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("base", HALVES)
def test_wide_parameters_beside_16_bit_ones_stay(half: torch.dtype, base: torch.dtype):
    model = nn.Sequential(
        nn.Linear(2, 2, dtype=base).requires_grad_(False),
        nn.Linear(2, 2),
        nn.Linear(2, 2, dtype=torch.float64),
    )
    kinds = [half, torch.float32, torch.float64]
    assert list(rule(model, half).values()) == [kind for kind in kinds for _ in range(2)]


def test_a_model_of_nothing_but_converted_norms_stays():
    """``convert_network`` leaves a mark, which tells norms kept in fp32 from norms that nobody looked at."""
    model = fp16_utils.convert_network(nn.Sequential(nn.LayerNorm(2), nn.BatchNorm1d(2)), torch.bfloat16)
    assert set(rule(model, torch.bfloat16).values()) == {torch.float32}
    assert set(rule(nn.LayerNorm(2), torch.bfloat16).values()) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("norm", "buffers", "expected"),
    [
        (nn.BatchNorm1d(2), None, torch.float32),
        (nn.BatchNorm2d(2).double(), None, torch.float64),
        (nn.BatchNorm1d(2), torch.bfloat16, torch.bfloat16),
        (nn.BatchNorm1d(2).bfloat16(), torch.float32, torch.float32),
        (nn.BatchNorm1d(2).bfloat16(), None, torch.bfloat16),
        (nn.BatchNorm1d(2, track_running_stats=False), None, torch.bfloat16),
        (nn.InstanceNorm1d(2, affine=True, track_running_stats=True), None, torch.bfloat16),
        (nn.SyncBatchNorm(2), None, torch.float32),
    ],
)
def test_a_batch_norm_goes_with_its_statistics(
    norm: nn.Module, buffers: torch.dtype | None, expected: torch.dtype
):
    """torch refuses 16-bit weights beside fp32 statistics, and only there."""
    assert set(rule(norm, torch.bfloat16, buffers).values()) == {expected}


def test_a_weight_shared_with_a_batch_norm_stays_wide_in_either_order():
    norm, scale = nn.BatchNorm1d(2), nn.LayerNorm(2)
    scale.weight = norm.weight
    for model in (nn.Sequential(norm, scale), nn.Sequential(scale, norm)):
        assert working_dtypes(model.modules(), torch.bfloat16, False)[norm.weight] == torch.float32


def test_codes_integers_and_complex_numbers_stay():
    model = nn.Module()
    for index, dtype in enumerate(
        (torch.float8_e4m3fn, torch.int8, torch.uint8, torch.complex64, torch.bool)
    ):
        param = nn.Parameter(torch.zeros(3).to(dtype), requires_grad=False)
        model.register_parameter(str(index), param)
    before = {name: param.dtype for name, param in model.named_parameters()}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert rule(model, dtype) == before
