"""A shard-aware optimizer stays bound through load_state_dict, and its copies are ordinary optimizers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.unit.runtime.optimizers.shards import flatten, layout_of, like, nasty, run_whole
from zeropipe.comm.group import SELF
from zeropipe.runtime.optimizers import Lamb, Muon, ShardAware, ShardView

# One rank: the pieces are the tensors, so even Lamb's norms are the same bits.


@pytest.mark.parametrize("cls", [Lamb, Muon])
def test_load_state_dict_keeps_the_binding(cls):
    gen = torch.Generator().manual_seed(0)
    start = nasty(gen)
    grads = [[like(start, gen)] for _ in range(4)]
    layout = layout_of(start, 1)
    master = nn.Parameter(flatten(start, layout))
    optimizer = cls([master])
    assert isinstance(optimizer, ShardAware)
    optimizer.bind_shards({master: ShardView(layout, 0, SELF)})
    for step in grads:
        master.grad = flatten(step[0], layout)
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (whole,) = run_whole(cls, [(start, {})], grads)
    assert torch.equal(master.detach(), flatten(whole, layout))


@pytest.mark.parametrize("cls", [Lamb, Muon])
def test_copies_are_unbound_and_step_on(cls):
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = cls([p])
    p.grad = torch.arange(6.0).view(3, 2)
    optimizer.step()
    twin = pickle.loads(pickle.dumps(optimizer))
    (q,) = twin.param_groups[0]["params"]
    q.grad = p.grad.clone()
    optimizer.step()
    twin.step()
    assert torch.equal(p, q)
