"""What an engine tells while it trains, where the config asks for it: log lines, timings, scalars for a monitor.

Silent by default, and then it costs nothing: no timer is started and no scalar is read from the device.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from zeropipe.config.schema import Config
from zeropipe.runtime.engine.clock import Clock
from zeropipe.runtime.engine.memory import MemoryRow
from zeropipe.runtime.monitor import MonitorMaster
from zeropipe.runtime.timers import PhaseTimers, ThroughputTimer, wall_clock_breakdown

_log = logging.getLogger("zeropipe")
_SILENT: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True, slots=True)
class Status:
    """What can be told of the engine after a step; read only where something is told."""

    lr: list[float]
    loss_scale: float
    grad_norm: float | None
    memory: Callable[[], tuple[MemoryRow, ...]]


class Reporter:
    """Tells of one engine. ``first``: whether this is the rank that tells."""

    def __init__(self, config: Config, clock: Clock, device: torch.device, first: bool) -> None:
        self._clock = clock
        self._device = device
        every = config.steps_per_print
        self._every = int(every) if first and every is not None and math.isfinite(every) else 0
        self._memory = first and config.memory_breakdown
        self._timers = PhaseTimers(device) if first and config.wall_clock_breakdown else None
        if first and config.dump_state:
            changed = ", ".join(f"{key} {value!r}" for key, value in config.settings(changed=True).items())
            _log.info("engine on %s, batch %s; settings: %s", device, clock.batch, changed)
        self.monitor = MonitorMaster(config, enabled=first)
        self.throughput: ThroughputTimer | None = None
        if self._every and config.timers.throughput.enabled:
            waits = config.timers.throughput.synchronized
            self.throughput = ThroughputTimer(clock.batch.train_batch_size, device=device if waits else None)
        self.listens = bool(self._every or self._memory or self._timers or self.monitor.enabled)
        self._losses: list[torch.Tensor] = []  # of this rank's micro-steps since the last step
        self._in_step = False

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Around one phase of a micro-step: it is timed where ``wall_clock_breakdown`` asks for it."""
        if not self._in_step and self.throughput is not None:
            self._in_step = True
            self.throughput.start()
        return _SILENT if self._timers is None else self._timers(name)

    def loss(self, loss: torch.Tensor) -> None:
        if self.listens:
            self._losses.append(loss.detach())

    def stepped(self, status: Callable[[], Status]) -> None:
        """After an optimizer step was tried."""
        if not self.listens:
            return
        if self.throughput is not None and self._in_step:
            self.throughput.batch_size = self._clock.batch.train_batch_size
            self.throughput.stop()
        self._in_step = False
        losses, self._losses = self._losses, []
        step = self._clock.global_steps
        now = status()
        loss = torch.stack([x.float().cpu() for x in losses]).mean().item() if losses else None
        if self.monitor.enabled:
            self._write(now, loss)
        if self._every and step % self._every == 0:
            _log.info("%s", self._line(now, loss))
        if self._timers is not None:
            _log.info("step %d: %s", step, wall_clock_breakdown(self._timers.times()))
        if self._memory:
            _log.info("step %d: %s; %s", step, "; ".join(map(str, now.memory())), self._allocated())

    def close(self) -> None:
        self.monitor.close()

    def _write(self, now: Status, loss: float | None) -> None:
        at = self._clock.global_samples
        events: list[tuple[str, float, int]] = []
        if loss is not None:
            events.append(("Train/Samples/train_loss", loss, at))
        if now.lr:
            events.append(("Train/Samples/lr", now.lr[0], at))
        events.append(("Train/Samples/loss_scale", now.loss_scale, at))
        if now.grad_norm is not None:
            events.append(("Train/Samples/grad_norm", now.grad_norm, at))
        self.monitor.write_events(events)

    def _line(self, now: Status, loss: float | None) -> str:
        parts = [f"step {self._clock.global_steps}", f"skipped {self._clock.skipped_steps}"]
        parts.append("lr " + ", ".join(f"{lr:.4g}" for lr in now.lr))
        if loss is not None:
            parts.append(f"loss {loss:.5g} (this rank)")
        if now.loss_scale != 1.0:
            parts.append(f"loss scale {now.loss_scale:g}")
        if self.throughput is not None and self.throughput.stats().steps:
            parts.append(str(self.throughput.stats()))
        return " | ".join(parts)

    def _allocated(self) -> str:
        if self._device.type != "cuda":
            return "the process's own figures are the system's (resident memory)"
        allocated, peak = (
            torch.cuda.memory_allocated(self._device),
            torch.cuda.max_memory_allocated(self._device),
        )
        return f"allocated {allocated:,} B, at most {peak:,} B"
