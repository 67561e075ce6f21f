"""The plan of a run is what the run takes, as torch's own allocator counts it; and what others promise is the same."""

from __future__ import annotations

import pytest
import torch
from benchmarks.common.model import Size
from benchmarks.plan.cases import Case
from benchmarks.plan.measure import measured
from benchmarks.plan.run import planned
from torch import nn

from zeropipe.comm.host.choosing import VARIABLE
from zeropipe.compat.estimators import (
    estimate_zero2_model_states_mem_needs,
    estimate_zero3_model_states_mem_needs,
)
from zeropipe.planning.devices import GIVE_BACK, KNOWN, device_of
from zeropipe.planning.plan import Plan, plan
from zeropipe.planning.rehearse import Rehearsal

pytestmark = pytest.mark.process
# What a message was sent from is freed by a thread that the profiler does not watch: until that memory is used again it
# counts as alive. One message of these models.
UNSEEN = 600_000
SMALL = Size(layers=2, width=128, heads=4, vocabulary=1024, context=32, micro_batch=2)
CASES = [
    Case(0, size=SMALL),
    Case(2, "bf16", 2, recompute=True, size=SMALL),
    Case(3, size=SMALL),
    Case(1, "bf16", 4, schedule="1f1b", size=SMALL),
    Case(3, "bf16", offload="optimizer and param", size=SMALL),
]


@pytest.fixture(autouse=True)
def _no_world() -> None:
    """Ranks are forked from a process that has joined no world, and other tests of this one have left theirs."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_states_and_peak_are_those_of_a_run(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """By messages, as the plan counts it; ranks of one host read without what messages arrive in, and have masters of
    stage 3 in memory that torch's allocator knows nothing of."""
    monkeypatch.setenv(VARIABLE, "messages")
    found = planned(case, KNOWN["cpu"])
    states = ("parameters", "gradients", "masters", "moments")
    for one, run in zip(found.rehearsals, measured(case, profiled=True), strict=True):
        said = sum(size for kind, size in one.resting.items() if kind.removeprefix("disk: ") in states)
        assert said == pytest.approx(run.states, rel=0.005)
        assert one.peak.peak == pytest.approx(run.allocated, rel=0.01, abs=UNSEEN)


OFFLOADS = [(2, ""), (3, ""), (3, "optimizer"), (3, "optimizer param")]


@pytest.mark.parametrize("world", [2, 8])
@pytest.mark.parametrize(("stage", "offload"), OFFLOADS)
def test_the_names_of_other_estimators_give_the_plan_s_states(stage: int, offload: str, world: int) -> None:
    """On the device, and of all ranks on the host; without the buffers through which copies go."""
    zero: dict[str, object] = {f"offload_{part}": {"device": "cpu"} for part in offload.split()}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
    }
    width, layers = 256, 8
    model = lambda: nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))  # noqa: E731
    batch = lambda: torch.randn(1, width, dtype=torch.bfloat16)  # noqa: E731
    found = plan(model, batch, config, world=world, device="h200", ranks=[0]).fullest.resting
    total, largest = width * width * layers, width * width
    host = 0
    if stage == 2:
        _, device = estimate_zero2_model_states_mem_needs(total, world, 1, False, 1.0)
    else:
        host, device, gathered = estimate_zero3_model_states_mem_needs(
            total, largest, world, 1, "optimizer" in offload, "param" in offload, True, 1.0
        )
        device -= gathered  # of one layer while it computes: no state
    assert _states(found, "") == pytest.approx(device, rel=0.005)
    assert world * _states(found, "host: ") == pytest.approx(host, rel=0.005)


def _states(kinds: dict[str, int], where: str) -> int:
    return sum(kinds.get(where + kind, 0) for kind in ("parameters", "gradients", "masters", "moments"))


def test_a_pipeline_waits_less_the_more_micro_batches_it_has() -> None:
    """Of p equal stages and m micro-batches the ranks wait (p - 1)/m of the time that they compute; more where the
    stages are unequal."""
    few, many = (
        planned(Case(0, accumulation=m, schedule="1f1b", size=Size(2, 64, 2, 64, 8, 2)), KNOWN["cpu"])
        for m in (2, 8)
    )
    assert few.bubble is not None and many.bubble is not None
    assert 1 / 8 <= many.bubble < few.bubble
    assert few.bubble >= 1 / 2
    assert many.seconds.computing["pipeline"] > few.seconds.computing["pipeline"] > 0


def test_what_a_heap_keeps_is_counted_unless_it_gives_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GIVE_BACK, raising=False)
    found = planned(CASES[0], KNOWN["cpu"])
    tight = Plan(found.rehearsals, found.device, found.peak + 17 * 2**20)  # and what products keep
    assert found.kept > 0
    assert not tight.fits
    assert GIVE_BACK in tight.verdict()
    monkeypatch.setenv(GIVE_BACK, "65536")
    assert tight.fits
    one: Rehearsal = found.fullest
    assert device_of("h200").keeps(one.passing) == 0
