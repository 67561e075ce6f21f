"""What the tests of stage 3 share: settings, whole values, training against stage 0, what is gathered now."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import zeropipe
from tests.helpers.data import generator
from tests.helpers.models import build
from tests.helpers.referee import assert_bitwise
from tests.helpers.train import config
from zeropipe.runtime.zero.gather.shards import shards_of

WIDTH = 16  # of the small models: tensors are multiples of 16 elements, so that stages agree bit for bit
ALL_SHARDED = {"stage3_param_persistence_threshold": 0}


def settings(stage: int, world: int, **extra: Any) -> dict[str, Any]:
    """As ``config``; at stage 3 no parameter persists."""
    zero = {"stage": stage, **(ALL_SHARDED if stage == 3 else {}), **extra.pop("zero_optimization", {})}
    return config(stage, world, zero_optimization=zero, **extra)


def engine_of(model: nn.Module, stage: int, world: int, **extra: Any) -> Any:
    chosen = settings(stage, world, **extra)
    if "optimizer_section" in chosen:
        chosen["optimizer"] = chosen.pop("optimizer_section")  # instead of AdamW, not merged with it
    return zeropipe.initialize(model=model, config=chosen)[0]


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter's whole value, by name; collective."""
    values = {}
    for name, param in module.named_parameters():
        shards = shards_of(param)
        away = shards is not None and not shards.param.numel() and shards.numel
        if shards is not None:
            shards.gather()
        values[name] = param.detach().clone()
        if shards is not None and away:
            shards.release_if_idle()
    return values


def gathered(module: nn.Module) -> list[str]:
    """The parameters whose whole value takes memory now, persistent ones left out."""
    found = [(name, shards_of(param)) for name, param in module.named_parameters()]
    return [
        name
        for name, shards in found
        if shards is not None
        and not shards.persist
        and shards.numel
        and shards.full.untyped_storage().nbytes()
    ]


def x_batch(step: int, rank: int, micro: int = 0, width: int = WIDTH) -> torch.Tensor:  # [4, width]
    return torch.randn(4, width, generator=generator(step, rank, micro))


Factory = Callable[[], nn.Module]
Loss = Callable[[Any, int, int], torch.Tensor]  # (engine, step, rank) -> the step's loss


def default_loss(engine: Any, step: int, rank: int) -> torch.Tensor:
    out = engine(x_batch(step, rank))
    return out.square().mean()


def fit(
    rank: int,
    world: int,
    stage: int,
    factory: Factory,
    loss_of: Loss = default_loss,
    steps: int = 4,
    plain: bool = False,
    **extra: Any,
) -> dict[str, torch.Tensor]:
    """Train ``steps`` steps; the whole weights. Checks that nothing stays gathered between steps."""
    engine = engine_of(build(factory), stage, world, **extra)
    for step in range(steps):
        for _ in range(engine.gradient_accumulation_steps()):
            loss = loss_of(engine, step, rank)
            loss.backward() if plain else engine.backward(loss)
            engine.step()
        assert gathered(engine.module) == []
    values = whole(engine.module)
    engine.destroy()
    return values


def assert_as_stage(
    stage: int, pool: Any, factory: Factory, *args: Any, world: int = 2, **kwargs: Any
) -> None:
    """``fit`` at stage 3 gives ``stage``'s weights, bit for bit, on every rank.

    With several backwards per step ranks average each of them at stages 2 and 3, and their sum at 0 and 1.
    """
    __tracebackhide__ = True
    expected = pool(world).run(fit, stage, factory, *args, **kwargs)[0]
    for ours in pool(world).run(fit, 3, factory, *args, **kwargs):
        assert_bitwise(ours, expected)


def assert_as_stage_0(pool: Any, factory: Factory, *args: Any, **kwargs: Any) -> None:
    __tracebackhide__ = True
    assert_as_stage(0, pool, factory, *args, **kwargs)


class Block(nn.Module):
    """A residual pair of layers."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Stack(nn.Module):
    """Blocks one after another; ``order`` says which run, and may change between forwards."""

    def __init__(self, depth: int = 3, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, width, bias=False)
        self.order = tuple(range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in self.order:
            x = self.blocks[index](x)
        return self.head(x)


def names(module: nn.Module, params: Iterable[torch.Tensor]) -> list[str]:
    wanted = {id(param) for param in params}
    return [name for name, param in module.named_parameters() if id(param) in wanted]
