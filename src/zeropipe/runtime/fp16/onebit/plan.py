"""What a compressed optimizer will send over a whole run, counted before anything runs, beside dense Adam.

Bytes are what one rank sends (it receives as many), by the bandwidth-optimal algorithms that the groups use:
an all-reduce of n bytes sends 2 n (W - 1) / W, a reduce-scatter, all-gather or all-to-all half of that. A round is
a step in which ranks wait for each other at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zeropipe.errors import ConfigError, describe
from zeropipe.runtime.fp16.onebit.phases import (
    OneBitPhases,
    Phase,
    Stretch,
    ZeroOnePhases,
    ZeroOneRules,
    check_against_run,
    stretches,
    totals,
)

_ONE_BIT = {"onebitadam": "OnebitAdam", "onebitlamb": "OnebitLamb"}
_ZERO_ONE = {"zerooneadam": "ZeroOneAdam"}
_RULES = {
    "var_freeze_step": 100000,
    "var_update_scaler": 16,
    "local_step_scaler": 32678,
    "local_step_clipper": 16,
}


@dataclass(frozen=True, slots=True)
class Job:
    """The run whose traffic is counted."""

    params: int  # elements that are trained
    steps: int
    world: int  # ranks that average together
    element_bytes: int = 2  # of a gradient on the wire: 2 for fp16 and bf16, 4 for fp32
    stage: int = 0
    tensors: int = 1  # each has a scale of its own in each message that holds some of it
    node_size: int = 1

    def __post_init__(self) -> None:
        for name in ("params", "steps", "world", "tensors", "node_size"):
            if getattr(self, name) < 1:
                raise ConfigError(describe(f"plan: {name}", expected="at least 1", found=getattr(self, name)))
        if self.world % self.node_size:
            raise ConfigError(
                describe("plan: node_size", expected=f"a divisor of {self.world}", found=self.node_size)
            )


@dataclass(frozen=True, slots=True)
class Row:
    """All steps of one phase."""

    phase: Phase
    steps: int
    bytes_per_step: int

    @property
    def bytes(self) -> int:
        return self.steps * self.bytes_per_step

    @property
    def rounds(self) -> int:
        return self.steps if self.bytes_per_step else 0


@dataclass(frozen=True, slots=True)
class Plan:
    """A run's traffic; ``rows`` holds one row for each phase that comes."""

    name: str
    stretches: tuple[Stretch, ...]
    rows: tuple[Row, ...]

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def rounds(self) -> int:
        return sum(row.rounds for row in self.rows)

    def less_bytes_than(self, other: Plan) -> float:
        """1 - own / other's: 0.87 is 87 % less."""
        return 1 - self.bytes / other.bytes if other.bytes else 0.0

    def fewer_rounds_than(self, other: Plan) -> float:
        return 1 - self.rounds / other.rounds if other.rounds else 0.0

    def times_less_than(self, other: Plan) -> float:
        return other.bytes / self.bytes if self.bytes else float("inf")

    def __str__(self) -> str:
        lines = [f"{self.name}"]
        lines += [f"  steps {stretch}" for stretch in self.stretches]
        lines += [f"  {'phase':<12}{'steps':>10}{'rounds':>10}{'sent per step':>16}{'sent in all':>14}"]
        for row in self.rows:
            each, total = human(row.bytes_per_step), human(row.bytes)
            lines.append(f"  {row.phase.value:<12}{row.steps:>10}{row.rounds:>10}{each:>16}{total:>14}")
        steps = sum(row.steps for row in self.rows)
        lines.append(f"  {'all':<12}{steps:>10}{self.rounds:>10}{'':>16}{human(self.bytes):>14}")
        return "\n".join(lines)


def dense_bytes(job: Job) -> int:
    """One step of dense data parallelism, at any stage up to 2: an all-reduce, or its two halves."""
    return round(2 * job.params * job.element_bytes * (job.world - 1) / job.world)


def compressed_bytes(job: Job) -> int:
    """One exchange of bits: two rounds between nodes, full precision and a gather of bits inside one.

    At stage 1 the updated parameters are gathered too, which is dense.
    """
    nodes, inside = job.world // job.node_size, job.node_size
    scales = 4 * min(job.tensors, job.tensors // job.world + 2)
    message = job.params / job.world / 8 + scales
    across = 2 * (nodes - 1) * message if nodes > 1 else 0.0
    within = (inside - 1) * (
        job.params / inside * 4 + (nodes * message if nodes > 1 else job.params / inside * 4)
    )
    gathered = job.params * job.element_bytes * (job.world - 1) / job.world if job.stage == 1 else 0.0
    return round(across + within + gathered)


def dense_plan(job: Job, name: str = "dense Adam") -> Plan:
    """Every step averages gradients in full."""
    whole = (Stretch(1, job.steps, ((Phase.WARM_UP, job.steps),)),)
    return Plan(name, whole, (Row(Phase.WARM_UP, job.steps, dense_bytes(job)),))


def plan(name: str, phases: OneBitPhases | ZeroOnePhases, job: Job) -> Plan:
    """The traffic of an optimizer with these phases."""
    parts = stretches(phases, job.steps)
    alone = job.world == 1
    cost = {
        Phase.WARM_UP: dense_bytes(job),
        Phase.VARIANCE: dense_bytes(job),
        Phase.COMPRESSED: compressed_bytes(job),
        Phase.SYNC: compressed_bytes(job),
        Phase.LOCAL: 0,
    }
    rows = tuple(Row(phase, steps, 0 if alone else cost[phase]) for phase, steps in totals(parts).items())
    return Plan(name, parts, rows)


def phases_of(type: str | None, params: Mapping[str, Any]) -> tuple[str, OneBitPhases | ZeroOnePhases]:
    """The optimizer's proper name and its phases, from a config's ``optimizer`` section.

    Raises ConfigError for an optimizer that does not compress.
    """
    name = (type or "").lower().replace("_", "").replace("-", "")
    if name in _ONE_BIT:
        return _ONE_BIT[name], OneBitPhases(params.get("freeze_step", 100000))
    if name in _ZERO_ONE:
        rules = ZeroOneRules(**{key: params.get(key, default) for key, default in _RULES.items()})
        return _ZERO_ONE[name], ZeroOnePhases(rules)
    raise ConfigError(
        describe(
            "this optimizer does not compress its communication",
            expected="optimizer.type OneBitAdam, OneBitLamb or ZeroOneAdam",
            found=repr(type),
        )
    )


def check(phases: OneBitPhases | ZeroOnePhases, name: str, job: Job, warmup_steps: int | None = None) -> None:
    """Raises ConfigError for a job in which this optimizer cannot compress."""
    check_against_run(phases, job.steps, warmup_steps)
    apart = isinstance(phases, ZeroOnePhases) and phases.rules.local_step_clipper > 1
    if job.stage >= 2 or (job.stage == 1 and apart):
        raise ConfigError(
            describe(
                f"{name} cannot run at this ZeRO stage",
                expected="zero_optimization.stage 0" + ("" if apart else " or 1"),
                found=job.stage,
                fix="set local_step_clipper to 1 for stage 1, or use stage 0"
                if apart
                else "use stage 0 or 1",
            )
        )


def human(count: float) -> str:
    """Bytes in units of 1024, three digits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000 or unit == "TiB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    raise AssertionError
