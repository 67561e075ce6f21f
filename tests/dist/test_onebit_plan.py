"""The plan of a run's traffic against what the engine sends: the same bytes and rounds, phase by phase."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.pool import Pools
from zeropipe.comm.record import Event, record
from zeropipe.runtime.fp16.onebit.plan import Job, phases_of, plan

STEPS = 14
BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "initial_scale_power": 4}}
ADAM = {"freeze_step": 3}
ZERO_ONE = {"var_freeze_step": 7, "var_update_scaler": 2, "local_step_scaler": 2, "local_step_clipper": 4}
TOGETHER = ZERO_ONE | {"local_step_clipper": 1}
WIDTHS = {None: 4, "fp32": 4, "bf16": 2, "fp16": 2}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 21), nn.Linear(21, 6), nn.Linear(6, 101)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(torch.tanh(self.first(x)))).float().square().mean()


def sent(event: Event) -> float:
    """By the algorithms that use all links evenly: an all-reduce is a reduce-scatter and an all-gather."""
    passes = 2 if event.op == "all_reduce" else 1
    return passes * event.bytes * (event.group_size - 1) / event.group_size


def recorded(
    rank: int, size: int, name: str, options: dict[str, Any], stage: int, config: dict[str, Any]
) -> tuple[float, dict[str, tuple[int, float]]]:
    """What one rank sends in all; by phase, the steps in which ranks waited and the bytes."""
    torch.manual_seed(0)
    engine = zeropipe.initialize(
        model=Net(),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": name, "params": {"lr": 1e-3, **options}},
            "zero_optimization": {"stage": stage},
            **config,
        },
    )[0]
    dtype = next(engine.module.parameters()).dtype
    found: dict[str, tuple[int, float]] = {}
    for _ in range(STEPS):
        phase = engine.optimizer.optimizer.phases.next()[0].value
        with record() as events:
            engine.backward(engine(torch.ones(2, 6, dtype=dtype)))
            engine.step()
        waits, numbers = found.get(phase, (0, 0.0))
        found[phase] = (waits + bool(events), numbers + sum(map(sent, events)))
    engine.destroy()
    return sum(numbers for _, numbers in found.values()), found


@pytest.mark.parametrize(
    ("name", "options", "stage", "config", "size"),
    [
        ("OneBitAdam", ADAM, 0, {}, 2),
        ("OneBitAdam", ADAM, 0, {"gradient_clipping": 0.0}, 3),
        ("OneBitAdam", ADAM, 1, {}, 2),
        ("OneBitAdam", ADAM, 1, {}, 3),
        ("OneBitAdam", ADAM, 1, BF16, 2),
        ("OneBitAdam", ADAM, 0, FP16, 2),
        ("OneBitAdam", ADAM, 0, BF16 | {"communication_data_type": "fp32"}, 2),
        ("OneBitAdam", ADAM, 1, FP16 | {"communication_data_type": "fp32"}, 2),
        ("OneBitAdam", ADAM, 0, {"communication_data_type": "bf16"}, 2),
        ("OneBitAdam", ADAM, 1, {"communication_data_type": "fp16"}, 2),
        ("OneBitAdam", ADAM | {"node_size": 2}, 0, {}, 4),
        ("OneBitAdam", ADAM | {"node_size": 2}, 1, {}, 2),
        ("OneBitLamb", ADAM, 0, {}, 2),
        ("OneBitLamb", ADAM, 1, {"communication_data_type": "bf16"}, 2),
        ("ZeroOneAdam", ZERO_ONE, 0, {}, 2),
        ("ZeroOneAdam", ZERO_ONE, 0, FP16, 3),
        ("ZeroOneAdam", TOGETHER, 1, BF16, 2),
    ],
)
def test_the_plan_is_what_is_sent(
    pool: Pools, name: str, options: dict[str, Any], stage: int, config: dict[str, Any], size: int
) -> None:
    """Local steps used to count as rounds saved, although ranks wait for the gradients' norm in each of them."""
    total, found = pool(size).run(recorded, name, options, stage, config)[0]
    width = 2 if BF16.keys() & config.keys() or FP16.keys() & config.keys() else 4
    wire = config.get("communication_data_type")
    sizes = tuple(p.numel() for p in Net().parameters())
    job = Job(
        sum(sizes),
        STEPS,
        size,
        element_bytes=width if wire is None else WIDTHS[wire],
        stage=stage,
        node_size=options.get("node_size", 1),
        param_bytes=width,
        sizes=(sizes,),
    )
    planned = plan(*phases_of(name, options), job)
    assert {row.phase.value: row.rounds for row in planned.rows} == {
        p: waits for p, (waits, _) in found.items()
    }
    for row in planned.rows:
        assert row.bytes == pytest.approx(
            found[row.phase.value][1], abs=0.501
        )  # it is a whole number of bytes
    assert planned.sum("bytes") == pytest.approx(total, abs=0.501 * len(found))
    assert planned.sum("rounds") == STEPS
