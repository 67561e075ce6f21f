"""What an engine tells while it trains, where the config asks for it: log lines, timings, scalars for a monitor.

Silent by default, and then it costs nothing: no timer is started and no scalar is read from the device.
"""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager, nullcontext

import torch

from zeropipe.runtime.engine.memory import memory_report
from zeropipe.runtime.engine.parts import Parts
from zeropipe.runtime.monitor import MonitorMaster
from zeropipe.runtime.timers import PhaseTimers, ThroughputTimer, wall_clock_breakdown

_log = logging.getLogger("zeropipe")
_SILENT: AbstractContextManager[None] = nullcontext()


class Reporter:
    """Tells of one engine, on the first of its ranks."""

    def __init__(self, parts: Parts) -> None:
        config, first = parts.config, parts.first
        self._parts, self._clock, self._device = parts, parts.clock, parts.device

        # What the config asks for.
        every = config.steps_per_print
        self._every = int(every) if first and every is not None and math.isfinite(every) else 0
        self._memory = first and config.memory_breakdown
        self._timers = PhaseTimers(self._device) if first and config.wall_clock_breakdown else None
        self.monitor = MonitorMaster(config, enabled=first)
        self.throughput: ThroughputTimer | None = None
        if self._every and config.timers.throughput.enabled:
            waits = config.timers.throughput.synchronized
            self.throughput = ThroughputTimer(
                self._clock.batch.train_batch_size, device=self._device if waits else None
            )
        self.listens = bool(self._every or self._memory or self._timers or self.monitor.enabled)

        # Since the last step.
        self._losses: list[
            torch.Tensor
        ] = []  # of this rank's micro-steps, left where they are: reading one waits
        self._in_step = False

        if first and config.dump_state:
            changed = ", ".join(f"{key} {value!r}" for key, value in config.settings(changed=True).items())
            _log.info("engine on %s, batch %s; settings: %s", self._device, self._clock.batch, changed)

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Around one phase of a micro-step: it is timed where ``wall_clock_breakdown`` asks for it."""
        if not self._in_step and self.throughput is not None:
            self._in_step = True
            self.throughput.start()
        return _SILENT if self._timers is None else self._timers(name)

    def loss(self, loss: torch.Tensor) -> None:
        if self.listens:
            self._losses.append(loss.detach())

    def stepped(self) -> None:
        """After an optimizer step was tried."""
        optimizer = self._parts.optimizer
        if not self.listens or optimizer is None:
            return
        if self.throughput is not None and self._in_step:
            self.throughput.batch_size = self._clock.batch.train_batch_size
            self.throughput.stop()
        self._in_step = False
        losses, self._losses = self._losses, []
        step = self._clock.global_steps
        rates = [group["lr"] for group in optimizer.param_groups]
        loss = torch.stack([x.float().cpu() for x in losses]).mean().item() if losses else None
        if self.monitor.enabled:
            told = {
                "train_loss": loss,
                "lr": rates[0] if rates else None,
                "loss_scale": optimizer.loss_scale,
                "grad_norm": optimizer.grad_norm,
            }
            at = self._clock.global_samples
            self.monitor.write_events(
                [(f"Train/Samples/{name}", value, at) for name, value in told.items() if value is not None]
            )
        if self._every and step % self._every == 0:
            _log.info("%s", self._line(rates, optimizer.loss_scale, loss))
        if self._timers is not None:
            _log.info("step %d: %s", step, wall_clock_breakdown(self._timers.times()))
        if self._memory:
            rows = "; ".join(map(str, memory_report(self._parts.module, optimizer)))
            _log.info("step %d: %s; %s", step, rows, self._allocated())

    def close(self) -> None:
        self.monitor.close()

    def _line(self, rates: list[float], loss_scale: float, loss: float | None) -> str:
        parts = [f"step {self._clock.global_steps}", f"skipped {self._clock.skipped_steps}"]
        parts.append("lr " + ", ".join(f"{lr:.4g}" for lr in rates))
        if loss is not None:
            parts.append(f"loss {loss:.5g} (this rank)")
        if loss_scale != 1.0:
            parts.append(f"loss scale {loss_scale:g}")
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
