"""Parameters of every kind, at every stage, give what plain PyTorch gives in one process.

All sizes are multiples of 16 where bits are compared: see ALIGN in runtime/zero/hold/values.py. One process that
accumulates the two ranks' batches does the same arithmetic as two ranks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zeropipe
from tests.helpers.data import generator, token_batch
from tests.helpers.models import NastyModel, build
from tests.helpers.referee import assert_bitwise, assert_within_referee, weights_of
from tests.helpers.train import config

STAGES = (0, 1, 2)
STEPS = 5


class Layers(nn.Module):
    """Four linear layers of 16 x 16; ``use`` says which of them a call runs."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=bias) for _ in range(4))

    def forward(self, x: torch.Tensor, use: tuple[int, ...] = (0, 1, 2, 3)) -> torch.Tensor:  # []
        for i in use:
            x = torch.tanh(self.layers[i](x)) + x
        return x.square().mean()


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 16, generator=generator(step, rank))


def adamw(params: Any, **kwargs: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, fused=True, **kwargs)


def plain(
    factory: Any, before: Any, use: Any, *, world: int = 2, groups: Any = None
) -> dict[str, torch.Tensor]:
    """One process that accumulates all ranks' batches; ``before(step, model)`` may freeze or unfreeze."""
    model = factory()
    optimizer = adamw(groups(model) if groups else model.parameters())
    for step in range(STEPS):
        before(step, model)
        for rank in range(world):
            (model(batch(step, rank), use(step, rank)) / world).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


def ours(rank: int, world: int, factory: Any, before: Any, use: Any, groups: Any = None) -> list[Any]:
    results = []
    for stage in STAGES:
        model = factory()
        optimizer = adamw(groups(model) if groups else model.parameters())
        engine, *_ = zeropipe.initialize(
            model=model,
            optimizer=optimizer,
            config=config(stage, world, optimizer={"type": None, "params": {}}),
        )
        for step in range(STEPS):
            before(step, model)
            engine.backward(engine(batch(step, rank), use(step, rank)))
            engine.step()
        results.append(weights_of(model))
        engine.destroy()
    return results


layers = partial(build, Layers)


def last_layer_frozen() -> nn.Module:
    model = layers()
    model.layers[3].requires_grad_(False)
    return model


def weights_frozen() -> nn.Module:
    model = layers()
    for name, param in model.named_parameters():
        param.requires_grad_("bias" in name)
    return model


def nothing(step: int, model: nn.Module) -> None:
    """No parameter changes its state."""


def all_layers(step: int, rank: int) -> tuple[int, ...]:
    return (0, 1, 2, 3)


def one_rank_less(step: int, rank: int) -> tuple[int, ...]:
    return (0, 1, 3) if rank == 0 else (0, 1, 2, 3)


def never_the_third(step: int, rank: int) -> tuple[int, ...]:
    return (0, 1, 3)


def other_order(step: int, rank: int) -> tuple[int, ...]:
    return (3, 1, 0, 2) if rank == step % 2 else (0, 1, 2, 3)


def each_rank_its_own(step: int, rank: int) -> tuple[int, ...]:
    return (rank, 2, 2, rank)


def unfreeze_at_2(step: int, model: Layers) -> None:
    if step == 2:
        model.requires_grad_(True)


def train_it_in_1_and_2_only(step: int, model: Layers) -> None:
    model.layers[3].requires_grad_(step in (1, 2))


def freeze_from_2(step: int, model: Layers) -> None:
    if step == 2:
        model.layers[1].requires_grad_(False)


@pytest.mark.parametrize(
    ("factory", "before", "use"),
    [
        (layers, nothing, all_layers),
        (layers, nothing, one_rank_less),
        (layers, nothing, never_the_third),
        (layers, nothing, other_order),
        (layers, nothing, each_rank_its_own),
        (last_layer_frozen, nothing, all_layers),
        (last_layer_frozen, unfreeze_at_2, all_layers),
        (last_layer_frozen, train_it_in_1_and_2_only, all_layers),
        (layers, freeze_from_2, all_layers),
        (weights_frozen, unfreeze_at_2, one_rank_less),
    ],
    ids=lambda f: getattr(f, "__name__", "layers"),
)
def test_used_frozen_and_unfrozen_are_plain_pytorch_bitwise(pool, factory, before, use):
    expected = plain(factory, before, use)
    for results in pool(2).run(ours, factory, before, use):
        for stage, weights in zip(STAGES, results, strict=True):
            assert_bitwise(weights, expected, f"stage {stage}")


def test_a_layer_first_used_later_has_its_own_step_count(pool):
    use = _third_from_step_3
    expected = plain(layers, nothing, use)
    for results in pool(2).run(ours, layers, nothing, use):
        for weights in results:
            assert_bitwise(weights, expected)


def _third_from_step_3(step: int, rank: int) -> tuple[int, ...]:
    return (0, 1, 2, 3) if step >= 3 else (0, 1, 3)


class Shared(Layers):
    """Two modules hold one linear layer, and the same weight is held under a third name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2] = self.layers[0]
        self.layers[3].weight = self.layers[1].weight


def test_parameters_shared_by_modules(pool):
    factory = partial(build, Shared)
    expected = plain(factory, nothing, all_layers)
    for results in pool(2).run(ours, factory, nothing, all_layers):
        for weights in results:
            assert_bitwise(weights, expected)


def with_own_rates(model: Layers) -> list[dict[str, Any]]:
    first, second, *rest = model.layers
    return [
        {"params": list(first.parameters()), "lr": 0.05, "weight_decay": 0.0},
        {"params": [second.bias], "lr": 0.002},
        {"params": [second.weight, *(p for layer in rest for p in layer.parameters())], "betas": (0.8, 0.9)},
    ]


def test_param_groups_keep_their_own_rates(pool):
    expected = plain(layers, nothing, one_rank_less, groups=with_own_rates)
    for results in pool(2).run(ours, layers, nothing, one_rank_less, with_own_rates):
        for weights in results:
            assert_bitwise(weights, expected)


# Mixed dtypes, empty and scalar parameters, numel below the number of ranks: within the referee.


def nasty_ours(rank: int, world: int, half: torch.dtype | None) -> list[Any]:
    results = []
    for stage in STAGES:
        model = build(NastyModel, half)
        engine, *_ = zeropipe.initialize(model=model, config=config(stage, world))
        for step in range(STEPS):
            engine.backward(engine(*token_batch(step, rank), wake_dead=True))
            engine.step()
        results.append(weights_of(model))
        engine.destroy()
    return results


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_the_nasty_model_is_plain_pytorch_within_the_referee(pool, world, half):
    runs = pool(world).run(nasty_ours, half)
    trained = [_nasty_plain(world, None, half), _nasty_plain(world, torch.float64, None)]
    for results in runs:
        for weights in results:
            assert_bitwise(weights, runs[0][0])
    wide = {name: value for name, value in runs[0][0].items() if value.dtype == torch.float32}
    assert_within_referee(wide, *({name: run[name] for name in wide} for run in trained))


def _nasty_plain(world: int, dtype: torch.dtype | None, half: torch.dtype | None) -> dict[str, torch.Tensor]:
    model = build(NastyModel, half)
    if dtype is not None:
        model = model.to(dtype)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    for step in range(STEPS):
        for rank in range(world):
            (model(*token_batch(step, rank), wake_dead=True) / world).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


class Sparse(nn.Module):
    """An embedding whose gradient is sparse. Inputs: tokens, int64 [batch, seq]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16, sparse=True)
        self.head = nn.Linear(16, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # []
        return F.cross_entropy(self.head(self.embed(tokens)).flatten(0, 1), tokens.flatten() % 16)


def sparse_ours(rank: int, world: int, gas: int, fp16: bool) -> list[Any]:
    results = []
    for stage in STAGES:
        model = build(Sparse)
        extra = {"fp16": {"enabled": True, "loss_scale": 8.0}} if fp16 else {}
        engine, *_ = zeropipe.initialize(model=model, config=config(stage, world, gas=gas, **extra))
        for step in range(STEPS):
            for micro in range(gas):
                tokens, _ = token_batch(step, rank, micro, vocab=32)
                engine.backward(engine(tokens))
                engine.step()
        results.append(weights_of(model))
        engine.destroy()
    return results


@pytest.mark.parametrize("gas", [1, 2])
def test_sparse_gradients_are_reduced_as_dense_ones(pool, gas):
    runs = pool(2).run(sparse_ours, gas, False)
    trained = []
    for dtype in (torch.float32, torch.float64):
        model = build(Sparse).to(dtype)
        model.embed.sparse = False
        optimizer = adamw(model.parameters())
        for step in range(STEPS):
            for micro in range(gas):
                for rank in range(2):
                    tokens, _ = token_batch(step, rank, micro, vocab=32)
                    (model(tokens) / (2 * gas)).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(weights_of(model))
    for results in runs:
        for weights in results:
            if gas == 1:
                assert_bitwise(weights, trained[0])
            assert_within_referee(weights, *trained)


def test_sparse_gradients_in_fp16(pool):
    runs = pool(2).run(sparse_ours, 1, True)
    for results in runs:
        for weights in results:
            assert_bitwise(weights, runs[0][0])


def no_parameters(rank: int, world: int) -> list[Any]:
    seen = []
    for stage in STAGES:
        model = build(Layers).requires_grad_(False)
        engine, optimizer, *_ = zeropipe.initialize(model=model, config=config(stage, world))
        x = batch(0, rank).requires_grad_()
        engine.backward(engine(x))
        engine.step()
        model.layers[0].requires_grad_(True)
        engine.backward(engine(batch(0, rank)))
        engine.step()
        seen.append((engine.global_steps, weights_of(model)))
        engine.destroy()
    return seen


def test_an_engine_whose_parameters_are_all_frozen_steps_and_wakes(pool):
    runs = pool(2).run(no_parameters)
    assert_bitwise(runs[1], runs[0])
    start = weights_of(build(Layers))
    for steps, weights in runs[0]:
        assert steps == 2
        changed = {name for name in weights if not torch.equal(weights[name], start[name])}
        assert changed == {"layers.0.weight", "layers.0.bias"}
