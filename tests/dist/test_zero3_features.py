"""What users do around a model of stage 3: evaluate, compile, hook, read, use several engines, destroy."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.models import build
from tests.helpers.referee import assert_bitwise
from tests.helpers.zero3 import Block, Stack, engine_of, gathered, settings, whole, x_batch
from zeropipe import utils
from zeropipe.compat.table import BESIDE
from zeropipe.errors import UnavailableParameterError, UsageError
from zeropipe.runtime.zero.gather.sharded_model import unsharded


def inference(rank: int, world: int) -> None:
    model = build(Stack)
    expected = build(Stack)(x_batch(0, rank))
    chosen = settings(3, world)
    del chosen["optimizer"]
    engine = zeropipe.initialize(model=model, config=chosen)[0]
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert torch.equal(engine(x_batch(0, rank)), expected)
    engine._sharded.coordinator.settle()
    assert gathered(engine.module) == []


def test_inference_without_an_optimizer(pool):
    pool(2).run(inference)


def actor_and_critic(rank: int, world: int, stage: int) -> list[dict[str, torch.Tensor]]:
    actor = engine_of(build(Stack), stage, world)
    critic = engine_of(build(Stack, 2, seed=1), stage, world)
    chosen = settings(stage, world)
    del chosen["optimizer"]
    frozen = zeropipe.initialize(model=build(Stack, seed=2).requires_grad_(False), config=chosen)[0]
    for step in range(3):
        x = x_batch(step, rank)
        with torch.no_grad():
            wanted = frozen(x)
        action = actor(x)
        value = critic(action.detach())
        critic.backward((value - wanted).square().mean())
        actor.backward((action - wanted).square().mean())
        critic.step()
        actor.step()
    return [whole(engine.module) for engine in (actor, critic, frozen)]


def test_several_engines_in_one_process(pool):
    expected = pool(2).run(actor_and_critic, 0)[0]
    for ours in pool(2).run(actor_and_critic, 3):
        assert_bitwise(ours, expected)


def transformed(rank: int, world: int) -> None:
    engine = engine_of(build(Stack), 3, world)
    with pytest.raises(UsageError, match="functorch"):
        torch.func.vmap(engine.module)(x_batch(0, rank)[None])
    with pytest.raises(UsageError, match="functorch"):
        torch.func.grad(lambda x: engine.module(x).sum())(x_batch(0, rank))
    engine.backward(engine(x_batch(0, rank)).square().mean())  # nothing is left behind
    engine.step()


def test_functorch_transforms_are_refused(pool):
    pool(2).run(transformed)


def used_outside(rank: int, world: int) -> str:
    engine = engine_of(build(Stack), 3, world)
    with pytest.raises(UnavailableParameterError) as caught:
        engine.module.head.weight + 1
    return str(caught.value)


def test_a_parameter_that_is_away_says_so(pool):
    message = pool(2).run(used_outside)[1]
    assert "head.weight" in message
    assert "(16, 16)" in message
    assert "GatheredParameters" in message


def hooked(rank: int, world: int, stage: int) -> dict[str, torch.Tensor]:
    model = build(Stack)
    shapes = []
    model.head.weight.register_hook(lambda grad: grad * 2)
    model.blocks[0].up.weight.register_hook(lambda grad: shapes.append(tuple(grad.shape)))
    model.blocks[1].register_full_backward_hook(lambda module, grads, outputs: (grads[0] * 0.5,))
    engine = engine_of(model, stage, world)
    for step in range(3):
        engine.backward(engine(x_batch(step, rank)).square().mean())
        engine.step()
    assert shapes == [(32, 16)] * 3
    return whole(engine.module)


def test_a_users_gradient_hooks(pool):
    expected = pool(2).run(hooked, 0)[0]
    for ours in pool(2).run(hooked, 3):
        assert_bitwise(ours, expected)


def read_and_write(rank: int, world: int, stage: int) -> dict[str, Any]:
    from zeropipe.utils import (
        safe_get_full_fp32_param,
        safe_get_full_grad,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_grad,
    )

    engine = engine_of(build(Stack), stage, world)
    seen: dict[str, Any] = {}
    for step in range(2):
        engine.backward(engine(x_batch(step, rank)).square().mean())
        param = engine.module.blocks[1].up.weight
        seen[f"grad {step}"] = safe_get_full_grad(param)
        safe_set_full_grad(param, seen[f"grad {step}"] * 3)
        engine.step()
        seen[f"moment {step}"] = safe_get_full_optimizer_state(param, "exp_avg")
        safe_set_full_fp32_param(param, safe_get_full_fp32_param(param) * 0.5)
    seen["weights"] = whole(engine.module)
    return seen


def test_gradients_and_state_are_read_and_written_by_parameter(pool):
    expected = pool(2).run(read_and_write, 0)[0]
    for ours in pool(2).run(read_and_write, 3):
        assert_bitwise(ours, expected)


def destroyed(rank: int, world: int) -> list[int]:
    def tensors() -> int:
        gc.collect()
        return sum(torch.is_tensor(thing) for thing in gc.get_objects())

    counts = []
    for _ in range(5):
        model = build(Stack)
        engine = engine_of(model, 3, world)
        for step in range(2):
            engine.backward(engine(x_batch(step, rank)).square().mean())
            engine.step()
        engine.destroy()
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        assert all(not p._backward_hooks for p in model.parameters())
        del engine, model, module
        counts.append(tensors())
    return counts


def test_destroy_leaves_nothing(pool):
    for counts in pool(2).run(destroyed):
        assert counts[-1] == counts[1], counts


def reused_input(rank: int, world: int) -> int:
    """One leaf goes through the model again and again, as in prompt tuning."""
    engine = engine_of(build(Stack), 3, world)
    prompt = x_batch(0, rank).requires_grad_()
    for _ in range(4):
        engine.backward(engine(prompt).square().mean())
        engine.step()
    with torch.no_grad():
        engine(prompt)
    return len(prompt._backward_hooks or ())


def test_an_input_that_lives_on_gathers_no_hooks(pool):
    assert pool(2).run(reused_input) == [0, 0]


class Leafy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


MARKED = ("blocks.0", "blocks.1")
WAYS = {  # the mark on the model, the key of the configuration
    "class": (lambda model: utils.set_z3_leaf_modules(model, [Block]), {}),
    "name": (lambda model: utils.set_z3_leaf_modules_by_name(model, MARKED), {}),
    "suffix": (lambda model: utils.set_z3_leaf_modules_by_suffix(model, ["s.0", "ocks.1"]), {}),
    "key names": (lambda model: None, {"leaf_module": {"names": [*MARKED]}}),
    "key suffixes": (lambda model: None, {"leaf_module": {"name_suffixes": ["s.0", "s.1"]}}),
    "key classes": (lambda model: None, {"leaf_module": {"classes": ["Block"]}}),
}


def leaf_units(rank: int, world: int, way: str | None) -> tuple[list[str], dict[str, torch.Tensor]]:
    model = build(Leafy)
    mark, keys = WAYS[way] if way else (lambda model: None, {})
    mark(model)
    engine = engine_of(model, 3, world, zero_optimization=keys)
    for step in range(3):
        engine.backward(engine(x_batch(step, rank)).square().mean())
        engine.step()
    return [unit.name for unit in engine._sharded.coordinator.units], whole(model)


def test_a_leaf_module_is_one_unit(pool):
    """Said in any of six ways."""
    plain = pool(2).run(leaf_units, None)[0][1]
    for way in WAYS:
        for names, weights in pool(2).run(leaf_units, way):
            assert names == ["Leafy", "blocks.0", "blocks.1"], way
            assert_bitwise(weights, plain)


def test_leaves_are_marked_by_name_and_by_suffix():
    model = Leafy()
    found, missing = utils.set_z3_leaf_modules_by_name(
        model, ["blocks.0", "blok.1"], raise_if_not_found=False
    )
    assert found == [model.blocks[0]] == utils.get_z3_leaf_modules(model) and missing == ["blok.1"]
    assert utils.set_z3_leaf_modules_by_suffix(model, ["s.0"], flag=False) == ([model.blocks[0]], [])
    assert utils.get_z3_leaf_modules(model) == []
    with pytest.raises(UsageError, match=r"by_name: .*found blok\.1\. Fix: did you mean blocks\.1\?"):
        utils.set_z3_leaf_modules_by_name(model, ["blok.1"])
    with pytest.raises(UsageError, match=r"by_suffix: .*found zzz"):
        utils.set_z3_leaf_modules_by_suffix(model, ["zzz"])
    model.alias = model.blocks[1]  # one module by two names
    assert utils.set_z3_leaf_modules_by_name(model, ["alias"]) == ([model.blocks[1]], [])


def unwrapped(rank: int, world: int) -> None:
    """Generation in the middle of training: whole weights, no messages, and the next steps as without it."""
    for stage in (2, 3):
        engines = [engine_of(build(Leafy), stage, world) for _ in range(2)]
        for step in range(3):
            for engine in engines:
                engine.backward(engine(x_batch(step, rank)).square().mean())
                engine.step()
            with unsharded(engines[0]) as model:
                assert model is engines[0] and all(p.numel() for p in model.parameters())
                with zeropipe.comm.record() as events, torch.no_grad():
                    for _ in range(rank + 1):  # ranks generate as much as they like
                        model(x_batch(step, rank))
                assert not events
        assert_bitwise(whole(engines[0].module), whole(engines[1].module))
        for engine in engines:
            engine.destroy()


def test_a_model_unwrapped_for_generation_is_whole(pool):
    assert (
        homes_of("runtime.zero") == homes_of("zero") == "zeropipe.runtime.zero.gather.sharded_model:unsharded"
    )
    pool(2).run(unwrapped)


def homes_of(path: str) -> str:
    return BESIDE[path]["unwrap_model_for_generation"]


def vectorized(rank: int, world: int) -> None:
    for stage in (0, 1, 2, 3):
        engines = [engine_of(build(Leafy), stage, world) for _ in range(2)]
        params = [list(engine.module.parameters()) for engine in engines]
        utils.safe_update_full_grad_vectorized(params[0], lambda grad, param: 1 / 0)  # there are none yet
        for engine in engines:
            engine.backward(engine(x_batch(0, rank)).square().mean())
        seen = []

        def halve(grad: torch.Tensor, param: nn.Parameter, seen: list[Any] = seen) -> torch.Tensor:
            seen.append((grad.dtype, tuple(grad.shape) == tuple(getattr(param, "ds_shape", param.shape))))
            return grad / 2

        utils.safe_update_full_grad_vectorized(params[0], halve)
        assert set(seen) == {(torch.float32, True)} and len(seen) == len(params[0])
        for one, other in zip(*params, strict=True):
            assert_bitwise(utils.safe_get_full_grad(one), utils.safe_get_full_grad(other) / 2)
        for engine in engines:
            engine.step()
            engine.destroy()


def test_gradients_are_changed_one_after_the_other(pool):
    pool(2).run(vectorized)
