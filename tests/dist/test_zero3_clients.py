"""What trainers that generate text do to a model of stage 3: gather it, take the hooks off, generate, put them back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zeropipe
from tests.helpers.models import build
from tests.helpers.referee import assert_bitwise
from tests.helpers.zero3 import Stack, engine_of, gathered, whole, x_batch


def take_off(offload: Any) -> None:
    for _, param in (*offload.module.named_parameters(), *offload.module.ds_external_parameters()):
        param.ds_active_sub_modules.clear()
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks = []
    offload.backward_hooks = []


def put_back(offload: Any) -> None:
    if not offload.param_coordinator.is_invalid_trace():
        offload.param_coordinator._invalidate_trace()
    offload._register_deepspeed_module(offload.module)


def online(rank: int, world: int, generate: bool) -> dict[str, torch.Tensor]:
    engine = engine_of(build(Stack), 3, world)
    offload = engine.optimizer.parameter_offload
    assert offload.module is engine.module
    hooks = len(engine.module._forward_pre_hooks)
    for step in range(4):
        if generate:
            with zeropipe.zero.GatheredParameters(engine.module.parameters()):
                take_off(offload)
                assert not any(module._forward_pre_hooks for module in engine.module.modules())
                with torch.no_grad():
                    for _ in range(1 + 2 * rank):  # ranks do not generate the same number of tokens
                        engine.module(x_batch(step, rank))
                put_back(offload)
            assert len(engine.module._forward_pre_hooks) == hooks
            assert gathered(engine.module) == []
        x = x_batch(step, rank)
        engine.backward((engine(x) - 1).square().mean())
        engine.step()
        assert offload.param_coordinator.is_invalid_trace() == (step == 0)
    result = whole(engine.module)
    engine.destroy()
    assert not any(module._forward_pre_hooks for module in engine.module.modules())
    return result


def test_generation_without_hooks_leaves_training_as_it_was(pool):
    expected = pool(2).run(online, False)[0]
    for ours in pool(2).run(online, True):
        assert_bitwise(ours, expected)


def without(rank: int, world: int, stage: int) -> bool:
    engine = engine_of(build(Stack), stage, world)
    found = hasattr(engine.optimizer, "parameter_offload")
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_only_stage_3_has_hooks_to_take_off(pool, stage):
    assert pool(2).run(without, stage) == [False, False]
