"""What no batch has used, or hardly any: compressed optimizers neither move nor throw it, in any phase, nor on resume.

A bit cannot say "zero": an element that never had a gradient got a momentum of plus or minus its tensor's scale,
which lay there until a dense step divided it by sqrt(0) + eps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import zeropipe
from tests.helpers.pool import Pools

ROWS, LATE, NEVER = 32, slice(24, 28), slice(28, 32)
RARE = slice(16, 24)  # used in the first two steps only
LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8
ROUNDING = 1e-3  # of a difference of two weights near 1, divided by LR: 2**-24 / 1e-3 is 6e-5
# What dense Adam moves an element by at its first gradient g, in units of lr, without bias correction:
# m / sqrt(v) = (1 - b1) g / sqrt((1 - b2) g g).
FIRST = (1 - BETA1) / (1 - BETA2) ** 0.5
ADAM: dict[str, Any] = {"betas": [BETA1, BETA2], "lr": LR, "eps": EPS}
APART = {"var_update_scaler": 2, "local_step_scaler": 3, "local_step_clipper": 4}
TOGETHER = {"var_update_scaler": 2, "local_step_clipper": 1}


class Tokens(nn.Module):
    """A table of which some rows come late or never, and a unit that is always off."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, 8)
        self.out = nn.Linear(8, ROWS)
        self.off = nn.Parameter(torch.full((5,), -1.0))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.out(self.table(tokens)) + torch.relu(self.off).sum()
        return F.cross_entropy(logits.float(), targets)


def engine_of(name: str, stage: int, **options: Any) -> Any:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 64,
        "optimizer": {"type": name, "params": ADAM | options},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
    }
    return zeropipe.initialize(model=Tokens(), config=config)[0]


def batch(rank: int, step: int, late: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    last = RARE.stop if step < 2 else RARE.start
    tokens = torch.randint(0, last, (64,), generator=generator)
    if late:
        tokens[:8] = torch.arange(8) // 2 + LATE.start
    return tokens, tokens  # each token is its own target


def step(engine: Any, rank: int, number: int, late: bool = False) -> float:
    loss = engine(*batch(rank, number, late))
    engine.backward(loss)
    engine.step()
    return loss.item()


def moved(engine: Any, rank: int, number: int, late: bool = False) -> dict[str, torch.Tensor]:
    """By what each element was moved, in units of lr."""
    before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    step(engine, rank, number, late)
    return {name: (p.detach() - before[name]) / LR for name, p in engine.module.named_parameters()}


def lane_of(engine: Any) -> Any:
    return engine.optimizer.optimizer._lanes[0]


def hold(engine: Any, change: dict[str, torch.Tensor], late: bool) -> None:
    """What has had no gradient stays in place, to the bit, and has no momentum."""
    rest = NEVER if late else slice(LATE.start, NEVER.stop)
    assert not change["table.weight"][rest].any()
    assert not change["off"].any()
    lane = lane_of(engine)
    unused = lane.own["exp_avg_sq"] == 0
    assert unused.any()
    for key in lane.own.keys() & {"exp_avg", "momentum_accumulator"}:
        assert not lane.own[key][unused].any()


def bounded(before: float, change: dict[str, torch.Tensor], growth: float) -> float:
    """A dense step moves nothing further than this. In units of lr, u = m / (sqrt(v) + eps), and v' >= b2 v, so

        |b1 m + (1 - b1) g| / (sqrt(v') + eps) <= b1 / sqrt(b2) |u| + (1 - b1) |g| / sqrt((1 - b2) g g)
                                               <= b1 / sqrt(b2) max |u| + FIRST

    with ``growth`` for what bias correction makes of it. The first term is what momentum carries on from the step
    before, by less each time; the second is dense Adam's bound for an element's first gradient.
    """
    most = max(float(values.abs().max()) for values in change.values())
    assert most <= (BETA1 / BETA2**0.5 * before + FIRST) * growth * (1 + ROUNDING)
    return most


def through_phases(
    rank: int, size: int, name: str, stage: int, first: dict[str, Any], then: dict[str, Any], folder: str
) -> list[str]:
    engine = engine_of(name, stage, **first)
    words: list[str] = []

    def go(start: int, stop: int, before: float) -> float:
        for number in range(start, stop):
            phase = engine.optimizer.optimizer.phases.next()[0]
            updates = lane_of(engine).variance_steps if number else 0
            change = moved(engine, rank, number)
            hold(engine, change, late=False)
            if name == "OneBitLamb":
                continue  # its coefficients scale every update
            if phase.dense:
                growth = ((1 - BETA2 ** (updates + 1)) / (1 - BETA2 ** max(updates, 1))) ** 0.5
                if not updates:
                    growth = (1 - BETA2) ** 0.5 / (1 - BETA1)
                before = bounded(before, change, growth)
            else:
                before = max(float(values.abs().max()) for values in change.values())
            words.append(phase.value)
        return before

    last = go(0, 7, 0.0)
    engine.save_checkpoint(folder)
    engine.destroy()
    engine = engine_of(name, stage, **then)
    engine.load_checkpoint(folder)
    go(7, 14, last)
    dense = next((n for n in range(14, 60) if engine.optimizer.optimizer.phases.next()[0].dense), None)
    if dense is not None:  # the late rows come, in a dense step: they are moved as dense Adam would move them
        change = moved(engine, rank, 14, late=True)
        hold(engine, change, late=True)
        assert change["table.weight"][LATE].any()
        if name != "OneBitLamb":
            lane = lane_of(engine)
            first_use = FIRST * (1 - BETA2**lane.variance_steps) ** 0.5 / (1 - BETA1**lane.step)
            assert change["table.weight"][LATE].abs().max() <= first_use * (1 + ROUNDING)
    engine.destroy()
    return words


FREEZES = [(3, 3), (3, 40), (40, 3), (3, 10), (10, 5)]


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("name", ["OneBitAdam", "OneBitLamb"])
def test_1_bit_optimizers_leave_what_is_unused_in_place(
    pool: Pools, tmp_path: Path, name: str, stage: int
) -> None:
    """A freeze_step raised on resume used to throw never-used rows by 1e8 times their tensor's scale."""
    for old, new in FREEZES:
        folder = str(tmp_path / f"{old}-{new}")
        pool(2).run(through_phases, name, stage, {"freeze_step": old}, {"freeze_step": new}, folder)


@pytest.mark.parametrize("stage", [0, 1])
def test_0_1_adam_leaves_what_is_unused_in_place(pool: Pools, tmp_path: Path, stage: int) -> None:
    """By default settings, the first dense step after a compressed one moved never-used rows by 77."""
    for old, new in [*FREEZES, (40, 40)]:
        first, then = ({"var_freeze_step": freeze, **TOGETHER} for freeze in (old, new))
        words = pool(2).run(through_phases, "ZeroOneAdam", stage, first, then, str(tmp_path / f"{old}-{new}"))
        assert old < 40 or new < 40 or {"variance", "compressed"} <= set(words[0][2:])


def apart(rank: int, size: int, folder: str) -> None:
    engine = engine_of("ZeroOneAdam", 0, var_freeze_step=4, **APART)
    for number in range(12):
        hold(engine, moved(engine, rank, number, late=number > 6), late=False)
        if number == 10:
            assert lane_of(engine).scalars["lrs"]  # in the middle of an interval
            engine.save_checkpoint(folder)
    engine.destroy()
    engine = engine_of("ZeroOneAdam", 0, var_freeze_step=4, **APART)
    engine.load_checkpoint(folder)
    for number in range(11, 18):
        hold(engine, moved(engine, rank, number, late=True), late=False)
    engine.destroy()


def test_what_comes_first_while_ranks_step_apart_stays_in_place(pool: Pools, tmp_path: Path) -> None:
    """Without a variance nothing tells how far it may go: neither a rank alone nor an exchange moves it."""
    pool(2).run(apart, str(tmp_path))


def decayed(rank: int, size: int, name: str, stage: int) -> None:
    options = {"var_freeze_step": 40, **TOGETHER} if name == "ZeroOneAdam" else {"freeze_step": 3}
    engine = engine_of(name, stage, weight_decay=0.5, **options)
    for number in range(10):
        before = engine.module.table.weight.detach()[NEVER].clone()
        step(engine, rank, number)
        assert torch.equal(engine.module.table.weight.detach()[NEVER], before - before * 0.5 * LR)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("name", ["OneBitAdam", "ZeroOneAdam"])
def test_weight_decay_alone_acts_on_what_is_unused(pool: Pools, name: str, stage: int) -> None:
    pool(2).run(decayed, name, stage)


def noisy(rank: int, size: int, folder: str) -> None:
    """A checkpoint as earlier versions (and DeepSpeed) write them: noise where there is no variance."""
    engine = engine_of("OneBitAdam", 0, freeze_step=3)
    for number in range(6):
        step(engine, rank, number)
    lane = lane_of(engine)
    lane.own["exp_avg"][lane.own["exp_avg_sq"] == 0] = 1e-3
    engine.save_checkpoint(folder)
    engine.destroy()
    engine = engine_of("OneBitAdam", 0, freeze_step=40)
    engine.load_checkpoint(folder)
    hold(engine, moved(engine, rank, 6), late=False)
    engine.destroy()


def test_noise_in_an_older_checkpoint_is_dropped(pool: Pools, tmp_path: Path) -> None:
    pool(2).run(noisy, str(tmp_path))


def as_adam(rank: int, size: int, folder: str) -> None:
    engine = engine_of("OneBitAdam", 1, freeze_step=3)
    for number in range(6):
        step(engine, rank, number)
    engine.save_checkpoint(folder)
    engine.destroy()
    engine = engine_of("Adam", 1)
    engine.load_checkpoint(folder)
    change = moved(engine, rank, 6)
    assert not change["table.weight"][LATE.start :].any() and not change["off"].any()
    engine.destroy()


def test_plain_adam_takes_over_without_throwing_anything(pool: Pools, tmp_path: Path) -> None:
    """A state saved in the compressed phase and loaded by Adam threw what was unused in the same way."""
    pool(2).run(as_adam, str(tmp_path))


def converge(rank: int, size: int, name: str, options: dict[str, Any]) -> tuple[float, float]:
    engine = engine_of(name, 0, **options | {"lr": 0.02, "eps": 1e-4})
    losses = [step(engine, rank, number) for number in range(80)]
    first_use = step(engine, rank, 80, late=True)
    engine.destroy()
    return losses[-1], first_use


def test_sparse_tables_train_as_with_adam(pool: Pools) -> None:
    """The loss at the first use of rows that nothing has used is Adam's; it used to be that of a ruined table."""
    (reached, first_use), *_ = pool(2).run(converge, "Adam", {})
    for name, options in {
        "OneBitAdam": {"freeze_step": 16},
        "ZeroOneAdam": {"var_freeze_step": 200},
        "OneBitLamb": {"freeze_step": 16},
    }.items():
        (found, late), *_ = pool(2).run(converge, name, options)
        assert late < first_use * 1.1, name
        if name != "OneBitLamb":  # whose lr means something else
            assert found < reached + 0.3, name
