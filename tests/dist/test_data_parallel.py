"""Stages 0, 1 and 2 give the same numbers, bit for bit, and the numbers of plain PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests.helpers.data import global_batches, gpt_batch, token_batch
from tests.helpers.models import NastyModel, TinyGPT, build
from tests.helpers.referee import assert_bitwise, assert_within_referee, train_plain
from tests.helpers.train import config, train

STEPS = 4
nasty = partial(build, NastyModel)
gpt = partial(build, TinyGPT)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, fused=True)


@pytest.mark.native
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_are_one_plain_process_that_accumulates(pool, stage, world):
    # The sizes of this model's tensors are multiples of 16: see ALIGN in runtime/zero/hold/values.py.
    ours = pool(world).run(train, gpt, gpt_batch, config(stage, world), STEPS)
    plain = train_plain(gpt, partial(_batches, world), adamw, STEPS, dtype=None)
    for result in ours:
        assert_bitwise(result["weights"], plain.weights)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_ranks_are_one_process_that_accumulates_the_nasty_model(pool, stage):
    ours = pool(2).run(train, nasty, token_batch, config(stage, 2), STEPS)
    alone = pool(1).run(train, nasty, _as_micro_batch, config(stage, 1, gas=2), STEPS)
    for result in ours:
        assert_bitwise(result["weights"], alone[0]["weights"])


def _as_micro_batch(step: int, rank: int, micro: int) -> Any:
    return token_batch(step, micro)


@pytest.mark.parametrize("world", [1, 3, 4])
def test_stages_agree_bitwise_at_other_worlds(pool, world):
    runs = [pool(world).run(train, gpt, gpt_batch, config(stage, world), STEPS) for stage in (0, 1, 2)]
    for run in runs:
        for result in run:
            assert_bitwise(result["weights"], runs[0][0]["weights"])
    batches = partial(_batches, world)
    plain32 = train_plain(gpt, batches, adamw, STEPS, dtype=None)
    plain64 = train_plain(gpt, batches, adamw, STEPS)
    assert_within_referee(runs[0][0]["weights"], plain32.weights, plain64.weights)


def _batches(world: int, step: int) -> list[Any]:
    return global_batches(gpt_batch, step, world)


@pytest.mark.native
@pytest.mark.parametrize(
    "options",
    [
        {"reduce_bucket_size": 1},
        {"reduce_bucket_size": 0},
        {"reduce_bucket_size": 10**12},
        {"overlap_comm": False},
        {"contiguous_gradients": False, "round_robin_gradients": True, "reduce_scatter": False},
        {"allgather_partitions": False, "allgather_bucket_size": 1},
    ],
    ids=lambda o: ",".join(o),
)
def test_options_of_traffic_do_not_change_a_bit(pool, options):
    reference = pool(2).run(train, nasty, token_batch, config(0, 2), STEPS)
    for stage in (0, 1, 2):
        settings = config(stage, 2, zero_optimization={"stage": stage, **options})
        ours = pool(2).run(train, nasty, token_batch, settings, STEPS)
        assert_bitwise(ours[1]["weights"], reference[0]["weights"])


@pytest.mark.native
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("gas", [1, 2, 4])
def test_plain_backward_gives_the_same(pool, stage, gas):
    settings = config(stage, 2, gas=gas)
    ours = pool(2).run(train, nasty, token_batch, settings, 2)
    plain = pool(2).run(train, nasty, token_batch, settings, 2, plain=True)
    assert_bitwise(plain[0]["weights"], ours[0]["weights"])
