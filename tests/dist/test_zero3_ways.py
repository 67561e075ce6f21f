"""The ways in and out of a module at stage 3 beside arguments and results: hooks of clients, lists, attributes, leaves.

Each of these ended in torch's words about a size of 0, because the parameters were gone when they were read.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.zero3 import assert_as_stage, assert_as_stage_0, engine_of, whole, x_batch


class Out(nn.Module):
    """What it computes leaves it in the way that ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a = nn.Parameter(torch.randn(16, 16) / 4)
        self.b = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: torch.Tensor, box: Any = None) -> Any:
        if self.how in ("list", "dict", "keyword"):
            box["out" if self.how == "dict" else slice(0)] = (
                x @ self.a if self.how == "dict" else [x @ self.a]
            )
            return x @ self.b
        if self.how == "list alone":
            box.append(x @ self.a)
            return None
        if self.how == "attribute":
            self.out = x @ self.a
            return x @ self.b
        if self.how == "attribute list":
            self.out = [x @ self.a]
            return x @ self.b
        if self.how == "view":
            self.out = self.a.t()
        return x @ self.b


class Ways(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.out, self.last = nn.Linear(16, 16), Out(how), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        box: Any = {} if self.how == "dict" else []
        if self.how == "keyword":
            result = self.out(x, box=box)
        else:
            result = self.out(x, box)
        other = getattr(self.out, "out", None)
        other = other[0] if isinstance(other, list) else other
        if self.how == "view":
            return self.last(torch.tanh(result) @ other)
        if other is None:
            other = box["out"] if self.how == "dict" else box[0]
        # The other one first in backward: it is not what the module returned.
        return self.last(
            torch.tanh(other.square()) if result is None else torch.tanh(other.square()) * result
        )


WAYS = ["list", "dict", "keyword", "list alone", "attribute", "attribute list", "view"]


@pytest.mark.parametrize("how", WAYS)
def test_what_leaves_a_module_beside_its_result_is_as_at_stage_0(pool, how):
    assert_as_stage_0(pool, partial(Ways, how))


class Reused(nn.Module):
    """Its input is gone when it returns, and its output may be given the same address."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, box: list[torch.Tensor]) -> torch.Tensor:
        x = box.pop()
        before = id(x)
        x = x * 2
        found = [torch.mm(x, self.weight) for _ in range(40)]
        return next((out for out in found if id(out) == before), found[0])


class ReusedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(Reused() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        box = [self.first(x)]
        for block in self.blocks:
            y = block(box)
            box.append(y)
            del y
        return box[0]


def test_an_output_at_the_address_of_a_dead_input_is_an_output(pool):
    assert_as_stage_0(pool, ReusedTwice, steps=6)


def hooked_loss(engine: Any, step: int, rank: int) -> torch.Tensor:
    """Hooks of a client's, added after initialize and anew in every step."""
    module = engine.module
    handles = [
        module[2].register_forward_hook(
            lambda mod, args, out: out + mod.weight.detach().sum() + mod.bias.data
        ),
        module[2].register_forward_hook(lambda mod, args, out: out * mod.weight.norm()),
        module[0].register_forward_pre_hook(lambda mod, args: (args[0] * mod.bias.detach(),), prepend=True),
        module[0].register_full_backward_hook(
            lambda mod, into, out: tuple(g if g is None else 2 * g for g in into)
        ),
    ]
    out = engine(x_batch(step, rank))
    for handle in handles:
        handle.remove()
    return out.square().mean()


def three() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))


def test_hooks_added_after_initialize_see_whole_parameters(pool):
    assert_as_stage_0(pool, three, hooked_loss)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


class Marked(nn.Module):
    """``which``: what is fetched whole."""

    def __init__(self, which: type[nn.Module] | None) -> None:
        super().__init__()
        self.experts, self.last = Experts(), nn.Linear(16, 16)
        if which is not None:
            zeropipe.zero.set_z3_leaf_modules(self, [Marked if which is Marked else which])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.experts(x))


def input_with_gradient(engine: Any, step: int, rank: int) -> torch.Tensor:
    return engine(x_batch(step, rank).requires_grad_()).square().mean()


def input_without(engine: Any, step: int, rank: int) -> torch.Tensor:
    return engine(x_batch(step, rank)).square().mean()


@pytest.mark.parametrize("loss", [input_with_gradient, input_without])
@pytest.mark.parametrize("which", [None, Experts, Marked], ids=["no leaf", "a leaf", "the root a leaf"])
def test_a_module_whose_input_autograd_has_no_node_of_keeps_its_parameters_through_backward(
    pool, which, loss
):
    assert_as_stage_0(pool, partial(Marked, which), loss)


def penalty_gathered(engine: Any, step: int, rank: int) -> torch.Tensor:
    """The weights themselves in the loss, whose backward comes when they are no longer gathered by the client."""
    params = [engine.module[0].weight, engine.module[2].weight]
    out = engine(x_batch(step, rank))
    with zeropipe.zero.GatheredParameters(params):
        penalty = sum(param.square().sum() + (param @ param.t()).square().mean() for param in params)
    return out.square().mean() + 0.01 * penalty


def penalty_first(engine: Any, step: int, rank: int) -> torch.Tensor:
    params = [engine.module[0].weight, engine.module[2].weight]
    with zeropipe.zero.GatheredParameters(params):
        penalty = sum(param.square().sum() for param in params)
    return engine(x_batch(step, rank)).square().mean() + 0.01 * penalty


@pytest.mark.parametrize("loss", [penalty_gathered, penalty_first])
@pytest.mark.parametrize("gas", [1, 2])
def test_a_loss_on_gathered_weights_may_run_backward_later(pool, loss, gas):
    """Torch spoke of a size of 0. Nothing of it stays gathered when the step is over."""
    assert_as_stage(2, pool, three, loss, gradient_accumulation_steps=gas, train_batch_size=2 * gas)


def numpy_kept(rank: int, world: int, threshold: int) -> None:
    options = {"stage3_param_persistence_threshold": threshold}
    engine = engine_of(nn.Linear(16, 16), 3, world, zero_optimization=options)
    weight = engine.module.weight
    with zeropipe.zero.GatheredParameters(weight):
        before, kept = weight.detach().clone(), weight.detach().numpy()
    for step in range(2):
        engine.backward(engine(x_batch(step, rank)).square().mean())
        engine.step()
    assert bool((whole(engine.module)["weight"] != before).any())
    if not threshold:  # what stays gathered is the array's own memory
        assert bool((torch.from_numpy(kept) == before).all())
    engine.destroy()


@pytest.mark.parametrize("threshold", [0, 10**6])
def test_a_parameter_given_to_numpy_can_be_freed(pool: Any, threshold: int) -> None:
    """torch lets nobody resize memory that NumPy has seen, and freeing it was that."""
    pool(2).run(numpy_kept, threshold)
