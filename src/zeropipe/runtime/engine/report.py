"""What an engine tells while it trains, where the config asks for it: log lines, timings, scalars for a monitor; and,
when it is asked, what it holds on its device beside what the stage's formula allows.

Silent by default, and then it costs two readings of the clock a step: no scalar is read from the device. In a process
that knows zeropipe as ``deepspeed`` a line is also printed, every 10 steps or as the config says, in the words that
scripts look for there.

The formula is the one of the table "memory and traffic" in ``docs/architecture.md`` (P parameters, N ranks),
with the layout's padding included, so that a ratio other than 1 is memory that nobody planned.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from zeropipe.comm.record import SEAM
from zeropipe.errors import UsageError
from zeropipe.runtime.engine.parts import Parts
from zeropipe.runtime.engine.profile import ScheduledProfile
from zeropipe.runtime.engine.recorder import Recorder
from zeropipe.runtime.monitor import MonitorMaster
from zeropipe.runtime.optimizers.state_kinds import split_state, state_keys
from zeropipe.runtime.pipe.executor import Executor
from zeropipe.runtime.resilience.watchdog import WATCHDOG, Watch
from zeropipe.runtime.timers import PhaseTimers, ThroughputTimer, wall_clock_breakdown
from zeropipe.runtime.zero.hold.autograd import AbsentGradient
from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer
from zeropipe.runtime.zero.hold.partition import Partition

_log = logging.getLogger("zeropipe")
_Moved = TypeVar("_Moved")
_SILENT: AbstractContextManager[None] = nullcontext()
_PRINTED_EVERY = 10  # steps, under the name deepspeed, unless the config says otherwise
_ADAM_MOMENTS = 2  # state that an Adam-like optimizer keeps per element, before it has made any


def momenta(param_groups: Iterable[Mapping[str, Any]]) -> list[Any]:
    """The momentum of each param group, as its optimizer names it: ``betas``, or a number; 0 where there is none."""
    return [group.get("betas", group.get("momentum", 0)) for group in param_groups]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an engine has come, for whoever prints it."""

    step: int
    skipped: int
    rates: list[float]  # by param group
    momenta: list[Any]  # by param group
    loss: float | None  # of the last step; None where a plain backward kept it from us
    seconds: float  # of a step, on average since the last line
    samples_per_second: float  # likewise
    pipeline: bool
    throughput: ThroughputTimer


class Watcher(Protocol):
    """Who follows an engine through its steps."""

    def began(self, phase: str) -> None:
        """``forward``, ``backward`` or ``step``."""

    def ended(self, phase: str) -> None: ...
    def stepped(self, losses: Sequence[torch.Tensor]) -> None:
        """An optimizer step was tried; ``losses`` are this rank's, of its micro-steps, where they are kept."""


class Reporter:
    """Tells of one engine, on the first of its ranks."""

    def __init__(self, parts: Parts, pipeline: bool = False) -> None:
        config, first = parts.config, parts.first
        self._parts, self._clock, self._device, self._pipeline = parts, parts.clock, parts.device, pipeline

        # What the config asks for. Whoever is at home under the name deepspeed prints, and does so unasked.
        printer = getattr(sys.modules.get("deepspeed"), "__zeropipe_prints__", None)
        self._print: Callable[[Progress], None] | None = printer if first else None
        every = config.steps_per_print
        self.steps_per_print = _PRINTED_EVERY if every is None and printer is not None else every
        self._every = self._steps(self.steps_per_print) if first else 0
        self._logs = every is not None
        self._memory = first and config.memory_breakdown
        self._timers = PhaseTimers(self._device) if first and config.wall_clock_breakdown else None
        # A rehearsal leaves nothing behind: it would go on in the files of the run that it rehearses.
        imagined = parts.group.imagined
        self.monitor = MonitorMaster(config, enabled=first and not imagined)
        # Nobody's device is waited for unless a line is asked for.
        self._rates = bool(self._every and self._logs and config.timers.throughput.enabled)
        waits = self._rates and config.timers.throughput.synchronized
        self.throughput = ThroughputTimer(
            self._clock.batch.train_batch_size, device=self._device if waits else None
        )
        self._profile = ScheduledProfile(parts)
        self.listens = bool(self._every or self._memory or self._timers or self.monitor.enabled)

        # Where steps have slots what is told of their losses is the mean of all, to which every rank adds its own.
        monitors = config.csv_monitor.enabled or config.tensorboard.enabled or config.wandb.enabled
        told = monitors or self._steps(self.steps_per_print) > 0
        self._turn = parts.optimizer.turn if parts.optimizer is not None and told and not pipeline else None
        self._of_slots: dict[int, torch.Tensor] = {}

        # The record is one of every rank; a watcher that somebody brings later is told nothing of losses.
        self._watchers: list[Watcher] = []
        self.recorder: Recorder | None = None
        if config.report.folder is not None and not imagined:
            self.recorder = Recorder(parts, config.report.folder, config.report.every)
            self.watch(self.recorder)
        self._watchdog: Watch | None = None
        guard, clock = config.watchdog, self._clock
        if guard.seconds is not None and not imagined:
            self._watchdog = WATCHDOG.follow(guard.seconds, guard.end, lambda: clock.global_steps)
            self.watch(self._watchdog)

        section = config.comms_logger
        if section.enabled:
            SEAM.log.start(None if section.prof_all else section.prof_ops)

        # Since the last step. Losses, of this rank's micro-steps, are left where they are: reading one waits for it.
        self._losses: list[torch.Tensor] = []
        self._in_step = False
        self._printed: tuple[int, float] | None = None  # the step and the time of the last line

        if first and config.dump_state:
            changed = ", ".join(f"{key} {value!r}" for key, value in config.settings(changed=True).items())
            _log.info("engine on %s, batch %s; settings: %s", self._device, self._clock.batch, changed)

    @staticmethod
    def _steps(every: float | None) -> int:
        return int(every) if every is not None and math.isfinite(every) else 0

    def __call__(self, path: str | os.PathLike[str]) -> None:
        """Write the page of the run so far, on the first rank: ``engine.report("report.html")``.

        Raises UsageError where the config has no ``report.folder``, ConfigError where plotly is missing.
        """
        if self.recorder is None:
            raise UsageError(
                "engine.report: this run leaves no record",
                fix='set "report": {"folder": "..."} in the configuration',
            )
        if self._parts.first:
            self.recorder.page(Path(path))

    def saved(self, folder: str, tag: str, seconds: float) -> None:
        """A checkpoint was saved, or is being saved beside the training."""
        if self.recorder is not None:
            self.recorder.saved(folder, tag, seconds)

    def close(self) -> None:
        """The engine is destroyed."""
        self.monitor.close()
        if self._watchdog is not None:
            self._watchdog.close()
        if self.recorder is not None:
            self.recorder.close()

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Around one phase of a micro-step: it is timed where ``wall_clock_breakdown`` asks for it."""
        # A step lasts from the first phase of its first micro-step on: what a program does before is none of it.
        if not self._in_step:
            self._in_step = True
            self.throughput.start()
            self._printed = self._printed or (self._clock.global_steps, time.perf_counter())
        if name == "forward" and self._profile.due:
            return self._profile.running()  # of which a timer would not tell the truth
        if self._watchers:
            return self._watched(name)
        return _SILENT if self._timers is None else self._timers(name)

    def files(self, what: str, move: Callable[[], _Moved]) -> _Moved:
        """``move``, which moves files: it may take long, as long as it moves them."""
        if self._watchdog is None:
            return move()
        self._watchdog.began_files(what)
        try:
            return move()
        finally:
            self._watchdog.ended(what)

    def watch(self, watcher: Watcher) -> None:
        """Tell ``watcher`` too, from now on."""
        self._watchers.append(watcher)

    @contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        for watcher in self._watchers:
            watcher.began(name)
        try:
            with _SILENT if self._timers is None else self._timers(name):
                yield
        finally:
            for watcher in self._watchers:
                watcher.ended(name)

    def loss(self, loss: torch.Tensor, pipeline: Executor | None = None) -> None:
        """``loss`` of a micro-step, or of the whole batch that ``pipeline`` has just run."""
        if self.recorder is not None and pipeline is not None:
            self.recorder.ran(pipeline)
        if self._turn is not None and self._turn.slot is not None:
            self._of_slots[self._turn.slot] = loss.detach()
        if self.listens or self.recorder is not None:
            self._losses.append(loss.detach())

    def stepped(self) -> None:
        """After an optimizer step was tried."""
        for watcher in self._watchers:
            watcher.stepped(self._losses)
        self._profile.tell()
        optimizer = self._parts.optimizer
        if self.throughput.running:
            self.throughput.batch_size = self._clock.batch.train_batch_size
            self.throughput.stop()
        self._in_step = False
        losses, self._losses = self._losses, []
        mean = None if self._turn is None else self._turn.mean(self._of_slots)
        self._of_slots.clear()
        if not self.listens or optimizer is None:
            return
        step = self._clock.global_steps
        due = self._every > 0 and step % self._every == 0
        rates = [group["lr"] for group in optimizer.param_groups]
        loss = None
        # Only now are scalars read, which waits for the device: once a step at most, and only where somebody listens.
        if losses and (due or self.monitor.enabled):
            loss = torch.stack([x.float() for x in losses]).mean().item() if mean is None else mean
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
        if due and self._logs:
            _log.info("%s", self._line(rates, optimizer.loss_scale, loss))
        if due and self._print is not None:
            self._print(self._progress(optimizer, rates, loss))
        if self._timers is not None:
            _log.info("step %d: %s", step, wall_clock_breakdown(self._timers.times()))
        if self._memory:
            rows = "; ".join(map(str, memory_report(self._parts.module, optimizer)))
            _log.info("step %d: %s; %s", step, rows, self._allocated())

    def _progress(self, optimizer: ZeroOptimizer, rates: list[float], loss: float | None) -> Progress:
        # The loss has been read by now, so the device has done what is counted.
        step, now = self._clock.global_steps, time.perf_counter()
        since, then = self._printed or (step, now)
        self._printed = step, now
        seconds = (now - then) / max(1, step - since)
        rate = self._clock.batch.train_batch_size / seconds if seconds else 0.0
        moved = momenta(optimizer.param_groups)
        skipped = self._clock.skipped_steps
        return Progress(step, skipped, rates, moved, loss, seconds, rate, self._pipeline, self.throughput)

    def _line(self, rates: list[float], loss_scale: float, loss: float | None) -> str:
        parts = [f"step {self._clock.global_steps}", f"skipped {self._clock.skipped_steps}"]
        parts.append("lr " + ", ".join(f"{lr:.4g}" for lr in rates))
        if loss is not None:
            parts.append(f"loss {loss:.5g} ({'this rank' if self._turn is None else 'all slots'})")
        if loss_scale != 1.0:
            parts.append(f"loss scale {loss_scale:g}")
        if self._rates and self.throughput.stats().steps:
            parts.append(str(self.throughput.stats()))
        return " | ".join(parts)

    def _allocated(self) -> str:
        if self._device.type != "cuda":
            return "the process's own figures are the system's (resident memory)"
        now, peak = torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device)
        return f"allocated {now:,} B, at most {peak:,} B"


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """``kind``: ``parameters``, ``gradients`` or ``optimizer state`` (masters that are copies, and moments)."""

    kind: str
    bytes: int  # live on this rank; the storage that views share counts once
    formula: int  # what the stage promises, padding included

    @property
    def ratio(self) -> float:
        """Live over promised bytes; 1.0 where both are 0."""
        if self.formula == 0:
            return 1.0 if self.bytes == 0 else float("inf")
        return self.bytes / self.formula

    def __str__(self) -> str:
        return f"{self.kind} {self.bytes:,} B (formula {self.formula:,} B, ratio {self.ratio:.4f})"


def memory_report(module: torch.nn.Module, optimizer: ZeroOptimizer | None) -> tuple[MemoryRow, ...]:
    """The three rows for an engine's module and optimizer; before the first step there are no moments yet."""
    params, partitions = list(module.parameters()), [] if optimizer is None else optimizer.partitions
    trained = {id(param) for partition in partitions for param in partition.params}
    others = sum(p.numel() * p.element_size() for p in params if id(p) not in trained)
    kept = [tensor for partition in partitions for tensor in partition.values.stored()[0]]
    # In this order: what a view of a parameter's memory is (a master in fp32) counts as the parameter.
    counted: set[int] = set()
    live = [_bytes([*params, *kept], counted), 0, 0]
    promised = [others, 0, 0]
    if optimizer is not None:
        live[1:] = [_bytes(held(optimizer, params), counted) for held in (_gradients, _state)]
        budgets = [_budget(optimizer, partition) for partition in partitions]
        promised = [sum(column) for column in zip(promised, *budgets, strict=True)]
    kinds = ("parameters", "gradients", "optimizer state")
    return tuple(MemoryRow(*row) for row in zip(kinds, live, promised, strict=True))


def owned(module: torch.nn.Module, optimizer: ZeroOptimizer | None) -> dict[str, list[torch.Tensor]]:
    """The tensors that an engine holds from step to step, by kind; one that is a view of another counts as the last."""
    params, partitions = list(module.parameters()), [] if optimizer is None else optimizer.partitions
    masters = [partition.master.detach() for partition in partitions]
    kept = [tensor for partition in partitions for tensor in partition.values.stored()[0]]
    found = {"masters": masters, "buffers": list(module.buffers()), "parameters": [*params, *kept]}
    if optimizer is not None:
        keys = state_keys(optimizer.optimizer)
        states = optimizer.optimizer.state.values()
        found["moments"] = [tensor for state in states for tensor in split_state(state, keys)[0].values()]
        found["gradients"] = list(_gradients(optimizer, params))
    return found


def _budget(optimizer: ZeroOptimizer, partition: Partition) -> tuple[int, int, int]:
    """Bytes of the partition's parameters, gradients and optimizer state on this rank."""
    own, whole = partition.master.numel(), partition.values.whole_numel
    accumulated = (optimizer.policy.accumulate_dtype or partition.dtype).itemsize
    _, values, copied = partition.values.stored()
    grads = (own if optimizer.policy.shards_gradients else whole) * accumulated
    # Before the first step there are none to count; what Adam will make is promised all the same.
    moments = len(partition.state.keys())
    if not optimizer.optimizer.state:
        moments = _ADAM_MOMENTS if "betas" in optimizer.defaults else 0
    width = optimizer.policy.state_dtype(partition.dtype).itemsize
    return values, grads, own * (width * moments + partition.master.element_size() * copied)


def _gradients(optimizer: ZeroOptimizer, params: Iterable[torch.nn.Parameter]) -> Iterator[torch.Tensor]:
    for store in optimizer.reducer.stores:
        yield store.shard
        yield from store.held
    for param in params:
        if param.grad is not None and not isinstance(param.grad, AbsentGradient):
            yield param.grad


def _state(optimizer: ZeroOptimizer, params: Iterable[torch.nn.Parameter]) -> Iterator[torch.Tensor]:
    for partition in optimizer.partitions:
        yield partition.master.detach()
    keys = state_keys(optimizer.optimizer)
    for state in optimizer.optimizer.state.values():
        yield from split_state(state, keys)[0].values()


def _bytes(tensors: Iterable[torch.Tensor], counted: set[int]) -> int:
    """Bytes of the storages behind ``tensors`` that are not in ``counted`` yet, and are added to it."""
    total = 0
    for tensor in tensors:
        # A sparse gradient has no storage; of it the values count.
        if tensor.layout != torch.strided:
            total += tensor._values().numel() * tensor.element_size()
            continue
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total
