"""The record of a run: one file of JSON lines for each rank, written as the run goes on, so that a crash leaves it.

    start   when, rank, world, settings, environment, parameters
    step    once for every so many steps: what a monitor gets, and seconds, memory, bytes by collective
    phases  now and then: what this rank did in one step, in seconds since it began
    grid    now and then, of a pipeline: each instruction of a batch, as this rank ran it and as it was planned
    save    a checkpoint that was saved
    end     the engine was destroyed

A line is whole or it is the last: who reads drops one that is torn. A run that goes on appends, with a ``start`` of its
own. ``reporting/record.py`` reads it.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO
from weakref import WeakMethod, finalize

import torch

from zeropipe.comm.agreement import together
from zeropipe.comm.group import world
from zeropipe.comm.host.exposed import borrowed
from zeropipe.comm.record import SEAM, Event
from zeropipe.errors import ConfigError
from zeropipe.reporting.drawing import write
from zeropipe.reporting.page import run_page
from zeropipe.reporting.record import read
from zeropipe.runtime.engine.parts import Parts
from zeropipe.runtime.pipe.executor import Executor
from zeropipe.runtime.pipe.instructions import computes
from zeropipe.runtime.pipe.simulate import simulate

_log = logging.getLogger("zeropipe")
_TORCHRUN = ("LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
_PHASES_EVERY = 50  # recorded steps
_MOST_PHASES = 4096  # of one step: what only evaluates never steps


class Recorder:
    """Follows one engine (a ``Watcher`` of its reporter) and writes what it sees.

    Raises ConfigError, on all ranks, where one cannot write to the folder; collective. Where writing fails later (a
    full disk) a warning says so once, and training goes on without a record.
    """

    def __init__(self, parts: Parts, folder: str, every: int) -> None:
        self._parts, self._every = parts, every
        everyone = world()
        self._folder = Path(folder)
        path = self._folder / f"record-{everyone.ranks[everyone.rank]:05d}.jsonl"

        def opened() -> TextIO:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("a", encoding="utf-8")

        # A folder that only one rank cannot write to would leave the others waiting for it.
        what = "config key 'report.folder' cannot be written to"
        file, errors = together(everyone, "the record of the run", opened, what, "name another folder")
        if errors or file is None:
            raise ConfigError("; ".join(errors))
        self._file = file

        # Since the last step that was recorded.
        self._since = time.perf_counter()
        self._sent: Counter[str] = Counter()
        # What the last step left on the device: it is read with the next one, when it is there without waiting.
        self._late: tuple[dict[str, Any], list[torch.Tensor], torch.Tensor | float | None] | None = None

        # Of the step that runs: (phase, begin, end), seconds of this process's clock.
        self._phases: deque[tuple[str, float, float]] = deque(maxlen=_MOST_PHASES)
        self._began = 0.0
        self._steps = 0

        # An engine that is forgotten without ``destroy`` takes its record along.
        heard = WeakMethod(self._heard)

        def listener(event: Event) -> None:
            method = heard()
            if method is not None:
                method(event)

        SEAM.listeners.append(listener)
        self._deafen = finalize(self, SEAM.listeners.remove, listener)
        self._write("start", self._start(everyone.size))

    def _start(self, size: int) -> dict[str, Any]:
        parts = self._parts
        device = parts.device
        params = list(parts.module.parameters())
        return {
            "world": size,
            "settings": {key: _plain(value) for key, value in parts.config.settings().items()},
            "changed": sorted(parts.config.settings(changed=True)),
            "batch": str(parts.clock.batch),
            "parameters": sum(int(getattr(param, "ds_numel", param.numel())) for param in params),
            "step": parts.clock.global_steps,
            "environment": {
                "host": platform.node(),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "command": " ".join(sys.argv)[:500],
                **{name: os.environ[name] for name in _TORCHRUN if name in os.environ},
            },
        }

    def _heard(self, event: Event) -> None:
        if event.bytes and event.group_size > 1:
            self._sent[event.op] += event.bytes

    # As a watcher.

    def began(self, phase: str) -> None:
        self._began = time.perf_counter()

    def ended(self, phase: str) -> None:
        self._phases.append((phase, self._began, time.perf_counter()))

    def ran(self, pipeline: Executor) -> None:
        """A batch of a pipeline is over."""
        if self._steps % _PHASES_EVERY != 1:
            return
        first = min((event.start for event in pipeline.events), default=0.0)
        rank = pipeline.events[0].rank if pipeline.events else 0
        ran = [[str(e.step), e.start - first, e.end - first] for e in pipeline.events]
        mine = (e for e in simulate(pipeline.schedule).events if e.rank == rank and computes(e.step))
        planned = [[str(e.step), e.start, e.end] for e in mine]
        self._write(
            "grid", {"rank": rank, "step": self._parts.clock.global_steps + 1, "ran": ran, "planned": planned}
        )

    def stepped(self, losses: Sequence[torch.Tensor]) -> None:
        clock, optimizer = self._parts.clock, self._parts.optimizer
        phases = list(self._phases)
        self._phases.clear()
        if clock.global_steps % self._every or optimizer is None:
            return
        self._settle()
        now = time.perf_counter()
        row = {
            "step": clock.global_steps,
            "samples": clock.global_samples,
            "skipped": clock.skipped_steps,
            "seconds": (now - self._since) / self._every,
            "lr": [group["lr"] for group in optimizer.param_groups],
            "loss_scale": float(optimizer.loss_scale),
            "memory": _memory(self._parts.device),
            "sent": dict(self._sent),
        }
        self._since = now
        self._sent.clear()
        self._late = row, list(losses), optimizer.unread_norm
        # On a CPU nothing waits, and a record that is up to date says more after a crash.
        if self._parts.device.type == "cpu":
            self._settle()
        if self._steps % _PHASES_EVERY == 1 and phases:
            first = phases[0][1]
            spans = [[name, begin - first, end - first] for name, begin, end in phases]
            self._write("phases", {"step": clock.global_steps, "phases": spans})
        self._steps += 1

    def _settle(self) -> None:
        """Write the step that was left, with the values that it has by now."""
        if self._late is None:
            return
        (row, losses, norm), self._late = self._late, None
        row["loss"] = torch.stack([x.float() for x in losses]).mean().item() if losses else None
        row["grad_norm"] = None if norm is None else float(norm)
        self._write("step", row)

    def saved(self, folder: str, tag: str, seconds: float) -> None:
        """A checkpoint was saved."""
        self._write(
            "save", {"folder": folder, "tag": tag, "seconds": seconds, "step": self._parts.clock.global_steps}
        )

    def page(self, path: Path) -> None:
        """Write the page of the run so far."""
        self._settle()
        write(run_page(read(self._folder)), path)

    def close(self) -> None:
        """The engine is destroyed; the record is whole."""
        if self._file.closed:
            return
        self._settle()
        self._write("end", {"step": self._parts.clock.global_steps})
        self._file.close()
        self._deafen()

    def _write(self, kind: str, row: dict[str, Any]) -> None:
        if self._file.closed:
            return
        # In one call and at once: what is in the system's hands survives this process.
        try:
            self._file.write(json.dumps({"kind": kind, "time": time.time(), **row}) + "\n")
            self._file.flush()
        except OSError as error:
            # A full disk is no reason to stop training, and one rank alone that stops would leave the others waiting.
            _log.warning("the record in %s ends here: %s", self._folder, error)
            with suppress(OSError):
                self._file.close()


def _memory(device: torch.device) -> dict[str, int]:
    """Bytes now, and at most so far: of the device's allocator, or of the process where there is none."""
    if device.type == "cuda":
        return {"now": torch.cuda.memory_allocated(device), "peak": torch.cuda.max_memory_allocated(device)}
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return {}
    rows = dict(
        line.split(":", 1) for line in text.splitlines() if line.startswith(("VmRSS", "VmHWM", "RssShmem"))
    )
    nbytes = {key: int(value.split()[0]) * 1024 for key, value in rows.items()}
    # What ranks of one host read in each other's memory is resident in all of them, and counts where it is.
    others = min(borrowed(), nbytes["RssShmem"])
    return {"now": nbytes["VmRSS"] - others, "peak": nbytes["VmHWM"] - others}


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | type(None)) else str(value)
