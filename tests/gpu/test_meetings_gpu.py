"""How often the host waits for the GPU in a step: torch itself tells of each time (``set_sync_debug_mode``).

On a CPU (``make gpu DEVICE=cpu``) the same steps are counted as in ``tests/dist/test_meetings.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from benchmarks.counts.counting import Counting

from tests.gpu.test_training_gpu import settings, start
from tests.helpers.data import gpt_batch
from tests.helpers.meetings import of_host
from zeropipe.tensor.host import HOST

pytestmark = pytest.mark.gpu
FREE = {"bf16": {"enabled": True, "check_grad_overflow": False}}
# Config, meetings in a step; settings() clips.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "fp32": ({}, 0),
    "fp32 without clipping": ({"gradient_clipping": 0.0}, 0),
    "bf16": (FREE, 0),
    "bf16, checked": ({"bf16": {"enabled": True}}, 1),
    "fp16": ({"fp16": {"enabled": True, "initial_scale_power": 8}}, 1),
    "parameters that stay": ({**FREE, "zero_optimization": {"stage": 3}}, 0),
    "Lamb": ({"optimizer": {"type": "Lamb", "params": {"lr": 0.01}}}, 0),
    "Muon": ({"optimizer": {"type": "Muon", "params": {"lr": 0.01}}}, 0),
}


@contextmanager
def met(engine: Any) -> Iterator[list[str]]:
    """What is yielded says, at its end, where the host waited inside."""
    found: list[str] = []
    if engine.device.type == "cpu":
        with Counting(of_host(engine)) as counts:
            yield found
        found += counts.where
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found += [f"{one.filename}:{one.lineno}" for one in caught if "synchronizing" in str(one.message)]


@pytest.mark.parametrize(
    ("case", "stage"),
    [
        (case, n)
        for case, (extra, _) in CASES.items()
        for n in range(4)
        if n == 3 or "zero_optimization" not in extra
    ],
)
def test_a_step_waits_for_the_gpu_once_where_it_may_be_skipped_and_never_else(case: str, stage: int) -> None:
    extra, most = CASES[case]
    engine = start(settings(stage, **extra))
    batches = [tuple(t.to(engine.device) for t in gpt_batch(at, 0, at)) for at in range(8)]

    def step(at: int) -> None:
        for micro in range(2):
            engine.backward(engine(*batches[2 * at + micro]))
            engine.step()

    with HOST.afar():
        for at in range(3):
            step(at)
        with met(engine) as found:
            step(3)
    engine.destroy()
    assert len(found) == most, found
