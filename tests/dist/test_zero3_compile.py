"""torch.compile under stage 3: how often a graph breaks, how often it is compiled, and that the numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import zeropipe
from tests.helpers.models import build
from tests.helpers.referee import assert_bitwise
from tests.helpers.zero3 import Block, Stack, engine_of, gathered, whole, x_batch

# A prefetch budget of nothing: what is more than half of the model is not fetched whole.
LARGE = {"stage3_prefetch_bucket_size": 0}
# No unit of a block may be joined with another.
APART = {"stage3_max_live_parameters": 100}


class Recomputed(Stack):
    """Blocks under activation checkpointing, inside of what is compiled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


class RecomputedParts(nn.Module):
    """A block that recomputes one of its own layers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.block = Block(width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(checkpoint(self.block, x, use_reentrant=False))


class StackOfParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RecomputedParts() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def compile_blocks(engine: Any, backend: str) -> None:
    for block in engine.module.blocks:
        block.compile(backend=backend, fullgraph=True)


def wrap_blocks(engine: Any, backend: str) -> None:
    for index, block in enumerate(engine.module.blocks):
        engine.module.blocks[index] = torch.compile(block, backend=backend)


def compile_model(engine: Any, backend: str) -> None:
    engine.compile(backend=backend)


def compile_nothing(engine: Any, backend: str) -> None:
    pass


Way = Callable[[Any, str], None]


@dataclass(frozen=True, slots=True)
class Seen:
    """What a run showed. ``breaks``, ``compiled``: after each step, of all steps so far."""

    values: dict[str, torch.Tensor]
    breaks: list[int]
    compiled: list[int]
    whole: list[str]


def fit(
    rank: int,
    world: int,
    stage: int,
    way: Way,
    backend: str,
    factory: type[nn.Module] = Stack,
    zero: Any = None,
) -> Seen:
    """Four steps, with an evaluation after each."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    engine = engine_of(build(factory), stage, world, zero_optimization=zero or {})
    way(engine, backend)
    breaks, compiled, outputs = [], [], []
    for step in range(4):
        engine.backward(engine(x_batch(step, rank)).square().mean())
        engine.step()
        engine.eval()
        with torch.no_grad():
            outputs.append(engine(x_batch(100 + step, rank)))
        engine.train()
        if stage == 3:
            engine._sharded.coordinator.settle()
            assert gathered(engine.module) == []
        breaks.append(sum(counters["graph_break"].values()))
        compiled.append(counters["frames"]["total"])
    values = {name.replace("_orig_mod.", ""): value for name, value in whole(engine.module).items()}
    values["outputs"] = torch.stack(outputs)
    units = [unit.unit.name for _, unit in engine._sharded.hooks.compiled.whole] if stage == 3 else []
    engine.destroy()
    torch._dynamo.reset()
    return Seen(values, breaks, compiled, units)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "backend", "zero", "units"),
    [
        (compile_blocks, "aot_eager", {}, 3),
        (wrap_blocks, "eager", {}, 3),
        (compile_model, "aot_eager", {}, 1),
        (compile_blocks, "eager", LARGE, 3),
        (compile_model, "eager", LARGE, 3),
        (compile_model, "aot_eager", LARGE, 3),
    ],
)
def test_compiled_code_has_no_break_and_the_numbers_of_unsharded_compiled_code(
    pool, way, backend, zero, units
):
    referee = pool(2).run(fit, 0, way, backend, timeout=200)
    for ours, plain in zip(pool(2).run(fit, 3, way, backend, Stack, zero, timeout=200), referee, strict=True):
        assert_bitwise(ours.values, plain.values)
        assert ours.breaks[-1] == 0
        # Training and evaluation were compiled in the first step.
        assert ours.compiled == ours.compiled[:1] * 4
        assert len(ours.whole) == units


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "factory", "zero"),
    [
        (compile_blocks, Recomputed, {}),
        (compile_blocks, StackOfParts, LARGE),
        (compile_model, Recomputed, {}),
        (compile_model, Recomputed, LARGE),
    ],
)
def test_compiled_code_may_recompute_or_be_recomputed(pool, way, factory, zero):
    referee = pool(2).run(fit, 0, way, "aot_eager", factory, timeout=200)
    for ours, plain in zip(
        pool(2).run(fit, 3, way, "aot_eager", factory, zero, timeout=200), referee, strict=True
    ):
        assert_bitwise(ours.values, plain.values)
        assert ours.breaks[-1] == 0
        assert ours.compiled == ours.compiled[:1] * 4


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_units_that_the_budget_keeps_apart_break_the_graph_but_are_compiled_once(pool, backend):
    """Each unit breaks the graph before and after it: what remains where the user's bound forbids to join them."""
    plain = pool(2).run(fit, 3, compile_nothing, "")
    for ours, expected in zip(
        pool(2).run(fit, 3, wrap_blocks, backend, Stack, APART, timeout=200), plain, strict=True
    ):
        assert_bitwise(ours.values, expected.values)
        assert ours.whole == []
        assert ours.breaks == ours.breaks[:1] * 4
        assert ours.compiled == ours.compiled[:1] * 4


def lives(rank: int, world: int) -> None:
    """Compiled anew, hooks taken off and put back, destroyed: the calls around compiled code follow."""
    torch._dynamo.reset()
    model = build(Stack)
    model.blocks[0].compile(backend="eager", fullgraph=True)
    made = model.blocks[0]._compiled_call_impl
    engine = engine_of(model, 3, world)
    x = x_batch(0, rank)
    expected = engine(x)
    assert model.blocks[0]._compiled_call_impl is not made
    model.blocks[0].compile(backend="aot_eager", fullgraph=True)
    again = model.blocks[0]._compiled_call_impl
    assert torch.equal(engine(x), expected)
    assert model.blocks[0]._compiled_call_impl is not again
    engine._sharded.coordinator.settle()
    with zeropipe.zero.unsharded(model):
        for handle in engine.optimizer.parameter_offload.forward_hooks:
            handle.remove()
        assert model.blocks[0]._compiled_call_impl is again
        assert torch.equal(model(x), expected)
        engine.optimizer.parameter_offload._register_deepspeed_module(model)
    assert torch.equal(engine(x), expected)
    assert model.blocks[0]._compiled_call_impl is not again
    engine.destroy()
    assert model.blocks[0]._compiled_call_impl is again
    zeropipe.zero.unshard_module(model)
    assert torch.equal(model(x), expected)
    torch._dynamo.reset()


@pytest.mark.slow
def test_calls_around_compiled_code_come_and_go(pool):
    pool(2).run(lives, timeout=200)


class Picky(Stack):
    """Fails in the middle of the model when told to."""

    refuses = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x)
        if self.refuses:
            x = self.blocks[1](x[:, :3])  # of the wrong width
        return self.head(x)


def raised(rank: int, world: int, way: Way, zero: Any) -> str:
    torch._dynamo.reset()
    engine = engine_of(build(Picky), 3, world, zero_optimization=zero)
    way(engine, "eager")
    x = x_batch(0, rank)
    expected = engine(x).detach()
    engine.backward(engine(x).square().mean())
    engine.zero_grad()
    engine.module.refuses = True
    with pytest.raises(Exception, match="shape") as caught:
        engine(x)
    engine.module.refuses = False
    assert torch.equal(engine(x), expected)  # all raised at the same place: they go on
    engine._sharded.coordinator.settle()
    assert gathered(engine.module) == []
    torch._dynamo.reset()
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "zero"),
    [(compile_blocks, {}), (compile_model, {}), (compile_model, LARGE), (compile_model, APART)],
)
def test_an_exception_in_compiled_code_leaves_nothing_behind(pool, way, zero):
    for said in pool(2).run(raised, way, zero, timeout=200):
        assert "ranks went different ways" not in said
