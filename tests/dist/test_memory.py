"""Live bytes of parameters, gradients and optimizer state against the budget of each stage."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.data import generator, token_batch
from tests.helpers.models import NastyModel, build
from tests.helpers.train import config

STAGES = (0, 1, 2)
SLACK = 1.005  # of the issue: live state within 0.5 % of formula plus padding
WIDTH, DEPTH = 64, 8
P = DEPTH * WIDTH * WIDTH


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # []
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return x.float().square().mean()


def live_tensor_bytes() -> int:
    """Bytes of all storages that any tensor in this process refers to."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        try:
            if isinstance(thing, torch.Tensor) and thing.layout == torch.strided:
                for tensor in (thing, thing.grad if thing.is_leaf else None):
                    if tensor is not None:
                        storage = tensor.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
        except (ReferenceError, RuntimeError):
            continue
    return sum(storages.values())


def measure(rank: int, world: int, stage: int, extra: dict[str, Any]) -> Any:
    before = live_tensor_bytes()
    engine, *_ = zeropipe.initialize(model=build(Deep), config=config(stage, world, **extra))
    for step in range(2):
        x = torch.randn(2, WIDTH, generator=generator(step, rank)).to(engine.module.layers[0].weight.dtype)
        engine.backward(engine(x))
        engine.step()
    del x
    live = live_tensor_bytes() - before
    rows = {row.kind: (row.bytes, row.formula, row.ratio) for row in engine.memory_report()}
    engine.destroy()
    return live, rows


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_live_state_is_the_budget(pool, world, dtype):
    n = world
    budget = {
        "fp32": {0: (4, 4, 8), 1: (4, 4, 8 / n), 2: (4, 4 / n, 8 / n)},
        "bf16": {0: (2, 2, 12), 1: (2, 2, 12 / n), 2: (2, 2 / n, 12 / n)},
    }[dtype]
    extra = {} if dtype == "fp32" else {"bf16": {"enabled": True}}
    for stage in STAGES:
        for live, rows in pool(world).run(measure, stage, extra):
            kinds = ("parameters", "gradients", "optimizer state")
            for kind, per_parameter in zip(kinds, budget[stage], strict=True):
                measured, formula, ratio = rows[kind]
                assert formula == P * per_parameter  # P is a multiple of ranks x ALIGN: no padding
                assert formula <= measured <= formula * SLACK
                assert ratio == measured / formula
            total = P * sum(budget[stage])
            # Every tensor of the process, whoever holds it: nothing lives beside the three kinds.
            assert total <= live <= total * SLACK + 512  # bytes of 0-d tensors


def sharded_report(rank: int, world: int, extra: dict[str, Any]) -> Any:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    engine, *_ = zeropipe.initialize(
        model=build(Deep), config=config(3, world, zero_optimization=zero, **extra)
    )
    dtype = torch.bfloat16 if extra else torch.float32
    for step in range(2):
        engine.backward(engine(torch.randn(2, WIDTH, generator=generator(step, rank)).to(dtype)))
        engine.step()
    rows = {row.kind: (row.bytes, row.formula) for row in engine.memory_report()}
    gathered = sum(param.numel() * param.element_size() for param in engine.module.parameters())
    engine.destroy()
    return rows, gathered


@pytest.mark.parametrize(("extra", "budget"), [({}, (4, 4, 8)), ({"bf16": {"enabled": True}}, (0, 2, 12))])
def test_the_report_at_stage_3(pool, extra, budget):
    for rows, gathered in pool(2).run(sharded_report, extra):
        kinds = ("parameters", "gradients", "optimizer state")
        for kind, per_parameter, more in zip(kinds, budget, (gathered, 0, 0), strict=True):
            measured, formula = rows[kind]
            assert formula == P * per_parameter / 2 + more
            assert formula <= measured <= formula * SLACK


def nasty_report(rank: int, world: int) -> None:
    for stage in STAGES:
        engine, *_ = zeropipe.initialize(model=build(NastyModel), config=config(stage, world))
        assert [row.bytes for row in engine.memory_report()][2] == 0
        engine.backward(engine(*token_batch(0, rank)))
        engine.step()
        rows = engine.memory_report()
        assert [row.kind for row in rows] == ["parameters", "gradients", "optimizer state"]
        for row in rows:
            assert row.bytes == row.formula, (stage, str(row))
        assert "ratio 1.0000" in str(rows[0])
        engine.destroy()
        (parameters, *_) = engine.memory_report()
        assert parameters.bytes == parameters.formula


def test_the_report_counts_padding_and_frozen_parameters(pool):
    pool(3).run(nasty_report)


def live_gradients(rank: int, world: int, stage: int, bucket: int) -> int:
    """The most bytes of whole gradients that were alive at once during backward."""
    zero = {"stage": stage, "reduce_bucket_size": bucket}
    engine, *_ = zeropipe.initialize(model=build(Deep), config=config(stage, world, zero_optimization=zero))
    storages: dict[int, weakref.ref[Any]] = {}
    peak = 0

    def note(grad: torch.Tensor) -> torch.Tensor:
        nonlocal peak
        kept = grad.clone()  # a tensor of our own, so that its life is that of the gradient
        storages[id(kept)] = weakref.ref(kept)
        alive = [ref() for ref in storages.values()]
        peak = max(peak, sum(t.numel() * t.element_size() for t in alive if t is not None))
        return kept

    for layer in engine.module.layers:
        layer.weight.register_hook(note)
    for step in range(2):
        engine.backward(engine(torch.randn(2, WIDTH, generator=generator(step, rank))))
        alive = [ref() for ref in storages.values() if ref() is not None]
        assert not alive or stage < 2
        del alive
        engine.step()
    engine.destroy()
    return peak


def test_stage_2_never_holds_all_gradients_at_once(pool):
    layer = WIDTH * WIDTH * 4  # bytes
    # One that arrives, one that its bucket waits with, two that travel.
    for peak in pool(2).run(live_gradients, 2, 1):
        assert layer <= peak <= 4 * layer < DEPTH * layer


def no_growth(rank: int, world: int) -> list[int]:
    """Live bytes after 1, 4 and 8 steps with changing batch sizes."""
    seen = []
    engine, *_ = zeropipe.initialize(model=build(Deep), config=config(2, world, gas=2))
    for step in range(8):
        for micro in range(2):
            engine.backward(engine(torch.randn(1 + step % 3, WIDTH, generator=generator(step, rank, micro))))
            engine.step()
        if step in (0, 3, 7):
            seen.append(live_tensor_bytes())
    engine.destroy()
    return seen


def test_steps_do_not_grow(pool):
    for first, middle, last in pool(2).run(no_growth):
        assert middle == last
        assert last <= first + 512
