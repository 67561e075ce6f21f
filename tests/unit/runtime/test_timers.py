"""Timers add up what they should, by a clock that the test turns by hand."""

from __future__ import annotations

import pytest

from zeropipe.errors import UsageError
from zeropipe.runtime.timers import PhaseTimers, ThroughputTimer, transformer_flops, wall_clock_breakdown


class Hand:
    now = 0.0

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_phases():
    clock = Hand()
    timers = PhaseTimers(clock=clock)
    for seconds in (1.0, 3.0):
        with timers("forward"):
            clock.now += seconds
        clock.now += 10
    timers("backward").start()
    clock.now += 12
    assert timers("backward").elapsed() == 12.0 and timers("backward").running
    timers("backward").stop()
    assert timers("forward").mean() == 2.0 and timers("never used").mean() == 0.0
    times = timers.times(["forward", "backward", "absent"])
    assert times == {"forward": 4.0, "backward": 12.0}
    assert wall_clock_breakdown(times, steps=2) == "forward 2000.0 ms (25 %) | backward 6000.0 ms (75 %)"
    assert timers.times()["forward"] == 0.0
    assert wall_clock_breakdown({"a": 0.0}) == "a 0.0 ms (0 %)"


def test_reset_while_running_counts_from_now():
    clock = Hand()
    timer = PhaseTimers(clock=clock)("x")
    timer.start()
    clock.now += 5
    assert timer.elapsed(reset=True) == 5.0
    clock.now += 2
    timer.stop()
    assert timer.elapsed() == 2.0


def test_misuse_is_named():
    timer = PhaseTimers()("x")
    with pytest.raises(UsageError, match="'x' is not running"):
        timer.stop()
    timer.start()
    with pytest.raises(UsageError, match="'x' is already running"):
        timer.start()
    with pytest.raises(UsageError, match="throughput timer is not running"):
        ThroughputTimer(1).stop()


def test_throughput():
    clock = Hand()
    timer = ThroughputTimer(8, flops_per_sample=transformer_flops(10**9, 500), warm_up=1, clock=clock)
    assert timer.stats().samples_per_second == 0.0
    for seconds in (50.0, 1.0, 3.0):
        timer.start()
        clock.now += 7  # a step that failed and was begun again
        timer.start()
        clock.now += seconds
        timer.stop()
    stats = timer.stats()
    assert (stats.steps, stats.seconds) == (2, 4.0)
    assert stats.samples_per_second == 4.0
    assert stats.last_samples_per_second == 8 / 3
    assert stats.tflops == 4.0 * 6 * 10**9 * 500 / 1e12
    assert str(stats) == "4.00 samples/s, 12.00 TFLOP/s"
    assert ThroughputTimer(1).stats().tflops is None
