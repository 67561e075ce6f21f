"""Stage 3 gives the numbers of stages 0 to 2, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist.test_data_parallel import STEPS, gpt, nasty
from tests.helpers.data import gpt_batch, token_batch
from tests.helpers.referee import assert_bitwise
from tests.helpers.train import config, train

NOTHING_PERSISTS = {"stage3_param_persistence_threshold": 0}


def train3(rank: int, world: int, factory: Any, make: Any, settings: dict[str, Any], steps: int) -> Any:
    """As ``train``; the weights are whole."""
    import zeropipe

    engine, _, _, _ = zeropipe.initialize(model=factory(), config=settings)
    losses = []
    for step in range(steps):
        for micro in range(engine.gradient_accumulation_steps()):
            loss = engine(*make(step, rank, micro))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    weights = {}
    for name, param in engine.module.named_parameters():
        param.all_gather()
        weights[name] = param.detach().clone()
        param.partition()
    engine.destroy()
    return {"weights": weights, "losses": losses}


@pytest.mark.native
@pytest.mark.parametrize("options", [{}, NOTHING_PERSISTS], ids=["persistent", "nothing persists"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("model", ["gpt", "nasty"])
def test_stage_3_is_stage_0(pool, world, model, options):
    factory, make = (gpt, gpt_batch) if model == "gpt" else (nasty, token_batch)
    expected = pool(world).run(train, factory, make, config(0, world), STEPS)
    settings = config(3, world, zero_optimization={"stage": 3, **options})
    ours = pool(world).run(train3, factory, make, settings, STEPS)
    for result in ours:
        assert_bitwise(result["weights"], expected[0]["weights"])
