"""Graphs of autograd that stage 3 does not see from a module's forward: custom functions on others' parameters, and
gradients that have a graph of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.referee import assert_bitwise
from tests.helpers.zero3 import WIDTH, engine_of, fit, whole, x_batch
from zeropipe.errors import UnavailableParameterError

PENALTY = 10.0


class InChunks(torch.autograd.Function):
    """x @ weight.t() and its loss as fused kernels compute them: gradients summed in forward, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        to_x, to_weight, total = torch.zeros_like(x), torch.zeros_like(weight), x.new_zeros(())
        for rows in torch.arange(len(x)).split(2):
            out = x[rows] @ weight.t()
            total = total + out.square().sum()
            to_x[rows] = 2 * out @ weight
            to_weight += 2 * out.t() @ x[rows]
        ctx.save_for_backward(to_x, to_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        to_x, to_weight = ctx.saved_tensors
        return to_x * grad, to_weight * grad


class InForward(torch.autograd.Function):
    """The same by an autograd of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            own_x, own_weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
            loss = (own_x.float() @ own_weight.float().t()).square().sum()
            ctx.save_for_backward(*torch.autograd.grad(loss, (own_x, own_weight)))
        return loss.detach()

    backward = InChunks.backward


class FusedHead(nn.Module):
    """The root hands the weight of a module that does not run to a custom function."""

    function: type[torch.autograd.Function] = InChunks

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(torch.tanh(self.body(x)), self.head.weight)


class FusedInForward(FusedHead):
    function = InForward


def fused_loss(engine: Any, step: int, rank: int) -> torch.Tensor:
    return engine(x_batch(step, rank))


@pytest.mark.parametrize("factory", [FusedHead, FusedInForward])
def test_a_custom_function_takes_a_parameter_that_is_away(pool, factory):
    """Autograd binds the function to the parameter before its forward can fetch it, and refused the gradient:
    'got [32, 16] but expected shape compatible with [0]'."""
    expected = pool(2).run(fit, 0, factory, fused_loss)[0]
    for ours in pool(2).run(fit, 3, factory, fused_loss):
        assert_bitwise(ours, expected)


def outside(rank: int, world: int, function: type[torch.autograd.Function]) -> str:
    engine = engine_of(FusedHead(), 3, world)
    hidden = torch.randn(4, WIDTH, requires_grad=True)
    with pytest.raises(UnavailableParameterError) as caught:
        function.apply(hidden, engine.module.head.weight)
    engine.destroy()
    return str(caught.value)


@pytest.mark.parametrize("function", [InChunks, InForward])
def test_outside_of_a_forward_the_error_names_it_and_the_way_out(pool, function):
    for message in pool(2).run(outside, function):
        assert "'head.weight'" in message and "Fix: " in message and "GatheredParameters" in message


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(WIDTH, WIDTH),
            nn.Tanh(),
            nn.Linear(WIDTH, WIDTH),
            nn.Softplus(),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).sum(-1)


class Energy(Critic):
    """Returns forces: the gradient is taken, with its graph, inside the forward itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        (forces,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return forces


def penalized(engine: Any, step: int, rank: int) -> torch.Tensor:
    x = x_batch(step, rank).requires_grad_()
    score = engine(x)
    (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return score.mean() + PENALTY * (slope.norm(dim=1) - 1).square().mean()


def of_forces(engine: Any, step: int, rank: int) -> torch.Tensor:
    return F.mse_loss(engine(x_batch(step, rank)), torch.zeros(4, WIDTH))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("factory", "loss"), [(Critic, penalized), (Energy, of_forces)])
def test_gradients_with_a_graph_of_their_own(pool, factory, loss, plain):
    """A penalty on gradients read weights whose storage stage 3 had freed: 'setStorage: ... out of bounds'."""
    world = 2
    expected = pool(world).run(fit, 2, factory, loss, plain=plain)[0]
    for ours in pool(world).run(fit, 3, factory, loss, plain=plain):
        assert_bitwise(ours, expected)


def kept_after(rank: int, world: int) -> int:
    engine = engine_of(Critic(), 3, world)
    x = x_batch(0, rank).requires_grad_()
    torch.autograd.grad(engine(x).sum(), x, create_graph=True)
    engine.backward(engine(x_batch(1, rank)).mean())
    engine.step()
    kept = [p.numel() for p in engine.module.parameters() if p.numel()]
    whole(engine.module)
    engine.destroy()
    return sum(kept)


def test_a_graph_that_nobody_uses_keeps_nothing_beyond_the_step(pool):
    assert pool(2).run(kept_after) == [0, 0]
