"""Error feedback taken over by another number of ranks, without any rank: what the average is owed stays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.comm.group import Group
from zeropipe.errors import CheckpointError
from zeropipe.layout.flat import TensorSpec
from zeropipe.runtime.fp16.onebit.exchange import Exchange, Topology
from zeropipe.runtime.fp16.onebit.rank_state import RankState, groups_of, is_own, own_values, shared_values

SIZES = st.lists(st.integers(0, 150), min_size=1, max_size=5)
ERRORS = ("worker_error", "server_error")


def exchanges(sizes: list[int], world: int) -> list[Exchange]:
    """The exchange of one buffer, on each rank."""
    specs = [TensorSpec(f"t{i}", (n,), "float32") for i, n in enumerate(sizes)]
    groups = [Group(ranks=tuple(range(world)), rank=rank) for rank in range(world)]
    return [Exchange(specs, Topology(group), torch.device("cpu")) for group in groups]


def saved(sizes: list[int], world: int) -> list[RankState]:
    """What each rank saves: whole numbers, so that sums are exact; padding owes nothing."""
    states = []
    for rank, exchange in enumerate(exchanges(sizes, world)):
        generator = torch.Generator().manual_seed(rank)
        lane = {"layout": exchange.layout.to_json(), "further": {"u": torch.full((sum(sizes),), float(rank))}}
        for name, error in exchange.errors().items():
            start, _ = exchange.ranges[name]
            values = torch.randint(-8, 9, (error.numel(),), generator=generator).float() * world
            values[max(0, sum(sizes) - start) :] = 0
            lane[name] = values
        states.append({"world": world, "rank": rank, "node_size": 1, "lanes": [lane]})
    return states


def owed(workers: list[torch.Tensor], servers: list[torch.Tensor], numel: int) -> torch.Tensor:
    mean = torch.stack(workers).double().mean(0)
    return mean[:numel] + torch.cat(servers).double()[:numel]


@given(SIZES, st.integers(1, 5), st.integers(1, 5), st.randoms(use_true_random=False))
def test_another_number_of_ranks_and_order_of_tensors_owes_the_same(
    sizes: list[int], old: int, new: int, random: object
) -> None:
    states, numel = saved(sizes, old), sum(sizes)
    before = owed(*([s["lanes"][0][name] for s in states] for name in ERRORS), numel=numel)
    shuffled = list(states)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    groups = groups_of(shuffled)
    taken = [shared_values(groups, 0, exchange) for exchange in exchanges(sizes, new)]
    after = owed(*([values[name] for values in taken] for name in ERRORS), numel=numel)
    assert torch.equal(before, after)
    for values, exchange in zip(taken, exchanges(sizes, new), strict=True):
        assert {name: values[name].numel() for name in ERRORS} == {
            name: error.numel() for name, error in exchange.errors().items()
        }
        assert torch.equal(values["u"], torch.full((numel,), (old - 1) / 2))


@given(SIZES, st.integers(1, 4))
def test_the_same_rank_knows_its_own(sizes: list[int], world: int) -> None:
    states = saved(sizes, world)
    for rank, exchange in enumerate(exchanges(sizes, world)):
        mine = [is_own(state, [exchange], exchange.topology) for state in states]
        assert mine == [number == rank for number in range(world)]
        values = own_values(states[rank], 0)
        assert all(values[name] is states[rank]["lanes"][0][name] for name in ERRORS)


def test_what_is_missing_or_other_is_named() -> None:
    states = saved([5, 70], 3)
    with pytest.raises(CheckpointError, match=r"ranks 0\.\.2, found \[0, 2\]"):
        groups_of([states[2], states[0]])
    with pytest.raises(CheckpointError, match=r"t1 \(71,\), found \[\(70,\)\]"):
        shared_values(groups_of(states), 0, exchanges([5, 71], 2)[0])
    with pytest.raises(CheckpointError, match="found none"):
        groups_of([])
