"""Ranks that go different ways at stage 3: right numbers, or an error on every rank within seconds; never a hang.

A rank that raised stays alive here and does nothing more, so that nothing but what it said can end the others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.pool import Pools
from tests.helpers.referee import assert_bitwise
from tests.helpers.zero3 import Block, Stack, engine_of, settings, whole, x_batch
from zeropipe.errors import DesyncError

SOON = 20.0  # s; on an idle machine it is milliseconds
ODD = 1  # the rank that goes another way


def step(engine: Any, at: int, rank: int, micro: int = 0) -> None:
    engine.backward(engine(x_batch(at, rank, micro)).square().mean())
    engine.step()


# Each of these is one training step of the odd rank.


def skips_a_module(engine: Any, rank: int) -> None:
    engine.module.order = (0, 2)
    step(engine, 1, rank)


def skips_the_first_module(engine: Any, rank: int) -> None:
    engine.module.order = (1, 2)
    step(engine, 1, rank)


def calls_a_module_twice(engine: Any, rank: int) -> None:
    engine.module.order = (0, 1, 1, 2)
    step(engine, 1, rank)


def swaps_modules(engine: Any, rank: int) -> None:
    engine.module.order = (1, 0, 2)
    step(engine, 1, rank)


def evaluates_while_others_train(engine: Any, rank: int) -> None:
    for micro in range(5):
        with torch.no_grad():
            engine(x_batch(1, rank, micro))


def evaluates_once_more(engine: Any, rank: int) -> None:
    with torch.no_grad():
        engine(x_batch(1, rank))
    step(engine, 1, rank)


def forgets_backward(engine: Any, rank: int) -> None:
    engine(x_batch(1, rank))
    engine.step()


def forgets_to_step(engine: Any, rank: int) -> None:
    for micro in range(2):
        engine.backward(engine(x_batch(1, rank, micro)).square().mean())


def steps_without_anything(engine: Any, rank: int) -> None:
    engine.step()


def reads_a_gradient_alone(engine: Any, rank: int) -> None:
    from zeropipe.utils import safe_get_full_grad

    engine.backward(engine(x_batch(1, rank)).square().mean())
    safe_get_full_grad(engine.module.head.weight)
    engine.step()


def gathers_a_parameter_alone(engine: Any, rank: int) -> None:
    engine.module.head.weight.all_gather()
    step(engine, 1, rank)


def compiles_alone(engine: Any, rank: int) -> None:
    engine.module.blocks[0].compile(backend="eager")
    step(engine, 1, rank)


WAYS: list[Callable[[Any, int], None]] = [
    skips_a_module,
    skips_the_first_module,
    calls_a_module_twice,
    swaps_modules,
    evaluates_while_others_train,
    evaluates_once_more,
    forgets_backward,
    forgets_to_step,
    steps_without_anything,
    reads_a_gradient_alone,
    gathers_a_parameter_alone,
    compiles_alone,
]


def go_on(engine: Any, rank: int, way: Callable[[Any, int], None]) -> None:
    for _ in range(3):
        way(engine, rank) if rank == ODD else step(engine, 1, rank)


def go(rank: int, world: int, ways: list[Callable[[Any, int], None]], zero: dict[str, Any]) -> list[str]:
    """One step together, then rank ODD goes ``way``; what each rank was told, per way."""
    told = []
    for way in ways:
        engine = engine_of(Stack(), 3, world, zero_optimization=zero)
        step(engine, 0, rank)
        step(engine, 0, rank)
        begun = time.monotonic()
        with pytest.raises(DesyncError) as caught:
            go_on(engine, rank, way)
        assert time.monotonic() - begun < SOON
        told.append(str(caught.value))
    return told


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_rank_is_told(pool: Pools, way: Callable[[Any, int], None]) -> None:
    outcomes = pool(2).run_faulty(go, [way], {}, timeout=60)
    for outcome in outcomes:
        assert outcome.kind == "result", (outcome.kind, outcome.error)
        for message in outcome.value:
            assert "ranks went different ways" in message
            assert f"rank {1 - outcome.rank} is at '" in message
            assert f"[rank {outcome.rank}]" in message
            assert "Fix:" in message


def test_the_message_names_both_modules(pool: Pools) -> None:
    outcomes = pool(2).run_faulty(go, [skips_a_module], {"stage3_prefetch_bucket_size": 0}, timeout=60)
    for outcome, here, there in zip(outcomes, (1, 2), (2, 1), strict=True):
        assert f"this one is at 'blocks.{here}." in outcome.value[0]
        assert f"is at 'blocks.{there}." in outcome.value[0]


@pytest.mark.parametrize("way", [skips_a_module, evaluates_while_others_train], ids=lambda way: way.__name__)
def test_every_rank_of_three_is_told(pool: Pools, way: Callable[[Any, int], None]) -> None:
    for outcome in pool(3).run_faulty(go, [way], {}, timeout=60):
        assert outcome.kind == "result", (outcome.kind, outcome.error)


# ---- a rank that raises, and stays alive ----


class Trap(Block):
    """Raises where it is told to."""

    where = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.where == "forward":
            raise ArithmeticError("trap")
        x = super().forward(x)
        if self.where == "backward" and x.requires_grad:
            x.register_hook(self._spring)
        return x

    def _spring(self, _: torch.Tensor) -> None:
        raise ArithmeticError("trap")


class Trapped(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1] = Trap(16)


def two_steps(engine: Any, rank: int) -> None:
    for at in range(2):
        step(engine, at, rank)


def raise_alone(rank: int, world: int, where: str, compiled: bool = False, **zero: Any) -> str:
    engine = engine_of(Trapped(), 3, world, zero_optimization=zero)
    if compiled:
        engine.compile(backend="eager")
    step(engine, 0, rank)
    engine.module.blocks[1].where = where if rank == ODD else ""
    begun = time.monotonic()
    with pytest.raises(ArithmeticError if rank == ODD else DesyncError) as caught:
        two_steps(engine, rank)
    assert time.monotonic() - begun < SOON
    return str(caught.value)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_rank_that_raises_tells_the_others(pool: Pools, where: str) -> None:
    outcomes = pool(3).run_faulty(raise_alone, where, timeout=60)
    assert [outcome.kind for outcome in outcomes] == ["result"] * 3, [outcome.error for outcome in outcomes]
    for other in (0, 2):
        assert f"rank {ODD} is at 'ArithmeticError raised in" in outcomes[other].value


def test_a_rank_that_raises_in_compiled_code_tells_the_others(pool: Pools) -> None:
    outcomes = pool(2).run_faulty(raise_alone, "forward", True, timeout=60)
    assert [outcome.kind for outcome in outcomes] == ["result"] * 2, [outcome.error for outcome in outcomes]
    assert f"rank {ODD} is at 'ArithmeticError raised in" in outcomes[0].value


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_it_tells_those_of_other_shard_groups_too(pool: Pools, where: str) -> None:
    """With MiCS they waited for it until the group's timeout: only those of its own group were told."""
    outcomes = pool(4).run_faulty(raise_alone, where, timeout=60, mics_shard_size=2)
    assert [outcome.kind for outcome in outcomes] == ["result"] * 4, [outcome.error for outcome in outcomes]
    for other in (0, 2, 3):
        assert "raised in" in outcomes[other].value


def raise_together(rank: int, world: int, where: str, **zero: Any) -> dict[str, torch.Tensor]:
    """Every rank drops the same batch because of the same error, and goes on."""
    torch.manual_seed(0)
    engine = engine_of(Trapped(), 3, world, zero_optimization=zero)
    for at in range(3):
        engine.module.blocks[1].where = where if at == 1 else ""
        try:
            step(engine, at, rank)
        except ArithmeticError:
            engine.zero_grad()
    return whole(engine.module)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_on_all_ranks_can_be_survived(pool: Pools, where: str) -> None:
    skipped = pool(2).run(raise_together, where)
    assert_bitwise(skipped[0], skipped[1])
    assert_bitwise(skipped[0], pool(2).run(skip_together)[0])


def test_an_error_on_all_ranks_of_two_shard_groups_can_be_survived(pool: Pools) -> None:
    first, *others = pool(4).run(raise_together, "forward", mics_shard_size=2)
    for other in others:
        assert_bitwise(other, first)


def skip_together(rank: int, world: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    engine = engine_of(Trapped(), 3, world)
    for at in (0, 2):
        step(engine, at, rank)
    return whole(engine.module)


def leave(rank: int, world: int) -> str:
    engine = engine_of(Stack(), 3, world)
    step(engine, 0, rank)
    if rank == ODD:
        os._exit(3)
    with pytest.raises(zeropipe.errors.CommunicationError) as caught:
        step(engine, 1, rank)
    return str(caught.value)


def test_a_rank_that_dies_is_an_error_on_the_others(pool: Pools) -> None:
    outcomes = pool(2).run_faulty(leave, timeout=60)
    assert outcomes[1].kind == "died"
    assert outcomes[0].kind == "result", (outcomes[0].kind, outcomes[0].error)


# ---- different models and configurations ----


def initialize_differently(rank: int, world: int, what: str) -> str:
    odd = rank == ODD
    model: nn.Module = Stack(4 if odd and what == "depth" else 3)
    if odd and what == "frozen":
        model.head.requires_grad_(False)
    chosen = settings(3, world)
    if odd and what == "stage":
        chosen["zero_optimization"]["stage"] = 2
    if odd and what == "budget":
        chosen["zero_optimization"]["stage3_max_live_parameters"] = 77
    if odd and what == "leaf":
        zeropipe.zero.set_z3_leaf_modules(model, [Block])
    if odd and what == "one leaf":
        zeropipe.zero.set_z3_leaf_module(model.blocks[2], True)
    if odd and what == "raises":
        chosen["optimizer"] = {"type": "NoSuchOptimizer"}
    begun = time.monotonic()
    with pytest.raises(zeropipe.errors.ZeropipeError) as caught:
        zeropipe.initialize(model=model, config=chosen)
    assert time.monotonic() - begun < SOON
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("what", ["depth", "frozen", "stage", "budget", "leaf", "one leaf", "raises"])
def test_ranks_that_initialize_differently_are_told(pool: Pools, what: str) -> None:
    outcomes = pool(2).run_faulty(initialize_differently, what, timeout=60)
    for outcome in outcomes:
        assert outcome.kind == "result", (outcome.kind, outcome.error)
    assert "DesyncError" in outcomes[0].value
    assert "rank 1" in outcomes[0].value
    if "leaf" in what:
        module = "blocks.2" if what == "one leaf" else "blocks.0"
        for outcome in outcomes:
            assert f"module '{module}' is marked with set_z3_leaf_modules: rank 1 has 'yes'" in outcome.value


# ---- ways that work ----


class Experts(nn.Module):
    """A mixture whose experts run only where the router sends something."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Block() for _ in range(3))
        self.chosen: tuple[int, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in self.chosen:
            x = x + self.experts[index](x)
        return x


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mixture, self.last = Block(), Experts(), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.mixture(self.first(x)))


ROUTES = [((0,), (1,)), ((), (0, 1, 2)), ((2, 0), (0, 2)), ((1, 1), (1,)), ((), ()), ((2,), (2,))]


def route(rank: int, world: int, stage: int, zero: dict[str, Any], leaf: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Mixture()
    if leaf:
        zeropipe.zero.set_z3_leaf_modules(model, [Experts])
    engine = engine_of(model, stage, world, zero_optimization=zero)
    for at, routes in enumerate(ROUTES):
        engine.module.mixture.chosen = routes[rank]
        step(engine, at, rank)
    return whole(engine.module)


@pytest.mark.parametrize("bucket", [1, 2000, 10**9])
def test_experts_in_a_leaf_module_may_differ(pool: Pools, bucket: int) -> None:
    expected = pool(2).run(route, 0, {}, False)[0]
    for ours in pool(2).run(route, 3, {"reduce_bucket_size": bucket}, True):
        assert_bitwise(ours, expected)


@pytest.mark.parametrize("overlap", [True, False])
def test_persistent_experts_may_differ_without_a_mark(pool: Pools, overlap: bool) -> None:
    # No gather depends on what runs, and a reduction that a peer starts late is not waited for in backward.
    zero = {"stage3_param_persistence_threshold": 10**6, "reduce_bucket_size": 1, "overlap_comm": overlap}
    expected = pool(2).run(route, 0, {}, False)[0]
    for ours in pool(2).run(route, 3, zero, False):
        assert_bitwise(ours, expected)


def test_mixed_with_gathers_persistent_experts_may_differ(pool: Pools) -> None:
    """Rank 1 lacks gradients that rank 0 reduces early, while both gather the big layers around."""
    zero = {"stage3_param_persistence_threshold": 40, "reduce_bucket_size": 1}
    expected = pool(2).run(bypass, 0, {})[0]
    for ours in pool(2).run(bypass, 3, zero):
        assert_bitwise(ours, expected)


class Bypass(Stack):
    """Gains that may be left out, small enough to persist, between layers that are gathered."""

    def __init__(self) -> None:
        super().__init__(4)
        self.gains = nn.ParameterList(nn.Parameter(torch.ones(16)) for _ in range(4))
        self.used: tuple[int, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.used:
                x = x * self.gains[index]
        return self.head(x)


def bypass(rank: int, world: int, stage: int, zero: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    engine = engine_of(Bypass(), stage, world, zero_optimization=zero)
    for at in range(6):
        engine.module.used = ((0, 1, 2, 3), (3,), (0,), ())[(at + 2 * rank) % 4]
        step(engine, at, rank)
    return whole(engine.module)


def alone_while_whole(rank: int, world: int, stage: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rank 0 alone generates inside ``unsharded``, once with all blocks and once without one; then all go on."""
    model = Bypass()
    engine = engine_of(model, stage, world)
    block = model.blocks[1]
    for at in range(4):
        step(engine, at, rank)
        with zeropipe.zero.unsharded(engine.module), torch.no_grad():
            if rank == 0:
                for skipped in (block, nn.Identity()):
                    model.blocks[1] = skipped
                    engine(x_batch(at, rank))
                model.blocks[1] = block
        with torch.no_grad():
            out = engine(x_batch(at, 7))
    return out, whole(engine.module)


def test_what_one_rank_runs_while_all_is_whole_leaves_no_trace(pool: Pools) -> None:
    """It became that rank's plan: the next evaluation gathered ahead there, and differently elsewhere."""
    expected = pool(2).run(alone_while_whole, 0)[0]
    for out, weights in pool(2).run(alone_while_whole, 3):
        assert torch.equal(out, expected[0])
        assert_bitwise(weights, expected[1])


class NoRoom:
    """Stands for the storage of the whole value of a parameter for which memory is short."""

    def resize_(self, size: int) -> None:
        if size:
            raise MemoryError("no room")


def short_of_memory(rank: int, world: int, fails: bool) -> dict[str, torch.Tensor]:
    engine = engine_of(Stack(4), 3, world)
    (shards,) = (s for s in engine._sharded.shards if s.name == "blocks.2.up.weight")
    for at in range(4):
        if fails and at == 2:  # a plan is there: the gather that fails is one of a prefetch
            real, shards._storage = shards._storage, NoRoom()
            with pytest.raises(MemoryError):
                engine(x_batch(at, rank))
            shards._storage = real
            engine.zero_grad()
        step(engine, at, rank)
    return whole(engine.module)


def test_training_goes_on_after_memory_was_short_for_a_gather(pool: Pools) -> None:
    """The parameter stayed in flight for ever, and its next use met a tensor of no elements."""
    expected = pool(2).run(short_of_memory, False)[0]
    for ours in pool(2).run(short_of_memory, True):
        assert_bitwise(ours, expected)
