"""Parameters that were frozen, absent or unused when a checkpoint was saved train on as in plain PyTorch.

Each parameter has a step count of its own there, and none before it is first stepped. Here parameters share one in a
flat; those that part from the rest must be told apart through a save and a load, at any stage and size. Sizes are no
multiples of a cache line on purpose, except where bits are compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.data import generator
from tests.helpers.models import build
from tests.helpers.referee import assert_bitwise
from tests.helpers.train import config
from tests.helpers.zero3 import whole
from zeropipe.checkpoint.convert import convert
from zeropipe.checkpoint.loader import open_source
from zeropipe.checkpoint.sources.dcp import write_dcp
from zeropipe.checkpoint.sources.universal import write_universal

BEFORE, AFTER = 5, 4  # steps until the checkpoint, and from it on
WIDTH = 16
ULPS = 3e-6  # fused steps of whole lines and scalar rests round differently; half a step too small is 1e-2

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.5),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.5, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01, t0=2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "lamb": lambda p: zeropipe.runtime.optimizers.Lamb(p, lr=0.01),
    "lion": lambda p: zeropipe.runtime.optimizers.Lion(p, lr=0.01),
    "muon": lambda p: zeropipe.runtime.optimizers.Muon(p, lr=0.01),
    "own": lambda p: OwnStep(p, lr=0.01),
}


class OwnStep(torch.optim.Adam):
    """Unknown to zeropipe for its own ``step``: stepped one by one at stages 0 and 3, as told at 1 and 2."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Model(nn.Module):
    """A trunk, an adapter that may be absent, a head, and a scale of no dims."""

    def __init__(self, adapter: bool = True, width: int = WIDTH) -> None:
        super().__init__()
        self.trunk = nn.Linear(width, width)
        self.adapter = nn.Linear(width, width) if adapter else None
        self.head = nn.Linear(width, 4 if width != WIDTH else WIDTH)
        self.scale = nn.Parameter(torch.ones(()))
        self.uses_trunk = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.uses_trunk:
            x = torch.tanh(self.trunk(x)) + x
        if self.adapter is not None:
            x = x + self.adapter(x)
        return (self.head(x) * self.scale).square().mean()


def frozen(model: Model) -> None:
    """The trunk is frozen until the checkpoint."""
    model.trunk.requires_grad_(False)


def unused(model: Model) -> None:
    model.uses_trunk = False


def as_it_is(model: Model) -> None:
    pass


# What the model is until the checkpoint: (has the adapter, what is done to it).
PASTS: dict[str, tuple[bool, Callable[[Model], None]]] = {
    "frozen": (True, frozen),
    "added": (False, as_it_is),
    "unused": (True, unused),
    "added and frozen": (False, frozen),
}


def made(adapter: bool, width: int) -> Model:
    model = build(lambda: Model(True, width))
    if not adapter:
        model.adapter = None
    return model


def batch(step: int, rank: int, width: int) -> torch.Tensor:
    return torch.randn(4, width, generator=generator(step, rank))


def plain(optimizer: str, past: str, width: int, world: int) -> dict[str, torch.Tensor]:
    """One process that accumulates the ranks' batches; a state of optimizer that is loaded by parameter."""
    adapter, change = PASTS[past]
    old = made(adapter, width)
    change(old)
    states: dict[str, Any] = {}
    # torch's fused SGD takes no mixture of parameters with and without momentum.
    step_of = OPTIMIZERS[optimizer.removeprefix("fused ")]
    first = step_of([p for p in old.parameters() if p.requires_grad])
    fit_plain(old, first, range(BEFORE), width, world)
    for name, param in old.named_parameters():
        if param in first.state:
            states[name] = first.state[param]
    new = made(True, width)
    new.load_state_dict(old.state_dict(), strict=False)
    second = step_of(list(new.parameters()))
    for name, param in new.named_parameters():
        if states.get(name):
            second.state[param] = states[name]
    fit_plain(new, second, range(BEFORE, BEFORE + AFTER), width, world)
    return {name: param.detach().clone() for name, param in new.named_parameters()}


def fit_plain(model: Model, optimizer: Any, steps: range, width: int, world: int) -> None:
    for step in steps:
        for rank in range(world):
            (model(batch(step, rank, width)) / world).backward()
        optimizer.step()
        optimizer.zero_grad()


def engine_for(model: Model, optimizer: str, stage: int, world: int, extra: dict[str, Any]) -> Any:
    params = [p for p in model.parameters() if p.requires_grad]
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **extra}
    settings = config(
        stage,
        world,
        optimizer={"type": None, "params": {}},
        zero_allow_untested_optimizer=True,
        zero_optimization=zero,
    )
    return zeropipe.initialize(model=model, optimizer=OPTIMIZERS[optimizer](params), config=settings)[0]


def save(rank: int, world: int, folder: str, optimizer: str, past: str, width: int, stage: int) -> None:
    adapter, change = PASTS[past]
    model = made(adapter, width)
    change(model)
    engine = engine_for(model, optimizer, stage, world, {})
    for step in range(BEFORE):
        engine.backward(engine(batch(step, rank, width)))
        engine.step()
    engine.save_checkpoint(folder, tag="before")
    engine.destroy()


def resume(
    rank: int,
    world: int,
    folder: str,
    optimizer: str,
    width: int,
    stage: int,
    extra: dict[str, Any],
    halt: bool = True,
    batches: int = 0,
) -> dict[str, torch.Tensor]:
    """``halt``: save half way, and go on in another engine. ``batches``: of how many ranks (default: as many)."""
    per_rank = (batches or world) // world

    def start(tag: str) -> Any:
        engine = engine_for(made(True, width), optimizer, stage, world, extra)
        engine.load_checkpoint(folder, tag=tag, load_module_strict=False)
        return engine

    engine = start("before")
    for step in range(BEFORE, BEFORE + AFTER):
        if halt and step == BEFORE + 2:
            engine.save_checkpoint(folder, tag=f"half{stage}")
            engine.destroy()
            engine = start(f"half{stage}")
        data = [batch(step, rank * per_rank + micro, width) for micro in range(per_rank)]
        engine.backward(torch.stack([engine(x) for x in data]).mean())
        engine.step()
    weights = whole(engine.module)
    engine.destroy()
    return weights


@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_whole_lines_resume_as_plain_pytorch_bitwise(pool, tmp_path, stage, past):
    """Parameters that a checkpoint did not train got zero moments with the old step count: Adam's first updates of
    them were half of the right ones, or three times as large."""
    expected = plain("adamw", past, WIDTH, 2)
    pool(2).run(save, str(tmp_path), "adamw", past, WIDTH, stage)
    for weights in pool(2).run(resume, str(tmp_path), "adamw", WIDTH, stage, {}):
        for name, value in expected.items():
            if name != "scale":  # of one element: no whole line in plain PyTorch
                assert_bitwise(weights[name], value, name)


MATRIX = [
    (optimizer, past, save_at, load_at)
    for number, optimizer in enumerate(OPTIMIZERS)
    for turn, past in enumerate(["frozen", "added and frozen", "unused"])
    for save_at, load_at in [((number + turn) % 4, (number + 2 * turn + 1) % 4)]
]


@pytest.mark.parametrize(("optimizer", "past", "save_at", "load_at"), MATRIX)
def test_every_optimizer_resumes_as_plain_pytorch(pool, tmp_path, optimizer, past, save_at, load_at):
    """Saved at one stage, loaded at another; no size is a multiple of a cache line."""
    expected = plain(optimizer, past, 7, 2)
    pool(2).run(save, str(tmp_path), optimizer, past, 7, save_at)
    for weights in pool(2).run(resume, str(tmp_path), optimizer, 7, load_at, {}):
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=ULPS, atol=ULPS, msg=name)


@pytest.mark.parametrize(("stage", "place"), [(1, "cpu"), (2, "cpu"), (3, "cpu"), (3, "nvme")])
def test_offloaded_state_resumes_too_and_at_another_number_of_ranks(pool, tmp_path, stage, place):
    expected = plain("adamw", "added and frozen", WIDTH, 2)
    pool(2).run(save, str(tmp_path / "c"), "adamw", "added and frozen", WIDTH, 3 - stage)
    offload = {"offload_optimizer": {"device": place, "nvme_path": str(tmp_path)}}
    for world in (2, 1):
        runs = pool(world).run(
            resume, str(tmp_path / "c"), "adamw", WIDTH, stage, offload, halt=world == 2, batches=2
        )
        for weights in runs:
            for name, value in expected.items():
                torch.testing.assert_close(weights[name], value, rtol=ULPS, atol=ULPS, msg=name)


@pytest.mark.parametrize("kind", ["universal", "dcp", "2", "3"])
def test_converted_checkpoints_keep_what_was_never_stepped(pool, tmp_path, kind):
    expected = plain("adamw", "unused", WIDTH, 2)
    pool(2).run(save, str(tmp_path / "a"), "adamw", "unused", WIDTH, 1)
    source = open_source(tmp_path / "a", "before")
    (tmp_path / "b").mkdir()
    if kind == "universal":
        write_universal(source, tmp_path / "b" / "before")
    elif kind == "dcp":
        write_dcp(source, tmp_path / "b" / "before")
    else:
        convert(source, tmp_path / "b", stage=int(kind), dp=3)
    for weights in pool(2).run(resume, str(tmp_path / "b"), "adamw", WIDTH, 2, {}, halt=False):
        for name, value in expected.items():
            if name != "scale":
                assert_bitwise(weights[name], value, name)


def own_state_dict(rank: int, world: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of an engine that never stopped, and of one that took over its optimizer's state dict half way."""

    def start() -> Any:
        return engine_for(made(True, WIDTH), "adamw", 1, world, {})

    def steps(engine: Any, numbers: range) -> None:
        for step in numbers:
            engine.module.uses_trunk = step != 1
            engine.backward(engine(batch(step, rank, WIDTH)))
            engine.step()

    first, second = start(), start()
    steps(first, range(3))
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    for engine in (first, second):
        steps(engine, range(3, 5))
    found = whole(first.module), whole(second.module)
    first.destroy()
    second.destroy()
    return found


def test_the_optimizers_own_state_dict_has_the_counts_too(pool):
    for left, right in pool(2).run(own_state_dict):
        assert_bitwise(left, right)
