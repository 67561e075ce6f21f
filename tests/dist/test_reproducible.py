"""With slots a run ends with the same bits on any number of ranks, at every stage."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.slots import Odd, digest, make, settings, step, train, words
from zeropipe.errors import ConfigError, UsageError
from zeropipe.utils import safe_get_full_grad

STEPS = 3


def one_of_all(found: list[Any]) -> Any:
    """What every rank of every run found, which is one."""
    assert len(set(found)) == 1, found
    return found[0]


@pytest.mark.native
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_digest_at_every_stage_on_1_to_4_ranks(pool, precision):
    configs = [settings(stage, precision=precision) for stage in range(4)]
    runs = [pool(world).run(train, configs, STEPS) for world in (1, 2, 3, 4)]
    one_of_all([result for run in runs for rank in run for result in rank])


@pytest.mark.parametrize("slots", [3, 7])
def test_uneven_shares(pool, slots):
    """Ranks that have one slot less run a pass that counts for nothing."""
    configs = [settings(stage, slots) for stage in range(4)]
    runs = [pool(world).run(train, configs, STEPS) for world in (1, 2, 3)]
    one_of_all([result for run in runs for rank in run for result in rank])


def test_several_backwards_in_a_micro_step(pool):
    configs = [settings(stage, 6) for stage in range(4)]
    runs = [pool(world).run(train, configs, STEPS, 2) for world in (1, 2, 3)]
    two = one_of_all([result for run in runs for rank in run for result in rank])
    assert two != pool(1).run(train, configs[:1], STEPS)[0][0]


def test_fp16_overflows_alike(pool):
    """The first loss scale is too large: the same steps are skipped, and the scale falls alike."""
    fp16 = {"enabled": True, "initial_scale_power": 17, "hysteresis": 1}
    configs = [settings(stage, 6, fp16=fp16) for stage in range(4)]
    runs = [pool(world).run(train, configs, 8) for world in (1, 2, 3)]
    _, norm, scale = one_of_all([result for run in runs for rank in run for result in rank])
    assert scale < 2.0**17
    assert norm < float("inf")


def test_the_average_is_that_of_the_slots(pool):
    """Of four slots of one value the average is that value, to the bit: sums of two equal numbers are exact."""
    ours = pool(2).run(_average, 4)
    torch.manual_seed(0)
    plain = Odd().eval()
    plain(words(0, 0)).backward()
    for name, grad in ours[0].items():
        expected = plain.get_parameter(name).grad
        assert torch.equal(grad, torch.zeros_like(grad) if expected is None else expected), name


def _average(rank: int, world: int, slots: int) -> dict[str, torch.Tensor]:
    engine = make({**settings(1, slots)})
    engine.eval()
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(words(0, 0)))
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
    found = {n: safe_get_full_grad(p) for n, p in engine.module.named_parameters() if p.requires_grad}
    engine.destroy()
    return found


def _generators(rank: int, world: int) -> list[bool]:
    engine = make(settings(1, 4))
    same = []
    for _ in range(2):
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        step(engine, 0)
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
        same += [torch.equal(before[0], after[0]), before[1] == after[1], bool((before[2] == after[2]).all())]
    engine.destroy()
    return same


def test_the_users_generators_are_left_as_they_were(pool):
    assert all(pool(2).run(_generators)[0])


def _misuses(rank: int, world: int) -> list[str]:
    engine, found = make(settings(1, 4)), []

    def refused(call: Any) -> None:
        with pytest.raises((UsageError, ConfigError)) as raised:
            call()
        found.append(str(raised.value))

    engine.backward(engine(words(0, rank)))
    refused(lambda: safe_get_full_grad(engine.module.embed.weight))
    refused(lambda: engine.set_gradient_accumulation_boundary(True))
    refused(engine.optimizer.step)
    refused(lambda: engine.backward(engine(words(0, rank)), scale_wrt_gas=False))
    refused(lambda: engine.set_train_batch_size(16))
    # Forgotten, the step begins anew, and ends as one that was never disturbed.
    engine.zero_grad()
    step(engine, 0)
    found.append(digest(engine.module))
    engine.destroy()
    return found


def test_a_step_that_is_not_whole_is_refused_and_begins_anew(pool):
    runs = [pool(world).run(_misuses) for world in (1, 2)]
    for run in runs:
        for found in run:
            assert len(found) == 6
            assert all("Fix: " in text for text in found[:5])
    one_of_all([found[5] for run in runs for found in run] + [pool(1).run(train, [settings(1, 4)], 1)[0][0][0]])


def _build(rank: int, world: int, config: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        make(config)
    return str(raised.value)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"reproducible": {"slots": 1}}, "at least 2"),
        ({"gradient_accumulation_steps": 3}, "leave it out"),
        ({"train_batch_size": 9}, "set train_batch_size to 8"),
        ({"communication_data_type": "fp16"}, "communication_data_type"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 1}}, "mics_shard_size"),
    ],
)
def test_what_cannot_be_held_is_refused(pool, more, says):
    for text in pool(2).run(_build, {**settings(1, 4), **more}):
        assert says in text
        assert "Fix: " in text
