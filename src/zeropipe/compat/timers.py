"""Timers in DeepSpeed's words, over those of ``zeropipe.runtime.timers``: behind ``deepspeed.utils.timer``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from zeropipe.accelerator import get_accelerator
from zeropipe.runtime.timers import PhaseTimer, synchronizing_clock
from zeropipe.utils.logging import log_dist, logger

FORWARD_MICRO_TIMER, FORWARD_GLOBAL_TIMER = "fwd_microstep", "fwd"
BACKWARD_MICRO_TIMER, BACKWARD_GLOBAL_TIMER = "bwd_microstep", "bwd"
BACKWARD_INNER_MICRO_TIMER, BACKWARD_INNER_GLOBAL_TIMER = "bwd_inner_microstep", "bwd_inner"
BACKWARD_REDUCE_MICRO_TIMER, BACKWARD_REDUCE_GLOBAL_TIMER = "bwd_allreduce_microstep", "bwd_allreduce"
STEP_MICRO_TIMER, STEP_GLOBAL_TIMER = "step_microstep", "step"


class _Timer:
    """One phase, in milliseconds."""

    def __init__(self, name: str) -> None:
        self.name_ = name
        self._phase = PhaseTimer(name, synchronizing_clock(get_accelerator().device_name()))
        self._elapsed: list[float] = []

    @property
    def started_(self) -> bool:
        return self._phase.running

    def start(self) -> None:
        self._phase.start()

    def stop(self, reset: bool = False, record: bool = False) -> None:
        self._phase.stop()
        if record:
            self._elapsed.append(self._phase.elapsed() * 1e3)

    def reset(self) -> None:
        self._phase.reset()

    def elapsed(self, reset: bool = True) -> float:
        return self._phase.elapsed(reset=reset) * 1e3

    def mean(self) -> float:
        return sum(self._elapsed) / len(self._elapsed) if self._elapsed else 0.0


class SynchronizedWallClockTimer:
    """Timers by name, each of which waits for the device before it reads the clock."""

    def __init__(self) -> None:
        self.timers: dict[str, _Timer] = {}

    def __call__(self, name: str) -> _Timer:
        return self.timers.setdefault(name, _Timer(name))

    def get_timers(self) -> dict[str, _Timer]:
        return self.timers

    def has_timer(self, name: str) -> bool:
        return name in self.timers

    @staticmethod
    def memory_usage() -> str:
        words = get_accelerator()
        return f"MA {words.memory_allocated() / 2**30:.2f} GiB, max MA {words.max_memory_allocated() / 2**30:.2f} GiB"

    def log(
        self,
        names: Iterable[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool = False,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Log the milliseconds of the named timers, divided by ``normalizer``, on rank 0 or ``ranks``."""
        known = [name for name in names if name in self.timers]
        text = " | ".join(f"{name}: {self.timers[name].elapsed(reset) / normalizer:.2f}" for name in known)
        log_dist(f"time (ms) | {text}", ranks=ranks or [0])

    def get_mean(self, names: Iterable[str], normalizer: float = 1.0, reset: bool = True) -> dict[str, float]:
        """Means of what was recorded with ``stop(record=True)``, in milliseconds."""
        return {name: self.timers[name].mean() / normalizer for name in names if name in self.timers}


class NoopTimer:
    """Timers that measure nothing."""

    class Timer:
        def start(self) -> None: ...

        def reset(self) -> None: ...

        def stop(self, **kwargs: Any) -> None: ...

        def elapsed(self, **kwargs: Any) -> float:
            return 0.0

        def mean(self) -> float:
            return 0.0

    def __init__(self) -> None:
        self.timer = self.Timer()

    def __call__(self, name: str) -> NoopTimer.Timer:
        return self.timer

    def get_timers(self) -> dict[str, Any]:
        return {}

    def has_timer(self, name: str) -> bool:
        return True

    def log(
        self, names: Iterable[str], normalizer: float = 1.0, reset: bool = True, **kwargs: Any
    ) -> None: ...

    def get_mean(self, names: Iterable[str], normalizer: float = 1.0, reset: bool = True) -> dict[str, float]:
        return {}


class ThroughputTimer:
    """Samples per second over the steps after ``start_step``; ``batch_size``: samples of one step."""

    def __init__(
        self,
        config: object = None,
        batch_size: int | None = 1,
        start_step: int | None = 2,
        steps_per_output: int | None = None,
        monitor_memory: bool = False,
        logging_fn: Callable[[str], None] | None = None,
    ) -> None:
        self.config, self.batch_size = config, 1 if batch_size is None else max(batch_size, 1)
        self.start_step, self.steps_per_output = 2 if start_step is None else start_step, steps_per_output
        self.logging = logging_fn or logger.info
        self.epoch_count = self.micro_step_count = self.global_step_count = 0
        self.total_elapsed_time = self.step_elapsed_time = 0.0
        self._clock = synchronizing_clock(get_accelerator().device_name(), time.perf_counter)
        self._since: float | None = None

    def update_epoch_count(self) -> None:
        self.epoch_count, self.micro_step_count = self.epoch_count + 1, 0

    def start(self) -> None:
        self._since = self._clock() if self.global_step_count >= self.start_step else None

    def stop(self, global_step: bool = False, report_speed: bool = True) -> None:
        """End a micro-step; ``global_step``: it was the last of its step."""
        self.micro_step_count += 1
        self.global_step_count += global_step
        if self._since is None:
            return
        seconds, self._since = self._clock() - self._since, None
        self.total_elapsed_time += seconds
        self.step_elapsed_time += seconds
        if not global_step:
            return
        if report_speed and self.steps_per_output and self.global_step_count % self.steps_per_output == 0:
            now = self.batch_size / self.step_elapsed_time if self.step_elapsed_time else 0.0
            self.logging(
                f"epoch={self.epoch_count}/micro_step={self.micro_step_count}/global_step={self.global_step_count}, "
                f"RunningAvgSamplesPerSec={self.avg_samples_per_sec():.3f}, CurrSamplesPerSec={now:.3f}"
            )
        self.step_elapsed_time = 0.0

    def avg_samples_per_sec(self) -> float:
        """-inf before the first counted step."""
        counted = self.global_step_count - self.start_step
        if counted <= 0 or not self.total_elapsed_time:
            return -math.inf
        return self.batch_size * counted / self.total_elapsed_time
