"""Large gradients travel alone and large shards are stepped while they travel: neither shows in a bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import zeropipe
from tests.helpers.data import gpt_batch, token_batch
from tests.helpers.models import NastyModel, TinyGPT, build
from tests.helpers.referee import assert_bitwise, weights_of
from tests.helpers.train import config, train
from zeropipe.runtime.zero.hold import shard_values, values

STEPS = 4
PARTITIONS = 2  # param groups: each is stepped by a call of its own, so that one that raised can be repeated
nasty = partial(build, NastyModel)
gpt = partial(build, TinyGPT)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, fused=True),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True, foreach=False),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01, centered=True, momentum=0.5),
}


def in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "ALONE_NUMEL", 8)
    monkeypatch.setattr(shard_values, "ALONE_NUMEL", 8)


def stepped_in_pieces(settings: dict[str, Any]) -> dict[str, Any]:
    zero = {**settings["zero_optimization"], "allgather_bucket_size": 32}
    return {**settings, "zero_optimization": zero}


def train_in_pieces(
    rank: int, world: int, factory: Any, batch: Any, settings: dict[str, Any], steps: int
) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_small_pieces(monkeypatch)
        return train(rank, world, factory, batch, stepped_in_pieces(settings), steps)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("model", ["gpt", "nasty"])
def test_training_in_small_pieces(pool, stage, world, model):
    factory, batch = (gpt, gpt_batch) if model == "gpt" else (nasty, token_batch)
    whole = pool(world).run(train, factory, batch, config(0, world), STEPS)
    cut = pool(world).run(train_in_pieces, factory, batch, config(stage, world), STEPS)
    for result in cut:
        assert_bitwise(result["weights"], whole[0]["weights"])


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [{"bf16": {"enabled": True}}, {"gas": 3}, {"gradient_clipping": 0.1}],
    ids=["bf16", "accumulation", "clipping"],
)
def test_training_in_small_pieces_otherwise(pool, stage, settings):
    made = config(stage, 2, **settings)
    whole = pool(2).run(train, nasty, token_batch, made, STEPS)
    cut = pool(2).run(train_in_pieces, nasty, token_batch, made, STEPS)
    assert_bitwise(cut[1]["weights"], whole[0]["weights"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_in_pieces(pool, name):
    whole = pool(2).run(weights_state_and_calls, name, False)
    cut = pool(2).run(weights_state_and_calls, name, True)
    for (weights, state, calls), (weights_whole, state_whole, calls_whole) in zip(cut, whole, strict=True):
        assert len(calls_whole) == STEPS * PARTITIONS < len(calls), "the shard was not cut"
        assert state.keys() == state_whole.keys()
        assert_bitwise(state, state_whole)
        assert_bitwise(weights, weights_whole)


def weights_state_and_calls(rank: int, world: int, name: str, cut: bool) -> tuple[Any, Any, list[int]]:
    """Weights, this rank's optimizer state, and the number of elements in each call of the torch step."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if cut:
            in_small_pieces(monkeypatch)
        model = gpt()
        decayed = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        optimizer = OPTIMIZERS[name]([{"params": decayed}, {"params": rest, "lr": 0.001}])
        calls: list[int] = []
        step = type(optimizer).step

        def counted(self: torch.optim.Optimizer, *args: Any) -> Any:
            held = [p for group in self.param_groups for p in group["params"]]
            calls.append(sum(p.numel() for p in held))
            return step(self, *args)

        monkeypatch.setattr(type(optimizer), "step", counted)
        settings = stepped_in_pieces(config(2, world)) if cut else config(2, world)
        engine, wrapped, _, _ = zeropipe.initialize(model=model, optimizer=optimizer, config=settings)
        for at in range(STEPS):
            engine.backward(engine(*gpt_batch(at, rank, 0)))
            engine.step()
        state = {
            f"{at}.{key}": value.clone()
            for at, part in enumerate(wrapped.partitions)
            for key, value in optimizer.state[part.master].items()
        }
        weights = weights_of(engine.module)
        engine.destroy()
        return weights, state, calls


def test_a_users_hook_sees_steps_even_where_only_one_rank_has_one(pool):
    whole = pool(2).run(train, gpt, gpt_batch, config(2, 2), STEPS)
    for rank, (weights, seen) in enumerate(pool(2).run(hooked_on_rank_0)):
        assert seen == (STEPS if rank == 0 else 0)
        assert_bitwise(weights, whole[0]["weights"])


def hooked_on_rank_0(rank: int, world: int) -> tuple[Any, int]:
    seen: list[object] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_small_pieces(monkeypatch)
        settings = stepped_in_pieces(config(2, world))
        engine, wrapped, _, _ = zeropipe.initialize(model=gpt(), config=settings)
        if rank == 0:
            wrapped.optimizer.register_step_post_hook(lambda *args: seen.append(args))
        for at in range(STEPS):
            engine.backward(engine(*gpt_batch(at, rank, 0)))
            engine.step()
        weights = weights_of(engine.module)
        engine.destroy()
    return weights, len(seen)


class Added(torch.nn.Module):
    """Two parameters whose gradients autograd may leave in one and the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.zeros(64)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((self.a.view(4, 16) + self.b.view(4, 16)) * x).sum()


def train_added(rank: int, world: int, stage: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Weights after a step of two micro-steps, and a gradient that a hook kept."""
    kept: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_small_pieces(monkeypatch)
        model = Added()
        model.a.register_post_accumulate_grad_hook(lambda p: kept.append(p.grad))
        settings = config(stage, world, gas=2, optimizer={"type": "SGD", "params": {"lr": 1.0}})
        engine, *_ = zeropipe.initialize(model=model, config=stepped_in_pieces(settings))
        for micro in range(2):
            engine.backward(engine(torch.full((4, 16), 8.0 * rank + 16.0 * micro)))
            engine.step()
        with zeropipe.zero.GatheredParameters(list(model.parameters())):
            weights = weights_of(model)
        engine.destroy()
    return weights, kept[-1].clone()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_that_share_memory_do_not_spoil_each_other(pool, stage):
    expected = -(0.0 + 16.0 + 8.0 + 24.0) / 2 / 2  # the average over ranks and micro-steps
    for rank, (weights, kept) in enumerate(pool(2).run(train_added, stage)):
        assert_bitwise(weights, {name: torch.full((64,), expected) for name in "ab"})
        if stage > 1:
            assert torch.equal(kept, torch.full((64,), (8.0 * rank + 16.0) / 2)), (
                "a user's gradient was written to"
            )
