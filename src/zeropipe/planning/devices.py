"""What a device and the links between devices can do, and how long a rehearsed step takes on them.

A kernel takes the longer of its arithmetic and its traffic with memory (the roofline of Williams, Waterman, Patterson
2009), times what its operator is slower by; its launch comes before it on a CPU and beside it on a GPU. A collective of
n ranks takes its latency and the time of the bytes that cross the slowest link of a ring: (n - 1)/n of a gather or a
reduction to owners, twice that of an all-reduce. What a phase computes and what it sends overlap as far as ``overlap``
says.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from zeropipe.errors import ConfigError
from zeropipe.given import Json
from zeropipe.planning.work import Kernel

GB = 10**9
# glibc's heap keeps what is freed below a block in use, and a hole is no room for the aligned block that made it. How
# much stays so hangs on the order of small things; in benchmarks/plan it was never more than this many of the largest
# block that came and went, and this share of all. Where this variable of the environment names a size, blocks from
# there on go back when they are freed (mallopt(3)), and no hole stays.
GIVE_BACK = "MALLOC_MMAP_THRESHOLD_"
_HOLES, _SHARE = 6.0, 0.3
_DIVIDE = ("flops", "bandwidth", "inside", "between", "to_host", "host", "ranks_per_node")
_SCRATCH = 16 * 2**20  # bytes that products keep for themselves: MKL's and oneDNN's packed matrices


@dataclass(frozen=True, slots=True)
class Device:
    """One device and its links. Rates are what is reached, not what a data sheet promises."""

    name: str
    kind: str  # cpu or cuda
    memory: int  # bytes
    flops: dict[str, float]  # floating-point operations a second, by dtype
    bandwidth: float  # bytes a second that kernels read and write
    launch: float  # seconds of the shortest kernel
    inside: float  # bytes a second and rank between ranks of one node
    between: float  # the same between nodes
    latency: float = 20e-6  # seconds of a collective
    overlap: float = 0.8  # of the shorter of computing and sending, how much hides behind the longer
    base: int = 0  # bytes that a process takes before there is a model
    ranks_per_node: int = 8
    slower: dict[str, float] = field(default_factory=dict)  # times, by "operator dtype", or by what is sent
    to_host: float = 20e9  # bytes a second between a device and host memory
    host: float = 8e9  # bytes a second that a rank's optimizer reads and writes in host memory

    def beside(self, away: Mapping[str, int], micro_steps: int) -> float:
        """Seconds of a step for what lies ``away`` in host memory or files, by kind: gradients come, values go back,
        moments and masters are read and written there; parameters are fetched twice in a micro-step."""
        gradients, masters = away.get("gradients", 0), away.get("masters", 0)
        step = (2 * (masters + away.get("moments", 0)) + gradients) / self.host
        return step + (2 * gradients + 2 * micro_steps * away.get("parameters", 0)) / self.to_host

    def keeps(self, passing: tuple[int, int]) -> int:
        """Bytes that a process may keep of blocks that come and go: their most at once, and the largest."""
        if self.kind != "cpu":
            return 0
        most, largest = (0, 0) if os.environ.get(GIVE_BACK) else passing
        return int(_HOLES * largest + _SHARE * most) + _SCRATCH

    def roof(self, kernel: Kernel) -> float:
        """Seconds that ``kernel`` takes by the rates alone."""
        speed = self.flops.get(kernel.dtype) or self.flops["float32"]
        return max(kernel.flops / speed, kernel.nbytes / self.bandwidth)

    def seconds_of(self, kernel: Kernel) -> float:
        took = self.roof(kernel) * self.slower.get(f"{kernel.op} {kernel.dtype}", 1.0)
        return took + self.launch if self.kind == "cpu" else max(took, self.launch)

    def sends(self, op: str, nbytes: int, ranks: tuple[int, ...]) -> float:
        """Seconds of one collective of ``ranks`` whose whole tensor has ``nbytes``."""
        n = len(ranks)
        if n < 2:
            return 0.0
        one_node = len({rank // self.ranks_per_node for rank in ranks}) == 1
        share = (n - 1) / n * (2 if op == "all_reduce" else 1) if op not in ("send", "recv") else 1
        took = self.latency + nbytes * share / (self.inside if one_node else self.between)
        return took * self.slower.get(op, 1.0)


# Reached, not promised: about 60 % of the dense peak in bf16, 90 % of the memory's bandwidth, NVLink inside a node and
# one 400 Gbit/s (200 for an A100) port a device between nodes. Data sheets: NVIDIA H200, H100 SXM, A100 SXM 80 GB.
_H200 = Device(
    "h200",
    "cuda",
    memory=141 * GB,
    flops={"bfloat16": 600e12, "float16": 600e12, "float32": 45e12},
    bandwidth=4.3e12,
    launch=4e-6,
    inside=360e9,
    between=45e9,
    base=600 * 2**20,
)
KNOWN: dict[str, Device] = {
    "h200": _H200,
    "h100": replace(_H200, name="h100", memory=80 * GB, bandwidth=3.0e12),
    "a100": replace(
        _H200,
        name="a100",
        memory=80 * GB,
        flops={"bfloat16": 190e12, "float16": 190e12, "float32": 15e12},
        bandwidth=1.8e12,
        inside=230e9,
        between=22e9,
    ),
    "cpu": Device(
        "cpu",
        "cpu",
        memory=16 * GB,
        flops={"float32": 40e9, "bfloat16": 10e9},
        bandwidth=6e9,
        launch=5e-6,
        inside=1.5e9,
        between=1e9,
        latency=2e-4,
        overlap=0.3,
        base=350 * 2**20,
        ranks_per_node=1024,
    ),
}


def device_of(name: str) -> Device:
    """A device by name, or from a JSON file with some of a ``Device``'s keys; ``kind`` says whose the others are.

    Raises ConfigError for another name, and for a file that is none.
    """
    if name.lower() in KNOWN:
        return KNOWN[name.lower()]
    path = Path(name)
    if path.suffix != ".json":
        raise ConfigError(
            "--device", expected=f"{', '.join(KNOWN)} or a JSON file with a device's keys", found=name
        )
    try:
        data: Json = json.loads(path.read_text())
        base = KNOWN["h200" if isinstance(data, dict) and data.get("kind") == "cuda" else "cpu"]
        for key, value in data.items():
            kind = type(getattr(base, key))
            if not isinstance(value, int | float if kind in (int, float) else kind):
                raise ValueError(f"{key}: {value!r} is no {kind.__name__}")
            for number in value.values() if isinstance(value, dict) else [value]:
                _check(key, number)
        if "float32" not in data.get("flops", base.flops):
            raise ValueError("flops: no float32, whose rate is that of every dtype without one")
        return replace(base, **data)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the device profile {name} cannot be used",
            expected=f"an object with keys among {', '.join(one.name for one in fields(Device))}",
            found=str(error),
        ) from error


def _check(key: str, value: object) -> None:
    """Raise ValueError where ``value`` is none that may be divided by, or a time or size below zero."""
    if key in ("name", "kind"):
        if key == "kind" and value not in ("cpu", "cuda"):
            raise ValueError(f"kind: {value!r} is neither 'cpu' nor 'cuda'")
    elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{key}: {value!r} is no number from 0 on")
    elif (value == 0 and key in _DIVIDE) or (value > 1 and key == "overlap"):
        raise ValueError(f"{key}: {value!r}")


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one optimizer step: computing and sending by phase, and both as they overlap."""

    computing: dict[str, float] = field(default_factory=dict)
    sending: dict[str, float] = field(default_factory=dict)
    overlap: float = 0.0

    @property
    def total(self) -> float:
        phases = {*self.computing, *self.sending}
        return sum(self.of(phase) for phase in phases)

    def of(self, phase: str) -> float:
        a, b = self.computing.get(phase, 0.0), self.sending.get(phase, 0.0)
        return a + b - self.overlap * min(a, b)


def seconds(kernels: Mapping[Kernel, int], traffic: Mapping[Any, int], device: Device) -> Seconds:
    """How long the rehearsed ``kernels`` and ``traffic`` (as a Rehearsal has them) take on ``device``."""
    computing: Counter[str] = Counter()
    sending: Counter[str] = Counter()
    for kernel, count in kernels.items():
        computing[kernel.phase] += count * device.seconds_of(kernel)  # type: ignore[assignment]
    for (op, _, nbytes, ranks, phase), count in traffic.items():
        sending[phase] += count * device.sends(op, nbytes, ranks)  # type: ignore[assignment]
    return Seconds(dict(computing), dict(sending), device.overlap)


def parse_bytes(text: str) -> int:
    """``80GB``, ``24 GiB``, ``512M`` or a number of bytes. Raises ConfigError for anything else."""
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    cleaned = text.strip().upper().removesuffix("B")
    binary = cleaned.endswith("I")
    cleaned = cleaned.removesuffix("I")
    unit = cleaned[-1:] if cleaned[-1:] in "KMGT" else ""
    try:
        number = float(cleaned.removesuffix(unit) if unit else cleaned)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise ConfigError("a size", expected="bytes, such as 80GB or 24GiB", found=repr(text))
    size = units[unit] if not binary else 1024 ** "_KMGT".index(unit or "_")
    return int(number * size)
