"""The sections of the configuration by which a run is watched: scalars, timers, operations, collectives."""

from __future__ import annotations

from typing import Any

from zeropipe.config.fields import Count, Real, Section, key


class TensorBoard(Section):
    """Write scalars for TensorBoard (extra: zeropipe[tensorboard])."""

    enabled: bool = key(False, "Turn it on.")
    output_path: str = key("", "Folder; empty: runs/.")
    job_name: str = key("DeepSpeedJobName", "Folder of this run inside output_path.")


class Wandb(Section):
    """Send scalars to Weights & Biases (extra: zeropipe[wandb])."""

    enabled: bool = key(False, "Turn it on.")
    group: str | None = key(None, "Group of runs.")
    team: str | None = key(None, "Team that owns the project.")
    project: str = key("deepspeed", "Project.")


class CsvMonitor(Section):
    """Write one CSV file per scalar."""

    enabled: bool = key(False, "Turn it on.")
    output_path: str = key("", "Folder; empty: csv_monitor/.")
    job_name: str = key("DeepSpeedJobName", "Folder of this run inside output_path.")


class Report(Section):
    """Leave a record of the run, which ``zeropipe report`` makes a page of."""

    folder: str | None = key(None, "Folder of the record, one file for each rank; unset: none is left.")
    every: Count = key(1, "Optimizer steps between two that are recorded.", ge=1)


class Watchdog(Section):
    """Names a rank that is alive and stuck, with its stack and what each rank waits for."""

    seconds: Real | None = key(
        None,
        "A rank that has not moved for so long is named before they are over; unset: nobody watches.",
        gt=0,
    )
    end: bool = key(False, "End the run then, on every rank, with exit code 124.")


class CommsLogger(Section):
    """Counts, bytes and time of collectives, shown by ``zeropipe.comm.log_summary()``."""

    enabled: bool = key(False, "Turn it on, for the whole process.")
    prof_all: bool = key(True, "Log all operations.")
    prof_ops: list[Any] = key([], "Operations to log when prof_all is false.")
    verbose: bool = key(False, "Accepted; zeropipe.comm.record() has each one.")
    debug: bool = key(False, "Accepted; each one has a label that says what it is for.")


class FlopsProfiler(Section):
    """Operations, parameters and time of each module in one forward, told by rank 0."""

    enabled: bool = key(False, "Profile one forward.")
    profile_step: Count = key(1, "Steps that are over when it is profiled.", ge=0)
    module_depth: Count = key(-1, "Depth down to which modules are listed; -1: all.", ge=-1)
    top_modules: Count = key(1, "Classes that are named for each depth.", ge=0)
    detailed: bool = key(True, "List each module.")
    recompute_fwd_factor: Real = key(
        0.0, "How much of a forward the backward does again (activation checkpointing).", ge=0
    )
    output_file: str | None = key(None, "File to write to; unset: it is printed.")


class ThroughputTimer(Section):
    """Samples per second and TFLOP/s."""

    enabled: bool = key(True, "Measure throughput when steps_per_print asks for it.")
    synchronized: bool = key(True, "Synchronize the device around each measurement.")


class Timers(Section):
    """Timers of the engine."""

    throughput: ThroughputTimer = key(ThroughputTimer(), "Samples per second and TFLOP/s.")
