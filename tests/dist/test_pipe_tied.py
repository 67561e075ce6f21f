"""The layers of one `TiedLayerSpec` key are one module: every cut and schedule has the numbers of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zeropipe
from tests.dist.pipe_models import batches, loss_of, specs
from tests.dist.test_pipe_engine import BASE_SEED, MICRO, config, engine_of
from zeropipe.errors import UsageError
from zeropipe.runtime.pipe.layers import LayerSpec, TiedLayerSpec

W, STEPS = 8, 3
# A tied gradient is (all uses here) + (all uses there) instead of one sum by micro-batch: last bits differ.
TIED = 1e-6
SCHEDULES = ["gpipe", "1f1b", "interleaved", "zb-h1", "interleaved-zb", "zbv", "dualpipev"]


class Shared(nn.Module):
    """A weight that is tied by name, and what else such a module may have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(W, W) / 3), nn.Parameter(torch.randn(W))
        self.inner = nn.Sequential(nn.Linear(W, W), nn.LayerNorm(W))
        self.first_alone = nn.Parameter(torch.randn(W))  # used by the first use only
        self.dead = nn.Parameter(torch.ones(W))  # used by none
        self.frozen = nn.Parameter(torch.randn(W), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(F.linear(x, self.weight, self.bias)) + self.frozen) * self.first_alone


def last(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, module.weight.t(), module.bias)


LAYERS = [
    TiedLayerSpec("k", Shared),
    *[LayerSpec(nn.Linear, W, W) for _ in range(3)],
    TiedLayerSpec("k", Shared, forward_fn=last),
    *[LayerSpec(nn.Linear, W, W) for _ in range(2)],
    TiedLayerSpec("k", Shared, forward_fn=last),
]
OPTIMIZER = {"type": "AdamW", "params": {"lr": 2.0**-6, "weight_decay": 0.25}}


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(4, W, generator=generator), torch.randn(4, W, generator=generator))
        for _ in range(STEPS * MICRO)
    ]


def one_process() -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(BASE_SEED)
    shared = Shared()
    modules = nn.ModuleDict({"0": shared})
    calls: list[Any] = []
    for index, spec in enumerate(LAYERS):
        if isinstance(spec, TiedLayerSpec):
            function = spec.forward_fn
            calls.append(shared if function is None else lambda x, f=function: f(shared, x))
            continue
        torch.manual_seed(BASE_SEED + index)
        modules[str(index)] = spec.build()
        calls.append(modules[str(index)])
    optimizer = torch.optim.AdamW(modules.parameters(), **OPTIMIZER["params"])
    losses = []
    for step in range(STEPS):
        total = 0.0
        for x, y in data()[step * MICRO :][:MICRO]:
            for call in calls:
                x = call(x)
            loss = F.mse_loss(x, y)
            (loss / MICRO).backward()
            total += loss.item() / MICRO
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, {name: p.detach() for name, p in modules.named_parameters()}


def trained(rank: int, world: int, pp: int, schedule: str, stage: int) -> dict[str, torch.Tensor]:
    losses, right = one_process()
    settings = config(stage, optimizer=OPTIMIZER)
    engine = engine_of(
        pp, world // pp, LAYERS, settings, schedule=schedule, loss_fn=F.mse_loss, partition_method="uniform"
    )
    batches = iter(data())
    assert [engine.train_batch(batches).item() for _ in range(STEPS)] == pytest.approx(losses, rel=TIED)
    full = {}
    for name, p in engine.module.named_parameters():
        with zeropipe.zero.GatheredParameters([p]):
            full[name] = p.detach().clone()
    for name, value in full.items():
        assert torch.allclose(value, right[name], rtol=0, atol=1e-5), f"{schedule}: {name}"
    assert torch.equal(full.get("0.dead", torch.ones(W)), torch.ones(W))  # no gradient: no decay either
    if stage < 3:
        whole = engine.module.to_sequential()
        assert len(list(whole.parameters())) == len(right)
    engine.destroy()
    return {name: value for name, value in full.items() if name.startswith("0.")}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("world", "pp", "stage"), [(2, 2, 0), (2, 2, 3), (4, 4, 1), (4, 2, 2), (1, 1, 0)])
def test_all_parameters_of_a_tied_layer_are_one(pool, schedule, world, pp, stage):
    """Those outside of ``tied_weight_attr`` were one or several, depending on the cut, under one name."""
    copies = [found for found in pool(world).run(trained, pp, schedule, stage, timeout=60) if found]
    for found in copies[1:]:
        assert all(torch.equal(value, copies[0][name]) for name, value in found.items())


def narrow(rank: int, world: int, stage: int, accumulate: str | None) -> torch.Tensor | None:
    extra: dict[str, Any] = {"bf16": {"enabled": True}}
    if accumulate:
        extra["data_types"] = {"grad_accum_dtype": accumulate}
    engine = engine_of(2, 1, specs(blocks=3, tied=True), config(stage, **extra))
    for step in range(STEPS):
        engine.train_batch(iter(batches(MICRO, seed=step)))
    params = dict(engine.module.named_parameters())
    return zeropipe.utils.safe_get_full_fp32_param(params["0.weight"]).clone()


@pytest.mark.parametrize("accumulate", [None, "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_copies_stay_equal_in_16_bits(pool, stage, accumulate):
    """Accumulated in fp32, gradients of stages 2 and 3 were not in the sum over the copies, which parted."""
    first, second = pool(2).run(narrow, stage, accumulate)
    assert torch.equal(first, second)


def strange(rank: int, world: int) -> None:
    spec = TiedLayerSpec("k", nn.Linear, W, W, tied_weight_attr=["weight", "wieght"])
    with pytest.raises(UsageError, match=r"'k': Linear\.wieght is not a parameter"):
        engine_of(
            2, 1, [spec, LayerSpec(nn.Linear, W, W), LayerSpec(nn.Linear, W, W)], config(), loss_fn=loss_of
        )


def test_a_tied_attribute_that_is_no_parameter_is_named_on_every_rank(pool):
    pool(2).run(strange)
