"""How long the phases of a step take, and how much work a second does; nothing is printed from here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType

import torch

from zeropipe.errors import UsageError

Clock = Callable[[], float]  # seconds
# Steps that are not counted: allocation, autotuning and compilation happen there.
WARM_UP = 2


def synchronizing_clock(device: torch.device | str | None = None, clock: Clock = time.perf_counter) -> Clock:
    """``clock``, read when the work queued on ``device`` is done; a CPU has none queued."""
    # A kernel is queued when its call returns; what is timed without waiting is the queueing.
    if device is None or torch.device(device).type != "cuda":
        return clock

    def read() -> float:
        torch.cuda.synchronize(device)
        return clock()

    return read


class PhaseTimer:
    """Accumulates the time between ``start`` and ``stop``, or of a ``with`` block.

    Raises UsageError when started twice or stopped without a start.
    """

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = name
        self.count = 0
        self._clock = clock
        self._total = 0.0  # seconds
        self._since: float | None = None

    @property
    def running(self) -> bool:
        return self._since is not None

    def start(self) -> None:
        if self._since is not None:
            raise UsageError(f"timer {self.name!r} is already running", fix="call stop() first")
        self._since = self._clock()

    def stop(self) -> None:
        if self._since is None:
            raise UsageError(f"timer {self.name!r} is not running", fix="call start() first")
        self._total += self._clock() - self._since
        self._since = None
        self.count += 1

    def elapsed(self, reset: bool = False) -> float:
        """Seconds accumulated so far, up to now where it is running; ``reset`` starts again from 0."""
        total = self._total
        if self._since is not None:
            # Read once: with ``reset`` no time between two readings is lost.
            now = self._clock()
            total += now - self._since
            self._since = now if reset else self._since
        if reset:
            self.reset()
        return total

    def mean(self) -> float:
        """Seconds per completed use; 0 where there is none."""
        return self._total / self.count if self.count else 0.0

    def reset(self) -> None:
        self._total, self.count = 0.0, 0

    def __enter__(self) -> PhaseTimer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class PhaseTimers:
    """Timers by name: ``with timers("forward"): ...``. They wait for the device, so use them to measure only."""

    def __init__(self, device: torch.device | str | None = None, clock: Clock = time.perf_counter) -> None:
        self._clock = synchronizing_clock(device, clock)
        self._timers: dict[str, PhaseTimer] = {}

    def __call__(self, name: str) -> PhaseTimer:
        if name not in self._timers:
            self._timers[name] = PhaseTimer(name, self._clock)
        return self._timers[name]

    def times(self, names: Iterable[str] | None = None, *, reset: bool = True) -> dict[str, float]:
        """Seconds by name, in the order of first use; names that were never used are left out."""
        wanted = list(self._timers) if names is None else [name for name in names if name in self._timers]
        return {name: self._timers[name].elapsed(reset=reset) for name in wanted}


def wall_clock_breakdown(times: dict[str, float], *, steps: int = 1) -> str:
    """One line such as ``forward 12.3 ms (40 %) | backward 18.5 ms (60 %)`` from seconds of ``steps`` steps."""
    total = sum(times.values())
    return " | ".join(
        f"{name} {seconds / steps * 1e3:.1f} ms ({seconds / total * 100 if total else 0:.0f} %)"
        for name, seconds in times.items()
    )


def transformer_flops(parameters: int, tokens: int) -> int:
    """Operations to train a transformer on ``tokens`` tokens, forward and backward, without attention's share.

    ``6 N D`` (arXiv 2001.08361, section 2.1). Give ``ThroughputTimer`` that of one sample.
    """
    return 6 * parameters * tokens


@dataclass(frozen=True, slots=True)
class Throughput:
    """What a run has done since its warm-up. Rates are 0 before the first counted step."""

    steps: int
    seconds: float
    samples_per_second: float
    last_samples_per_second: float  # of the last step alone
    tflops: float | None  # per second; None where the operations of a sample are not known

    def __str__(self) -> str:
        text = f"{self.samples_per_second:.2f} samples/s"
        return text if self.tflops is None else f"{text}, {self.tflops:.2f} TFLOP/s"


class ThroughputTimer:
    """Samples and operations per second over the steps between ``start`` and ``stop``.

    ``batch_size``: samples of one step (of all ranks, for the rate of all). ``flops_per_sample``: see
    ``transformer_flops``. The first ``warm_up`` steps are not counted.
    """

    def __init__(
        self,
        batch_size: int,
        flops_per_sample: float | None = None,
        *,
        device: torch.device | str | None = None,
        warm_up: int = WARM_UP,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.batch_size, self.flops_per_sample = batch_size, flops_per_sample
        self._clock = synchronizing_clock(device, clock)
        self._skip = warm_up
        self._since: float | None = None
        self._seconds: tuple[float, float] = (0.0, 0.0)  # of all counted steps, of the last
        self._steps = 0

        # Of all steps, the warm-up's too.
        self.epoch_count = self.global_step_count = 0

    @property
    def running(self) -> bool:
        return self._since is not None

    def update_epoch_count(self) -> None:
        """An epoch is over; the rates go on."""
        self.epoch_count += 1

    def start(self) -> None:
        """Begin a step; one that was begun and never stopped, because it failed, is forgotten."""
        self._since = self._clock()

    def stop(self, global_step: bool = True, report_speed: bool = False) -> None:
        """End a step, or (not ``global_step``) a part of it, which goes on. Raises UsageError when none was begun.

        ``report_speed`` is accepted: nothing is printed from here.
        """
        if self._since is None:
            raise UsageError("the throughput timer is not running", fix="call start() first")
        if not global_step:
            return
        seconds, self._since = self._clock() - self._since, None
        self.global_step_count += 1
        # Not even counted: a first step of minutes would stay in the mean of a whole run.
        if self._skip > 0:
            self._skip -= 1
            return
        self._steps += 1
        self._seconds = self._seconds[0] + seconds, seconds

    def avg_samples_per_sec(self) -> float:
        """-inf before the first counted step."""
        return self.stats().samples_per_second if self._steps else -math.inf

    def stats(self) -> Throughput:
        total, last = self._seconds
        rate = self._steps * self.batch_size / total if total else 0.0
        flops = self.flops_per_sample
        return Throughput(
            steps=self._steps,
            seconds=total,
            samples_per_second=rate,
            last_samples_per_second=self.batch_size / last if last else 0.0,
            tflops=None if flops is None else rate * flops / 1e12,
        )
