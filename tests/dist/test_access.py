"""Full and local values, gradients and optimizer state by the parameter object, at stages 0 to 2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.data import mlp_batch, token_batch
from tests.helpers.models import MLP, NastyModel, build
from tests.helpers.referee import assert_bitwise, weights_of
from tests.helpers.train import config
from zeropipe import utils
from zeropipe.errors import UsageError

STAGES = (0, 1, 2)
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "loss_scale": 256.0}}


def start(stage: int, world: int, **extra: Any) -> tuple[Any, nn.Module]:
    model = build(NastyModel)
    engine, *_ = zeropipe.initialize(model=model, config=config(stage, world, **extra))
    return engine, model


def reads(rank: int, world: int, extra: dict[str, Any]) -> list[Any]:
    results = []
    for stage in STAGES:
        engine, model = start(stage, world, **extra)
        params = dict(model.named_parameters())
        assert all(utils.safe_get_full_grad(p) is None for p in params.values())
        assert utils.safe_get_full_optimizer_state(model.norm.weight, "exp_avg") is None
        engine.backward(engine(*token_batch(0, rank)))
        grads = {n: utils.safe_get_full_grad(p) for n, p in params.items()}
        engine.step()
        assert utils.safe_get_full_grad(model.norm.weight) is None
        engine.backward(engine(*token_batch(1, rank)))
        engine.step()
        masters = {n: utils.safe_get_full_fp32_param(p) for n, p in params.items()}
        moments = {n: utils.safe_get_full_optimizer_state(p, "exp_avg_sq") for n, p in params.items()}
        for name, param in params.items():
            if not param.requires_grad:
                assert grads[name] is masters[name] is moments[name] is None
                continue
            for found in (grads[name], masters[name], moments[name]):
                assert found.shape == param.shape and found.dtype == torch.float32
            assert_bitwise(masters[name].to(param.dtype), param.detach(), name)
        results.append((grads, masters, moments))
        engine.destroy()
    return results


@pytest.mark.parametrize("extra", [{}, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("world", [2, 3])
def test_whole_values_are_the_same_at_every_stage_and_rank(pool, extra, world):
    runs = pool(world).run(reads, extra)
    for results in runs:
        for found in results:
            assert_bitwise(found, runs[0][0])
    if not extra and world == 2:
        model = build(NastyModel)
        for rank in range(2):
            (model(*token_batch(0, rank)) / 2).backward()
        for name, param in model.named_parameters():
            if param.grad is not None:
                assert_bitwise(runs[0][0][0][name], param.grad, name)
        assert not runs[0][0][0]["dead.weight"].any()


def local_pieces(rank: int, world: int) -> list[Any]:
    found = []
    for stage in STAGES:
        engine, model = start(stage, world)
        for step in range(2):
            engine.backward(engine(*token_batch(step, rank)))
            if step == 0:
                engine.step()
        pieces = {}
        for name, param in model.named_parameters():
            if param.requires_grad:
                value, grad = utils.safe_get_local_fp32_param(param), utils.safe_get_local_grad(param)
                state = utils.safe_get_local_optimizer_state(param, "exp_avg")
                assert value.dim() == 1 and value.shape == grad.shape == state.shape
                whole = (utils.safe_get_full_fp32_param(param), utils.safe_get_full_grad(param))
                pieces[name] = ((value.clone(), grad), [w.reshape(-1) for w in whole])
        found.append(pieces)
        engine.destroy()
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_local_pieces_make_up_the_whole(pool, world):
    runs = pool(world).run(local_pieces)
    for stage in STAGES:
        for name, (_, whole) in runs[0][stage].items():
            for kind in (0, 1):
                parts = [run[stage][name][0][kind] for run in runs]
                if stage == 0:
                    assert all(torch.equal(part, whole[kind]) for part in parts)
                else:
                    assert_bitwise(torch.cat(parts), whole[kind], name)


def writes(rank: int, world: int, extra: dict[str, Any]) -> list[Any]:
    """Double one parameter, replace one gradient, zero one moment; then step."""
    results = []
    for stage in STAGES:
        engine, model = start(stage, world, **extra)
        engine.backward(engine(*token_batch(0, rank)))
        engine.step()
        weight, bias = model.wide.weight, model.wide.bias
        doubled = utils.safe_get_full_fp32_param(weight) * 2
        utils.safe_set_full_fp32_param(weight, doubled)
        assert_bitwise(weight.detach(), doubled.to(weight.dtype))
        engine.backward(engine(*token_batch(1, rank)))
        utils.safe_set_full_grad(bias, torch.arange(bias.numel(), dtype=torch.float32) / 64)
        assert_bitwise(utils.safe_get_full_grad(bias), torch.arange(bias.numel(), dtype=torch.float32) / 64)
        utils.safe_set_full_grad(model.dead.weight, torch.ones(6, 6))  # no backward has reached it
        state = utils.safe_get_full_optimizer_state(weight, "exp_avg")
        utils.safe_set_full_optimizer_state(weight, torch.zeros_like(state), "exp_avg")
        engine.step()
        results.append(weights_of(model))
        engine.destroy()
    return results


@pytest.mark.parametrize("extra", [{}, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_edits_change_the_step_alike_at_every_stage(pool, extra):
    runs = pool(2).run(writes, extra)
    for results in runs:
        for weights in results:
            assert_bitwise(weights, runs[0][0])
    untouched = build(NastyModel).dead.weight.detach()
    assert not torch.equal(
        runs[0][0]["dead.weight"].float(), untouched.to(runs[0][0]["dead.weight"].dtype).float()
    )


def local_writes(rank: int, world: int) -> list[Any]:
    results = []
    for stage in STAGES:
        engine, model = start(stage, world)
        engine.backward(engine(*token_batch(0, rank)))
        for param in (model.embed.weight, model.wide.bias):
            value, grad = utils.safe_get_local_fp32_param(param), utils.safe_get_local_grad(param)
            utils.safe_set_local_fp32_param(param, value * 0.5)
            utils.safe_set_local_grad(param, grad * 2)
        engine.step()
        for param in (model.embed.weight, model.wide.bias):
            state = utils.safe_get_local_optimizer_state(param, "exp_avg")
            utils.safe_set_local_optimizer_state(param, state * 3, "exp_avg")
        engine.backward(engine(*token_batch(1, rank)))
        engine.step()
        results.append(weights_of(model))
        engine.destroy()
    return results


def test_local_edits_by_every_rank_are_an_edit_of_the_whole(pool):
    runs = pool(2).run(local_writes)
    for results in runs:
        for weights in results:
            assert_bitwise(weights, runs[0][0])


def mistakes(rank: int, world: int) -> None:
    for stage in STAGES:
        engine, model = start(stage, world)
        weight = model.wide.weight
        stranger = nn.Parameter(torch.ones(2, 2))
        assert utils.safe_get_full_fp32_param(stranger) is None
        assert utils.safe_get_local_grad(stranger) is None
        assert utils.safe_get_full_optimizer_state(model.frozen.weight, "exp_avg") is None
        for param in (stranger, model.frozen.weight):
            for setter in (utils.safe_set_full_fp32_param, utils.safe_set_full_grad):
                with pytest.raises(UsageError, match=r"is not trained by any engine. Fix"):
                    setter(param, torch.ones_like(param))
        with pytest.raises(UsageError, match=r"'wide.weight'; expected shape \(192, 6\), found \(6, 192\)"):
            utils.safe_set_full_fp32_param(weight, torch.ones(6, 192))
        for setter in (utils.safe_set_full_grad, utils.safe_set_local_grad):
            with pytest.raises(UsageError, match=r"'wide.weight' has no gradient yet. Fix: set it between"):
                setter(weight, torch.ones(192, 6))
        with pytest.raises(
            UsageError, match=r"no optimizer state 'exp_avg'; expected none before the first step"
        ):
            utils.safe_set_full_optimizer_state(weight, torch.ones(192, 6), "exp_avg")
        engine.backward(engine(*token_batch(0, rank)))
        engine.step()
        assert utils.safe_get_full_optimizer_state(weight, "momentum") is None
        with pytest.raises(UsageError, match=r"no optimizer state 'momentum'; expected exp_avg, exp_avg_sq"):
            utils.safe_set_full_optimizer_state(weight, torch.ones(192, 6), "momentum")
        engine.destroy()
        assert utils.safe_get_full_fp32_param(weight) is None


def test_wrong_access_is_told(pool):
    pool(2).run(mistakes)


# Users' own gradient hooks.


def hooks(rank: int, world: int) -> list[Any]:
    results = []
    for stage in STAGES:
        model = build(MLP)
        seen: list[torch.Tensor] = []
        model.layers[0].weight.register_hook(lambda grad: grad * 3)
        engine, *_ = zeropipe.initialize(model=model, config=config(stage, world))
        model.layers[1].weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
        model.layers[2].register_full_backward_hook(lambda m, gi, go, seen=seen: seen.append(go[0].clone()))
        for step in range(3):
            engine.backward(engine(*mlp_batch(step, rank)))
            engine.step()
        assert len(seen) == 3
        results.append(weights_of(model))
        engine.destroy()
    return results


def test_gradient_hooks_of_users_take_effect(pool):
    runs = pool(2).run(hooks)
    model = build(MLP)
    model.layers[0].weight.register_hook(lambda grad: grad * 3)
    model.layers[1].weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    for step in range(3):
        for rank in range(2):
            (model(*mlp_batch(step, rank))).backward(torch.tensor(1.0))
            # Hooks see whole local gradients, so halve after them.
        for param in model.parameters():
            param.grad /= 2
        optimizer.step()
        optimizer.zero_grad()
    for results in runs:
        for weights in results:
            assert_bitwise(weights, runs[0][0])
            for name, param in model.named_parameters():
                torch.testing.assert_close(weights[name], param.detach(), rtol=ULPS, atol=ULPS)


ULPS = 4e-7  # sizes that are no multiples of 16: the scalar rest of torch's fused step rounds otherwise
