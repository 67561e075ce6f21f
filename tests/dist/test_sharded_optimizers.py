"""Muon and Lamb on real ranks: the same numbers as unsharded, over the real seam."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.unit.runtime.optimizers.shards import flatten, layout_of, like, nasty, run_whole
from zeropipe.comm.group import world
from zeropipe.comm.record import record
from zeropipe.runtime.optimizers import Lamb, Muon, ShardView

FP64_ORDER = 1e-13  # the order of a norm's sums over pieces


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
