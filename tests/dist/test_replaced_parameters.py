"""A parameter that is replaced under an engine: nobody would train the new one, which was said by nobody."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, weight_norm

from tests.helpers.pool import Pools
from tests.helpers.zero3 import Stack, engine_of, x_batch
from zeropipe.errors import DesyncError, UsageError


def new_parameter(model: Stack) -> None:
    model.head.weight = nn.Parameter(torch.ones(16, 16))


def new_layer(model: Stack) -> None:
    model.blocks[1].up = nn.Linear(16, 32)


def old_weight_norm(model: Stack) -> None:
    weight_norm(model.head)


REPLACED = {
    new_parameter: ("'head.weight'", "'head.weight'"),
    new_layer: ("'blocks.1.up.weight', 'blocks.1.up.bias'", "'blocks.1.up.weight', 'blocks.1.up.bias'"),
    old_weight_norm: ("'head.weight'", "'head.weight_g', 'head.weight_v'"),
}


def one_step(engine: object, step: int, rank: int) -> None:
    engine.backward(engine(x_batch(step, rank)).square().mean())  # type: ignore[attr-defined]
    engine.step()  # type: ignore[attr-defined]


def refused(rank: int, world: int, stage: int, change: Callable[[Stack], None], alone: bool) -> str:
    engine = engine_of(
        Stack(2), stage, world, zero_optimization={"stage3_param_persistence_threshold": 10**6}
    )
    one_step(engine, 0, rank)
    head = engine.module.head.weight
    if rank == 0 or not alone:
        change(engine.module)
    with pytest.raises((UsageError, DesyncError)) as caught:
        one_step(engine, 1, rank)
    if change is new_parameter and not alone:  # put back, training goes on
        engine.module.head.weight = head
        engine.zero_grad()
        before = head.detach().clone()
        one_step(engine, 1, rank)
        assert bool((head != before).any())
    engine.destroy()
    return f"{type(caught.value).__name__} {caught.value}"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("change", [new_parameter, new_layer])
def test_it_is_an_error_that_names_both(pool: Pools, stage: int, change: Callable[[Stack], None]) -> None:
    lost, new = REPLACED[change]
    for world in (1, 2):
        for text in pool(world).run(refused, stage, change, False):
            assert f"parameters {lost} are trained and no longer" in text
            assert f"nobody trains {new}, which came" in text


def test_torchs_old_weight_norm_makes_others_of_it(pool: Pools) -> None:
    lost, new = REPLACED[old_weight_norm]
    for text in pool(1).run(refused, 2, old_weight_norm, False):
        assert f"parameters {lost} are" in text and f"trains {new}," in text


def test_a_rank_that_does_it_alone_is_heard_at_stage_3(pool: Pools) -> None:
    first, second = pool(2).run_faulty(refused, 3, new_parameter, True)
    assert (first.kind, second.kind) == ("result", "result"), first.error + second.error
    assert first.value.startswith("UsageError") and second.value.startswith("DesyncError")
    assert "UsageError raised in step" in second.value


class Scaled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def goes_on(rank: int, world: int) -> None:
    """Changes of a model after which all that is trained is in it, or what went is not replaced."""
    engine = engine_of(Stack(2), 2, world)
    model = engine.module
    one_step(engine, 0, rank)
    model.head = nn.Sequential(model.head)  # a wrapper
    one_step(engine, 1, rank)
    parametrize.register_parametrization(model.blocks[0].up, "weight", Scaled())
    one_step(engine, 2, rank)
    model.more = nn.Linear(16, 16)  # whose training is the user's own affair
    one_step(engine, 3, rank)
    model.blocks[1].down.bias = None
    with pytest.raises(
        UsageError, match=r"'blocks\.1\.down\.bias' are trained .* trains 'more\.weight', 'more\.bias'"
    ):
        one_step(engine, 4, rank)
    engine.zero_grad()
    del model.more
    one_step(engine, 4, rank)
    engine.destroy()


def test_what_is_wrapped_parametrized_added_or_left_out_is_none(pool: Pools) -> None:
    pool(1).run(goes_on)
