"""Users' backwards in a pipeline: every schedule, with SGD (Adam would hide a factor), has the bits of plain PyTorch."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zeropipe
from tests.helpers.backward_kinds import KINDS, W
from zeropipe.runtime.pipe.module import PipelineModule

SCHEDULES = ["gpipe", "1f1b", "interleaved", "zb-h1", "interleaved-zb", "zbv", "dualpipev"]
MICRO, STEPS, LAYERS = 4, 2, 8
# The learning rate is a power of two: a step then rounds once, with or without a fused multiply-add.
SGD = {"type": "SGD", "params": {"lr": 0.25}}
# Not in a pipeline: one needs seconds to compile, the other has parameters of two dtypes.
ELSEWHERE = {"compiled", "broadcast"}
NAMES = sorted(KINDS.keys() - ELSEWHERE)
GROUPS = [NAMES[i :: len(NAMES) // (LAYERS - 1) + 1] for i in range(len(NAMES) // (LAYERS - 1) + 1)]


def data(steps: int = STEPS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(5, W, generator=generator), torch.randn(5, W, generator=generator))
        for _ in range(steps * MICRO)
    ]


def plain_steps(layers: nn.Sequential) -> list[torch.Tensor]:
    """Plain PyTorch, in place of what the pipeline does."""
    optimizer = torch.optim.SGD(layers.parameters(), lr=SGD["params"]["lr"])
    losses = []
    for step in range(STEPS):
        found = [F.mse_loss(layers(x), y) for x, y in data()[step * MICRO :][:MICRO]]
        for loss in found:
            (loss / MICRO).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.stack([loss.detach() for loss in found]).mean())
    return losses


def as_plain(rank: int, world: int, group: list[str], stage: int) -> None:
    for schedule in SCHEDULES:
        made, logs = [], []
        for _ in range(2):
            torch.manual_seed(0)
            seen: list[Any] = []
            kinds = [KINDS[group[i % len(group)]](seen) for i in range(LAYERS - 1)]
            made.append([*kinds, nn.Linear(W, W)])
            logs.append(seen)
        layers, alone = made[0], nn.Sequential(*made[1])
        want = plain_steps(alone)
        module = PipelineModule(
            layers, num_stages=world, loss_fn=F.mse_loss, schedule=schedule, partition_method="uniform"
        )
        settings = {
            "train_micro_batch_size_per_gpu": 5,
            "gradient_accumulation_steps": MICRO,
            "optimizer": deepcopy(SGD),
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
        }
        engine = zeropipe.initialize(model=module, config=settings)[0]
        batches = iter(data())
        found = [engine.train_batch(batches) for _ in range(STEPS)]
        assert [a.item() for a in found] == [a.item() for a in want], schedule
        state = alone.state_dict()
        for name, value in module.state_dict().items():
            if "running" in name:  # a schedule recomputes between other forwards than plain training does
                continue
            assert torch.equal(value, state[name]), f"{schedule}: {name}"
        engine.destroy()


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[0])
@pytest.mark.filterwarnings("ignore")
def test_stateful_functions_checkpoints_and_hooks_train_as_in_plain_pytorch(pool, group):
    """A custom function whose backward ran twice gave wrong gradients under every zero-bubble schedule."""
    pool(2).run(as_plain, group, 0, timeout=120)


@pytest.mark.filterwarnings("ignore")
def test_the_same_with_sharded_gradients(pool):
    pool(2).run(as_plain, GROUPS[1], 2, timeout=120)
