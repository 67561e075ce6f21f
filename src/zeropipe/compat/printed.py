"""What DeepSpeed prints while it trains, in its words, for scripts and tools that read it from the output."""

from __future__ import annotations

import sys
import time

from rich.console import Console

from zeropipe.accelerator import get_accelerator
from zeropipe.runtime.engine.report import Progress


def print_progress(progress: Progress) -> None:
    """One line of a pipeline, or the two of another engine; on standard output, whatever the log's level is."""
    # A console of now: the program, or a test, may have exchanged standard output since the last line.
    console = Console(file=sys.stdout, soft_wrap=True, highlight=False, markup=False, emoji=False)
    if progress.pipeline:
        loss = float("nan") if progress.loss is None else progress.loss
        console.print(
            f"steps: {progress.step} loss: {loss:0.4f} iter time (s): {progress.seconds:0.3f} "
            f"samples/sec: {progress.samples_per_second:0.3f}"
        )
        return
    head = time.strftime("[%Y-%m-%d %H:%M:%S] [INFO]")
    console.print(
        f"{head} [Rank 0] step={progress.step}, skipped={progress.skipped}, lr={progress.rates}, "
        f"mom={progress.momenta}"
    )
    timer = progress.throughput
    if timer.stats().steps:
        words = get_accelerator()
        console.print(
            f"{head} [Rank 0] epoch={timer.epoch_count}/micro_step={timer.global_step_count}/"
            f"global_step={timer.global_step_count}, RunningAvgSamplesPerSec={timer.avg_samples_per_sec():.4f}, "
            f"CurrSamplesPerSec={timer.stats().last_samples_per_second:.4f}, "
            f"MemAllocated={words.memory_allocated() / 2**30:.2f}GB, "
            f"MaxMemAllocated={words.max_memory_allocated() / 2**30:.2f}GB"
        )
