"""Gradients that the user cleared, edited or scaled between backward and step: done, or an error with the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import zeropipe
from tests.helpers.data import generator
from tests.helpers.models import build
from tests.helpers.train import config
from zeropipe.errors import UsageError

PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 16), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)))


Clear = Callable[[Any, nn.Module, torch.optim.Optimizer], object]
CLEARS: dict[str, Clear] = {
    "module.zero_grad": lambda engine, model, optimizer: model.zero_grad(),
    "in place": lambda engine, model, optimizer: model.zero_grad(set_to_none=False),
    "submodules": lambda engine, model, optimizer: [child.zero_grad() for child in model.children()],
    "grad = None": lambda engine, model, optimizer: [setattr(p, "grad", None) for p in model.parameters()],
    "optimizer.zero_grad": lambda engine, model, optimizer: optimizer.zero_grad(),
    "optimizer, in place": lambda engine, model, optimizer: optimizer.zero_grad(set_to_none=False),
    "engine.zero_grad": lambda engine, model, optimizer: engine.zero_grad(),
}


def start(
    stage: int | None, world: int, gas: int = 1, **extra: Any
) -> tuple[Any, nn.Module, torch.optim.Optimizer]:
    model = build(Pair)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if stage is None:
        return model, model, optimizer
    settings = config(stage, world, gas=gas, **extra)
    del settings["optimizer"]
    if stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return zeropipe.initialize(model=model, optimizer=optimizer, config=settings)[0], model, optimizer


def values(model: nn.Module, stage: int | None) -> dict[str, torch.Tensor]:
    if stage is None:
        return {n: p.detach().clone() for n, p in model.named_parameters()}
    found = {n: zeropipe.utils.safe_get_full_fp32_param(p) for n, p in model.named_parameters()}
    return {n: value for n, value in found.items() if value is not None}


def batch(step: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(4, 6, generator=generator(rank, step)).to(dtype)


def adversarial(rank: int, world: int, clear: str, extra: dict[str, Any]) -> None:
    """The discriminator's gradients of the generator's loss are cleared before its own step."""
    dtype = torch.float16 if "fp16" in extra else torch.bfloat16 if extra else torch.float32
    for stage in (0, 1, 2, 3):
        for plain in (False,) if "fp16" in extra else (False, True):
            runs = []
            for disturbed in (False, True):
                engine, model, optimizer = start(stage, world, **extra)
                for step in range(3):
                    if disturbed:
                        loss = engine(batch(100 + step, rank, dtype)).float().square().mean()
                        loss.backward() if plain else engine.backward(loss)
                        CLEARS[clear](engine, model, optimizer)
                    loss = engine(batch(step, rank, dtype)).float().square().mean()
                    loss.backward() if plain else engine.backward(loss)
                    engine.step()
                runs.append(values(model, stage))
                engine.destroy()
            for name, value in runs[0].items():
                # Sums of several backwards per step take another order, at worst by a rounding of bf16.
                torch.testing.assert_close(runs[1][name], value, rtol=1e-2 if extra else 1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("clear", CLEARS)
def test_cleared_gradients_are_not_stepped_with(pool, clear, precision):
    """Only engine.zero_grad cleared anything: after a module's zero_grad a discriminator was stepped with the
    generator's gradients."""
    pool(2).run(adversarial, clear, PRECISIONS[precision])


def in_a_window(rank: int, world: int) -> None:
    """One parameter is cleared in mid-window, others stay; then it is not used any more before the step."""
    for stage in (0, 1, 2, 3):
        for local in (False, True):
            plain = build(Pair)
            for peer in range(world):
                for micro in range(3):
                    loss = plain(batch(micro, peer, torch.float32)).square().mean() / 3 / world
                    loss.backward(inputs=None if micro == 0 else list(plain.head.parameters()))
            plain.body.weight.grad = None
            engine, model, _ = start(stage, world, gas=3)
            for micro in range(3):
                loss = engine(batch(micro, rank, torch.float32)).square().mean()
                if micro:
                    model.body.requires_grad_(False)
                    loss = engine(batch(micro, rank, torch.float32)).square().mean()
                with engine.no_sync() if local and micro < 2 else torch.enable_grad():
                    engine.backward(loss)
                if micro == 0:
                    model.body.weight.grad = None
                model.body.requires_grad_(True)
                if micro < 2:
                    engine.step()
            for name, param in model.named_parameters():
                found, right = zeropipe.utils.safe_get_full_grad(param), plain.get_parameter(name).grad
                torch.testing.assert_close(found, torch.zeros_like(found) if right is None else right)
            before = values(model, stage)
            engine.step()
            assert torch.equal(before["body.weight"], values(model, stage)["body.weight"])
            assert not torch.equal(before["body.bias"], values(model, stage)["body.bias"])
            engine.destroy()


def test_one_gradient_of_a_window_is_cleared(pool):
    pool(2).run(in_a_window)


Edit = Callable[[nn.Module], object]
EDITS: dict[str, Edit] = {
    "clip_grad_norm_": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.1),
    "clip_grad_value_": lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.01),
    "mul_": lambda model: [p.grad.mul_(0.5) for p in model.parameters()],
    "data.div_": lambda model: [p.grad.data.div_(4) for p in model.parameters()],
    "assignment": lambda model: [setattr(p, "grad", p.grad * 0.5) for p in model.parameters()],
    "data assignment": lambda model: [setattr(p.grad, "data", p.grad.data * 0.5) for p in model.parameters()],
    "noise": lambda model: [p.grad.add_(1.0) for p in model.parameters()],
}


def edited(rank: int, world: int, edit: str, extra: dict[str, Any]) -> list[str]:
    """What happened at each stage."""
    dtype = torch.float16 if "fp16" in extra else torch.bfloat16 if extra else torch.float32
    found = []
    _, plain, optimizer = start(None, world)
    plain.to(dtype)
    for step in range(2):
        optimizer.zero_grad()
        for peer in range(world):
            (plain(batch(step, peer, dtype)).float().square().mean() / world).backward()
        EDITS[edit](plain)
        optimizer.step()
    right = values(plain, None)
    for stage in (0, 1, 2, 3):
        engine, model, _ = start(stage, world, **extra)
        try:
            for step in range(2):
                engine.backward(engine(batch(step, rank, dtype)).float().square().mean())
                EDITS[edit](model)
                engine.step()
            for name, value in values(model, stage).items():
                torch.testing.assert_close(
                    value.to(dtype), right[name], rtol=2e-2 if extra else 1e-6, atol=1e-3 if extra else 1e-7
                )
            found.append("right")
        except UsageError as error:
            assert "safe_set_full_grad" in str(error) and ("weight" in str(error) or "bias" in str(error))
            engine.zero_grad()  # and goes on
            engine.backward(engine(batch(0, rank, dtype)).float().square().mean())
            engine.step()
            found.append("refused")
        engine.destroy()
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("edit", EDITS)
def test_edited_gradients_are_stepped_with_or_refused(pool, edit, precision):
    """At the stages that shard, .grad was None: clipping it gave a norm of 0 and did nothing."""
    for found in pool(2).run(edited, edit, PRECISIONS[precision]):
        assert found == ["right", "refused", "refused", "refused"]
    if precision == "fp32":  # one rank holds everything whole
        assert pool(1).run(edited, edit, {})[0][:3] == ["right"] * 3


@pytest.mark.parametrize("edit", EDITS)
def test_edited_gradients_of_fp16_are_refused(pool, edit):
    """At stage 0 .grad was the loss scale times the gradient: clip_grad_norm_ made the update that much smaller."""
    assert pool(1).run(edited, edit, {"fp16": {"enabled": True, "loss_scale": 256.0}}) == [["refused"] * 4]


@pytest.mark.parametrize("clear", CLEARS)
def test_cleared_gradients_of_fp16_are_not_stepped_with(pool, clear):
    pool(1).run(adversarial, clear, {"fp16": {"enabled": True, "loss_scale": 256.0}})


def seen_in_hooks(rank: int, world: int) -> None:
    """A user's own post-accumulate hook sees this backward's gradient, and may drop it."""
    for stage in (0, 1, 2, 3):
        model = build(Pair)
        seen: dict[str, int] = {}
        for name, param in model.named_parameters():

            def look(p: torch.Tensor, name: str = name, seen: dict[str, int] = seen) -> None:
                assert p.grad is not None and p.grad.abs().sum() >= 0
                seen[name] = seen.get(name, 0) + 1
                if name == "body.bias":
                    p.grad = None

            param.register_post_accumulate_grad_hook(look)
        engine = zeropipe.initialize(model=model, config=config(stage, world))[0]
        for step in range(2):
            for _ in range(2):
                engine.backward(functional.relu(engine(batch(step, rank, torch.float32))).mean())
            assert all(p.grad is not None for n, p in model.named_parameters() if n != "body.bias")
            engine.step()
            assert all(p.grad is None for p in model.parameters())
        assert set(seen.values()) == {4}
        engine.destroy()


def test_a_users_hooks_see_gradients(pool):
    pool(2).run(seen_in_hooks)
