"""What a real run of a case takes on each of its ranks, measured in ways that know nothing of each other.

allocated   torch's own allocator, as its profiler is told of every block, kernels' scratch among them
resident    pages of the process (VmHWM) above those that a tiny engine of the same kind leaves
limited     whether it trains at all where the process may have no more than that
"""

import ctypes
import gc
import resource
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.memory import peak_resident, reset_peak, resident
from benchmarks.common.model import Size
from benchmarks.plan.cases import RANKS, Case, begin
from benchmarks.plan.watching import allocated_peak
from zeropipe.errors import UsageError
from zeropipe.planning.crew import crew
from zeropipe.runtime.engine.report import memory_report

TINY = Size(layers=2, width=32, heads=2, vocabulary=64, context=8, micro_batch=1)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, AT_ONCE = (
    -1,
    -3,
    65536,
)  # of mallopt(3): blocks from 64 kB on go back when freed


@dataclass(frozen=True)
class Run:
    """Of one rank: bytes, and seconds of each step."""

    states: int
    allocated: int
    grown: int
    base: int
    seconds: list[float]


def _give_back() -> None:
    """As MALLOC_MMAP_THRESHOLD_ in the environment of a process that has begun already."""
    for key in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        ctypes.CDLL(None).mallopt(key, AT_ONCE)


def warm(case: Case, folder: str) -> None:
    """Train a tiny engine of the same kind, and leave nothing of it but what its process now has."""
    torch.set_num_threads(1)
    engine, step = begin(replace(case, size=TINY), folder)
    for _ in range(2):
        step()
    engine.destroy()
    del engine, step
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def run(rank: int, case: Case, folder: str, steps: int, tight: bool, profiled: bool) -> Run:
    """Train ``case``; ``tight``: the heap gives back what is freed."""
    if tight:
        _give_back()
    warm(case, folder)
    reset_peak()
    base = resident()
    seconds = []
    watching = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    if profiled:
        watching.start()
    engine, step = begin(case, folder)
    for _ in range(steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    grown = peak_resident() - base
    if profiled:
        watching.stop()
    states = sum(row.bytes for row in memory_report(engine.module, engine.optimizer))
    return Run(states, allocated_peak(watching) if profiled else 0, grown, base, seconds)


def measured(case: Case, steps: int = 3, *, tight: bool = False, profiled: bool = False) -> list[Run]:
    """``run`` on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        return crew(
            partial(run, case=case, folder=folder, steps=steps, tight=tight, profiled=profiled), RANKS
        )


def limited(case: Case, allowance: int, steps: int = 3, *, tight: bool = False) -> str:
    """Train where the private memory of each process may grow by ``allowance`` bytes and no more; why it could not."""
    with tempfile.TemporaryDirectory() as folder:
        task = partial(_limited, case=case, folder=folder, allowance=allowance, steps=steps, tight=tight)
        try:
            crew(task, RANKS)
        except UsageError as error:
            return str(error)
    return ""


def _small_stacks() -> None:
    """Let threads to come have stacks of 512 kB, not 8 MB of which they touch as little: the limit counts what may be
    written to, and a group of gloo's has two."""
    libc, attributes = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_attr_init(attributes)
    libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(512 * 1024))
    libc.pthread_setattr_default_np(attributes)


def _limited(rank: int, case: Case, folder: str, allowance: int, steps: int, tight: bool) -> None:
    if tight:
        _give_back()
    _small_stacks()
    warm(case, folder)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            now = int(line.split()[1]) * 1024
            resource.setrlimit(resource.RLIMIT_DATA, (now + allowance,) * 2)
    _, step = begin(case, folder)
    for _ in range(steps):
        step()
