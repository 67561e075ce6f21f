"""Ranks that differ, fail or die: every other rank is told, in seconds, and none waits for ever."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.data import mlp_batch
from tests.helpers.models import MLP, build
from tests.helpers.pool import point
from tests.helpers.referee import assert_bitwise, weights_of
from tests.helpers.train import config
from zeropipe.comm.record import Event, inject
from zeropipe.errors import CommunicationError, ConfigError, DesyncError, UsageError

BOUND = 20.0  # s that a rank may take to hear of another's failure on this busy machine; a hang is 600
STAGES = (0, 1, 2)


def initialize_alike(rank: int, world: int, odd: dict[str, Any]) -> str:
    """Rank 1 differs by ``odd``; what initialize raised."""
    settings = config(1, world)
    model = build(MLP, **(odd.get("model", {}) if rank == 1 else {}))
    given: dict[str, Any] = {}
    if rank == 1:
        settings.update(odd.get("config", {}))
        if odd.get("freeze"):
            model.layers[0].requires_grad_(False)
        if odd.get("rename"):
            model.other = model.layers
            del model.layers
        if odd.get("groups"):
            given["model_parameters"] = [{"params": [p]} for p in model.parameters()]
        if odd.get("buffer"):
            model.register_buffer("extra", torch.zeros(3))
    start = time.monotonic()
    try:
        zeropipe.initialize(model=model, config=settings, **given)
    except (DesyncError, ConfigError, UsageError) as error:
        assert time.monotonic() - start < BOUND
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ({"config": {"gradient_clipping": 0.5}}, ("config key gradient_clipping", "'0.5'", "'0.0'")),
        (
            {"config": {"zero_optimization": {"stage": 2}}},
            ("config key zero_optimization.stage", "'2'", "'1'"),
        ),
        ({"config": {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}}, ("config key optimizer", "SGD")),
        ({"config": {"bf16": {"enabled": True}}}, ("config key bf16.enabled", "True", "False")),
        ({"model": {"hidden": 18}}, ("parameter 0", "(18, 10)", "(17, 10)")),
        ({"model": {"depth": 4}}, ("parameter 4", "(17, 17)", "(3, 17)")),
        ({"freeze": True}, ("parameter 0", "requires_grad=False", "requires_grad=True")),
        ({"rename": True}, ("parameter 0", "other.0.weight", "layers.0.weight")),
        ({"groups": True}, ("param group 0", "layers.0.weight")),
        ({"buffer": True}, ("buffer 0", "extra (3,)", "(absent)")),
    ],
    ids=lambda odd: ",".join(odd) if isinstance(odd, dict) else "",
)
def test_a_different_model_or_config_on_one_rank_is_told_to_all(pool, odd, says):
    for text in pool(3).run(initialize_alike, odd):
        assert text.startswith("DesyncError: ranks disagree on ")
        assert "rank 1" in text and "Fix: give every rank the same model and config" in text
        for part in says:
            assert part in text


@pytest.mark.parametrize(
    ("odd", "own"),
    [
        ({"config": {"gradient_cliping": 0.5}}, "ConfigError: unknown config key 'gradient_cliping'"),
        (
            {"config": {"train_batch_size": 4}},
            "ConfigError: the batch sizes have no solution: train_batch_size 4",
        ),
        ({"config": {"optimizer": {"type": "Adamm"}}}, "ConfigError: optimizer.type"),
    ],
)
def test_a_rank_that_fails_alone_in_initialize_tells_the_others(pool, odd, own):
    first, second, third = pool(3).run(initialize_alike, odd)
    assert second.startswith(own)
    for text in (first, third):
        assert text.startswith("DesyncError: ranks disagree on the outcome of initialize: rank 1 has ")


def unfreeze_differently(rank: int, world: int, stage: int) -> str:
    model = build(MLP)
    model.layers[1].requires_grad_(False)
    engine, *_ = zeropipe.initialize(model=model, config=config(stage, world))
    engine.backward(engine(*mlp_batch(0, rank)))
    engine.step()
    if rank == 1:
        model.layers[1].bias.requires_grad_(True)
    engine.backward(engine(*mlp_batch(1, rank)))
    start = time.monotonic()
    with pytest.raises(DesyncError) as caught:
        engine.step()
    assert time.monotonic() - start < BOUND
    return str(caught.value)


@pytest.mark.parametrize("stage", STAGES)
def test_unfreezing_on_one_rank_only_is_told_to_all(pool, stage):
    for text in pool(3).run(unfreeze_differently, stage):
        assert "disagree on the parameters unfrozen since the last step: rank 1 has 'layers.1.bias'" in text


# Ranks that end in the middle of a step.


def train_until(rank: int, world: int, stage: int, how: str, where: str) -> str:
    engine, *_ = zeropipe.initialize(model=build(MLP), config=config(stage, world))
    doomed = rank == 1

    def end(event: Event | None = None) -> None:
        if event is not None and event.label != where:
            return
        if how == "raise":
            raise ValueError("the user's own mistake")
        os.kill(os.getpid(), signal.SIGKILL)

    start = time.monotonic()
    try:
        for step in range(20):
            loss = engine(*mlp_batch(step, rank))
            if doomed and step == 3:
                if where == "forward":
                    end()
                with inject(end):
                    engine.backward(loss)
                    engine.step()
            else:
                engine.backward(loss)
                engine.step()
    except CommunicationError as error:
        assert time.monotonic() - start < BOUND
        return str(error)
    except ValueError:
        if doomed:
            point("raised")  # its process ends, as a script's would
            raise
        raise
    return "finished"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("where", ["forward", "gradients", "gradient norm", "parameters"])
def test_a_rank_that_dies_in_a_step_ends_the_others_soon(pool, stage, where):
    if (stage, where) == (0, "parameters"):
        pytest.skip("stage 0 gathers nothing")
    outcomes = pool(2).run_faulty(train_until, stage, "kill", where, timeout=BOUND * 2)
    assert outcomes[1].kind == "died"
    assert outcomes[0].kind == "result", outcomes[0]
    assert "did not complete" in outcomes[0].value and "Fix: another rank" in outcomes[0].value


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_that_raises_and_ends_ends_the_others_soon(pool, stage):
    outcomes = pool(2).run_faulty(
        train_until, stage, "raise", "gradients", kill={1: "raised"}, timeout=BOUND * 2
    )
    assert outcomes[1].kind == "died"
    assert "did not complete" in outcomes[0].value


# A step that fails and is given up leaves an engine that goes on.


class Choosy(MLP):
    """Its backward fails on all ranks, at the second layer, when told to."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, fail: bool = False) -> torch.Tensor:
        h = torch.relu(self.layers[1](_Trap.apply(torch.relu(self.layers[0](x)), fail)))
        return (self.layers[2](h) - y).square().mean()


class _Trap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fail: bool) -> torch.Tensor:
        ctx.fail = fail
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if ctx.fail:
            raise ValueError("out of memory, say")
        return grad, None


def give_up(rank: int, world: int, plain: bool) -> list[Any]:
    results = []
    for stage in STAGES:
        for fails in (False, True):
            engine, *_ = zeropipe.initialize(model=build(Choosy), config=config(stage, world))
            for step in range(3):
                if fails and step == 1:
                    loss = engine(*mlp_batch(9, rank), fail=True)
                    with pytest.raises(ValueError, match="out of memory"):
                        loss.backward() if plain else engine.backward(loss)
                    engine.zero_grad()
                loss = engine(*mlp_batch(step, rank))
                loss.backward() if plain else engine.backward(loss)
                engine.step()
            results.append(weights_of(engine.module))
            engine.destroy()
    return results


@pytest.mark.parametrize("plain", [False, True], ids=["engine.backward", "loss.backward"])
def test_a_backward_that_raised_can_be_given_up(pool, plain):
    for results in pool(2).run(give_up, plain):
        for weights in results:
            assert_bitwise(weights, results[0])


def forward_raises(rank: int, world: int) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.numel() == 3:
                raise ValueError("wrong shape")
            return (self.weight * x).sum()

    engine, *_ = zeropipe.initialize(
        model=Broken(), config=config(2, world, wall_clock_breakdown=True, steps_per_print=1)
    )
    for numel in (4, 3, 4):
        if numel == 3:
            with pytest.raises(ValueError, match=r"^wrong shape$"):  # the user's own error, not wrapped
                engine(torch.ones(numel))
        else:
            engine.backward(engine(torch.ones(numel)))
            engine.step()
    assert engine.global_steps == 2
    engine.destroy()


def test_an_error_of_the_model_passes_unchanged(pool):
    pool(2).run(forward_raises)
