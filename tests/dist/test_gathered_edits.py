"""``GatheredParameters(..., modifier_rank=r)`` gives all ranks and masters the modifier's values, at every stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.data import mlp_batch
from tests.helpers.models import MLP, build
from tests.helpers.train import config
from zeropipe import zero
from zeropipe.errors import UsageError
from zeropipe.utils import safe_get_full_fp32_param


def start(stage: int, world: int, seed: int = 0, trained: bool = True, **extra: Any) -> Any:
    settings = config(stage, world, **extra)
    if stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if not trained:
        del settings["optimizer"]
    return zeropipe.initialize(model=build(MLP, seed=seed), config=settings)[0]


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    with zero.GatheredParameters(list(module.parameters())):
        return {name: param.detach().clone() for name, param in module.named_parameters()}


def averaged(rank: int, world: int, stage: int, extra: dict[str, Any]) -> Any:
    """An EMA in an engine of its own, kept by rank 0 alone, as scripts for stage 3 do; then copied back."""
    engine, ema = start(stage, world, **extra), start(stage, world, trained=False, **extra)
    engine.module.layers[0].bias.requires_grad_(False)  # frozen ones are averaged too
    for step in range(3):
        x, y = mlp_batch(step, rank)
        engine.backward(engine(*(t.bfloat16() if extra else t for t in (x, y))))
        engine.step()
        for ours, theirs in zip(engine.module.parameters(), ema.module.parameters(), strict=True):
            with zero.GatheredParameters([ours, theirs], modifier_rank=0), torch.no_grad():
                if rank == 0:
                    theirs.data.lerp_(ours.data, 0.5)
                else:
                    theirs.data.fill_(7.0)  # dropped
    for ours, theirs in zip(engine.module.parameters(), ema.module.parameters(), strict=True):
        with zero.GatheredParameters([ours, theirs], modifier_rank=0):
            if rank == 0:
                ours.data = theirs.data.clone()
    masters = {n: safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters() if p.requires_grad}
    found = whole(ema.module), whole(engine.module), masters
    x, y = mlp_batch(9, rank)
    engine.backward(engine(*(t.bfloat16() if extra else t for t in (x, y))))
    engine.step()
    last = whole(engine.module)
    engine.destroy()
    ema.destroy()
    return (*found, last)


@pytest.mark.parametrize("extra", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
def test_an_average_that_one_rank_keeps_is_the_same_everywhere(pool, extra):
    """At stages 0 to 2 the edit stayed on rank 0: the replicas of the EMA parted by 1.3e-2."""
    runs = [found for stage in (0, 1, 2, 3) for found in pool(2).run(averaged, stage, extra)]
    for run in runs:
        for found, right in zip(run, runs[0], strict=True):
            assert found.keys() == right.keys()
            for name, value in found.items():
                assert torch.equal(value, right[name]), name
    ema, copied, masters, last = runs[0]
    for name, value in masters.items():
        assert torch.equal(value.to(copied[name].dtype), copied[name])
        assert torch.equal(copied[name], ema[name]) and not torch.equal(last[name], copied[name])


def raising(rank: int, world: int) -> None:
    for stage in (0, 2):
        engine = start(stage, world)
        params = list(engine.module.parameters())
        before = whole(engine.module)
        with pytest.raises(ValueError), zero.GatheredParameters(params, modifier_rank=1), torch.no_grad():
            params[0].add_(rank + 1)
            raise ValueError
        with pytest.raises(UsageError, match="shape"), zero.GatheredParameters(params, modifier_rank=1):
            if rank == 1:
                params[0].data = torch.zeros(5)
        with pytest.raises(UsageError, match="modifier_rank"):
            zero.GatheredParameters(params, modifier_rank=7).__enter__()
        if rank == 0:  # one rank alone may look
            with zero.GatheredParameters(params):
                assert params[0].sum().isfinite()
        params[0].data = params[0].data  # a script may do so
        for name, value in whole(engine.module).items():
            if name != "layers.0.weight":
                assert torch.equal(value, before[name])
        engine.destroy()
        assert not [n for p in params for n in vars(p) if n.startswith("_zero")]


def test_an_edit_that_raised_is_taken_back_and_a_wrong_one_named(pool):
    pool(2).run(raising)


def outside(rank: int, world: int) -> None:
    """A model of no engine stays each rank's own: nothing is sent, so one rank may do it alone."""
    model = nn.Linear(3, 3)
    if rank == 0:
        with zero.GatheredParameters(model, modifier_rank=0), torch.no_grad():
            model.weight.fill_(1.0)
        assert model.weight.eq(1).all()


def test_a_model_of_no_engine_is_left_alone(pool):
    pool(2).run(outside)
