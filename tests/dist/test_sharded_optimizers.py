"""Muon and Lamb on real ranks: the same numbers as unsharded, over the real seam."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tests.helpers.data import global_batches, gpt_batch, token_batch
from tests.helpers.models import NastyModel, TinyGPT, build
from tests.helpers.referee import assert_bitwise, assert_within_referee, train_plain
from tests.helpers.train import config, train
from tests.unit.runtime.optimizers.shards import flatten, layout_of, like, nasty, run_whole
from zeropipe.comm.group import world
from zeropipe.comm.record import record
from zeropipe.runtime.optimizers import Lamb, Muon, ShardView

FP64_ORDER = 1e-13  # the order of a norm's sums over pieces
nasty_model = partial(build, NastyModel)
gpt_model = partial(build, TinyGPT)


def make(kind):
    return Muon if kind == "muon" else Lamb


def problem(kind, size):
    gen = torch.Generator().manual_seed(size)
    start = nasty(gen, torch.float32 if kind == "muon" else torch.float64)
    return start, [like(start, gen) for _ in range(3)]


def sharded(rank, size, kind):
    start, grads = problem(kind, size)
    layout = layout_of(start, size)
    mine = slice(*layout.shard_range(rank))
    master = nn.Parameter(flatten(start, layout)[mine].clone())
    optimizer = make(kind)([{"params": [master]}], lr=0.02, weight_decay=0.1)
    optimizer.bind_shards({master: ShardView(layout, rank, world())})
    with record() as events:
        for step in grads:
            master.grad = flatten(step, layout)[mine].clone()
            optimizer.step()
    return master.detach(), [(e.op, e.bytes) for e in events]


@pytest.mark.native
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", ["muon", "lamb"])
def test_ranks_equal_one_process(pool, kind, size):
    results = pool(size).run(sharded, kind)
    start, grads = problem(kind, size)
    (whole,) = run_whole(
        lambda g: make(kind)(g, lr=0.02, weight_decay=0.1), [(start, {})], [[g] for g in grads]
    )
    full = torch.cat([shard for shard, _ in results])
    expected = flatten(whole, layout_of(start, size))
    if kind == "muon":
        assert torch.equal(full, expected)
        assert {op for _, events in results for op, _ in events} <= {"send", "recv"}
    else:
        torch.testing.assert_close(full, expected, rtol=FP64_ORDER, atol=FP64_ORDER)
        assert all(events == [("all_reduce", 2 * 8 * len(start))] * len(grads) for _, events in results)


@pytest.mark.native
@pytest.mark.parametrize("world_size", [2, 3])
def test_muon_by_config_is_the_same_bits_at_every_stage(pool, world_size):
    section = {"type": "Muon", "params": {"lr": 0.02, "adam_lr": 0.003, "weight_decay": 0.1}}
    runs = [
        pool(world_size).run(train, nasty_model, token_batch, config(stage, world_size, optimizer=section), 3)
        for stage in (0, 1, 2)
    ]
    for result in (result for run in runs for result in run):
        assert_bitwise(result["weights"], runs[0][0]["weights"])


@pytest.mark.parametrize("stage", [1, 2])
def test_lamb_by_config_is_within_the_referee(pool, stage):
    section = {"type": "Lamb", "params": {"lr": 0.01, "weight_decay": 0.1}}
    ours = pool(2).run(train, gpt_model, gpt_batch, config(stage, 2, optimizer=section), 3)
    plain = [
        train_plain(gpt_model, batches_of_two, lamb, 3, **extra).weights for extra in ({"dtype": None}, {})
    ]
    for result in ours:
        assert_within_referee(result["weights"], *plain)


def lamb(params):
    return Lamb(params, lr=0.01, weight_decay=0.1)


def batches_of_two(step):
    return global_batches(gpt_batch, step, 2)
