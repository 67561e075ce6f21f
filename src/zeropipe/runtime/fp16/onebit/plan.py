"""What a compressed optimizer will send over a whole run, counted before anything runs, beside dense Adam.

Bytes are what one rank sends (it receives as many) under the engine, by the bandwidth-optimal algorithms that the
groups use: an all-reduce of n bytes sends 2 n (W - 1) / W, a reduce-scatter, all-gather or all-to-all half of that.
An exchange is a step in which gradients, momenta or updates travel; a round is a step in which ranks wait for each
other at all, and those are all steps: in each the ranks agree on the norm of the gradients.

Not counted is what depends on the model's use: one more small all-reduce in a dense step in which some rank leaves
a parameter out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from zeropipe.errors import ConfigError
from zeropipe.layout.flat import FlatShards, TensorSpec
from zeropipe.runtime.fp16.onebit.exchange import ALIGN
from zeropipe.runtime.fp16.onebit.phases import (
    OneBitPhases,
    Phase,
    Stretch,
    ZeroOnePhases,
    ZeroOneRules,
    check_against_run,
    stretches,
    totals,
    walk,
)

_ONE_BIT = {"onebitadam": "OnebitAdam", "onebitlamb": "OnebitLamb"}
_ZERO_ONE = {"zerooneadam": "ZeroOneAdam"}
_RULES = {
    "var_freeze_step": 100000,
    "var_update_scaler": 16,
    "local_step_scaler": 32678,
    "local_step_clipper": 16,
}
_AGREEMENT = 24  # bytes: three numbers that the ranks all-reduce in every step
_MASTER_ALIGN = 16  # elements of which a shard of stage 1 holds a multiple


@dataclass(frozen=True, slots=True)
class Job:
    """The run whose traffic is counted."""

    params: int  # elements that are trained
    steps: int
    world: int  # ranks that average together
    element_bytes: int = (
        2  # of a gradient on the wire (``communication_data_type``): 2 for fp16 and bf16, 4 for fp32
    )
    stage: int = 0
    tensors: int = 1  # each has a scale of its own in each message that holds some of it
    node_size: int = 1
    param_bytes: int | None = None  # of a parameter, which stage 1 gathers; None: as a gradient
    # Elements of each tensor, buffer by buffer (one for each param group and dtype), for figures that are exact to the
    # byte; without them ``params`` are shared out evenly among ``tensors`` in one buffer.
    sizes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for name in ("params", "steps", "world", "tensors", "node_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"plan: {name}", expected="at least 1", found=getattr(self, name))
        if self.world % self.node_size:
            raise ConfigError("plan: node_size", expected=f"a divisor of {self.world}", found=self.node_size)


@dataclass(frozen=True, slots=True)
class Row:
    """All steps of one phase."""

    phase: Phase
    steps: int
    bytes: int
    rounds: int  # steps in which ranks wait for each other
    exchanges: int  # of these, those in which values travel

    @property
    def bytes_per_step(self) -> float:
        return self.bytes / self.steps


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

    @property
    def exchanges(self) -> int:
        return sum(row.exchanges for row in self.rows)

    def less_bytes_than(self, other: Plan) -> float:
        """1 - own / other's: 0.87 is 87 % less."""
        return 1 - self.bytes / other.bytes if other.bytes else 0.0

    def fewer_rounds_than(self, other: Plan) -> float:
        return 1 - self.rounds / other.rounds if other.rounds else 0.0

    def fewer_exchanges_than(self, other: Plan) -> float:
        return 1 - self.exchanges / other.exchanges if other.exchanges else 0.0

    def times_less_than(self, other: Plan) -> float:
        return other.bytes / self.bytes if self.bytes else float("inf")

    def __str__(self) -> str:
        lines = [f"{self.name}"]
        lines += [f"  steps {stretch}" for stretch in self.stretches]
        heads = f"{'steps':>10}{'rounds':>10}{'exchanges':>11}{'sent per step':>16}{'sent in all':>14}"
        lines += [f"  {'phase':<12}{heads}"]
        for row in self.rows:
            counts = f"{row.steps:>10}{row.rounds:>10}{row.exchanges:>11}"
            each, total = human(row.bytes_per_step), human(row.bytes)
            lines.append(f"  {row.phase.value:<12}{counts}{each:>16}{total:>14}")
        counts = f"{sum(row.steps for row in self.rows):>10}{self.rounds:>10}{self.exchanges:>11}"
        lines.append(f"  {'all':<12}{counts}{'':>16}{human(self.bytes):>14}")
        return "\n".join(lines)


def dense_bytes(job: Job) -> float:
    """Averaging gradients for one step: an all-reduce; from stage 1 on its first half, then parameters are gathered."""
    first = job.params * job.element_bytes
    second = _gathered(job, job.param_bytes or job.element_bytes) if job.stage else first
    return (first + second) * _others(job)


def compressed_bytes(job: Job) -> float:
    """One exchange of bits: two rounds between nodes, full precision and a gather of bits inside one.

    At stage 1 the updated parameters are gathered too, which is dense.
    """
    nodes, inside = job.world // job.node_size, job.node_size
    sent = 0.0
    for layout in _layouts(job, job.world, ALIGN):
        scales = max(len(layout.pieces(shard)) for shard in range(job.world))
        message = 4 * scales + layout.shard_numel // 8
        if nodes == 1:  # nobody to send bits to
            sent += 2 * 4 * layout.numel * (inside - 1) / inside
        else:
            sent += 2 * (nodes - 1) * message
            sent += (inside - 1) * (4 * layout.padded_numel / inside + nodes * message)
    if job.stage:
        sent += _gathered(job, job.param_bytes or job.element_bytes) * _others(job)
    return sent


def _others(job: Job) -> float:
    """The part of a whole tensor that a rank sends to the others."""
    return (job.world - 1) / job.world


def _layouts(job: Job, shards: int, align: int) -> list[FlatShards]:
    even, more = divmod(job.params, job.tensors)
    sizes = job.sizes or ([even + 1] * more + [even] * (job.tensors - more),)
    return [
        FlatShards(tuple(TensorSpec(str(i), (n,), "") for i, n in enumerate(buffer)), shards, align)
        for buffer in sizes
    ]


def _gathered(job: Job, element_bytes: int) -> int:
    """The bytes of all shards of the masters, with their padding."""
    return sum(f.padded_numel for f in _layouts(job, job.world, _MASTER_ALIGN)) * element_bytes


def _norms(job: Job, kinds: int) -> float:
    """LAMB's norms of each tensor, where shards must be put together for them."""
    tensors = sum(map(len, job.sizes)) or job.tensors
    return 8 * kinds * tensors * job.world * _others(job) if job.stage else 0.0


def dense_plan(job: Job, name: str = "dense Adam") -> Plan:
    """Every step averages gradients in full."""
    whole = (Stretch(1, job.steps, ((Phase.WARM_UP, job.steps),)),)
    alone = job.world == 1
    sent = 0 if alone else round(job.steps * (dense_bytes(job) + 2 * _AGREEMENT * _others(job)))
    waits = 0 if alone else job.steps
    return Plan(name, whole, (Row(Phase.WARM_UP, job.steps, sent, waits, waits),))


def plan(name: str, phases: OneBitPhases | ZeroOnePhases, job: Job) -> Plan:
    """The traffic of an optimizer with these phases; of ``OnebitLamb`` with its norms."""
    parts, lamb = stretches(phases, job.steps), name == _ONE_BIT["onebitlamb"]
    dense = dense_bytes(job) + (_norms(job, 2) if lamb else 0.0)
    bits = compressed_bytes(job) + (_norms(job, 3) if lamb else 0.0)
    cost = {
        Phase.WARM_UP: dense,
        Phase.VARIANCE: dense,
        Phase.COMPRESSED: bits,
        Phase.SYNC: bits,
        Phase.LOCAL: 0.0,
    }
    rows = []
    for phase, steps in totals(parts).items():
        if job.world == 1:
            rows.append(Row(phase, steps, 0, 0, 0))
            continue
        sent = steps * (cost[phase] + 2 * _AGREEMENT * _others(job))
        if phase is Phase.COMPRESSED:
            sent += _beginnings(phases, job, lamb)
        rows.append(Row(phase, steps, round(sent), steps, steps if phase.communicates else 0))
    return Plan(name, parts, tuple(rows))


def _beginnings(phases: OneBitPhases | ZeroOnePhases, job: Job, lamb: bool) -> float:
    """What compressed steps send in addition at stage 1: the whole momentum, which is in shards after a dense step
    (and always in one node, where nobody sends the bits of which it could be put together), and LAMB's first norms."""
    if not job.stage:
        return 0.0
    kinds = [phase for phase, _ in walk(phases, job.steps)]
    if job.world == job.node_size:
        times = kinds.count(Phase.COMPRESSED)
    else:
        times = sum(a.dense and not b.dense for a, b in pairwise(kinds))
    return times * _gathered(job, 4) * _others(job) + (_norms(job, 1) if lamb else 0.0)


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
        "this optimizer does not compress its communication",
        expected="optimizer.type OneBitAdam, OneBitLamb or ZeroOneAdam",
        found=repr(type),
    )


def check(phases: OneBitPhases | ZeroOnePhases, name: str, job: Job, warmup_steps: int | None = None) -> None:
    """Raises ConfigError for a job in which this optimizer cannot compress."""
    check_against_run(phases, job.steps, warmup_steps)
    apart = isinstance(phases, ZeroOnePhases) and phases.rules.local_step_clipper > 1
    if job.stage >= 2 or (job.stage == 1 and apart):
        raise ConfigError(
            f"{name} cannot run at this ZeRO stage",
            expected="zero_optimization.stage 0" + ("" if apart else " or 1"),
            found=job.stage,
            fix="set local_step_clipper to 1 for stage 1, or use stage 0" if apart else "use stage 0 or 1",
        )


def human(count: float) -> str:
    """Bytes in units of 1024, three digits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000 or unit == "TiB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    raise AssertionError
