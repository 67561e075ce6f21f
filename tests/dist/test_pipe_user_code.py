"""Users' backwards in a pipeline: every schedule, with SGD (Adam hides a factor), has the bits of plain PyTorch."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

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


def engine_of(layers: list[nn.Module], world: int, schedule: str, stage: int) -> Any:
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
    return zeropipe.initialize(model=module, config=settings)[0]


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
        engine = engine_of(layers, world, schedule, stage)
        batches = iter(data())
        found = [engine.train_batch(batches) for _ in range(STEPS)]
        assert [a.item() for a in found] == [a.item() for a in want], schedule
        state = alone.state_dict()
        for name, value in engine.module.state_dict().items():
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


class Pair(NamedTuple):
    h: torch.Tensor
    kept: torch.Tensor | None


@dataclass
class Record:
    h: torch.Tensor
    note: str = "as it was"


class Attributes(OrderedDict[str, Any]):
    """A dict whose items are attributes too, as transformers' outputs are."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__.update(items)


class Gives(nn.Module):
    """Takes one container and gives the next; whatever it takes has ``h``."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.linear, self.place = nn.Linear(W, W), place

    def forward(self, value: Any) -> Any:
        h = torch.tanh(self.linear(value if isinstance(value, torch.Tensor) else value.h))
        if isinstance(value, Attributes):
            h = h + value["h"] * value.twice["also"]
        if isinstance(value, Record):
            assert value.note == "as it was"
        kinds = (Pair(h, None), Record(h), Attributes(h=h, twice={"also": h}), h)
        return kinds[self.place % 4]


def contained(rank: int, world: int) -> None:
    for schedule in SCHEDULES:
        torch.manual_seed(0)
        layers = [Gives(i) for i in range(LAYERS)]
        want = plain_steps(nn.Sequential(*deepcopy(layers)))
        engine = engine_of(layers, world, schedule, stage=0)
        batches = iter(data())
        assert [engine.train_batch(batches).item() for _ in range(STEPS)] == [a.item() for a in want], (
            schedule
        )
        engine.destroy()


def test_named_tuples_dataclasses_and_dicts_with_attributes_cross_every_cut(pool):
    """They arrived as plain tuples and dicts, without their attributes, where the model was cut."""
    pool(4).run(contained)
